// Embed, RmsNorm, RopeTable, SwiGlu, GatherRows: operations on rows of activations.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/float16.h"

namespace innerq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

unsigned Blocks(int64_t elements) { return static_cast<unsigned>(CeilDiv(elements, kThreads)); }

__device__ int64_t GlobalIndex() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ float ReadElement(const std::byte* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF32:
      return reinterpret_cast<const float*>(data)[i];
    case DType::kF16:
      return F16ToF32(reinterpret_cast<const uint16_t*>(data)[i]);
    case DType::kBF16:
      return BF16ToF32(reinterpret_cast<const uint16_t*>(data)[i]);
  }
  return 0;
}

// Grid: elements of out / 256. Block: 256 threads, one element each. No shared memory.
__global__ void EmbedKernel(const EmbedLaunch args) {
  const int64_t i = GlobalIndex();
  if (i >= args.rows * args.width) return;
  const int64_t id = args.token_ids[i / args.width];
  args.out[i] = ReadElement(args.table, args.dtype, id * args.width + i % args.width);
}

// Grid: rows. Block: 256 threads normalize one row; the order of the sum depends on the width
// alone. Shared: one partial sum per warp.
__global__ void RmsNormKernel(const RmsNormLaunch args) {
  __shared__ float sums[kWarps];
  const float* x = args.x + blockIdx.x * args.width;
  float* out = args.out + blockIdx.x * args.width;
  float squares = 0;
  for (int64_t c = threadIdx.x; c < args.width; c += kThreads) squares = fmaf(x[c], x[c], squares);
  squares = WarpSum(squares);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = squares;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < kWarps; ++i) total += sums[i];
  const float inverse = 1.0f / sqrtf(total / static_cast<float>(args.width) + args.epsilon);
  // A thread reads the elements that it writes: out may be x.
  for (int64_t c = threadIdx.x; c < args.width; c += kThreads) {
    out[c] = x[c] * inverse * args.weight[c];
  }
}

// Grid: elements of cos / 256. Block: 256 threads, one angle each. No shared memory.
__global__ void RopeTableKernel(const RopeTableLaunch args) {
  const int64_t i = GlobalIndex();
  if (i >= args.rows * args.half) return;
  const float angle =
      static_cast<float>(args.positions[i / args.half]) * args.inverse_frequency[i % args.half];
  args.cos[i] = static_cast<float>(cos(static_cast<double>(angle)));
  args.sin[i] = static_cast<float>(sin(static_cast<double>(angle)));
}

// Grid: elements of out / 256. Block: 256 threads, one element each. No shared memory.
__global__ void SwiGluKernel(const SwiGluLaunch args) {
  const int64_t i = GlobalIndex();
  if (i >= args.rows * args.width) return;
  const int64_t at = i / args.width * 2 * args.width + i % args.width;
  const float gate = args.gate_up[at];
  args.out[i] = gate / (1.0f + expf(-gate)) * args.gate_up[at + args.width];
}

// Grid: elements of out / 256. Block: 256 threads, one element each. No shared memory.
__global__ void GatherRowsKernel(const GatherRowsLaunch args) {
  const int64_t i = GlobalIndex();
  if (i >= args.num_rows * args.width) return;
  args.out[i] = args.x[args.rows[i / args.width] * args.width + i % args.width];
}

}  // namespace

cudaError_t ProbeKernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, EmbedKernel);
}

cudaError_t LaunchEmbed(const EmbedLaunch& launch, cudaStream_t stream) {
  EmbedKernel<<<Blocks(launch.rows * launch.width), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchRmsNorm(const RmsNormLaunch& launch, cudaStream_t stream) {
  RmsNormKernel<<<static_cast<unsigned>(launch.rows), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchRopeTable(const RopeTableLaunch& launch, cudaStream_t stream) {
  RopeTableKernel<<<Blocks(launch.rows * launch.half), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchSwiGlu(const SwiGluLaunch& launch, cudaStream_t stream) {
  SwiGluKernel<<<Blocks(launch.rows * launch.width), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchGatherRows(const GatherRowsLaunch& launch, cudaStream_t stream) {
  GatherRowsKernel<<<Blocks(launch.num_rows * launch.width), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace innerq::cuda
