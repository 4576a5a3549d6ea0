// Attention on tensor cores, prefill and decode, over caches in CodeOrder::kMmaFragment; see
// attention_plan.h for how the work is cut.
//
// D head dimension, N group size, T page_tokens. A strip of 32 tokens is D/32 squares of 32 x 32
// elements of K, and as many of V. A square is the B operand of mma.m16n8k16, four tiles of eight
// columns and two steps of sixteen rows, in the order that FragmentIndex gives it: lane 4g + i has
// what it needs in whole words, and its sums are those of row g and of the eight outer places from
// 8i on. So a lane's scores of K are the weights that it needs as an operand for V, and neither
// crosses lanes.
//
// Rows. A warp has up to 8 rows, M = 16 of a product holds each twice: row g the queries (or
// weights) rounded to F16, row g + 8 what rounding took from them, rounded likewise. The sums of
// both, which one lane has, add up to those of rows of 22 bits. Rows are first scaled by a power of
// two so that their largest element is in [2^14, 2^15), weights by 2^14: x differs from its two
// halves by at most 2^-22 |x|, or, where the lower one is subnormal, 2^-25, which is 2^-39 of the
// largest. F32 arithmetic over D or 32 terms errs more. F16 alone, at 2^-11 |x|, would show in
// caches of 16 and 8 bits, and the second half costs nothing where a token has up to 8 heads.
//
// Codes enter unscaled, as exact integers: OR-ed into the mantissa of 1024 (whose unit is 1), then
// one operation on pairs of halves takes off the 1024 and moves a code down that did not begin at
// bit 0. A symmetric group's zero is implied and taken off here too. The group's scale multiplies
// the finished sum over a square (InnerQ, arXiv 2602.23200):
//   score = sum_g  s_g * (q_g . k_g) + z_g * sum(q_g)
//   out_c = sum_g  s_g * (p_g . v_g) + z_g * sum(p_g)
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/strip_index.h"

namespace innerq::cuda {
namespace {

constexpr int kStages = 3;  // of the ring of sealed strips: one is attended, two are on their way
constexpr int kSide = 32;   // of a square
constexpr float kWeightUnit = 0x1p14f;
constexpr uint32_t kBothHalves = 0x00010001u;

constexpr int kStrips = static_cast<int>(kSegmentStrips);  // a power of two

static_assert(kStripTokens == kSide && kStrips <= kWarpSize);

// A lane's part of the rows that meet a square: the A operands of both steps.
using Rows = uint32_t[2][4];

// log2(size / 32) of a size in {32, 64, 128}.
__device__ int Log2Of32s(int64_t size) { return size == 128 ? 2 : size == 64 ? 1 : 0; }

// A lane's eight elements of a row, as both halves of M.
__device__ void SplitRow(const float (&x)[8], Rows& rows) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const uint32_t high = PackHalves(x[2 * pair], x[2 * pair + 1]);
    const float2 taken = HalvesToFloats(high);
    uint32_t* to = rows[pair / 2] + pair % 2 * 2;
    to[0] = high;
    to[1] = PackHalves(x[2 * pair] - taken.x, x[2 * pair + 1] - taken.y);
  }
}

// Two codes from TileCodeBit `at` of both halves of a word as halves: code - centre.
__device__ uint32_t CodesToHalves(uint32_t codes, uint32_t at, uint32_t centre) {
  const uint32_t base = 0x6400u * kBothHalves;                        // 1024 + code * 2^at
  const uint32_t down = ((15u - at) << 10) * kBothHalves;             // 2^-at
  const uint32_t offset = 0x8000u | (25u - at) << 10 | centre << at;  // -(1024 * 2^-at + centre)
  return MultiplyAddHalves(codes | base, down, offset * kBothHalves);
}

// One square: out[j] += scale[j] * (row . codes of outer place 8i + j). `scales`: those of the
// lane's eight places.
template <int kBits>
__device__ void MultiplyCodes(const uint32_t* codes, const uint16_t* scales, uint32_t centre,
                              const Rows& rows, float* out) {
  uint32_t words[kBits];
  LoadLaneWords<kBits>(codes, static_cast<int>(threadIdx.x % kWarpSize), words);
  const auto factors = *reinterpret_cast<const Words<4>*>(scales);
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    uint32_t b[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      b[pair] = CodesToHalves(TileCodes<kBits>(words, tile, pair),
                              static_cast<uint32_t>(TileCodeBit(kBits, pair)), centre);
    }
    float sums[4] = {};
    MultiplyAdd(rows[0], b[0], b[1], sums);
    MultiplyAdd(rows[1], b[2], b[3], sums);
    const float2 scale = HalvesToFloats(factors.word[tile]);
    out[2 * tile] = fmaf(scale.x, sums[0] + sums[2], out[2 * tile]);
    out[2 * tile + 1] = fmaf(scale.y, sums[1] + sums[3], out[2 * tile + 1]);
  }
}

// out[j] += zero[j] * sum, for the lane's eight places.
__device__ void AddZeros(const uint16_t* zeros, float sum, float* out) {
  const auto words = *reinterpret_cast<const Words<4>*>(zeros);
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    const float2 zero = HalvesToFloats(words.word[tile]);
    out[2 * tile] = fmaf(zero.x, sum, out[2 * tile]);
    out[2 * tile + 1] = fmaf(zero.y, sum, out[2 * tile + 1]);
  }
}

// One square of F16, straight from global memory: out[j] += row . elements of outer place 8i + j.
// `from`: the lane's eight elements of tile 0; those of the next tile lie `stride` further. Only
// the first `num_elements` of each eight count, whatever the bytes of the others.
__device__ void MultiplyHalves(const uint16_t* from, int stride, int num_elements, const Rows& rows,
                               float* out) {
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    const uint4 eight = __ldg(reinterpret_cast<const uint4*>(from + tile * stride));
    uint32_t b[4] = {eight.x, eight.y, eight.z, eight.w};
    if (num_elements < 8) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int left = num_elements - 2 * pair;
        b[pair] &= left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0u;
      }
    }
    float sums[4] = {};
    MultiplyAdd(rows[0], b[0], b[1], sums);
    MultiplyAdd(rows[1], b[2], b[3], sums);
    out[2 * tile] += sums[0] + sums[2];
    out[2 * tile + 1] += sums[1] + sums[3];
  }
}

__device__ MmaSharedShape SharedShape() {
  return {kStages, static_cast<int32_t>(blockDim.x), kStrips};
}

// All that a thread needs to attend strips of its block's tile. Lane 4g + i of warp w has row 8w +
// g of the tile and, of the sums over V, channels 8i to 8i + 7 of every 32.
template <int kDim>
class MmaAttention {
 public:
  static constexpr int kRows = 1, kChannels = kDim / 4;

  __device__ MmaAttention(const AttentionKernelLaunch& args, const PlannedTile& from,
                          const BlockTile& tile, std::byte* shared)
      : args_(args),
        layout_(args.layout),
        from_(from),
        tile_(tile),
        at_(PlanMmaShared(args.layout, SharedShape())),
        shared_(shared),
        heads_(reinterpret_cast<const std::byte**>(shared + at_.heads)),
        thread_(static_cast<int>(threadIdx.x)),
        row_(thread_ / 4),
        last_strip_(static_cast<int>(tile.last_strip)),
        first_sealed_(static_cast<int>(tile.sealed.begin << Log2Of32s(args.layout.page_tokens))),
        end_sealed_(static_cast<int>(tile.sealed.end << Log2Of32s(args.layout.page_tokens))),
        first_(thread_ % 4 * 8),
        outer_(row_ % 8 / 2 * 8 + row_ % 2),
        offset_(StripOffset(args, from, row_)),
        last_offset_(StripOffset(args, from, kMaxTileRows)) {}

  // Accumulates the tile's part of a segment.
  __device__ void AttendSegment(int segment, State<1, kChannels>& state) {
    state.Clear();
    const int begin = segment * kStrips;
    const int end = min(begin + kStrips, last_strip_ + 1);
    const bool has_rows = thread_ / kWarpSize * kMmaWarpRows < from_.num_rows;  // the warp
    __syncthreads();  // all are done with the segment before
    if (begin + thread_ < end) heads_[thread_] = FindHead(begin + thread_);
    __syncthreads();
    for (int strip = begin; strip < begin + kStages - 1; ++strip) BeginCopy(strip, end);
    for (int strip = begin; strip < end; ++strip) {
      BeginCopy(strip + kStages - 1, end);
      WaitForCopies<kStages - 1>();
      __syncthreads();  // what others copied is there
      if (has_rows) AttendStrip(strip, state);
      __syncthreads();  // all are done with the stage that is filled next
    }
  }

  // The thread's part of the total over segments, in shared memory.
  __device__ float& Total(int, int c) {
    return reinterpret_cast<float*>(shared_ + at_.total)[c * blockDim.x + thread_];
  }
  __device__ int row(int) const { return row_; }
  __device__ int channel(int c) const { return c / 8 * kSide + first_ + c % 8; }

 private:
  enum class Queries { kNone, kPlain, kTimesNorm };
  static constexpr int kSquares = kDim / kSide;  // of a strip, keys or values

  __device__ bool IsSealed(int strip) const {
    return strip >= first_sealed_ && strip < end_sealed_;
  }
  // First token of a strip in its page.
  __device__ int FirstToken(int strip) const {
    return strip * kSide & (static_cast<int>(layout_.page_tokens) - 1);
  }
  // The head's part of the page of a strip, sealed or open.
  __device__ const std::byte* FindHead(int strip) const {
    PagedKvView kv = args_.kv;
    kv.layout = &layout_;
    const int page = strip >> Log2Of32s(layout_.page_tokens);
    const PageRef ref = args_.pages[tile_.slice->first_page + page];
    if (IsSealed(strip)) return kv.SealedHead(ref.sealed_id, tile_.kv_head);
    return reinterpret_cast<const std::byte*>(kv.OpenKeys(ref.open_id, tile_.kv_head));
  }
  __device__ const std::byte* HeadOf(int strip) const { return heads_[strip & (kStrips - 1)]; }
  __device__ std::byte* StageOf(int strip) const {
    return shared_ + (strip & (kStrips - 1)) % kStages * at_.stage_bytes;
  }

  // Begins to copy a strip's codes, scales and zeros to its stage, as one group of copies; nothing
  // where the strip is open or after the last.
  __device__ void BeginCopy(int strip, int end) const {
    if (strip < end && IsSealed(strip)) {
      const std::byte* head = HeadOf(strip);
      std::byte* stage = StageOf(strip);
      const int t0 = FirstToken(strip);
      const QuantSpec &key = layout_.key, &value = layout_.value;
      if (key.quantized()) {
        const int num_groups = kDim / kSide >> Log2Of32s(key.group_size);
        CopyRow(head + layout_.key_codes + t0 * kDim * key.bits / 8, kDim * key.bits / 4, stage);
        CopyKeyParams(head + layout_.key_scales, t0, num_groups, stage + at_.key_scales);
        if (key.has_zero()) {
          CopyKeyParams(head + layout_.key_zeros, t0, num_groups, stage + at_.key_zeros);
        }
      }
      if (value.quantized()) {
        const int group_at = (t0 / kSide >> Log2Of32s(value.group_size)) * kDim * 2;
        CopyRow(head + layout_.value_codes + t0 * kDim * value.bits / 8, kDim * value.bits / 4,
                stage + at_.value_codes);
        CopyRow(head + layout_.value_scales + group_at, kDim / 8, stage + at_.value_scales);
        if (value.has_zero()) {
          CopyRow(head + layout_.value_zeros + group_at, kDim / 8, stage + at_.value_zeros);
        }
      }
    }
    CommitCopies();
  }
  __device__ void CopyRow(const std::byte* from, int num_vectors, std::byte* to) const {
    const int step = static_cast<int>(blockDim.x);
    for (int i = thread_; i < num_vectors; i += step) CopyAsync(to + i * 16, from + i * 16);
  }
  // From [D/N][T] to [D/N][32].
  __device__ void CopyKeyParams(const std::byte* from, int t0, int num_groups,
                                std::byte* to) const {
    constexpr int kVectors = kSide * 2 / 16;  // of a group
    const int group_bytes = static_cast<int>(layout_.page_tokens) * 2;
    for (int i = thread_; i < num_groups * kVectors; i += static_cast<int>(blockDim.x)) {
      CopyAsync(to + i * 16, from + i / kVectors * group_bytes + t0 * 2 + i % kVectors * 16);
    }
  }

  __device__ void AttendStrip(int strip, State<1, kChannels>& state) {
    const bool sealed = IsSealed(strip), is_last = strip == last_strip_;
    const std::byte* stage = StageOf(strip);
    // Of halves, where a side has 16 bits.
    const std::byte* halves = HeadOf(strip) + FirstToken(strip) * kDim * 2;
    PrepareQueries(sealed && layout_.normalize_keys);
    float score[8] = {};
    if (sealed && layout_.key.quantized()) {
      ScoreCodes(stage, score);
    } else {
      ScoreHalves(halves + (sealed ? layout_.key_codes : 0), score);
    }
    Rows weights;
    const float sum = Weigh(is_last, score, state, weights);
    if (sealed && layout_.value.quantized()) {
      AddCodes(stage, weights, sum, state);
    } else {
      AddHalves(halves + (sealed ? layout_.value_codes : layout_.open_values),
                is_last ? last_offset_ + 1 : kSide, weights, state);
    }
  }

  // Fills queries_ with the row, times the key norm where keys were divided by it; unit_ with what
  // turns its products into scores, in units of log2; query_sums_ with the sums over squares. Does
  // nothing if they are there already.
  __device__ void PrepareQueries(bool times_norm) {
    const Queries wanted = times_norm ? Queries::kTimesNorm : Queries::kPlain;
    if (wanted == form_) return;
    form_ = wanted;
    const bool present = row_ < from_.num_rows;
    const float* q = args_.q + RowOffset(args_, from_, tile_.kv_head, present ? row_ : 0);
    const float* norm = args_.kv.key_norms;
    norm += times_norm ? (tile_.slice->norm_id * layout_.kv_heads + tile_.kv_head) * kDim : 0;
    float x[kSquares][8];
    float largest = 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int d = channel(c);
      float element = present ? q[d] : 0.0f;
      if (times_norm) element *= norm[d];
      x[c / 8][c % 8] = element;
      largest = fmaxf(largest, fabsf(element));
    }
    // The power of two, and its inverse, that bring the largest into [2^14, 2^15).
    const uint32_t exponent = FloatBits(RowMax(largest)) >> 23;
    const uint32_t bounded = exponent < 15u ? 15u : exponent;
    const float up = FloatFromBits((268u - bounded) << 23);
    unit_ = args_.scale * kLog2E * FloatFromBits((bounded - 14u) << 23);
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[s][j] *= up;
        sum += x[s][j];
      }
      query_sums_[s] = RowSum(sum);
      SplitRow(x[s], queries_[s]);
    }
  }

  __device__ void ScoreCodes(const std::byte* stage, float (&score)[8]) const {
    switch (layout_.key.bits) {
      case 2:
        return ScoreCodesOf<2>(stage, score);
      case 3:
        return ScoreCodesOf<3>(stage, score);
      case 4:
        return ScoreCodesOf<4>(stage, score);
      case 8:
        return ScoreCodesOf<8>(stage, score);
    }
  }
  template <int kBits>
  __device__ void ScoreCodesOf(const std::byte* stage, float (&score)[8]) const {
    const bool has_zero = layout_.key.has_zero();
    const int group_log2 = Log2Of32s(layout_.key.group_size);  // in squares
    const auto* codes = reinterpret_cast<const uint32_t*>(stage);
    const auto* scales = reinterpret_cast<const uint16_t*>(stage + at_.key_scales) + first_;
    const auto* zeros = reinterpret_cast<const uint16_t*>(stage + at_.key_zeros) + first_;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      const int group_at = (s >> group_log2) * kSide;
      MultiplyCodes<kBits>(codes + s * kSide * kBits, scales + group_at,
                           has_zero ? 0u : 1u << (kBits - 1), queries_[s], score);
      if (has_zero) AddZeros(zeros + group_at, query_sums_[s], score);
    }
  }
  // Keys of 16 bits [32][D].
  __device__ void ScoreHalves(const std::byte* keys, float (&score)[8]) const {
    const auto* from = reinterpret_cast<const uint16_t*>(keys) + outer_ * kDim + first_;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      MultiplyHalves(from + s * kSide, 2 * kDim, 8, queries_[s], score);
    }
  }

  // Turns scores into weights, in units of kWeightUnit, and rescales the state. Returns the row's
  // sum over the strip.
  __device__ float Weigh(bool is_last, float (&score)[8], State<1, kChannels>& state,
                         Rows& weights) const {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      score[j] = is_last && first_ + j > offset_ ? -INFINITY : score[j] * unit_;
      largest = fmaxf(largest, score[j]);
    }
    largest = fmaxf(state.largest[0], RowMax(largest));
    const float keep = exp2f(state.largest[0] - largest);
    float weight[8], sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      weight[j] = exp2f(score[j] - largest) * kWeightUnit;
      sum += weight[j];
    }
    sum = RowSum(sum);
    SplitRow(weight, weights);
    state.largest[0] = largest;
    state.sum[0] = fmaf(state.sum[0], keep, sum);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) state.values[0][c] *= keep;
    return sum;
  }

  __device__ void AddCodes(const std::byte* stage, const Rows& weights, float sum,
                           State<1, kChannels>& state) const {
    switch (layout_.value.bits) {
      case 2:
        return AddCodesOf<2>(stage, weights, sum, state);
      case 3:
        return AddCodesOf<3>(stage, weights, sum, state);
      case 4:
        return AddCodesOf<4>(stage, weights, sum, state);
      case 8:
        return AddCodesOf<8>(stage, weights, sum, state);
    }
  }
  template <int kBits>
  __device__ void AddCodesOf(const std::byte* stage, const Rows& weights, float sum,
                             State<1, kChannels>& state) const {
    const bool has_zero = layout_.value.has_zero();
    const auto* codes = reinterpret_cast<const uint32_t*>(stage + at_.value_codes);
    const auto* scales = reinterpret_cast<const uint16_t*>(stage + at_.value_scales) + first_;
    const auto* zeros = reinterpret_cast<const uint16_t*>(stage + at_.value_zeros) + first_;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      float* out = state.values[0] + s * 8;
      MultiplyCodes<kBits>(codes + s * kSide * kBits, scales + s * kSide,
                           has_zero ? 0u : 1u << (kBits - 1), weights, out);
      if (has_zero) AddZeros(zeros + s * kSide, sum, out);
    }
  }
  // Values of 16 bits [4][D][8 tokens], of which the first `num_tokens` count.
  __device__ void AddHalves(const std::byte* values, int num_tokens, const Rows& weights,
                            State<1, kChannels>& state) const {
    const auto* from = reinterpret_cast<const uint16_t*>(values) + (first_ * kDim + outer_ * 8);
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      MultiplyHalves(from + s * kSide * 8, 2 * 8, num_tokens - first_, weights,
                     state.values[0] + s * 8);
    }
  }

  const AttentionKernelLaunch& args_;
  const KvLayerLayout& layout_;
  const PlannedTile& from_;
  const BlockTile& tile_;
  const MmaShared at_;
  std::byte* const shared_;
  const std::byte** const heads_;  // of the segment's strips, in shared memory
  const int thread_, row_, last_strip_;
  const int first_sealed_, end_sealed_;  // strips that the tokens see sealed
  const int first_;  // of the lane's eight inner places, and of the outer ones of its sums
  const int outer_;  // outer place that the lane's codes of tile 0 have
  const int offset_, last_offset_;  // of the row's and the last row's token in their strip
  Rows queries_[kSquares];
  float query_sums_[kSquares];
  float unit_ = 0;
  Queries form_ = Queries::kNone;
};

// Grid: [items, G]. Block: a warp for every 8 rows of a tile; attends one segment of it for one
// key/value head, or all of it. Shared: PlanMmaShared: a ring of sealed strips, the total of
// segments, addresses of pages.
//
// Registers: 168 at D = 128, 96 to 128 at D = 64, of which a few words spill; with more to spend
// the compiler takes 230 to load ahead, which the ring does already. Shared memory: 15 KB for one
// warp at 3 bits and D = 128. So 12 warps share a multiprocessor of sm_90, 10 of sm_80.
template <int kDim>
__global__ void __launch_bounds__(MmaWarps(kMaxTileRows) * kWarpSize)
    MmaAttentionKernel(const __grid_constant__ AttentionKernelLaunch args) {
  extern __shared__ uint4 shared[];
  const AttentionItem item = args.items[blockIdx.x];
  if (item.tile < 0) return;
  const PlannedTile from = args.tiles[item.tile];
  const BlockTile tile = TileOf(args, from);
  MmaAttention<kDim> attention(args, from, tile, reinterpret_cast<std::byte*>(shared));
  AttendItem(args, item, from, tile.kv_head, attention);
}

template <int kDim>
cudaError_t Launch(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(launch.num_items),
                  static_cast<unsigned>(launch.layout.kv_heads));
  const int threads = MmaWarps(launch.tile_rows) * kWarpSize;
  const MmaShared shared = PlanMmaShared(launch.layout, {kStages, threads, kStrips});
  const auto bytes = static_cast<size_t>(shared.bytes);
  MmaAttentionKernel<kDim><<<grid, threads, bytes, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchMmaAttention(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  return launch.layout.head_dim == 64 ? Launch<64>(launch, stream) : Launch<128>(launch, stream);
}

}  // namespace innerq::cuda
