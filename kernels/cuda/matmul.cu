// Dense products, and what goes with them: those of F16 and F32 weights, rounding of activations
// for those of BF16 weights (matmul_mma.cu), biases.
//
// out [M, N] = x [M, K] * weight [N, K]^T. K is cut into ranges of kRange, from 0 on. Within a
// range an element is one chain of fused multiply-adds in the order of K, started at 0; the ranges'
// sums are added in order, for every M: an element's bits depend on its row of x and its row of the
// weight alone.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul_store.cuh"
#include "kernels/cuda/ptx.cuh"

namespace innerq::cuda {
namespace {

constexpr int64_t kRange = 512;

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

// Grid: padded elements / 2048. Block: 256 threads, eight elements of a row each. No shared memory.
__global__ void RoundToBf16Kernel(const RoundToBf16Launch args) {
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

// Grid: elements / 256. Block: 256 threads, one element each. No shared memory.
__global__ void AddBiasKernel(const AddBiasLaunch args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i < args.m * args.n) args.out[i] += args.bias[i % args.n];
}

}  // namespace

cudaError_t LaunchRoundToBf16(const RoundToBf16Launch& launch, cudaStream_t stream) {
  const int64_t elements = launch.rows * RoundUp(launch.cols, kMatMulUnit);
  const auto blocks = static_cast<unsigned>(CeilDiv(elements, 8 * kRowThreads));
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
      return LaunchMmaMatMul(launch, stream);
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
