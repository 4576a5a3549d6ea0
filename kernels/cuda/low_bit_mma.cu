// Products of low-bit weights on tensor cores: integers, exact within a chunk.
//
// out [M, N] = x [M, K] * weight [N, K]^T; see low_bit_layout.h for operands. K is cut into kParts
// parts of as many records, from 0 on. Within a part the sums of chunks are added in order, each by
// one fused multiply-add with its scale; the parts' sums are added in order. This holds for every M
// and both kernels, so an element's bits depend on its row of x and its row of the weight alone.
//
// The weight is the operand with 16 rows, since codes are decoded as A's lanes have them, and rows
// of x come in eights.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul_store.cuh"
#include "kernels/cuda/ptx.cuh"

namespace innerq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kParts = 8;
constexpr int kEight = 8;      // rows of x of a product
constexpr int kPairs = 4;      // of blocks, of a record: what 16 bytes of x are for
constexpr int kHighShift = 7;  // of the high bytes of x

struct Table {
  uint32_t words[4];
};

// A lane's codes of a record.
template <int kBits>
struct RecordCodes {
  static constexpr int kQuads = kBits * kWarpSize;  // of 16 bytes, of all lanes

  uint32_t words[kBits * 4];

  // From shared memory.
  __device__ void Load(const uint4* record, int lane) {
#pragma unroll
    for (int vector = 0; vector < kBits; ++vector) {
      const uint4 four = record[vector * kWarpSize + lane];
      words[4 * vector] = four.x;
      words[4 * vector + 1] = four.y;
      words[4 * vector + 2] = four.z;
      words[4 * vector + 3] = four.w;
    }
  }

  // Bytes level + L of a block, as a product takes them.
  __device__ void Levels(int block, const Table& table, uint32_t (&a)[4]) const {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = words[4 * block + i];
    } else {
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        const uint32_t nibbles = Nibbles(block, word);
        a[2 * word] = Look(table, nibbles);
        a[2 * word + 1] = Look(table, nibbles >> 16);
      }
    }
  }

 private:
  __device__ uint32_t Nibbles(int block, int word) const {
    if constexpr (kBits == 2) return words[block] >> (2 * word) & 0x33333333u;
    if constexpr (kBits == 3) {
      const int first = block / 2 * 3, at = block % 2 * 2 + word;
      if (at < 3) return words[first + at] & 0x77777777u;
      return (words[first] >> 3 & 0x11111111u) | (words[first + 1] >> 2 & 0x22222222u) |
             (words[first + 2] >> 1 & 0x44444444u);
    }
    return words[2 * block + word];
  }
  // The bytes of four nibbles; see LowBitCodes.
  __device__ static uint32_t Look(const Table& table, uint32_t nibbles) {
    const uint32_t bytes = SelectBytes(table.words[0], table.words[1], nibbles);
    if constexpr (kBits < 4) return bytes;
    return bytes | SelectBytes(table.words[2], table.words[3], nibbles ^ 0x8888u);
  }
};

// What a lane has of kTiles tiles of 16 outputs by kEights eights of rows of x. Lane 4g + t has
// outputs g and g + 8 of a tile, rows 2t and 2t + 1 of an eight: C's order.
template <int kPlanes, int kTiles, int kEights>
class ChunkSums {
 public:
  // Of rows of x from `first_row` on; the first record that is added is `first_record`, then come
  // those after it.
  __device__ ChunkSums(const LowBitMatMulLaunch& args, int64_t first_row, int64_t first_record,
                       int lane)
      : chunk_mask_(args.layout.chunk_blocks - 1) {
    const LowBitInputLayout layout(args.layout, args.m);
    start_rows_ = layout.StartRows();
    const auto* starts = reinterpret_cast<const uint32_t*>(args.inputs + layout.StartsAt()) +
                         first_record * args.layout.RecordChunks() * start_rows_;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      // What is beyond M reads what is not stored.
      const int64_t row = first_row + j * kEight + lane % 4 * 2;
      next_starts_[j] = starts + (row < start_rows_ ? row : 0);
    }
    Clear();
  }

  // Adds the next record of every tile. x(pair, eight, plane): 16 bytes of the lane.
  template <int kBits, typename Inputs>
  __device__ void Add(const RecordCodes<kBits> (&codes)[kTiles],
                      const uint4* const (&scales)[kTiles], const Table& table, int lane,
                      const Inputs& x, float (&part)[kTiles][kEights][4]) {
    int chunk = 0;
    LoadChunk(scales, chunk, lane);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      uint4 inputs[kEights][kPlanes];
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) inputs[j][plane] = x(pair, j, plane);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int block = 2 * pair + half;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          uint32_t a[4];
          codes[i].Levels(block, table, a);
#pragma unroll
          for (int j = 0; j < kEights; ++j) {
#pragma unroll
            for (int plane = 0; plane < kPlanes; ++plane) {
              const uint4& b = inputs[j][plane];
              MultiplyAddBytes(a, half == 0 ? b.x : b.z, half == 0 ? b.y : b.w, sums_[plane][i][j]);
            }
          }
        }
        if (((block + 1) & chunk_mask_) != 0) continue;
        EndChunk(part);
        if (block + 1 < kRecordBlocks) LoadChunk(scales, ++chunk, lane);
      }
    }
  }

 private:
  __device__ void Clear() {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kEights; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums_[plane][i][j][e] = 0;
        }
      }
    }
  }
  // What the end of a record's chunk takes, long before.
  __device__ void LoadChunk(const uint4* const (&scales)[kTiles], int chunk, int lane) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      scales_[i] = reinterpret_cast<const uint32_t*>(scales[i])[chunk * kEight + lane / 4];
    }
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      start_[j] = *reinterpret_cast<const uint2*>(next_starts_[j]);
      next_starts_[j] += start_rows_;
    }
  }
  __device__ void EndChunk(float (&part)[kTiles][kEights][4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 scale = HalvesToFloats(scales_[i]);
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          // Starts beyond M are anything: sums may wrap.
          uint32_t sum = e % 2 == 0 ? start_[j].x : start_[j].y;
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            sum += static_cast<uint32_t>(sums_[plane][i][j][e]) << plane * kHighShift;
          }
          part[i][j][e] = fmaf(e < 2 ? scale.x : scale.y, static_cast<float>(static_cast<int>(sum)),
                               part[i][j][e]);
        }
      }
    }
    Clear();
  }

  const int chunk_mask_;  // of a block's number: chunks have 1, 2 or 4
  int64_t start_rows_;
  const uint32_t* next_starts_[kEights];
  uint32_t scales_[kTiles];  // of the chunk: F16 of outputs g and g + 8
  uint2 start_[kEights];
  int sums_[kPlanes][kTiles][kEights][4];
};

__device__ Table TableOf(const LowBitMatMulLaunch& args) {
  return {{args.table[0], args.table[1], args.table[2], args.table[3]}};
}

// Finishes an element.
__device__ void StoreTotal(const LowBitMatMulLaunch& args, int64_t row, int64_t col, float total) {
  if (row >= args.m) return;
  const LowBitInputLayout layout(args.layout, args.m);
  const float unit = reinterpret_cast<const float*>(args.inputs + layout.UnitsAt())[row];
  Store(args, row, col, total * (unit / static_cast<float>(args.spec.max_level())));
}

// Of SplitKernel: a ring of records for every warp, and after them, in the same place, the parts'
// sums [part][row][16].
template <int kBits, int kEights>
struct SplitShape {
  static constexpr int kRows = kEights * kEight;
  static constexpr int kMostScaleQuads = kRecordBlocks * kRecordOutputs * 2 / 16;
  static constexpr int kRecordQuads = RecordCodes<kBits>::kQuads + kMostScaleQuads;
  static constexpr int kStages = kBits == 8 ? 2 : 3;
  static constexpr int kSharedBytes = kWarps * kStages * kRecordQuads * 16;
  static constexpr int kBlocks = kEights == 1 ? 3 : 2;  // of a multiprocessor
  static_assert(kSharedBytes <= kMostSharedBytes &&
                kParts * kRows * kRecordOutputs * 4 <= kSharedBytes);
};

// For few rows. Grid: [tiles of 16 outputs, M / (8 kEights)]. Block: 8 warps, a part of K each.
template <int kBits, int kPlanes, int kEights>
__global__ void __launch_bounds__(kThreads, SplitShape<kBits, kEights>::kBlocks)
    SplitKernel(const __grid_constant__ LowBitMatMulLaunch args) {
  using S = SplitShape<kBits, kEights>;
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * S::kRows;
  const auto records = static_cast<int>(args.layout.Records());
  const int part_records = (records + kParts - 1) / kParts;
  const int begin = min(warp * part_records, records), end = min(begin + part_records, records);

  uint4* const ring = shared + warp * (S::kStages * S::kRecordQuads);
  const auto record_quads = static_cast<int>(args.layout.RecordBytes() / 16);
  const uint4* const weight = reinterpret_cast<const uint4*>(args.weight) +
                              static_cast<int64_t>(blockIdx.x) * records * record_quads;
  const auto begin_copy = [&](int record) {
    if (record < end) {
      uint4* to = ring + record % S::kStages * S::kRecordQuads;
      const uint4* from = weight + static_cast<int64_t>(record) * record_quads;
#pragma unroll
      for (int quad = lane; quad < S::kRecordQuads; quad += kWarpSize) {
        if (quad < record_quads) CopyAsync(to + quad, from + quad);
      }
    }
    CommitCopies();
  };
#pragma unroll
  for (int stage = 0; stage < S::kStages - 1; ++stage) begin_copy(begin + stage);

  const LowBitInputLayout layout(args.layout, args.m);
  const std::byte* x[kEights];
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const int64_t row = min(first_row + j * kEight + lane / 4, args.m - 1);
    x[j] = args.inputs + row * layout.width + lane % 4 * 16;
  }
  const Table table = TableOf(args);
  float part[1][kEights][4] = {};
  ChunkSums<kPlanes, 1, kEights> sums(args, first_row, begin, lane);
  for (int record = begin; record < end; ++record) {
    WaitForCopies<S::kStages - 2>();
    __syncwarp();  // the record is there, and all lanes are done with the one before
    begin_copy(record + S::kStages - 1);
    const uint4* stage = ring + record % S::kStages * S::kRecordQuads;
    RecordCodes<kBits> codes[1];
    codes[0].Load(stage, lane);
    const uint4* const scales[1] = {stage + RecordCodes<kBits>::kQuads};
    const auto inputs = [&](int pair, int j, int plane) {
      return *reinterpret_cast<const uint4*>(x[j] + plane * layout.rows * layout.width +
                                             static_cast<int64_t>(record) * kRecordInputs +
                                             pair * 64);
    };
    sums.template Add<kBits>(codes, scales, table, lane, inputs, part);
  }

  __syncthreads();  // all are done with their rings
  auto* parts = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = j * kEight + lane % 4 * 2 + e % 2, col = lane / 4 + e / 2 * 8;
      parts[(warp * S::kRows + row) * kRecordOutputs + col] = part[0][j][e];
    }
  }
  __syncthreads();
  constexpr int kElements = S::kRows * kRecordOutputs;
  for (int i = threadIdx.x; i < kElements; i += kThreads) {
    float total = 0;
#pragma unroll
    for (int p = 0; p < kParts; ++p) total += parts[p * kElements + i];
    StoreTotal(args, first_row + i / kRecordOutputs,
               static_cast<int64_t>(blockIdx.x) * kRecordOutputs + i % kRecordOutputs, total);
  }
}

// For many rows: 8 warps, four across outputs, with 16 or 32 each, and two across rows of x, with
// 32 each.
template <int kBits, int kPlanes>
struct TiledShape {
  static constexpr int kAcross = 4, kDown = kWarps / kAcross;
  static constexpr int kTiles = kBits == 8 ? 1 : 2;  // of a warp, as registers allow
  static constexpr int kEights = 4;
  static constexpr int kOutputs = kAcross * kTiles * kRecordOutputs;
  static constexpr int kRows = kDown * kEights * kEight;
  static constexpr int kStages = 2;  // one is multiplied, one on its way
  static constexpr int kInputQuads = kPlanes * kRows * kRecordInputs / 16;
  static constexpr int kStageQuads = kInputQuads + kAcross * kTiles * RecordCodes<kBits>::kQuads;
  static constexpr int kSharedBytes = kStages * kStageQuads * 16;
  static_assert(kSharedBytes <= kMostSharedBytes);
};

// Grid: [M / 64, N / outputs]. Block: 8 warps compute a tile of the output, part after part.
// Shared: a ring of records, of x as [plane][pair][row][64 bytes], in which eight neighbouring
// lanes read 128 bytes in a row, and codes as [tile][their quads].
template <int kBits, int kPlanes>
__global__ void __launch_bounds__(kThreads, 1)
    TiledKernel(const __grid_constant__ LowBitMatMulLaunch args) {
  using T = TiledShape<kBits, kPlanes>;
  constexpr int kCodeQuads = RecordCodes<kBits>::kQuads;
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * T::kRows;
  const int64_t first_tile = static_cast<int64_t>(blockIdx.y) * (T::kAcross * T::kTiles);
  const int warp_tile = warp % T::kAcross * T::kTiles;
  const int warp_row = warp / T::kAcross * (T::kEights * kEight);
  const auto records = static_cast<int>(args.layout.Records());
  const int part_records = (records + kParts - 1) / kParts;
  const LowBitInputLayout layout(args.layout, args.m);
  const auto record_quads = static_cast<int>(args.layout.RecordBytes() / 16);
  // The records of a tile of outputs; what is beyond N reads what is not stored.
  const auto tile_at = [&](int tile) {
    return reinterpret_cast<const uint4*>(args.weight) +
           min(first_tile + tile, args.layout.Tiles() - 1) * records * record_quads;
  };

  // Sixteen threads copy a row of a record of x; a warp copies a tile's codes.
  const int copy_row = threadIdx.x / 16, copy_quad = threadIdx.x % 16;
  const auto rows_left = static_cast<int>(min(args.m - first_row, static_cast<int64_t>(T::kRows)));
  const std::byte* copy_from = args.inputs + (first_row + copy_row) * layout.width + copy_quad * 16;
  const auto begin_copy = [&](int record) {
    if (record < records) {
      uint4* to = shared + record % T::kStages * T::kStageQuads;
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
        for (int row = 0; row < T::kRows; row += kThreads / 16) {
          CopyAsync(to + ((plane * kPairs + copy_quad / 4) * T::kRows + row + copy_row) * 4 +
                        copy_quad % 4,
                    copy_from + (plane * layout.rows + row) * layout.width +
                        static_cast<int64_t>(record) * kRecordInputs,
                    row + copy_row < rows_left ? 16 : 0);
        }
      }
      to += T::kInputQuads;
      for (int tile = warp; tile < T::kAcross * T::kTiles; tile += kWarps) {
        const uint4* from = tile_at(tile) + static_cast<int64_t>(record) * record_quads;
#pragma unroll
        for (int quad = lane; quad < kCodeQuads; quad += kWarpSize) {
          CopyAsync(to + tile * kCodeQuads + quad, from + quad);
        }
      }
    }
    CommitCopies();
  };

  const Table table = TableOf(args);
  const uint4* scales[T::kTiles];  // of the next record
#pragma unroll
  for (int i = 0; i < T::kTiles; ++i) scales[i] = tile_at(warp_tile + i) + kCodeQuads;
  float total[T::kTiles][T::kEights][4] = {};
  ChunkSums<kPlanes, T::kTiles, T::kEights> sums(args, first_row + warp_row, 0, lane);
  begin_copy(0);
  for (int record = 0; record < records;) {
    float part[T::kTiles][T::kEights][4] = {};
    const int end = min(record + part_records, records);
    for (; record < end; ++record) {
      WaitForCopies<0>();
      __syncthreads();  // the record is there, and all are done with the one before
      begin_copy(record + 1);
      const uint4* stage = shared + record % T::kStages * T::kStageQuads;
      RecordCodes<kBits> codes[T::kTiles];
#pragma unroll
      for (int i = 0; i < T::kTiles; ++i) {
        codes[i].Load(stage + T::kInputQuads + (warp_tile + i) * kCodeQuads, lane);
      }
      const auto inputs = [&](int pair, int j, int plane) {
        return stage[((plane * kPairs + pair) * T::kRows + warp_row + j * kEight) * 4 + lane];
      };
      sums.template Add<kBits>(codes, scales, table, lane, inputs, part);
#pragma unroll
      for (int i = 0; i < T::kTiles; ++i) scales[i] += record_quads;
    }
#pragma unroll
    for (int i = 0; i < T::kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < T::kEights; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) total[i][j][e] += part[i][j][e];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < T::kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < T::kEights; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        StoreTotal(args, first_row + warp_row + j * kEight + lane % 4 * 2 + e % 2,
                   (first_tile + warp_tile + i) * kRecordOutputs + lane / 4 + e / 2 * 8,
                   total[i][j][e]);
      }
    }
  }
}

template <int kBits, int kPlanes, int kEights>
cudaError_t LaunchSplit(const LowBitMatMulLaunch& launch, cudaStream_t stream) {
  constexpr int kBytes = SplitShape<kBits, kEights>::kSharedBytes;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      SplitKernel<kBits, kPlanes, kEights>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(launch.layout.Tiles()),
                  static_cast<unsigned>(CeilDiv(launch.m, kEights * kEight)));
  SplitKernel<kBits, kPlanes, kEights><<<grid, kThreads, kBytes, stream>>>(launch);
  return cudaGetLastError();
}

template <int kBits, int kPlanes>
cudaError_t LaunchTiled(const LowBitMatMulLaunch& launch, cudaStream_t stream) {
  constexpr int kBytes = TiledShape<kBits, kPlanes>::kSharedBytes;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      TiledKernel<kBits, kPlanes>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(static_cast<unsigned>(CeilDiv(launch.m, TiledShape<kBits, kPlanes>::kRows)),
                  static_cast<unsigned>(CeilDiv(launch.n, TiledShape<kBits, kPlanes>::kOutputs)));
  TiledKernel<kBits, kPlanes><<<grid, kThreads, kBytes, stream>>>(launch);
  return cudaGetLastError();
}

// Tiles are for many rows; fewer of them than would keep three quarters of the multiprocessors busy
// give way to blocks of one tile of outputs, which read the weight once for every 16 rows.
template <int kBits, int kPlanes>
cudaError_t LaunchBits(const LowBitMatMulLaunch& launch, cudaStream_t stream) {
  using T = TiledShape<kBits, kPlanes>;
  if (launch.m <= kEight) return LaunchSplit<kBits, kPlanes, 1>(launch, stream);
  const int64_t blocks = CeilDiv(launch.m, T::kRows) * CeilDiv(launch.n, T::kOutputs);
  if (launch.m <= 2 * kEight || 4 * blocks < 3 * launch.num_multiprocessors) {
    return LaunchSplit<kBits, kPlanes, 2>(launch, stream);
  }
  return LaunchTiled<kBits, kPlanes>(launch, stream);
}

template <int kBits>
cudaError_t LaunchPlanes(const LowBitMatMulLaunch& launch, cudaStream_t stream) {
  return launch.layout.planes == 1 ? LaunchBits<kBits, 1>(launch, stream)
                                   : LaunchBits<kBits, 2>(launch, stream);
}

}  // namespace

cudaError_t LaunchLowBitMatMul(const LowBitMatMulLaunch& launch, cudaStream_t stream) {
  LowBitMatMulLaunch with_table = launch;
  LowBitCodes(launch.spec).FillTable(with_table.table);
  switch (launch.layout.bits) {
    case 2:
      return LaunchPlanes<2>(with_table, stream);
    case 3:
      return LaunchPlanes<3>(with_table, stream);
    case 4:
      return LaunchPlanes<4>(with_table, stream);
    default:
      return LaunchPlanes<8>(with_table, stream);
  }
}

}  // namespace innerq::cuda
