// Attention over open and sealed pages, prefill and decode, for every shape of head and group; see
// attention_plan.h for how the work is cut. attention_mma.cuh has the shapes of tensor cores.
//
// R rows of a tile, C channels of V that a lane sums, D head dimension, Dp D rounded up to 16,
// T page_tokens, N group size. The cache is in CodeOrder::kRowMajor.
//
// Strips of 32 tokens: see attention_strip.cuh.
#include "kernels/cuda/attention_strip.cuh"
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/strip_index.h"

namespace innerq::cuda {
namespace {

// All that a warp needs to attend strips of its tile.
template <int R, int C>
class TileAttention {
 public:
  static constexpr int kRows = R, kChannels = C;
  static constexpr bool kMerges = true;

  __device__ TileAttention(const AttentionKernelLaunch& args, const PlannedTile& tile,
                           float* shared)
      : args_(args),
        layout_(args.layout),
        tile_(tile),
        kv_head_(blockIdx.y),
        kv_(args.kv),
        dim_(static_cast<int>(args.layout.head_dim)),
        padded_(static_cast<int>(args.layout.padded_dim())),
        lane_(static_cast<int>(threadIdx.x)) {
    kv_.layout = &args.layout;
    const AttentionShared at = PlanAttentionShared(layout_, R, C);
    q_ = shared + at.q;
    weights_ = shared + at.weights;
    q_sums_ = shared + at.q_sums;
    total_ = shared + at.total;
    strip_ = reinterpret_cast<uint32_t*>(shared + at.strip);
#pragma unroll
    for (int r = 0; r < R; ++r) offset_[r] = StripOffset(args, tile, r);
  }

  // Accumulates the tile's part of a segment.
  __device__ void AttendSegment(int64_t segment, State<R, C>& state) {
    state.Clear();
    const int64_t begin = segment * kSegmentStrips;
    const int64_t end = min(begin + kSegmentStrips, static_cast<int64_t>(tile_.last_strip) + 1);
    for (int64_t strip = begin; strip < end; ++strip) AttendStrip(strip, state);
  }

  // The lane's part of the total over segments, in shared memory.
  __device__ float& Total(int r, int c) { return total_[(r * C + c) * kWarpSize + lane_]; }
  __device__ int row(int r) const { return r; }
  __device__ int channel(int c) const { return lane_ * C + c; }

 private:
  enum class Queries { kNone, kPlain, kTimesNorm };

  __device__ void AttendStrip(int64_t strip, State<R, C>& state) {
    const int64_t first_token = strip * kStripTokens;
    const int64_t page = first_token / layout_.page_tokens;
    const int t0 = static_cast<int>(first_token % layout_.page_tokens);
    const PageRef ref = args_.pages[tile_.first_page + page];
    const bool sealed = strip >= tile_.sealed_begin && strip < tile_.sealed_end;
    float score[R] = {};
    __syncwarp();  // all lanes are done with the strip before
    if (sealed) {
      PrepareQueries(layout_.normalize_keys ? Queries::kTimesNorm : Queries::kPlain);
      ScoreSealed(kv_.SealedHead(ref.sealed_id, kv_head_), t0, score);
    } else {
      PrepareQueries(Queries::kPlain);
      const uint16_t* keys = kv_.OpenKeys(ref.open_id, kv_head_);
      ScoreHalfStrip(reinterpret_cast<const std::byte*>(keys + layout_.OpenKeyIndex(t0, 0)), score);
    }
    const bool is_last = strip == tile_.last_strip;
    Weigh(is_last, score, state);
    __syncwarp();  // weights are written, keys are read
    if (sealed) {
      AddSealed(kv_.SealedHead(ref.sealed_id, kv_head_), t0, state);
    } else {
      const uint16_t* values = kv_.OpenValues(ref.open_id, kv_head_);
      AddHalfStrip(reinterpret_cast<const std::byte*>(values + layout_.OpenValueIndex(t0, 0)),
                   is_last ? offset_[R - 1] + 1 : kWarpSize, state);
    }
  }

  // Fills q_ [D][R] with scale * log2(e) * q, times the key norm where keys were divided by it, and
  // q_sums_ [D / N][R] with the sums of its groups. Does nothing if they are there already.
  __device__ void PrepareQueries(Queries wanted) {
    if (wanted == queries_) return;
    queries_ = wanted;
    const float* norm =
        wanted == Queries::kTimesNorm ? kv_.KeyNorm(tile_.norm_id, kv_head_) : nullptr;
    const float unit = args_.scale * kLog2E;
    for (int r = 0; r < R; ++r) {
      const bool present = r < tile_.num_rows;
      const float* q = args_.q + (present ? RowOffset(args_, tile_, kv_head_, r) : 0);
      for (int d = lane_; d < dim_; d += kWarpSize) {
        float x = present ? q[d] * unit : 0.0f;
        if (norm != nullptr) x *= norm[d];
        q_[d * R + r] = x;
      }
    }
    __syncwarp();
    if (layout_.key.has_zero() && layout_.key.axis == QuantAxis::kInner) {
      const int size = layout_.key.group_size;
      for (int i = lane_; i < dim_ / size * R; i += kWarpSize) {
        float sum = 0;
        for (int d = i / R * size; d < (i / R + 1) * size; ++d) sum += q_[d * R + i % R];
        q_sums_[i] = sum;
      }
      __syncwarp();
    }
  }

  // Keys of 16 bits, open or sealed, from their first byte of the strip on.
  __device__ void ScoreHalfStrip(const std::byte* keys, float (&score)[R]) {
    const PackedRows rows = PackRows(kWarpSize, dim_, 16);
    CopyStrip(keys, rows, strip_);
    __syncwarp();
    ScoreHalves<R>(strip_ + lane_ * rows.lane_words, q_, dim_, score);
  }

  // Keys of a sealed page from token t0 on.
  __device__ void ScoreSealed(const std::byte* page, int t0, float (&score)[R]) {
    const QuantSpec& spec = layout_.key;
    const std::byte* codes = page + layout_.key_codes + layout_.KeyCodeIndex(t0, 0) * spec.bits / 8;
    if (!spec.quantized()) return ScoreHalfStrip(codes, score);
    const PackedRows rows = PackRows(kWarpSize, dim_, spec.bits);
    CopyStrip(codes, rows, strip_);
    __syncwarp();
    const CodeFormat format = FormatOf(spec);
    const uint32_t* row = strip_ + lane_ * rows.lane_words;
    const int first_bit = lane_ * rows.lane_bits;
    const auto at = layout_.KeyScaleIndex(t0 + lane_, 0);
    const auto* scales = reinterpret_cast<const uint16_t*>(page + layout_.key_scales) + at;
    const auto* zeros = reinterpret_cast<const uint16_t*>(page + layout_.key_zeros) + at;
    if (spec.axis == QuantAxis::kInner) {
      ScoreInner<R>(row, first_bit, format, layout_, scales, zeros, q_, q_sums_, score);
    } else {
      ScoreOuter<R>(row, first_bit, format, dim_, scales, zeros, q_, score);
    }
  }

  // Turns the lanes' scores into weights, in shared memory [32][R], and rescales the state.
  __device__ void Weigh(bool is_last, const float (&score)[R], State<R, C>& state) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float visible = is_last && lane_ > offset_[r] ? -INFINITY : score[r];
      const float largest = fmaxf(state.largest[r], WarpMax(visible));
      const float keep = exp2f(state.largest[r] - largest);
      const float weight = exp2f(visible - largest);
      state.largest[r] = largest;
      state.sum[r] = fmaf(state.sum[r], keep, WarpSum(weight));
      weights_[lane_ * R + r] = weight;
#pragma unroll
      for (int c = 0; c < C; ++c) state.values[r][c] *= keep;
    }
  }

  // Values of 16 bits, open or sealed, from their first byte of the strip on.
  __device__ void AddHalfStrip(const std::byte* values, int num_tokens, State<R, C>& state) {
    CopyStrip(values, PackRowsDensely(kWarpSize, padded_, 16), strip_);
    __syncwarp();
    if (channel(0) >= dim_) return;
    AddHalves<R, C>(strip_, padded_, channel(0), num_tokens, weights_, state.values);
  }

  // Values of a sealed page from token t0 on.
  __device__ void AddSealed(const std::byte* page, int t0, State<R, C>& state) {
    const QuantSpec& spec = layout_.value;
    const std::byte* codes =
        page + layout_.value_codes + layout_.ValueCodeIndex(t0, 0) * spec.bits / 8;
    if (!spec.quantized()) return AddHalfStrip(codes, kWarpSize, state);
    CopyStrip(codes, PackRowsDensely(kWarpSize, padded_, spec.bits), strip_);
    __syncwarp();
    if (channel(0) >= dim_) return;
    const CodeFormat format = FormatOf(spec);
    const auto at = layout_.ValueScaleIndex(t0, channel(0));
    const auto* scales = reinterpret_cast<const uint16_t*>(page + layout_.value_scales) + at;
    const auto* zeros = reinterpret_cast<const uint16_t*>(page + layout_.value_zeros) + at;
    if (spec.axis == QuantAxis::kInner) {
      AddInner<R, C>(strip_, format, layout_, channel(0), scales, zeros, weights_, state.values);
    } else {
      AddOuter<R, C>(strip_, format, padded_, channel(0), scales, zeros, weights_, state.values);
    }
  }

  const AttentionKernelLaunch& args_;
  const KvLayerLayout& layout_;
  const PlannedTile& tile_;
  const int64_t kv_head_;
  PagedKvView kv_;
  const int dim_, padded_, lane_;
  int offset_[R];  // of each row's token in its strip
  Queries queries_ = Queries::kNone;
  float *q_, *weights_, *q_sums_, *total_;
  uint32_t* strip_;
};

// Grid: [items, G]. Block: one warp attends an item's segments for one key/value head. Shared:
// PlanAttentionShared: queries, weights, the total of segments, a strip of keys or values.
template <int R, int C>
__global__ void __launch_bounds__(kWarpSize)
    AttentionKernel(const __grid_constant__ AttentionKernelLaunch args) {
  extern __shared__ float4 shared[];
  const AttentionItem item = args.items[blockIdx.x];
  if (item.tile < 0) return;
  const PlannedTile tile = args.tiles[item.tile];
  TileAttention<R, C> attention(args, tile, reinterpret_cast<float*>(shared));
  AttendItem(args, item, tile, attention);
}

constexpr int kMergeThreads = 128;
constexpr int kMergeAhead = 32;  // states that are read at once

// Grid: [tiles, G, rows of a tile]. Block: 128 threads merge the segments of one row in order, a
// channel each at a time. No shared memory.
__global__ void MergeKernel(const __grid_constant__ AttentionKernelLaunch args) {
  const PlannedTile tile = args.tiles[blockIdx.x];
  const int row = static_cast<int>(blockIdx.z);
  if (row >= tile.num_rows) return;
  const int64_t dim = args.layout.head_dim;
  float* out = args.out + RowOffset(args, tile, blockIdx.y, row);
  const float* states =
      args.states + StateIndex(tile, args.tile_rows, blockIdx.y, 0, row) * StateFloats(dim);
  const int64_t stride = args.tile_rows * StateFloats(dim);  // from segment to segment
  for (int64_t c = threadIdx.x; c < dim; c += kMergeThreads) {
    float largest = -INFINITY, sum = 0, value = 0;
    for (int begin = 0; begin < tile.num_segments; begin += kMergeAhead) {
      const int count = min(kMergeAhead, tile.num_segments - begin);
      float largests[kMergeAhead], sums[kMergeAhead], values[kMergeAhead];
#pragma unroll
      for (int i = 0; i < kMergeAhead; ++i) {
        const float* state = states + (begin + min(i, count - 1)) * stride;
        largests[i] = __ldg(state + dim);
        sums[i] = __ldg(state + dim + 1);
        values[i] = __ldg(state + c);
      }
#pragma unroll
      for (int i = 0; i < kMergeAhead; ++i) {
        if (i >= count) break;
        if (begin + i == 0) {
          largest = largests[0];
          sum = sums[0];
          value = values[0];
          continue;
        }
        const MergeWeights weights = WeightsOf(largest, largests[i]);
        largest = weights.largest;
        sum = Merge(weights, sum, sums[i]);
        value = Merge(weights, value, values[i]);
      }
    }
    out[c] = value / sum;
  }
}

template <int R, int C>
cudaError_t Launch(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  const auto kv_heads = static_cast<unsigned>(launch.layout.kv_heads);
  const dim3 grid(static_cast<unsigned>(launch.num_items), kv_heads);
  const auto bytes =
      static_cast<size_t>(PlanAttentionShared(launch.layout, R, C).floats) * sizeof(float);
  AttentionKernel<R, C><<<grid, kWarpSize, bytes, stream>>>(launch);
  return cudaGetLastError();
}

template <int C>
cudaError_t LaunchForRows(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  switch (launch.tile_rows) {
    case 1:
      return Launch<1, C>(launch, stream);
    case 2:
      return Launch<2, C>(launch, stream);
    case 4:
      return Launch<4, C>(launch, stream);
    case 8:
      if constexpr (C < 8) return Launch<8, C>(launch, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t LaunchForShape(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  if (launch.layout.order == CodeOrder::kMmaFragment) {
    return launch.layout.head_dim == 64 ? LaunchMmaAttention64(launch, stream)
                                        : LaunchMmaAttention128(launch, stream);
  }
  switch (LaneChannels(launch.layout.head_dim)) {
    case 2:
      return LaunchForRows<2>(launch, stream);
    case 4:
      return LaunchForRows<4>(launch, stream);
    case 8:
      return LaunchForRows<8>(launch, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t LaunchAttention(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  if (const cudaError_t error = LaunchForShape(launch, stream);
      error != cudaSuccess || !launch.split) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(launch.num_tiles),
                  static_cast<unsigned>(launch.layout.kv_heads),
                  static_cast<unsigned>(launch.tile_rows));
  MergeKernel<<<grid, kMergeThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace innerq::cuda
