// Embed, RmsNorm, RopeTable, SwiGlu, GatherRows: operations on rows of activations.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
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
    case DType::kU8:
      return static_cast<float>(reinterpret_cast<const uint8_t*>(data)[i]);
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

// Writes a quad of a row, also in BF16 if there is where to.
__device__ void WriteOut(float* out, uint16_t* rounded, int64_t row, int64_t width, int64_t quad,
                         const float4& four) {
  WriteQuad(out + row * width, width, quad, four);
  if (rounded == nullptr) return;
  reinterpret_cast<uint2*>(rounded + row * width)[quad] = {PackBf16(four.x, four.y),
                                                           PackBf16(four.z, four.w)};
}

__device__ float AddSquares(const float4& x, float sum) {
  return fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, sum))));
}

__device__ float4 Scale(const float4& x, float factor, const float4& weight) {
  return {x.x * factor * weight.x, x.y * factor * weight.y, x.z * factor * weight.z,
          x.w * factor * weight.w};
}

constexpr int kHeldQuads = 8;  // of a thread: rows of up to 8192 elements are read once

// Grid: rows. Block: 256 threads normalize one row, each every 256th quad of it; the order of the
// sum depends on the width alone. Shared: one partial sum per warp.
__global__ void __launch_bounds__(kThreads) RmsNormKernel(const RmsNormLaunch args) {
  __shared__ float sums[kWarps];
  const float* x = args.x + blockIdx.x * args.width;
  const int64_t num_quads = CeilDiv(args.width, 4);
  float4 held[kHeldQuads] = {}, weight[kHeldQuads] = {};
#pragma unroll
  for (int i = 0; i < kHeldQuads; ++i) {
    const int64_t quad = threadIdx.x + i * kThreads;
    if (quad >= num_quads) break;
    held[i] = ReadQuad(x, args.width, quad);
    weight[i] = ReadQuad(args.weight, args.width, quad);
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kHeldQuads; ++i) squares = AddSquares(held[i], squares);
  for (int64_t quad = threadIdx.x + kHeldQuads * kThreads; quad < num_quads; quad += kThreads) {
    squares = AddSquares(ReadQuad(x, args.width, quad), squares);
  }
  squares = WarpSum(squares);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = squares;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < kWarps; ++i) total += sums[i];
  const float inverse = 1.0f / sqrtf(total / static_cast<float>(args.width) + args.epsilon);
  // A thread reads the elements that it writes: out may be x.
#pragma unroll
  for (int i = 0; i < kHeldQuads; ++i) {
    const int64_t quad = threadIdx.x + i * kThreads;
    if (quad >= num_quads) break;
    WriteOut(args.out, args.rounded, blockIdx.x, args.width, quad,
             Scale(held[i], inverse, weight[i]));
  }
  for (int64_t quad = threadIdx.x + kHeldQuads * kThreads; quad < num_quads; quad += kThreads) {
    WriteOut(
        args.out, args.rounded, blockIdx.x, args.width, quad,
        Scale(ReadQuad(x, args.width, quad), inverse, ReadQuad(args.weight, args.width, quad)));
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

// Grid: quads of out / 256. Block: 256 threads, one quad of a row each. No shared memory.
__global__ void SwiGluKernel(const SwiGluLaunch args) {
  const int64_t i = GlobalIndex(), row_quads = CeilDiv(args.width, 4);
  if (i >= args.rows * row_quads) return;
  const int64_t row = i / row_quads, quad = i % row_quads;
  const float* from = args.gate_up + row * 2 * args.width;
  const float4 gate = ReadQuad(from, args.width, quad);
  const float4 up = ReadQuad(from + args.width, args.width, quad);
  const auto apply = [](float g, float u) { return g / (1.0f + expf(-g)) * u; };
  WriteOut(args.out, args.rounded, row, args.width, quad,
           {apply(gate.x, up.x), apply(gate.y, up.y), apply(gate.z, up.z), apply(gate.w, up.w)});
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
  SwiGluKernel<<<Blocks(launch.rows * CeilDiv(launch.width, 4)), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchGatherRows(const GatherRowsLaunch& launch, cudaStream_t stream) {
  GatherRowsKernel<<<Blocks(launch.num_rows * launch.width), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace innerq::cuda
