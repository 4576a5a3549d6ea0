// What the attention kernels have in common: the tile of a block, the state of its softmax, and the
// walk over segments; see attention_plan.h for how the work is cut.
#pragma once

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace innerq::cuda {

constexpr float kLog2E = 1.44269504f;

// The part of LaunchAttention for caches in CodeOrder::kMmaFragment, without the merge, by D.
cudaError_t LaunchMmaAttention64(const AttentionKernelLaunch& launch, cudaStream_t stream);
cudaError_t LaunchMmaAttention128(const AttentionKernelLaunch& launch, cudaStream_t stream);

// Where a row's token lies in its strip. Rows that a tile has not got have the last one's.
__device__ inline int StripOffset(const AttentionKernelLaunch& args, const PlannedTile& tile,
                                  int row) {
  return tile.first_offset + (tile.first_head + min(row, tile.num_rows - 1)) / args.group;
}

// Where a row of a tile begins in q and out, in elements.
__device__ inline int64_t RowOffset(const AttentionKernelLaunch& args, const PlannedTile& tile,
                                    int64_t kv_head, int row) {
  const int f = tile.first_head + row;
  const int64_t token = tile.first_token + f / args.group;
  return (token * args.num_heads + kv_head * args.group + f % args.group) * args.layout.head_dim;
}

// The softmax of a lane's R rows over a segment so far, of C channels. `largest` and `sum` are
// equal in all lanes that have a row.
template <int R, int C>
struct State {
  float largest[R];  // score, in units of log2
  float sum[R];      // of weights: 2^(score - largest), times a factor of the kernel's
  float values[R][C];

  __device__ void Clear() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      largest[r] = -INFINITY;
      sum[r] = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) values[r][c] = 0;
    }
  }
};

// Weights of two states in their merge: 2^(largest - larger of both).
struct MergeWeights {
  float largest, before, after;
};
__device__ inline MergeWeights WeightsOf(float before, float after) {
  const float largest = fmaxf(before, after);
  return {largest, exp2f(before - largest), exp2f(after - largest)};
}
__device__ inline float Merge(const MergeWeights& weights, float before, float after) {
  return fmaf(before, weights.before, after * weights.after);
}

// Writes the state of a segment to where it is kept, or, if there are no others, the rows to `out`.
template <typename Attention, int R, int C>
__device__ void WriteSegment(const AttentionKernelLaunch& args, const PlannedTile& tile,
                             int segment, const Attention& attention, const State<R, C>& state) {
  const int64_t dim = args.layout.head_dim;
  const auto kv_head = static_cast<int64_t>(blockIdx.y);
  if (attention.channel(0) >= dim) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = attention.row(r);
    if (row >= tile.num_rows) continue;
    float* to = args.split ? args.states + StateIndex(tile, args.tile_rows, kv_head, segment, row) *
                                               StateFloats(dim)
                           : args.out + RowOffset(args, tile, kv_head, row);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      to[attention.channel(c)] =
          args.split ? state.values[r][c] : state.values[r][c] / state.sum[r];
    }
    if (args.split && attention.channel(0) == 0) {
      to[dim] = state.largest[r];
      to[dim + 1] = state.sum[r];
    }
  }
}

// Attends to an item: keeps the states of its segments, or merges them in order and writes the rows
// out. `attention` has, for a lane: kRows and kChannels; row(r), channel(c), counted in the tile
// and in the head; AttendSegment; kMerges: it may be given several segments that are not split, and
// has Total(r, c), which only that lane uses.
template <typename Attention>
__device__ void AttendItem(const AttentionKernelLaunch& args, const AttentionItem& item,
                           const PlannedTile& tile, Attention& attention) {
  constexpr int R = Attention::kRows, C = Attention::kChannels;
  State<R, C> state;
  float largest[R] = {}, sum[R] = {};  // of the segments before
  for (int segment = item.begin; segment < item.end; ++segment) {
    attention.AttendSegment(segment, state);
    if constexpr (Attention::kMerges) {
      if (!args.split) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (segment > item.begin) {
            const MergeWeights weights = WeightsOf(largest[r], state.largest[r]);
            state.largest[r] = weights.largest;
            state.sum[r] = Merge(weights, sum[r], state.sum[r]);
#pragma unroll
            for (int c = 0; c < C; ++c) {
              state.values[r][c] = Merge(weights, attention.Total(r, c), state.values[r][c]);
            }
          }
          largest[r] = state.largest[r];
          sum[r] = state.sum[r];
#pragma unroll
          for (int c = 0; c < C; ++c) attention.Total(r, c) = state.values[r][c];
        }
        if (segment + 1 < item.end) continue;
      }
    }
    WriteSegment(args, tile, segment, attention, state);
  }
}

}  // namespace innerq::cuda
