// Dense products of F32 weights, and what goes with those of 16 bits (matmul_mma.cu, cuBLASLt):
// rounding of activations, and what is left to do once there are sums.
//
// F32 weights are for exactness: their products do without tensor cores, and compute 32 rows where
// there is one. out [M, N] = x [M, K] * weight [N, K]^T. K is cut into ranges of kRange, from 0 on.
// Within a range an element is one chain of fused multiply-adds in the order of K, started at 0;
// the ranges' sums are added in order, for every M: an element's bits depend on its row of x and
// its row of the weight alone.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul_store.cuh"
#include "kernels/cuda/ptx.cuh"

namespace innerq::cuda {
namespace {

constexpr int64_t kRange = 512;

constexpr int kPlainRows = 32, kPlainCols = 64, kPlainDepth = 16, kPlainThreads = 256;

// Grid: [N / 64, M / 32]. Block: 256 threads compute 32 rows of 64 outputs, 2 x 4 each. Shared: 16
// columns of both operands.
__global__ void __launch_bounds__(kPlainThreads)
    PlainKernel(const __grid_constant__ MatMulLaunch args) {
  __shared__ float xs[kPlainDepth][kPlainRows + 1];
  __shared__ float ws[kPlainDepth][kPlainCols + 1];
  static_assert(kRange % kPlainDepth == 0, "ranges end with a step");
  const auto* x = reinterpret_cast<const float*>(args.x);
  const auto* weight = reinterpret_cast<const float*>(args.weight);
  const int64_t depth = RoundUp(args.k, kMatMulUnit);
  const int64_t weight_rows = RoundUp(args.n, kMatMulUnit);
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kPlainRows;
  const int64_t first_col = static_cast<int64_t>(blockIdx.x) * kPlainCols;
  const int m = threadIdx.x / 16, n = threadIdx.x % 16;  // rows m, m + 16, columns n + 16 j
  float total[2][4] = {}, part[2][4] = {};
  for (int64_t k0 = 0; k0 < depth; k0 += kPlainDepth) {
    for (int i = threadIdx.x; i < kPlainRows * kPlainDepth; i += kPlainThreads) {
      const int64_t row = first_row + i / kPlainDepth, k = k0 + i % kPlainDepth;
      xs[i % kPlainDepth][i / kPlainDepth] =
          row < args.m && k < args.k ? x[row * args.k + k] : 0.0f;
    }
    for (int i = threadIdx.x; i < kPlainCols * kPlainDepth; i += kPlainThreads) {
      const int64_t col = first_col + i / kPlainDepth, k = k0 + i % kPlainDepth;
      ws[i % kPlainDepth][i / kPlainDepth] = col < weight_rows ? weight[col * depth + k] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPlainDepth; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          part[i][j] = fmaf(xs[k][m + 16 * i], ws[k][n + 16 * j], part[i][j]);
        }
      }
    }
    __syncthreads();
    if ((k0 + kPlainDepth) % kRange != 0 && k0 + kPlainDepth < depth) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        total[i][j] += part[i][j];
        part[i][j] = 0;
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      Store(args, first_row + m + 16 * i, first_col + n + 16 * j, total[i][j]);
    }
  }
}

constexpr int kRowThreads = 256;

// Grid: padded elements / 2048. Block: 256 threads, eight elements of a row each. No shared memory.
__global__ void RoundToBf16Kernel(const RoundLaunch args) {
  const int64_t cols = RoundUp(args.cols, kMatMulUnit);
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) * 8;
  if (i >= args.rows * cols) return;
  const float* from = args.x + i / cols * args.cols;
  const int64_t quad = i % cols / 4, quads = CeilDiv(args.cols, 4);
  float4 halves[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (quad + half < quads) halves[half] = ReadQuad(from, args.cols, quad + half);
  }
  *reinterpret_cast<uint4*>(args.out + i) = {
      PackBf16(halves[0].x, halves[0].y), PackBf16(halves[0].z, halves[0].w),
      PackBf16(halves[1].x, halves[1].y), PackBf16(halves[1].z, halves[1].w)};
}

// The power of two that a row is multiplied by, and its inverse; both are normal numbers.
struct RowScale {
  float up, down;

  // fmaxf has left NaN out of `largest`.
  __device__ explicit RowScale(float largest) {
    constexpr int kBias = 127, kTop = 14, kMost = 126 + kBias;
    const auto exponent = static_cast<int>(__float_as_uint(largest) >> 23);  // with its bias
    const int biased = min(2 * kBias + kTop - exponent, kMost);
    up = __uint_as_float(static_cast<uint32_t>(biased) << 23);
    down = __uint_as_float(static_cast<uint32_t>(2 * kBias - biased) << 23);
  }
};

constexpr int kRoundThreads = 512;
constexpr int kRoundWarps = kRoundThreads / kWarpSize;

// Grid: rows. Block: 512 threads find the largest element of a row, then round it, each every
// 512th quad; the second time it is read from a cache. Shared: the largest element of every warp.
__global__ void __launch_bounds__(kRoundThreads) RoundToF16Kernel(const RoundLaunch args) {
  __shared__ float warps[kRoundWarps];
  const int64_t row = blockIdx.x, width = RoundUp(args.cols, kMatMulUnit);
  const int64_t quads = CeilDiv(args.cols, 4);
  const float* x = args.x + row * args.cols;
  float largest = 0;
#pragma unroll 4
  for (int64_t quad = threadIdx.x; quad < quads; quad += kRoundThreads) {
    const float4 four = ReadQuad(x, args.cols, quad);
    largest = fmaxf(fmaxf(fmaxf(fmaxf(largest, fabsf(four.x)), fabsf(four.y)), fabsf(four.z)),
                    fabsf(four.w));
  }
  largest = WarpMax(largest);
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  for (int i = 0; i < kRoundWarps; ++i) largest = fmaxf(largest, warps[i]);

  const RowScale scale(largest);
#pragma unroll 4
  for (int64_t quad = threadIdx.x; quad < width / 4; quad += kRoundThreads) {
    float4 four = {};
    if (quad < quads) four = ReadQuad(x, args.cols, quad);
    reinterpret_cast<uint2*>(args.out + row * width)[quad] = {
        PackHalves(four.x * scale.up, four.y * scale.up),
        PackHalves(four.z * scale.up, four.w * scale.up)};
  }
  if (threadIdx.x == 0) args.units[row] = scale.down;
}

// Grid: elements / 256. Block: 256 threads, one element each. No shared memory.
__global__ void FinishKernel(const MatMulLaunch args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= args.m * args.n) return;
  const int64_t row = i / args.n;
  Store(args, row, i - row * args.n, args.parts[i] * UnitOf(args, row));
}

}  // namespace

cudaError_t LaunchRound(const RoundLaunch& launch, cudaStream_t stream) {
  if (launch.format == WeightFormat::kF16) {
    const auto blocks = static_cast<unsigned>(launch.rows);
    RoundToF16Kernel<<<blocks, kRoundThreads, 0, stream>>>(launch);
    return cudaGetLastError();
  }
  const int64_t elements = launch.rows * RoundUp(launch.cols, kMatMulUnit);
  const auto blocks = static_cast<unsigned>(CeilDiv(elements, 8 * kRowThreads));
  RoundToBf16Kernel<<<blocks, kRowThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchMatMul(const MatMulLaunch& launch, cudaStream_t stream) {
  if (launch.format != WeightFormat::kF32) return LaunchMmaMatMul(launch, stream);
  const dim3 grid(static_cast<unsigned>(CeilDiv(launch.n, kPlainCols)),
                  static_cast<unsigned>(CeilDiv(launch.m, kPlainRows)));
  PlainKernel<<<grid, kPlainThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchFinishMatMul(const MatMulLaunch& launch, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(CeilDiv(launch.m * launch.n, kRowThreads));
  FinishKernel<<<blocks, kRowThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace innerq::cuda
