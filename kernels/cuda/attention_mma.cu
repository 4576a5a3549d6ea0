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
// Codes enter unscaled, as exact integers: masked out of their word they are subnormal halves,
// code * 2^(at - 24), and the places of a row that meet codes at bit `at` are taken times 2^-at
// (TileCodeBit). A symmetric group's zero is implied: it is what the sum starts from. The group's
// scale multiplies the finished sum over a square (InnerQ, arXiv 2602.23200):
//   score = sum_g  s_g * (q_g . k_g) + z_g * sum(q_g)
//   out_c = sum_g  s_g * (p_g . v_g) + z_g * sum(p_g)
//
// Teams. A segment's strips are cut in parts of kPartStrips; a row's softmax is accumulated strip
// by strip within a part, and the states of parts are merged in order. Where a tile has no more
// rows than a warp takes (decode), a block has kTeams warps, each of which attends its part of the
// segment by itself, with stages of its own. Else the block's warps, each with rows of its own,
// share the strips, and go through the parts one after the other. Both do the same operations on a
// row.
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/strip_index.h"

namespace innerq::cuda {
namespace {

// Stages of a team's ring of sealed strips: one is attended, the others are on their way.
constexpr int kMostStages = 3, kLeastStages = 2;
constexpr int32_t kLargeStage = 4096;  // bytes; of larger ones two are enough, and all that fit

constexpr int kSide = 32;  // of a square
constexpr float kWeightUnit = 0x1p14f;
constexpr float kCodeUnit = 0x1p-24f;  // of subnormal halves
constexpr int kHalfBits = 16;          // of sides that are not quantized

constexpr int kStrips = static_cast<int>(kSegmentStrips);
constexpr int kPartStrips = kStrips / kMmaTeams;

constexpr int kMmaThreads = MmaWarps(kMaxTileRows) * kWarpSize;
constexpr int kBlocksPerSm = 3;  // registers and shared memory are for so many

static_assert(kStripTokens == kSide && kStrips % kMmaTeams == 0);
static_assert(kMmaTeams * kWarpSize == kMmaThreads);

// A lane's part of the rows that meet a square: the A operands of both steps.
using Rows = uint32_t[2][4];

// log2(size / 32) of a size in {32, 64, 128}.
__device__ int Log2Of32s(int64_t size) { return size == 128 ? 2 : size == 64 ? 1 : 0; }

// How a warp's eight rows meet keys: times the key norm where keys were divided by it, and ready
// for codes or for halves. In shared memory.
template <int kDim>
struct QueryForm {
  struct alignas(16) Square {
    Rows lanes[kWarpSize];
  };
  Square rows[kDim / kSide];
  float sums[kDim / kSide][kMmaWarpRows];  // over squares, in kCodeUnit
  float unit[kMmaWarpRows];                // times a product: a score, in units of log2
};
static_assert(sizeof(QueryForm<64>) == QueryFormBytes(64));
static_assert(sizeof(QueryForm<128>) == QueryFormBytes(128));

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

// The power of two that a row's elements are taken times where they meet the codes of register
// `pair`, whatever the tile.
__device__ float PairUnit(int bits, int pair) {
  const int at = bits == kHalfBits ? 0 : TileCodeBit(bits, pair);
  return FloatFromBits(static_cast<uint32_t>(127 - at) << 23);
}

// One square: out[j] += scale[j] * (start + row . codes of outer place 8i + j), in kCodeUnit.
// `scales`: those of the lane's eight places.
template <int kBits>
__device__ void MultiplyCodes(const uint32_t* codes, const uint16_t* scales, float start,
                              const Rows& rows, float* out) {
  uint32_t words[kBits];
  LoadLaneWords<kBits>(codes, static_cast<int>(threadIdx.x % kWarpSize), words);
  const auto factors = *reinterpret_cast<const Words<4>*>(scales);
  const float from[4] = {start, start, 0, 0};
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    uint32_t b[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) b[pair] = TileCodes<kBits>(words, tile, pair);
    float sums[4];
    Multiply(rows[0], b[0], b[1], from, sums);
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

// One square of F16, straight from global memory: out[j] += unit * (row . elements of outer place
// 8i
// + j).
// `from`: the lane's eight elements of tile 0; those of the next tile lie `stride` further. Only
// the first `num_elements` of each eight count, whatever the bytes of the others.
__device__ void MultiplyHalves(const uint16_t* from, int stride, int num_elements, const Rows& rows,
                               float unit, float* out) {
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
    out[2 * tile] = fmaf(unit, sums[0] + sums[2], out[2 * tile]);
    out[2 * tile + 1] = fmaf(unit, sums[1] + sums[3], out[2 * tile + 1]);
  }
}

INNERQ_HOST_DEVICE MmaSharedShape SharedShape(const KvLayerLayout& layout, unsigned threads,
                                              int teams) {
  const bool large = PlanMmaShared(layout, {1, 1, 1}).stage_bytes > kLargeStage;
  return {large ? kLeastStages : kMostStages, static_cast<int32_t>(threads), teams};
}

// All that a thread needs to attend strips of its block's tile. Lane 4g + i of warp w has row g of
// the tile, or row 8w + g where the warps share strips; of the sums over V it has channels 8i to
// 8i + 7 of every 32 while it attends. What a segment gives is then spread over the warps of all
// teams: warp w has the w-th part of those channels.
template <int kDim, bool kTeamed>
class MmaAttention {
  static constexpr int kTeams = kTeamed ? kMmaTeams : 1;
  static constexpr int kLaneChannels = kDim / 4;

 public:
  static constexpr int kRows = 1, kChannels = kLaneChannels / kTeams;

  __device__ MmaAttention(const AttentionKernelLaunch& args, const AttentionItem& item,
                          const PlannedTile& from, const BlockTile& tile, std::byte* shared)
      : args_(args),
        layout_(args.layout),
        from_(from),
        tile_(tile),
        at_(PlanMmaShared(args.layout, SharedShape(args.layout, blockDim.x, kTeams))),
        shared_(shared),
        thread_(static_cast<int>(threadIdx.x)),
        warp_(thread_ / kWarpSize),
        lane_(thread_ % kWarpSize),
        row_(kTeamed ? lane_ / 4 : thread_ / 4),
        last_strip_(static_cast<int>(tile.last_strip)),
        first_sealed_(FirstStrip(tile.sealed.begin)),
        end_sealed_(FirstStrip(tile.sealed.end)),
        first_strip_(item.segment < 0 ? 0 : item.segment * kStrips),
        end_strip_(item.segment < 0 ? last_strip_ + 1
                                    : min(first_strip_ + kStrips, last_strip_ + 1)),
        first_(lane_ % 4 * 8),
        outer_(row_ % 8 / 2 * 8 + row_ % 2),
        offset_(StripOffset(args, from, row_)),
        last_offset_(StripOffset(args, from, kMaxTileRows)),
        stages_(shared + (kTeamed ? warp_ * at_.team_bytes : 0)),
        forms_(reinterpret_cast<QueryForm<kDim>*>(shared + at_.queries) +
               (kTeamed ? 0 : 2 * warp_)) {
    for (int i = 0; i < at_.num_stages - 1; ++i) BeginCopy();
    for (int form = 0; form < 2; ++form) {
      if (!kTeamed || warp_ == form) PrepareQueries(form == 1);
    }
    __syncthreads();
  }

  // Accumulates the tile's part of a segment. Segments come in order.
  __device__ void AttendSegment(int segment, State<1, kChannels>& state) {
    if constexpr (kTeamed) {
      AttendAsTeams(segment, state);
    } else {
      AttendTogether(segment, state);
    }
  }

  // The thread's part of the total over segments: few floats, or in shared memory.
  __device__ float& Total(int, int c) {
    if constexpr (kTeamed) {
      return total_[c];
    } else {
      return Floats(at_.total)[c * blockDim.x + thread_];
    }
  }
  __device__ int row(int) const { return row_; }
  __device__ int channel(int c) const {
    const int of_lane = (kTeamed ? warp_ * kChannels : 0) + c;
    return of_lane / 8 * kSide + first_ + of_lane % 8;
  }

 private:
  using LaneState = State<1, kLaneChannels>;
  static constexpr int kSquares = kDim / kSide;  // of a strip, keys or values

  __device__ float* Floats(int offset) const { return reinterpret_cast<float*>(shared_ + offset); }
  __device__ int FirstStrip(int64_t page) const {
    return static_cast<int>(page << Log2Of32s(args_.layout.page_tokens));
  }
  __device__ bool IsSealed(int strip) const {
    return strip >= first_sealed_ && strip < end_sealed_;
  }
  // First token of a strip in its page.
  __device__ int FirstToken(int strip) const {
    return strip * kSide & (static_cast<int>(layout_.page_tokens) - 1);
  }
  // The n-th strip that the team comes to.
  __device__ int StripAt(int n) const {
    const int of_segment = kTeamed ? warp_ * kPartStrips + n % kPartStrips : n % kStrips;
    return first_strip_ + n / (kStrips / kTeams) * kStrips + of_segment;
  }
  // Waits for the team, or for all where they are one.
  __device__ void SyncTeam() const {
    if constexpr (kTeamed) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Page of the team's strip n + lane, sealed or open, as the tile's tokens see it.
  __device__ int FindPage(int n) const {
    const int strip = StripAt(n + lane_);
    if (strip >= end_strip_) return -1;
    const int page = strip >> Log2Of32s(layout_.page_tokens);
    const PageRef ref = args_.pages[tile_.slice->first_page + page];
    return IsSealed(strip) ? ref.sealed_id : ref.open_id;
  }
  // The head's part of a page.
  __device__ const std::byte* HeadOf(int page, bool sealed) const {
    PagedKvView kv = args_.kv;
    kv.layout = &layout_;
    if (sealed) return kv.SealedHead(page, tile_.kv_head);
    return reinterpret_cast<const std::byte*>(kv.OpenKeys(page, tile_.kv_head));
  }

  // Begins to copy the team's next strip to its stage, as one group of copies; nothing where it is
  // open or after the last.
  __device__ void BeginCopy() {
    if (copied_ % kWarpSize == 0) pages_to_copy_ = FindPage(copied_);
    const int page = __shfl_sync(kAllLanes, pages_to_copy_, copied_ % kWarpSize);
    const int strip = StripAt(copied_);
    if (strip < end_strip_ && IsSealed(strip)) {
      CopyStrip(HeadOf(page, true), FirstToken(strip), stages_ + copy_stage_ * at_.stage_bytes);
    }
    CommitCopies();
    ++copied_;
    copy_stage_ = copy_stage_ + 1 < at_.num_stages ? copy_stage_ + 1 : 0;
  }
  // A page of one strip lies in memory as its stage does.
  __device__ void CopyStrip(const std::byte* head, int t0, std::byte* stage) const {
    const QuantSpec &key = layout_.key, &value = layout_.value;
    if (layout_.page_tokens == kSide) {
      const int64_t from = key.quantized() ? layout_.key_codes : layout_.value_codes;
      return CopyRow(head + from, at_.stage_bytes / 16, stage);
    }
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
  __device__ int copy_begin() const { return kTeamed ? lane_ : thread_; }
  __device__ int copy_step() const { return kTeamed ? kWarpSize : static_cast<int>(blockDim.x); }
  __device__ void CopyRow(const std::byte* from, int num_vectors, std::byte* to) const {
#pragma unroll 4
    for (int i = copy_begin(); i < num_vectors; i += copy_step()) {
      CopyAsync(to + i * 16, from + i * 16);
    }
  }
  // From [D/N][T] to [D/N][32].
  __device__ void CopyKeyParams(const std::byte* from, int t0, int num_groups,
                                std::byte* to) const {
    constexpr int kVectors = kSide * 2 / 16;  // of a group
    const int group_bytes = static_cast<int>(layout_.page_tokens) * 2;
    for (int i = copy_begin(); i < num_groups * kVectors; i += copy_step()) {
      CopyAsync(to + i * 16, from + i / kVectors * group_bytes + t0 * 2 + i % kVectors * 16);
    }
  }

  // Takes the team's next strip into the state, if there is one.
  __device__ void AttendNext(LaneState& state) {
    BeginCopy();
    if (at_.num_stages == kMostStages) {
      WaitForCopies<kMostStages - 1>();
    } else {
      WaitForCopies<kLeastStages - 1>();
    }
    SyncTeam();  // what others copied is there
    if (attended_ % kWarpSize == 0) pages_to_attend_ = FindPage(attended_);
    const int page = __shfl_sync(kAllLanes, pages_to_attend_, attended_ % kWarpSize);
    const int strip = StripAt(attended_);
    const bool has_rows = kTeamed || warp_ * kMmaWarpRows < from_.num_rows;
    if (strip < end_strip_ && has_rows) {
      AttendStrip(strip, page, stages_ + attend_stage_ * at_.stage_bytes, state);
    }
    SyncTeam();  // all are done with the stage that is filled next
    ++attended_;
    attend_stage_ = attend_stage_ + 1 < at_.num_stages ? attend_stage_ + 1 : 0;
  }

  // Every team attends its part; then all merge the parts in order, each warp some of the channels.
  __device__ void AttendAsTeams(int segment, State<1, kChannels>& state) {
    constexpr int kPartFloats = (kLaneChannels + 2) * kWarpSize;
    LaneState part;
    part.Clear();
    for (int i = 0; i < kPartStrips; ++i) AttendNext(part);
    float* parts = Floats(at_.parts) + lane_;
    __syncthreads();  // all are done with the segment before
    float* own = parts + warp_ * kPartFloats;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) own[c * kWarpSize] = part.values[0][c];
    own[kLaneChannels * kWarpSize] = part.largest[0];
    own[(kLaneChannels + 1) * kWarpSize] = part.sum[0];
    __syncthreads();
    const int num_strips = last_strip_ + 1 - segment * kStrips;
    state.Clear();
    for (int p = 0; p < kTeams && p * kPartStrips < num_strips; ++p) {
      const float* from = parts + p * kPartFloats;
      const float largest = from[kLaneChannels * kWarpSize];
      const float sum = from[(kLaneChannels + 1) * kWarpSize];
      from += warp_ * kChannels * kWarpSize;
      const MergeWeights weights =
          p == 0 ? MergeWeights{largest, 0, 1} : WeightsOf(state.largest[0], largest);
      state.largest[0] = weights.largest;
      state.sum[0] = p == 0 ? sum : Merge(weights, state.sum[0], sum);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float value = from[c * kWarpSize];
        state.values[0][c] = p == 0 ? value : Merge(weights, state.values[0][c], value);
      }
    }
  }

  // All attend part after part; what they had before is kept in shared memory.
  __device__ void AttendTogether(int segment, LaneState& state) {
    float* before = Floats(at_.parts) + thread_;
    float largest = 0, sum = 0;
    const int num_strips = min(kStrips, last_strip_ + 1 - segment * kStrips);
    for (int begin = 0; begin < num_strips; begin += kPartStrips) {
      state.Clear();
      for (int i = begin; i < min(begin + kPartStrips, num_strips); ++i) AttendNext(state);
      if (begin > 0) {
        const MergeWeights weights = WeightsOf(largest, state.largest[0]);
        state.largest[0] = weights.largest;
        state.sum[0] = Merge(weights, sum, state.sum[0]);
#pragma unroll
        for (int c = 0; c < kLaneChannels; ++c) {
          state.values[0][c] = Merge(weights, before[c * blockDim.x], state.values[0][c]);
        }
      }
      if (begin + kPartStrips >= num_strips) break;
      largest = state.largest[0];
      sum = state.sum[0];
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) before[c * blockDim.x] = state.values[0][c];
    }
  }

  __device__ void AttendStrip(int strip, int page, const std::byte* stage, LaneState& state) {
    const bool sealed = IsSealed(strip), is_last = strip == last_strip_;
    // Of halves, where a side has 16 bits.
    const std::byte* halves = HeadOf(page, sealed) + FirstToken(strip) * kDim * 2;
    const QueryForm<kDim>& form = forms_[sealed ? 1 : 0];
    float score[8] = {};
    if (sealed && layout_.key.quantized()) {
      ScoreCodes(stage, score);
    } else {
      ScoreHalves(halves + (sealed ? layout_.key_codes : 0), form, score);
    }
    const float unit = form.unit[row_ % kMmaWarpRows];
    // Scores in units of log2, those of tokens that the row does not see at -infinity.
#pragma unroll
    for (int j = 0; j < 8; ++j) score[j] *= unit;
    if (is_last) {
#pragma unroll
      for (int j = 0; j < 8; ++j) score[j] = first_ + j > offset_ ? -INFINITY : score[j];
    }
    Rows weights;
    if (!sealed || !layout_.value.quantized()) {
      Weigh<kHalfBits>(score, state, weights);
      return AddHalves(halves + (sealed ? layout_.value_codes : layout_.open_values),
                       is_last ? last_offset_ + 1 : kSide, weights, state);
    }
    switch (layout_.value.bits) {
      case 2:
        return AddCodes<2>(stage, score, state);
      case 3:
        return AddCodes<3>(stage, score, state);
      case 4:
        return AddCodes<4>(stage, score, state);
      case 8:
        return AddCodes<8>(stage, score, state);
    }
  }

  // Writes the form in which the warp's rows meet open or sealed keys.
  __device__ void PrepareQueries(bool sealed) const {
    const bool coded = sealed && layout_.key.quantized();
    const bool times_norm = sealed && layout_.normalize_keys && first_sealed_ < end_sealed_;
    const bool present = row_ < from_.num_rows;
    const float* q = args_.q + RowOffset(args_, from_, tile_.kv_head, present ? row_ : 0);
    const float* norm = args_.kv.key_norms;
    norm += times_norm ? (tile_.slice->norm_id * layout_.kv_heads + tile_.kv_head) * kDim : 0;
    float x[kSquares][8];
    float largest = 0;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      const int d = c / 8 * kSide + first_ + c % 8;
      float element = present ? q[d] : 0.0f;
      if (times_norm) element *= norm[d];
      x[c / 8][c % 8] = element;
      largest = fmaxf(largest, fabsf(element));
    }
    // The power of two, and its inverse, that bring the largest into [2^14, 2^15).
    const uint32_t exponent = FloatBits(RowMax(largest)) >> 23;
    const uint32_t bounded = exponent < 15u ? 15u : exponent;
    const float up = FloatFromBits((268u - bounded) << 23);
    const float unit = args_.scale * kLog2E * FloatFromBits((bounded - 14u) << 23);
    const int bits = coded ? layout_.key.bits : kHalfBits;
    QueryForm<kDim>& form = forms_[sealed ? 1 : 0];
    form.unit[row_ % kMmaWarpRows] = coded ? unit / kCodeUnit : unit;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[s][j] *= up;
        sum += x[s][j];
        x[s][j] *= PairUnit(bits, j / 2);
      }
      form.sums[s][row_ % kMmaWarpRows] = RowSum(sum) * kCodeUnit;
      SplitRow(x[s], form.rows[s].lanes[lane_]);
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
    const QueryForm<kDim>& form = forms_[1];
    float sums[kSquares];
#pragma unroll
    for (int s = 0; s < kSquares; ++s) sums[s] = form.sums[s][row_ % kMmaWarpRows];
    const bool has_zero = layout_.key.has_zero();
    const float implied_zero = has_zero ? 0.0f : -static_cast<float>(1 << (kBits - 1));
    const int group_log2 = Log2Of32s(layout_.key.group_size);  // in squares
    const auto* codes = reinterpret_cast<const uint32_t*>(stage);
    const auto* scales = reinterpret_cast<const uint16_t*>(stage + at_.key_scales) + first_;
    const auto* zeros = reinterpret_cast<const uint16_t*>(stage + at_.key_zeros) + first_;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      MultiplyCodes<kBits>(codes + s * kSide * kBits, scales + (s >> group_log2) * kSide,
                           implied_zero * sums[s], form.rows[s].lanes[lane_], score);
    }
    if (!has_zero) return;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      AddZeros(zeros + (s >> group_log2) * kSide, sums[s], score);
    }
  }
  // Keys of 16 bits [32][D].
  __device__ void ScoreHalves(const std::byte* keys, const QueryForm<kDim>& form,
                              float (&score)[8]) const {
    const auto* from = reinterpret_cast<const uint16_t*>(keys) + outer_ * kDim + first_;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      MultiplyHalves(from + s * kSide, 2 * kDim, 8, form.rows[s].lanes[lane_], 1.0f, score);
    }
  }

  // Turns scores into weights that meet values of `kBits`, in units of kWeightUnit, and rescales
  // the state, whose sum and values are in kWeightUnit * kCodeUnit. Returns the row's sum over the
  // strip.
  template <int kBits>
  __device__ float Weigh(const float (&score)[8], LaneState& state, Rows& weights) const {
    float largest = score[0];
#pragma unroll
    for (int j = 1; j < 8; ++j) largest = fmaxf(largest, score[j]);
    largest = fmaxf(state.largest[0], RowMax(largest));
    float weight[8], sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int at = kBits == kHalfBits ? 0 : TileCodeBit(kBits, j / 2);
      weight[j] = FastExp2(score[j] - (largest - static_cast<float>(14 - at)));
      sum = fmaf(weight[j], static_cast<float>(1 << at), sum);
    }
    static_assert(kWeightUnit == 0x1p14f);
    sum = RowSum(sum) * kCodeUnit;
    SplitRow(weight, weights);
    // Times 1 changes nothing; a new largest is rare after the first strips.
    if (__any_sync(kAllLanes, largest > state.largest[0])) {
      const float keep = FastExp2(state.largest[0] - largest);
      state.largest[0] = largest;
      state.sum[0] *= keep;
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) state.values[0][c] *= keep;
    }
    state.sum[0] += sum;
    return sum;
  }

  template <int kBits>
  __device__ void AddCodes(const std::byte* stage, const float (&score)[8],
                           LaneState& state) const {
    Rows weights;
    const float sum = Weigh<kBits>(score, state, weights);
    const bool has_zero = layout_.value.has_zero();
    const float start = has_zero ? 0.0f : -static_cast<float>(1 << (kBits - 1)) * sum;
    const auto* codes = reinterpret_cast<const uint32_t*>(stage + at_.value_codes);
    const auto* scales = reinterpret_cast<const uint16_t*>(stage + at_.value_scales) + first_;
    const auto* zeros = reinterpret_cast<const uint16_t*>(stage + at_.value_zeros) + first_;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      MultiplyCodes<kBits>(codes + s * kSide * kBits, scales + s * kSide, start, weights,
                           state.values[0] + s * 8);
    }
    if (!has_zero) return;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) AddZeros(zeros + s * kSide, sum, state.values[0] + s * 8);
  }
  // Values of 16 bits [4][D][8 tokens], of which the first `num_tokens` count.
  __device__ void AddHalves(const std::byte* values, int num_tokens, const Rows& weights,
                            LaneState& state) const {
    const auto* from = reinterpret_cast<const uint16_t*>(values) + (first_ * kDim + outer_ * 8);
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      MultiplyHalves(from + s * kSide * 8, 2 * 8, num_tokens - first_, weights, kCodeUnit,
                     state.values[0] + s * 8);
    }
  }

  const AttentionKernelLaunch& args_;
  const KvLayerLayout& layout_;
  const PlannedTile& from_;
  const BlockTile& tile_;
  const MmaShared at_;
  std::byte* const shared_;
  const int thread_, warp_, lane_, row_;
  const int last_strip_;                 // that the tokens see
  const int first_sealed_, end_sealed_;  // strips that the tokens see sealed
  const int first_strip_, end_strip_;    // of the item
  const int first_;  // of the lane's eight inner places, and of the outer ones of its sums
  const int outer_;  // outer place that the lane's codes of tile 0 have
  const int offset_, last_offset_;  // of the row's and the last row's token in their strip
  std::byte* const stages_;         // the team's ring
  float total_[kTeamed ? kChannels : 1];
  int copied_ = 0, attended_ = 0;  // of the team's strips
  int copy_stage_ = 0, attend_stage_ = 0;
  int pages_to_copy_ = -1, pages_to_attend_ = -1;  // of 32 strips, one in each lane
  QueryForm<kDim>* const forms_;                   // of the warp's rows, for open and sealed keys
};

// Grid: [items, G]. Block: attends one segment of a tile for one key/value head, or all of it; a
// warp for every part of a segment, or for every 8 rows of the tile. Shared: PlanMmaShared: rings
// of sealed strips, states of parts, the total of segments.
template <int kDim, bool kTeamed>
__global__ void __launch_bounds__(kMmaThreads, kBlocksPerSm)
    MmaAttentionKernel(const __grid_constant__ AttentionKernelLaunch args) {
  extern __shared__ uint4 shared[];
  const AttentionItem item = args.items[blockIdx.x];
  const PlannedTile from = args.tiles[item.tile];
  const BlockTile tile = TileOf(args, from);
  MmaAttention<kDim, kTeamed> attention(args, item, from, tile,
                                        reinterpret_cast<std::byte*>(shared));
  AttendItem(args, item, from, tile.kv_head, attention);
}

template <int kDim, bool kTeamed>
cudaError_t Launch(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(launch.num_items),
                  static_cast<unsigned>(launch.layout.kv_heads));
  const auto threads =
      static_cast<unsigned>((kTeamed ? kMmaTeams : MmaWarps(launch.tile_rows)) * kWarpSize);
  const MmaShared shared =
      PlanMmaShared(launch.layout, SharedShape(launch.layout, threads, kTeamed ? kMmaTeams : 1));
  // Without asking, a block gets 48 KiB.
  constexpr auto kKernel = MmaAttentionKernel<kDim, kTeamed>;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared.bytes);
  if (allowed != cudaSuccess) return allowed;
  kKernel<<<grid, threads, static_cast<size_t>(shared.bytes), stream>>>(launch);
  return cudaGetLastError();
}

template <int kDim>
cudaError_t LaunchForRows(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  return launch.tile_rows <= kMmaWarpRows ? Launch<kDim, true>(launch, stream)
                                          : Launch<kDim, false>(launch, stream);
}

}  // namespace

cudaError_t LaunchMmaAttention(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  return launch.layout.head_dim == 64 ? LaunchForRows<64>(launch, stream)
                                      : LaunchForRows<128>(launch, stream);
}

}  // namespace innerq::cuda
