// Matrix products whose rows do not depend on the number of rows: what a deterministic backend
// runs.
//
// out [M, N] = x [M, K] * weight [N, K]^T. K is cut into ranges of kRange, from 0 on. Within a
// range an element is one chain of operations in the order of K, started at 0; the ranges' sums are
// added in order. This holds in every kernel of this file and for every M, so an element's bits
// depend on its row of x and its row of the weight alone.
//
// BF16: tensor cores, products of 16 x 16 x 16 with F32 sums. An element of such a product depends
// on its own row and column only. F16 and F32: plain F32 with fused multiply-add.
#include <cuda_bf16.h>
#include <mma.h>

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/float16.h"

namespace innerq::cuda {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kUnit = static_cast<int>(kMatMulUnit);
constexpr int64_t kRange = 512;
constexpr int kFragment = kUnit * kUnit;  // elements of a product

using Sums = wmma::fragment<wmma::accumulator, kUnit, kUnit, kUnit, float>;
using Rows = wmma::fragment<wmma::matrix_a, kUnit, kUnit, kUnit, __nv_bfloat16, wmma::row_major>;
using Columns = wmma::fragment<wmma::matrix_b, kUnit, kUnit, kUnit, __nv_bfloat16, wmma::col_major>;

// Finishes an element: bias, residual.
__device__ void Store(const MatMulLaunch& args, int64_t row, int64_t col, float sum) {
  if (row >= args.m || col >= args.n) return;
  if (args.bias != nullptr) sum += args.bias[col];
  float& out = args.out[row * args.n + col];
  out = args.accumulate ? out + sum : sum;
}

// Sums of FM x FN products over one range of K. `x`, `weight`: their first elements, rows K padded
// apart; the fragments' rows are at `x_rows`, `weight_rows`.
template <int FM, int FN>
__device__ void MultiplyRange(const MatMulLaunch& args, const int64_t (&x_rows)[FM],
                              const int64_t (&weight_rows)[FN], int64_t range,
                              Sums (&sums)[FM][FN]) {
  const auto* x = reinterpret_cast<const __nv_bfloat16*>(args.x);
  const auto* weight = reinterpret_cast<const __nv_bfloat16*>(args.weight);
  const int64_t depth = RoundUp(args.k, kMatMulUnit);
  const int64_t begin = range * kRange, end = min(begin + kRange, depth);
#pragma unroll
  for (int i = 0; i < FM; ++i) {
#pragma unroll
    for (int j = 0; j < FN; ++j) wmma::fill_fragment(sums[i][j], 0.0f);
  }
#pragma unroll 4
  for (int64_t k = begin; k < end; k += kUnit) {
    Rows a[FM];
    Columns b[FN];
#pragma unroll
    for (int i = 0; i < FM; ++i) {
      wmma::load_matrix_sync(a[i], x + x_rows[i] * depth + k, static_cast<unsigned>(depth));
    }
#pragma unroll
    for (int j = 0; j < FN; ++j) {
      wmma::load_matrix_sync(b[j], weight + weight_rows[j] * depth + k,
                             static_cast<unsigned>(depth));
    }
#pragma unroll
    for (int i = 0; i < FM; ++i) {
#pragma unroll
      for (int j = 0; j < FN; ++j) wmma::mma_sync(sums[i][j], a[i], b[j], sums[i][j]);
    }
  }
}

constexpr int kFewWarps = 8;

// Grid: N / 16. Block: 8 warps compute 16 rows of 16 outputs; each takes every eighth range of K,
// then all add the sums in order. Shared: one product per warp.
__global__ void __launch_bounds__(kFewWarps* kWarpSize)
    FewRowsKernel(const __grid_constant__ MatMulLaunch args) {
  alignas(32) __shared__ float sums[kFewWarps][kFragment];
  static_assert(kFragment == kFewWarps * kWarpSize, "a thread finishes one element");
  const int warp = threadIdx.x / kWarpSize;
  const int64_t num_ranges = CeilDiv(args.k, kRange);
  const int64_t x_rows[1] = {0};
  const int64_t weight_rows[1] = {static_cast<int64_t>(blockIdx.x) * kUnit};
  float total = 0;
  for (int64_t first = 0; first < num_ranges; first += kFewWarps) {
    if (first + warp < num_ranges) {
      Sums part[1][1];
      MultiplyRange<1, 1>(args, x_rows, weight_rows, first + warp, part);
      wmma::store_matrix_sync(sums[warp], part[0][0], kUnit, wmma::mem_row_major);
    }
    __syncthreads();
    const int64_t count = min(num_ranges - first, static_cast<int64_t>(kFewWarps));
    for (int64_t i = 0; i < count; ++i) total += sums[i][threadIdx.x];
    __syncthreads();
  }
  Store(args, threadIdx.x / kUnit, weight_rows[0] + threadIdx.x % kUnit, total);
}

constexpr int kManyWarps = 4;
constexpr int kTile = 64;  // rows and outputs of a block: 2 x 2 warps of 2 x 2 products

// Grid: [N / 64, M / 64]. Block: 4 warps compute 64 rows of 64 outputs, each 32 x 32, range after
// range. Shared: one product per warp, on its way out.
__global__ void __launch_bounds__(kManyWarps* kWarpSize)
    ManyRowsKernel(const __grid_constant__ MatMulLaunch args) {
  alignas(32) __shared__ float staged[kManyWarps][kFragment];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile + warp / 2 * 32;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kTile + warp % 2 * 32;
  // Products beyond the last row or output repeat the last one and are not stored.
  const int64_t last_row = RoundUp(args.m, kMatMulUnit) - kUnit;
  const int64_t last_col = RoundUp(args.n, kMatMulUnit) - kUnit;
  const int64_t x_rows[2] = {min(row, last_row), min(row + kUnit, last_row)};
  const int64_t weight_rows[2] = {min(col, last_col), min(col + kUnit, last_col)};
  Sums total[2][2], part[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) wmma::fill_fragment(total[i][j], 0.0f);
  }
  const int64_t num_ranges = CeilDiv(args.k, kRange);
  for (int64_t range = 0; range < num_ranges; ++range) {
    MultiplyRange<2, 2>(args, x_rows, weight_rows, range, part);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < Sums::num_elements; ++e) total[i][j].x[e] += part[i][j].x[e];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      wmma::store_matrix_sync(staged[warp], total[i][j], kUnit, wmma::mem_row_major);
      __syncwarp();
      for (int e = lane; e < kFragment; e += kWarpSize) {
        Store(args, row + i * kUnit + e / kUnit, col + j * kUnit + e % kUnit, staged[warp][e]);
      }
      __syncwarp();
    }
  }
}

constexpr int kPlainRows = 32, kPlainCols = 64, kPlainDepth = 16, kPlainThreads = 256;

template <typename T>
__device__ float ToFloat(T x) {
  if constexpr (sizeof(T) == 2) {
    return HalfToFloat(x);
  } else {
    return x;
  }
}

// Grid: [N / 64, M / 32]. Block: 256 threads compute 32 rows of 64 outputs, 2 x 4 each. Shared: 16
// columns of both operands. T: float, or uint16_t for F16.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    PlainKernel(const __grid_constant__ MatMulLaunch args) {
  __shared__ float xs[kPlainDepth][kPlainRows + 1];
  __shared__ float ws[kPlainDepth][kPlainCols + 1];
  static_assert(kRange % kPlainDepth == 0, "ranges end with a step");
  const auto* x = reinterpret_cast<const float*>(args.x);
  const auto* weight = reinterpret_cast<const T*>(args.weight);
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
      ws[i % kPlainDepth][i / kPlainDepth] =
          col < weight_rows ? ToFloat<T>(weight[col * depth + k]) : 0.0f;
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

// Grid: padded elements / 256. Block: 256 threads, one element each. No shared memory.
__global__ void RoundToBf16Kernel(const RoundToBf16Launch args) {
  const int64_t cols = RoundUp(args.cols, kMatMulUnit);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= RoundUp(args.rows, kMatMulUnit) * cols) return;
  const int64_t row = i / cols, col = i % cols;
  const bool real = row < args.rows && col < args.cols;
  args.out[i] = real ? F32ToBF16(args.x[row * args.cols + col]) : uint16_t{0};
}

// Grid: elements / 256. Block: 256 threads, one element each. No shared memory.
__global__ void AddBiasKernel(const AddBiasLaunch args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i < args.m * args.n) args.out[i] += args.bias[i % args.n];
}

}  // namespace

cudaError_t LaunchRoundToBf16(const RoundToBf16Launch& launch, cudaStream_t stream) {
  const int64_t elements = RoundUp(launch.rows, kMatMulUnit) * RoundUp(launch.cols, kMatMulUnit);
  const auto blocks = static_cast<unsigned>(CeilDiv(elements, kRowThreads));
  RoundToBf16Kernel<<<blocks, kRowThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchMatMul(const MatMulLaunch& launch, cudaStream_t stream) {
  const auto tiles = [](int64_t extent, int64_t tile) {
    return static_cast<unsigned>(CeilDiv(extent, tile));
  };
  const dim3 plain_grid(tiles(launch.n, kPlainCols), tiles(launch.m, kPlainRows));
  switch (launch.format) {
    case WeightFormat::kBF16:
      if (launch.m <= kUnit) {
        FewRowsKernel<<<tiles(launch.n, kUnit), kFewWarps * kWarpSize, 0, stream>>>(launch);
      } else {
        const dim3 grid(tiles(launch.n, kTile), tiles(launch.m, kTile));
        ManyRowsKernel<<<grid, kManyWarps * kWarpSize, 0, stream>>>(launch);
      }
      break;
    case WeightFormat::kF16:
      PlainKernel<uint16_t><<<plain_grid, kPlainThreads, 0, stream>>>(launch);
      break;
    case WeightFormat::kF32:
      PlainKernel<float><<<plain_grid, kPlainThreads, 0, stream>>>(launch);
      break;
  }
  return cudaGetLastError();
}

cudaError_t LaunchAddBias(const AddBiasLaunch& launch, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(CeilDiv(launch.m * launch.n, kRowThreads));
  AddBiasKernel<<<blocks, kRowThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace innerq::cuda
