// Fill and Read: memory that is written once, and a loop that reads it and does nothing else.
#include "kernels/cuda/launch.h"

namespace innerq::cuda {
namespace {

constexpr int kThreads = 256;

__device__ int64_t FirstQuad() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// Grid: num_blocks. Block: 256 threads, each of which writes every (num_blocks * 256)-th quad. No
// shared memory.
__global__ void FillKernel(const ReadLaunch args) {
  const int64_t stride = args.num_blocks * kThreads;
  for (int64_t i = FirstQuad(); i < args.num_quads; i += stride) {
    const uint32_t word = static_cast<uint32_t>(i) * 0x9e3779b9u;
    args.quads[i] = {word, word ^ 0x55555555u, word ^ 0x33333333u, word ^ 0x0f0f0f0fu};
  }
}

// Grid: num_blocks. Block: 256 threads, each of which reads every (num_blocks * 256)-th quad. No
// shared memory. Whether it writes depends on every word: none may be left out.
__global__ void ReadKernel(const ReadLaunch args) {
  const int64_t stride = args.num_blocks * kThreads;
  uint32_t any = 0;
#pragma unroll 4
  for (int64_t i = FirstQuad(); i < args.num_quads; i += stride) {
    const uint4 quad = args.quads[i];
    any |= quad.x | quad.y | quad.z | quad.w;
  }
  if (any == 0) *args.all_zero = 1;
}

}  // namespace

cudaError_t LaunchFill(const ReadLaunch& launch, cudaStream_t stream) {
  FillKernel<<<static_cast<unsigned>(launch.num_blocks), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchRead(const ReadLaunch& launch, cudaStream_t stream) {
  ReadKernel<<<static_cast<unsigned>(launch.num_blocks), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace innerq::cuda
