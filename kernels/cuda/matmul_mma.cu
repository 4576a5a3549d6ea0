// Products of BF16 and F16 weights on tensor cores.
//
// out [M, N] = x [M, K] * weight [N, K]^T. K is cut into kParts parts of one length, a multiple of
// kStageDepth, from 0 on. Within a part an element is one chain of products mma.m16n8k16, started
// at 0, in the order of K; the parts' sums are added in order. This holds for every M and every
// tile, so an element's bits depend on its row of x and its row of the weight alone.
//
// What lies beyond K is zero in both operands and adds nothing; rows beyond M or N are zero or
// anything and are not stored.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul_store.cuh"
#include "kernels/cuda/ptx.cuh"

namespace innerq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kStageDepth = 64;  // columns of K that TiledKernel has of a stage
constexpr int kStep = 16;        // of K, of a product
constexpr int kQuad = 8;         // elements in 16 bytes
constexpr int kParts = 8;
constexpr int kEight = 8;  // rows of a fragment: of the weight, and of half of x

INNERQ_HOST_DEVICE int64_t PartLength(int64_t k) {
  return RoundUp(CeilDiv(k, kParts), kStageDepth);
}

constexpr int kTileColumns = 128;

// A tile of kRows rows of x and 128 of the weight. Of a stage: [rows][8] quads, x before the
// weight; quad c of row r is at c ^ r % 8, so that eight rows of a matrix are in different banks.
template <int kRows>
struct Tile {
  static constexpr int kWarpsDown = kRows >= 64 ? 2 : 1, kWarpsAcross = kWarps / kWarpsDown;
  static constexpr int kDown = kRows / kWarpsDown / 16;                 // products of a warp
  static constexpr int kAcross = kTileColumns / kWarpsAcross / kEight;  // likewise, even
  static constexpr int kRowQuads = kStageDepth / kQuad;
  static constexpr int kStageQuads = (kRows + kTileColumns) * kRowQuads;
  static constexpr int kStages = kRows >= 128 ? 3 : 4;  // what fits in kMostSharedBytes
  static constexpr int kSharedBytes = kStages * kStageQuads * 16;
  static constexpr int kBlocks = kRows >= 128 ? 1 : 2;  // of a multiprocessor
  static_assert(kSharedBytes <= kMostSharedBytes && kAcross % 2 == 0);
};

// A product of a step, by the format of both operands.
template <WeightFormat kFormat>
__device__ void MultiplyAddOf(const uint32_t (&x)[4], uint32_t w0, uint32_t w1, float (&sums)[4]) {
  if constexpr (kFormat == WeightFormat::kF16) {
    MultiplyAdd(x, w0, w1, sums);
  } else {
    MultiplyAddBf16(x, w0, w1, sums);
  }
}

// What a lane has of a warp's products of one step of K.
template <int kRows>
struct Operands {
  uint32_t x[Tile<kRows>::kDown][4];
  uint32_t weight[Tile<kRows>::kAcross / 2][4];  // of two neighbours
};

// Grid: [M / kRows, N / 128, 1 or 8]. Block: 8 warps compute kRows rows of 128 outputs, part after
// part. Shared: a ring of stages of 64 columns of both operands. kSplit: 8 blocks share a tile,
// each leaves the sums of one part for AddPartsKernel.
template <int kRows, bool kSplit, WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads, Tile<kRows>::kBlocks)
    TiledKernel(const __grid_constant__ MatMulLaunch args) {
  using T = Tile<kRows>;
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  const int64_t depth = RoundUp(args.k, kMatMulUnit);
  const auto part_stages = static_cast<int>(PartLength(args.k) / kStageDepth);
  const auto all_stages = static_cast<int>(CeilDiv(depth, kStageDepth));
  const int first_stage = kSplit ? min(static_cast<int>(blockIdx.z) * part_stages, all_stages) : 0;
  const int end_stage = kSplit ? min(first_stage + part_stages, all_stages) : all_stages;

  // Eight threads copy a row.
  constexpr int kCopyRows = kThreads / T::kRowQuads;
  const int copy_row = threadIdx.x / T::kRowQuads, copy_quad = threadIdx.x % T::kRowQuads;
  const auto rows_left =
      static_cast<int>(min(args.m - first_row, static_cast<int64_t>(kRows))) - copy_row;
  const auto columns_left = static_cast<int>(min(RoundUp(args.n, kMatMulUnit) - first_column,
                                                 static_cast<int64_t>(kTileColumns))) -
                            copy_row;
  const auto depth_left = static_cast<int>(depth) - copy_quad * kQuad;
  const auto* x = reinterpret_cast<const uint16_t*>(args.x) + (first_row + copy_row) * depth +
                  copy_quad * kQuad;
  const auto* weight = reinterpret_cast<const uint16_t*>(args.weight) +
                       (first_column + copy_row) * depth + copy_quad * kQuad;
  uint4* const copy_to = shared + copy_row * T::kRowQuads + (copy_quad ^ copy_row % 8);
  const auto begin_copy = [&](int stage, int place) {
    if (stage < end_stage) {
      const int k = stage * kStageDepth;
      uint4* to = copy_to + place * T::kStageQuads;
#pragma unroll
      for (int row = 0; row < kRows; row += kCopyRows) {
        CopyAsync(to + row * T::kRowQuads, x + row * depth + k,
                  k < depth_left && row < rows_left ? 16 : 0);
      }
#pragma unroll
      for (int row = 0; row < kTileColumns; row += kCopyRows) {
        CopyAsync(to + (kRows + row) * T::kRowQuads, weight + row * depth + k,
                  k < depth_left && row < columns_left ? 16 : 0);
      }
    }
    CommitCopies();
  };

  // Matrices of x: rows g, g + 8, g, g + 8 of a product; quads 0, 0, 1, 1 of a step. Of the weight:
  // rows g, g, g + 8, g + 8; quads 0, 1, 0, 1.
  const int warp_row = warp / T::kWarpsAcross * (T::kDown * 16);
  const int warp_column = warp % T::kWarpsAcross * (T::kAcross * kEight);
  const int x_at = (warp_row + lane % 16) * T::kRowQuads + (lane / 16 ^ lane % 8);
  const int weight_at =
      (kRows + warp_column + lane / 16 * 8 + lane % 8) * T::kRowQuads + (lane / 8 % 2 ^ lane % 8);
  const auto load = [&](int place, int step, Operands<kRows>& to) {
    const uint4* from = shared + place * T::kStageQuads;
#pragma unroll
    for (int i = 0; i < T::kDown; ++i) {
      LoadMatrices(from + (x_at ^ 2 * step) + i * 16 * T::kRowQuads, to.x[i]);
    }
#pragma unroll
    for (int j = 0; j < T::kAcross / 2; ++j) {
      LoadMatrices(from + (weight_at ^ 2 * step) + j * 16 * T::kRowQuads, to.weight[j]);
    }
  };

  float total[T::kDown][T::kAcross][4] = {};
#pragma unroll
  for (int place = 0; place < T::kStages - 1; ++place) begin_copy(first_stage + place, place);
  for (int stage = first_stage, place = 0; stage < end_stage;) {
    float part[T::kDown][T::kAcross][4] = {};
    const int end = min(stage + part_stages, end_stage);
    for (; stage < end; ++stage) {
      WaitForCopies<T::kStages - 2>();
      __syncthreads();  // the stage is there, and all are done with the one before
      Operands<kRows> operands[2];
      load(place, 0, operands[0]);
      begin_copy(stage + T::kStages - 1, place == 0 ? T::kStages - 1 : place - 1);
#pragma unroll
      for (int step = 0; step < kStageDepth / kStep; ++step) {
        if (step + 1 < kStageDepth / kStep) load(place, step + 1, operands[(step + 1) % 2]);
        const Operands<kRows>& now = operands[step % 2];
#pragma unroll
        for (int i = 0; i < T::kDown; ++i) {
#pragma unroll
          for (int j = 0; j < T::kAcross; ++j) {
            MultiplyAddOf<kFormat>(now.x[i], now.weight[j / 2][j % 2 * 2],
                                   now.weight[j / 2][j % 2 * 2 + 1], part[i][j]);
          }
        }
      }
      place = place + 1 == T::kStages ? 0 : place + 1;
    }
#pragma unroll
    for (int i = 0; i < T::kDown; ++i) {
#pragma unroll
      for (int j = 0; j < T::kAcross; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) total[i][j][e] += part[i][j][e];
      }
    }
  }
  const int64_t row = first_row + warp_row + lane / 4;
  const int64_t column = first_column + warp_column + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < T::kDown; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t to_row = row + i * 16 + half * kEight;
      const float unit = kFormat == WeightFormat::kF16 && !kSplit ? UnitOf(args, to_row) : 1.0f;
#pragma unroll
      for (int j = 0; j < T::kAcross; ++j) {
        const int64_t to_column = column + j * kEight;
        const float2 two = {total[i][j][2 * half], total[i][j][2 * half + 1]};
        if constexpr (kSplit) {
          if (to_row >= args.m || to_column >= args.n) continue;
          *reinterpret_cast<float2*>(args.parts + (blockIdx.z * args.m + to_row) * args.n +
                                     to_column) = two;
        } else {
          StoreTwo(args, to_row, to_column, two.x * unit, two.y * unit);
        }
      }
    }
  }
}

// Grid: M * N / 512. Block: 256 threads finish two neighbouring elements each. No shared memory.
__global__ void AddPartsKernel(const __grid_constant__ MatMulLaunch args) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 2;
  if (i >= args.m * args.n) return;
  float2 total = {0, 0};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const float2 two = *reinterpret_cast<const float2*>(args.parts + part * args.m * args.n + i);
    total.x += two.x;
    total.y += two.y;
  }
  const float unit = UnitOf(args, i / args.n);
  StoreTwo(args, i / args.n, i % args.n, total.x * unit, total.y * unit);
}

template <int kRows>
int64_t NumTiles(const MatMulLaunch& launch) {
  return CeilDiv(launch.m, kRows) * CeilDiv(launch.n, kTileColumns);
}

// So many tiles keep three quarters of the multiprocessors busy.
int64_t EnoughTiles(const MatMulLaunch& launch) {
  return CeilDiv(launch.num_multiprocessors * 3, 4);
}

template <int kRows, bool kSplit, WeightFormat kFormat>
cudaError_t LaunchTiled(const MatMulLaunch& launch, cudaStream_t stream) {
  constexpr int kBytes = Tile<kRows>::kSharedBytes;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      TiledKernel<kRows, kSplit, kFormat>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(CeilDiv(launch.m, kRows)),
                  static_cast<unsigned>(CeilDiv(launch.n, kTileColumns)), kSplit ? kParts : 1);
  TiledKernel<kRows, kSplit, kFormat><<<grid, kThreads, kBytes, stream>>>(launch);
  if (kSplit) {
    const auto blocks = static_cast<unsigned>(CeilDiv(launch.m * launch.n, 2 * kThreads));
    AddPartsKernel<<<blocks, kThreads, 0, stream>>>(launch);
  }
  return cudaGetLastError();
}

// Few tiles of many columns of K are split among blocks.
template <int kRows, WeightFormat kFormat>
cudaError_t LaunchTiles(const MatMulLaunch& launch, cudaStream_t stream) {
  const bool split = NumTiles<kRows>(launch) < EnoughTiles(launch) && launch.n % 2 == 0 &&
                     kParts * launch.m * launch.n <= launch.num_part_sums;
  return split ? LaunchTiled<kRows, true, kFormat>(launch, stream)
               : LaunchTiled<kRows, false, kFormat>(launch, stream);
}

template <WeightFormat kFormat>
cudaError_t LaunchAs(const MatMulLaunch& launch, cudaStream_t stream) {
  if (launch.m <= 32) return LaunchTiles<32, kFormat>(launch, stream);
  if (launch.m <= 64 || NumTiles<128>(launch) < EnoughTiles(launch)) {
    return LaunchTiles<64, kFormat>(launch, stream);
  }
  return LaunchTiled<128, false, kFormat>(launch, stream);
}

}  // namespace

cudaError_t LaunchMmaMatMul(const MatMulLaunch& launch, cudaStream_t stream) {
  return launch.format == WeightFormat::kF16 ? LaunchAs<WeightFormat::kF16>(launch, stream)
                                             : LaunchAs<WeightFormat::kBF16>(launch, stream);
}

}  // namespace innerq::cuda
