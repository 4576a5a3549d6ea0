// Products of BF16 weights on tensor cores.
//
// out [M, N] = x [M, K] * weight [N, K]^T. K is cut into kParts parts of one length, a multiple of
// kStageDepth, from 0 on. Within a part an element is one chain of products mma.m16n8k16, started
// at 0, in the order of K; the parts' sums are added in order. Every kernel of this file does so
// for every M, so an element's bits depend on its row of x and its row of the weight alone.
//
// The order of K within a chain is ours: of a slab of 32 columns, lane 4g + i of a warp takes
// columns 8i to 8i + 7 of row g, of x and of the weight alike. They are 16 bytes, one load, and the
// lane's operands of two products: its first four columns of one, the others of the next. A warp
// loads 512 consecutive bytes of shared memory, whatever the slab.
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
constexpr int kSlab = 32;        // columns of K
constexpr int kLaneColumns = 8;  // of a slab, of one row
constexpr int kStageDepth = 64;  // columns of K that the tiled kernel has of a stage
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

// sums[j] += a slab's products of 16 rows of x with the eight weight rows of w[j]. `low`, `high`:
// what the lane has of rows g and g + 8 of x.
template <int kCount>
__device__ void MultiplySlab(const uint4& low, const uint4& high, const uint4 (&w)[kCount],
                             float (&sums)[kCount][4]) {
  const uint32_t first[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
  for (int j = 0; j < kCount; ++j) MultiplyAddBf16(first, w[j].x, w[j].y, sums[j]);
  const uint32_t second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
  for (int j = 0; j < kCount; ++j) MultiplyAddBf16(second, w[j].z, w[j].w, sums[j]);
}

// Eight columns of x as BF16.
__device__ uint4 RoundEight(const uint4& first, const uint4& second) {
  const auto pack = [](uint32_t low, uint32_t high) {
    return PackBf16(__uint_as_float(low), __uint_as_float(high));
  };
  return {pack(first.x, first.y), pack(first.z, first.w), pack(second.x, second.y),
          pack(second.z, second.w)};
}

// --- Up to 16 rows: the weight is read once, and little else matters ---

// A warp's ring of slabs, in quads of 16 bytes. Of each slab: [kTiles][32 lanes] of the weight,
// then pieces of x, [min(M, 8)][4] each: of rows g, columns 8i to 8i + 3, then 8i + 4 to 8i + 7; of
// rows g + 8 likewise, if there are any.
template <int kTiles, bool kHighRows>
struct FewRowsRing {
  static constexpr int kHalves = kHighRows ? 2 : 1;  // of the 16 rows of a product
  static constexpr int kStages = kHighRows ? 3 : 4;  // what fits in kMostSharedBytes
  int piece_quads, slab_quads;

  INNERQ_HOST_DEVICE explicit FewRowsRing(int64_t m)
      : piece_quads(static_cast<int>(m < kEight ? m : kEight) * (kSlab / kLaneColumns)),
        slab_quads(kTiles * kWarpSize + 2 * kHalves * piece_quads) {}
};

// Grid: N / (8 * kTiles). Block: 8 warps compute all rows of 8 * kTiles outputs, each the sums of
// one part, then all add them in order. Shared: a ring per warp; a lane reads what it
// copied itself, so warps run on without barriers until the sums are complete. kHighRows: M > 8.
template <int kTiles, bool kHighRows>
__global__ void __launch_bounds__(kThreads, 2)
    FewRowsKernel(const __grid_constant__ MatMulLaunch args) {
  using Ring = FewRowsRing<kTiles, kHighRows>;
  constexpr int kColumns = kTiles * kEight, kHalves = Ring::kHalves, kStages = Ring::kStages;
  extern __shared__ uint4 shared[];
  const Ring plan(args.m);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, group = lane / 4;
  uint4* const ring = shared + warp * kStages * plan.slab_quads;
  const int64_t depth = RoundUp(args.k, kMatMulUnit), length = PartLength(args.k);
  const int64_t begin = min(warp * length, depth), end = min(begin + length, depth);
  const auto num_slabs = static_cast<int>(CeilDiv(end - begin, kSlab));
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int64_t last_column = RoundUp(args.n, kMatMulUnit) - 1;
  const int64_t first = begin + lane % 4 * kLaneColumns;  // the lane's column of the first slab
  const auto x_left = static_cast<int>(args.k - first),
             depth_left = static_cast<int>(depth - first);
  const auto* x = reinterpret_cast<const float*>(args.x) + group * args.k + first;
  const auto* weight =
      reinterpret_cast<const uint16_t*>(args.weight) + (first_column + group) * depth + first;

  const auto begin_copy = [&](int slab, int stage) {
    if (slab < num_slabs) {
      const int k = slab * kSlab;
      uint4* to = ring + stage * plan.slab_quads + lane;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const bool real = first_column + tile * kEight <= last_column && k < depth_left;
        CopyAsync(to + tile * kWarpSize, weight + tile * kEight * depth + k, real ? 16 : 0);
      }
      to += kTiles * kWarpSize;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (group + half * kEight >= args.m) continue;
        const float* from = x + half * kEight * args.k + k;
        CopyAsync(to, from, min(max(x_left - k, 0), 4) * 4);
        CopyAsync(to + plan.piece_quads, from + 4, min(max(x_left - k - 4, 0), 4) * 4);
        to += 2 * plan.piece_quads;
      }
    }
    CommitCopies();
  };

  float sums[kTiles][4] = {};
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) begin_copy(stage, stage);
  for (int slab = 0, stage = 0; slab < num_slabs; ++slab) {
    WaitForCopies<kStages - 1>();
    const uint4* from = ring + stage * plan.slab_quads + lane;
    uint4 w[kTiles], rows[2] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) w[tile] = from[tile * kWarpSize];
    from += kTiles * kWarpSize;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (group + half * kEight >= args.m) continue;
      const uint4 low = from[0], high = from[plan.piece_quads];
      rows[half] = RoundEight(low, high);
      from += 2 * plan.piece_quads;
    }
    MultiplySlab(rows[0], rows[1], w, sums);
    begin_copy(slab + kStages, stage);  // to where the slab was
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  __syncwarp();  // all lanes are done with the warp's ring: it takes the sums, [M][kColumns]
  float* own = reinterpret_cast<float*>(ring) + group * kColumns + lane % 4 * 2;
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
      total += reinterpret_cast<const float*>(shared + part * kStages * plan.slab_quads)[i];
    }
    Store(args, i / kColumns, first_column + i % kColumns, total);
  }
}

// --- More rows ---

constexpr int kTileColumns = 128;

// A tile of kRows rows of x and 128 of the weight, of a stage: [2 slabs][rows][4 quads].
template <int kRows>
struct Tile {
  static constexpr int kWarpsDown = kRows >= 64 ? 2 : 1, kWarpsAcross = kWarps / kWarpsDown;
  static constexpr int kDown = kRows / kWarpsDown / 16;                 // products of a warp
  static constexpr int kAcross = kTileColumns / kWarpsAcross / kEight;  // likewise
  static constexpr int kAllRows = kRows + kTileColumns;                 // of both operands
  static constexpr int kSlabQuads = kAllRows * (kSlab / kLaneColumns);
  static constexpr int kStageQuads = kSlabQuads * (kStageDepth / kSlab);
  static constexpr int kStages = kRows >= 128 ? 3 : 4;  // what fits in the 99 KB that sm_120 has
  static constexpr int kSharedBytes = kStages * kStageQuads * 16;
  static constexpr int kBlocks = kRows >= 128 ? 1 : 2;  // of a multiprocessor
};

// Grid: [M / kRows, N / 128]. Block: 8 warps compute kRows rows of 128 outputs, part after part.
// Shared: a ring of stages of both operands.
template <int kRows>
__global__ void __launch_bounds__(kThreads, Tile<kRows>::kBlocks)
    TiledKernel(const __grid_constant__ MatMulLaunch args) {
  using T = Tile<kRows>;
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  const int64_t depth = RoundUp(args.k, kMatMulUnit);
  const auto num_stages = static_cast<int>(CeilDiv(depth, kStageDepth));
  const auto part_stages = static_cast<int>(PartLength(args.k) / kStageDepth);

  // Sixteen threads copy 128 bytes of two rows, eight of them 128 consecutive bytes of a slab.
  const int copy_row = threadIdx.x / 16 * 2 + threadIdx.x / 4 % 2;
  const int copy_slab = threadIdx.x / 8 % 2, copy_quad = threadIdx.x % 4;
  constexpr int kCopyRows = kThreads / 8;
  const int64_t copy_column = copy_slab * kSlab + copy_quad * kLaneColumns;
  const auto rows_left = static_cast<int>(min(args.m - first_row, int64_t{kRows})) - copy_row;
  const auto columns_left =
      static_cast<int>(min(RoundUp(args.n, kMatMulUnit) - first_column, int64_t{kTileColumns})) -
      copy_row;
  const uint16_t* x =
      reinterpret_cast<const uint16_t*>(args.x) + (first_row + copy_row) * depth + copy_column;
  const uint16_t* weight = reinterpret_cast<const uint16_t*>(args.weight) +
                           (first_column + copy_row) * depth + copy_column;
  uint4* const copy_to = shared + copy_slab * T::kSlabQuads + copy_row * 4 + copy_quad;
  const auto begin_copy = [&](int stage, int place) {
    if (stage < num_stages) {
      const int64_t k = static_cast<int64_t>(stage) * kStageDepth;
      const bool real = copy_column + k < depth;
      uint4* to = copy_to + place * T::kStageQuads;
#pragma unroll
      for (int row = 0; row < kRows; row += kCopyRows) {
        CopyAsync(to + row * 4, x + row * depth + k, real && row < rows_left ? 16 : 0);
      }
#pragma unroll
      for (int row = 0; row < kTileColumns; row += kCopyRows) {
        CopyAsync(to + (kRows + row) * 4, weight + row * depth + k,
                  real && row < columns_left ? 16 : 0);
      }
    }
    CommitCopies();
  };

  const int warp_row = warp / T::kWarpsAcross * (T::kDown * 16);
  const int warp_column = warp % T::kWarpsAcross * (T::kAcross * kEight);
  const uint4* const read_x = shared + warp_row * 4 + lane;
  const uint4* const read_weight = shared + (kRows + warp_column) * 4 + lane;
  float total[T::kDown][T::kAcross][4] = {};
#pragma unroll
  for (int stage = 0; stage < T::kStages - 1; ++stage) begin_copy(stage, stage);
  for (int stage = 0, place = 0; stage < num_stages;) {
    float part[T::kDown][T::kAcross][4] = {};
    const int end = min(stage + part_stages, num_stages);
    for (; stage < end; ++stage) {
      WaitForCopies<T::kStages - 2>();
      __syncthreads();  // the stage is there, and all are done with the one before
      begin_copy(stage + T::kStages - 1, place == 0 ? T::kStages - 1 : place - 1);
#pragma unroll
      for (int slab = 0; slab < kStageDepth / kSlab; ++slab) {
        const int at = place * T::kStageQuads + slab * T::kSlabQuads;
        uint4 w[T::kAcross];
#pragma unroll
        for (int j = 0; j < T::kAcross; ++j) w[j] = read_weight[at + j * kWarpSize];
#pragma unroll
        for (int i = 0; i < T::kDown; ++i) {
          MultiplySlab(read_x[at + 2 * i * kWarpSize], read_x[at + (2 * i + 1) * kWarpSize], w,
                       part[i]);
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
    for (int j = 0; j < T::kAcross; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        Store(args, row + i * 16 + e / 2 * kEight, column + j * kEight + e % 2, total[i][j][e]);
      }
    }
  }
}

template <int kTiles, bool kHighRows>
cudaError_t LaunchFewRows(const MatMulLaunch& launch, cudaStream_t stream) {
  const FewRowsRing<kTiles, kHighRows> ring(launch.m);
  const auto blocks = static_cast<unsigned>(CeilDiv(launch.n, kTiles * kEight));
  const auto bytes = static_cast<size_t>(kWarps * ring.kStages * ring.slab_quads * 16);
  static const cudaError_t allowed =
      cudaFuncSetAttribute(FewRowsKernel<kTiles, kHighRows>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes);
  if (allowed != cudaSuccess) return allowed;
  FewRowsKernel<kTiles, kHighRows><<<blocks, kThreads, bytes, stream>>>(launch);
  return cudaGetLastError();
}

template <int kRows>
cudaError_t LaunchTiles(const MatMulLaunch& launch, cudaStream_t stream) {
  constexpr int kBytes = Tile<kRows>::kSharedBytes;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(TiledKernel<kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(CeilDiv(launch.m, kRows)),
                  static_cast<unsigned>(CeilDiv(launch.n, kTileColumns)));
  TiledKernel<kRows><<<grid, kThreads, kBytes, stream>>>(launch);
  return cudaGetLastError();
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
  if (launch.m <= 64) return LaunchTiles<64>(launch, stream);
  return LaunchTiles<128>(launch, stream);
}

}  // namespace innerq::cuda
