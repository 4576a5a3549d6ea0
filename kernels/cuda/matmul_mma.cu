// Products of BF16 weights on tensor cores.
//
// out [M, N] = x [M, K] * weight [N, K]^T. K is cut into kParts parts of one length, a multiple of
// kStageDepth, from 0 on. Within a part an element is one chain of products mma.m16n8k16, started
// at 0, in the order of K; the parts' sums are added in order. Every kernel of this file does so
// for every M, so an element's bits depend on its row of x and its row of the weight alone.
//
// What lies beyond K is zero in both operands and adds nothing; rows beyond M or N are zero or
// anything and are not stored.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"

namespace innerq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSlab = 32;        // columns of K that FewRowsKernel has of a stage
constexpr int kStageDepth = 64;  // columns of K that TiledKernel has of a stage
constexpr int kStep = 16;        // of K, of a product
constexpr int kQuad = 8;         // BF16 elements in 16 bytes
constexpr int kParts = 8;
constexpr int kMostSharedBytes = 99 * 1024;  // that a block may have on sm_120; others have more
constexpr int kEight = 8;                    // rows of a fragment: of the weight, and of half of x
constexpr int64_t kFewRows = 16;
// Outputs from which on blocks of 32 are enough to fill a device.
constexpr int64_t kNarrow = 3072;

static_assert(kParts == kWarps, "a warp of FewRowsKernel takes one part");

INNERQ_HOST_DEVICE int64_t PartLength(int64_t k) {
  return RoundUp(CeilDiv(k, kParts), kStageDepth);
}

// Finishes an element: bias, residual.
__device__ void Store(const MatMulLaunch& args, int64_t row, int64_t col, float sum) {
  if (row >= args.m || col >= args.n) return;
  if (args.bias != nullptr) sum += args.bias[col];
  float& out = args.out[row * args.n + col];
  out = args.accumulate ? out + sum : sum;
}

// The same of columns col and col + 1; col is even.
__device__ void StoreTwo(const MatMulLaunch& args, int64_t row, int64_t col, float first,
                         float second) {
  if (args.n % 2 != 0) {
    Store(args, row, col, first);
    Store(args, row, col + 1, second);
    return;
  }
  if (row >= args.m || col >= args.n) return;
  if (args.bias != nullptr) {
    first += args.bias[col];
    second += args.bias[col + 1];
  }
  auto* out = reinterpret_cast<float2*>(args.out + row * args.n + col);
  if (args.accumulate) {
    const float2 before = *out;
    first = before.x + first;
    second = before.y + second;
  }
  *out = {first, second};
}

// --- Up to 16 rows: the weight is read once, and little else matters ---

// A warp's ring of slabs of 32 columns, in quads of 16 bytes. Of each slab: the weight,
// [8 * kTiles][4], then x in F32, [M][8]. Quad c of row r of the weight is at c ^ r / 2 % 4, of x
// at c ^ r % 4 * 2, so that no two of those that are read at once are in the same banks.
template <int kTiles, bool kHighRows>
struct FewRowsRing {
  static constexpr int kHalves = kHighRows ? 2 : 1;  // of the 16 rows of a product
  static constexpr int kStages = kHighRows ? 3 : 4;  // what fits in kMostSharedBytes
  static constexpr int kTileQuads = kEight * kSlab / kQuad, kRowQuads = kSlab / 4;

  INNERQ_HOST_DEVICE static int SlabQuads(int64_t m) {
    return kTiles * kTileQuads + static_cast<int>(m) * kRowQuads;
  }
};

// Grid: N / (8 * kTiles). Block: 8 warps compute all rows of 8 * kTiles outputs, each the sums of
// one part, then all add them in order. Shared: a ring per warp, which fills it itself and waits
// for no other until its sums are complete. kHighRows: M > 8.
template <int kTiles, bool kHighRows>
__global__ void __launch_bounds__(kThreads, 2)
    FewRowsKernel(const __grid_constant__ MatMulLaunch args) {
  using Ring = FewRowsRing<kTiles, kHighRows>;
  constexpr int kColumns = kTiles * kEight, kHalves = Ring::kHalves, kStages = Ring::kStages;
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int group = lane / 4, inner = lane % 4;
  const int slab_quads = Ring::SlabQuads(args.m);
  uint4* const ring = shared + warp * kStages * slab_quads;
  const int64_t depth = RoundUp(args.k, kMatMulUnit), length = PartLength(args.k);
  const int64_t begin = min(warp * length, depth), end = min(begin + length, depth);
  const auto num_slabs = static_cast<int>(CeilDiv(end - begin, kSlab));
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kColumns;
  const auto columns_left = static_cast<int>(
      min(RoundUp(args.n, kMatMulUnit) - first_column, static_cast<int64_t>(kColumns)));

  // Lane 4g + i copies quad i of rows g of the weight, and quads i and i + 4 of rows g of x.
  const auto weight_left = static_cast<int>(depth - begin) - inner * kQuad;
  const auto x_left = static_cast<int>(args.k - begin) - inner * 4;
  const auto* weight = reinterpret_cast<const uint16_t*>(args.weight) +
                       (first_column + group) * depth + begin + inner * kQuad;
  const auto* x = reinterpret_cast<const float*>(args.x) + group * args.k + begin + inner * 4;
  const int weight_place = group * 4 + (inner ^ (group / 2 % 4));
  const int x_swizzle = group % 4 * 2;
  const int x_place = kTiles * Ring::kTileQuads + group * Ring::kRowQuads + (inner ^ x_swizzle);
  const auto begin_copy = [&](int slab, int stage) {
    if (slab < num_slabs) {
      const int k = slab * kSlab;
      uint4* to = ring + stage * slab_quads;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const bool real = tile * kEight < columns_left && k < weight_left;
        CopyAsync(to + weight_place + tile * Ring::kTileQuads, weight + tile * kEight * depth + k,
                  real ? 16 : 0);
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (group + half * kEight >= args.m) continue;
        const float* from = x + half * kEight * args.k + k;
        uint4* row = to + half * kEight * Ring::kRowQuads;
        CopyAsync(row + x_place, from, min(max(x_left - k, 0), 4) * 4);
        CopyAsync(row + (x_place ^ 4), from + 16, min(max(x_left - k - 16, 0), 4) * 4);
      }
    }
    CommitCopies();
  };

  // The row that the lane names of the four matrices of a tile.
  const int matrix_row = lane % 8 * 4 + (lane / 8 ^ (lane % 8 / 2));
  const int pair = inner % 2;  // of the two in a quad
  float sums[kTiles][4] = {};
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) begin_copy(stage, stage);
  for (int slab = 0, stage = 0; slab < num_slabs; ++slab) {
    WaitForCopies<kStages - 1>();
    __syncwarp();  // what other lanes copied is there
    const uint4* from = ring + stage * slab_quads;
    uint32_t rows[kSlab / kStep][4] = {};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (group + half * kEight >= args.m) continue;
      const auto* row = reinterpret_cast<const float2*>(from + kTiles * Ring::kTileQuads +
                                                        (group + half * kEight) * Ring::kRowQuads);
#pragma unroll
      for (int eight = 0; eight < kSlab / kEight; ++eight) {
        const float2 two = row[((eight * 2 + inner / 2) ^ x_swizzle) * 2 + pair];
        rows[eight / 2][eight % 2 * 2 + half] = PackBf16(two.x, two.y);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t w[4];
      LoadMatrices(from + tile * Ring::kTileQuads + matrix_row, w);
      MultiplyAddBf16(rows[0], w[0], w[1], sums[tile]);
      MultiplyAddBf16(rows[1], w[2], w[3], sums[tile]);
    }
    __syncwarp();  // all lanes have read the slab
    begin_copy(slab + kStages, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  __syncwarp();  // all lanes are done with the warp's ring: it takes the sums, [M][kColumns]
  float* own = reinterpret_cast<float*>(ring) + group * kColumns + inner * 2;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float* to = own + half * kEight * kColumns + tile * kEight;
      to[0] = sums[tile][2 * half];
      to[1] = sums[tile][2 * half + 1];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < static_cast<int>(args.m) * kColumns; i += kThreads) {
    float total = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      total += reinterpret_cast<const float*>(shared + part * kStages * slab_quads)[i];
    }
    Store(args, i / kColumns, first_column + i % kColumns, total);
  }
}

// --- More rows ---

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

// What a lane has of a warp's products of one step of K.
template <int kRows>
struct Operands {
  uint32_t x[Tile<kRows>::kDown][4];
  uint32_t weight[Tile<kRows>::kAcross / 2][4];  // of two neighbours
};

// Grid: [M / kRows, N / 128, 1 or 8]. Block: 8 warps compute kRows rows of 128 outputs, part after
// part. Shared: a ring of stages of 64 columns of both operands. kSplit: 8 blocks share a tile,
// each leaves the sums of one part for AddPartsKernel.
template <int kRows, bool kSplit>
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
            MultiplyAddBf16(now.x[i], now.weight[j / 2][j % 2 * 2],
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
#pragma unroll
      for (int j = 0; j < T::kAcross; ++j) {
        const int64_t to_row = row + i * 16 + half * kEight, to_column = column + j * kEight;
        const float2 two = {total[i][j][2 * half], total[i][j][2 * half + 1]};
        if constexpr (kSplit) {
          if (to_row >= args.m || to_column >= args.n) continue;
          *reinterpret_cast<float2*>(args.parts + (blockIdx.z * args.m + to_row) * args.n +
                                     to_column) = two;
        } else {
          StoreTwo(args, to_row, to_column, two.x, two.y);
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
  StoreTwo(args, i / args.n, i % args.n, total.x, total.y);
}

template <int kTiles, bool kHighRows>
cudaError_t LaunchFewRows(const MatMulLaunch& launch, cudaStream_t stream) {
  using Ring = FewRowsRing<kTiles, kHighRows>;
  const auto blocks = static_cast<unsigned>(CeilDiv(launch.n, kTiles * kEight));
  const auto bytes = static_cast<size_t>(kWarps * Ring::kStages * Ring::SlabQuads(launch.m) * 16);
  static const cudaError_t allowed =
      cudaFuncSetAttribute(FewRowsKernel<kTiles, kHighRows>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes);
  if (allowed != cudaSuccess) return allowed;
  FewRowsKernel<kTiles, kHighRows><<<blocks, kThreads, bytes, stream>>>(launch);
  return cudaGetLastError();
}

template <int kRows>
int64_t NumTiles(const MatMulLaunch& launch) {
  return CeilDiv(launch.m, kRows) * CeilDiv(launch.n, kTileColumns);
}

// So many tiles keep three quarters of the multiprocessors busy.
int64_t EnoughTiles(const MatMulLaunch& launch) {
  return CeilDiv(launch.num_multiprocessors * 3, 4);
}

template <int kRows, bool kSplit>
cudaError_t LaunchTiled(const MatMulLaunch& launch, cudaStream_t stream) {
  constexpr int kBytes = Tile<kRows>::kSharedBytes;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      TiledKernel<kRows, kSplit>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(CeilDiv(launch.m, kRows)),
                  static_cast<unsigned>(CeilDiv(launch.n, kTileColumns)), kSplit ? kParts : 1);
  TiledKernel<kRows, kSplit><<<grid, kThreads, kBytes, stream>>>(launch);
  if (kSplit) {
    const auto blocks = static_cast<unsigned>(CeilDiv(launch.m * launch.n, 2 * kThreads));
    AddPartsKernel<<<blocks, kThreads, 0, stream>>>(launch);
  }
  return cudaGetLastError();
}

// Few tiles of many columns of K are split among blocks.
template <int kRows>
cudaError_t LaunchTiles(const MatMulLaunch& launch, cudaStream_t stream) {
  const bool split = NumTiles<kRows>(launch) < EnoughTiles(launch) && launch.n % 2 == 0 &&
                     kParts * launch.m * launch.n <= launch.num_part_sums;
  return split ? LaunchTiled<kRows, true>(launch, stream)
               : LaunchTiled<kRows, false>(launch, stream);
}

}  // namespace

bool TakesF32(const MatMulLaunch& launch) {
  if (launch.format != WeightFormat::kBF16) return true;
  // Its rows must be aligned as copies are.
  return launch.m <= kFewRows && launch.k % 4 == 0 &&
         reinterpret_cast<uintptr_t>(launch.x) % 16 == 0;
}

cudaError_t LaunchMmaMatMul(const MatMulLaunch& launch, cudaStream_t stream) {
  if (!launch.rounded) {
    const bool narrow = launch.n < kNarrow;
    if (launch.m <= kEight) {
      return narrow ? LaunchFewRows<2, false>(launch, stream)
                    : LaunchFewRows<4, false>(launch, stream);
    }
    return narrow ? LaunchFewRows<2, true>(launch, stream) : LaunchFewRows<4, true>(launch, stream);
  }
  if (launch.m <= 32) return LaunchTiles<32>(launch, stream);
  if (launch.m <= 64 || NumTiles<128>(launch) < EnoughTiles(launch)) {
    return LaunchTiles<64>(launch, stream);
  }
  return LaunchTiled<128, false>(launch, stream);
}

}  // namespace innerq::cuda
