// Attention on tensor cores for heads of 64 channels.
#include "kernels/cuda/attention_mma.cuh"

namespace innerq::cuda {

cudaError_t LaunchMmaAttention64(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  return LaunchMmaForDim<64>(launch, stream);
}

}  // namespace innerq::cuda
