// Attention on tensor cores for heads of 128 channels.
#include "kernels/cuda/attention_mma.cuh"

namespace innerq::cuda {

cudaError_t LaunchMmaAttention128(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  return LaunchMmaForDim<128>(launch, stream);
}

}  // namespace innerq::cuda
