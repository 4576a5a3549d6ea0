// Attention on tensor cores, prefill and decode, over caches in CodeOrder::kMmaFragment; see
// attention_plan.h for how the work is cut.
//
// D head dimension. A strip of 32 tokens is D/32 squares of K and as many of V, see
// attention_square.cuh; how rows meet keys is prepared in attention_queries.cuh.
//
// Rows. A warp has 16 rows, or 8 in decode and in caches of 16 bits, M = 16 of a product. Queries
// and weights are first brought, by a power of two, to where their largest is in [2^14, 2^15).
// Where they meet codes they are rounded to F16: to 2^-12 of themselves, where codes of 8 bits are
// rounded to 2^-9 of their group's range. Where they meet halves, which are exact, that would show:
// there M holds 8 rows twice, row g + 8 what rounding took from row g, rounded likewise, and the
// sums of both add up to those of rows of 22 bits.
//
// Teams. A segment's strips are cut in parts of kPartStrips; a row's softmax is accumulated strip
// by strip within a part, and the states of parts are merged in order. Where a tile that is split,
// or short, has at most 8 rows (decode), a block has kMmaTeams warps, each of which attends its
// part of the segment by itself, with stages of its own. Else the block's warps, each with rows of
// its own, share the strips, and go through the parts one after the other. Both do the same
// operations on a row.
#pragma once

#include "kernels/cuda/attention_queries.cuh"
#include "kernels/cuda/attention_square.cuh"
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/strip_index.h"

namespace innerq::cuda {

constexpr int kStages = 2;  // of a team's ring of sealed strips: one is attended, one on its way
constexpr float kWeightUnit = 0x1p14f;

constexpr int kStrips = static_cast<int>(kSegmentStrips);
constexpr int kPartStrips = kStrips / kMmaTeams;

static_assert(kStripTokens == kSide && kStrips % kMmaTeams == 0);

// What one thread needs to attend strips of its block's tile. Lane 4g + i of a warp has its rows g
// and, where there are 16, g + 8; of the sums over V it has channels 8i to 8i + 7 of every 32 while
// it attends. What teams give is then spread over their warps: warp w has the w-th part of those
// channels.
template <int kDim, int kKeyBits, int kValueBits, bool kTeamed>
class MmaAttention {
  static_assert((kKeyBits == kHalfBits) == (kValueBits == kHalfBits));
  static constexpr bool kOfHalves = kKeyBits == kHalfBits;  // nothing is sealed in codes
  static constexpr int kTeams = kTeamed ? kMmaTeams : 1;
  static constexpr int kLaneChannels = kDim / 4;
  static constexpr int kSquares = kDim / kSide;  // of a strip, keys or values

 public:
  static constexpr int kRows = kTeamed || kOfHalves ? 1 : 2;  // of a lane
  static constexpr int kChannels = kLaneChannels / kTeams;
  static constexpr bool kMerges = !kTeamed;
  static constexpr int kWarpRows = 8 * kRows;
  static constexpr int kMostThreads =
      kTeamed ? kTeams * kWarpSize : kMaxTileRows / kWarpRows * kWarpSize;
  static constexpr int kLeastBlocks = kTeamed ? 4 : kOfHalves ? 3 : 4;  // registers are for so many
  INNERQ_HOST_DEVICE static constexpr MmaShape Shape() { return {kDim, kRows, kTeams}; }

  __device__ MmaAttention(const AttentionKernelLaunch& args, const AttentionItem& item,
                          const PlannedTile& tile, std::byte* shared)
      : args_(args),
        layout_(args.layout),
        tile_(tile),
        kv_head_(static_cast<int>(blockIdx.y)),
        at_(PlanMmaShared(args.layout, Shape(), kStages, static_cast<int32_t>(blockDim.x))),
        shared_(shared),
        thread_(static_cast<int>(threadIdx.x)),
        warp_(static_cast<int>(threadIdx.x / kWarpSize)),
        lane_(static_cast<int>(threadIdx.x % kWarpSize)),
        first_row_(kTeamed ? 0 : warp_ * kWarpRows),
        team_strip_(item.begin * kStrips + (kTeamed ? warp_ * kPartStrips : 0)),
        end_strip_(min(item.end * kStrips, tile.last_strip + 1)),
        first_(lane_ % 4 * 8),
        sealed_heads_(HeadOf(0, true)),
        page_bytes_(static_cast<uint32_t>(args.layout.sealed_page_bytes())),
        stages_(shared + (kTeamed ? warp_ * at_.team_bytes : 0)),
        zero_(static_cast<uint32_t>(args.layout.page_tokens) & 1u),
        queries_(shared + at_.queries + (kTeamed ? 0 : warp_ * Shape().query_bytes())) {
    BeginCopies();
    const WarpRows rows{args_, tile_, kv_head_, first_row_};
    if (!kTeamed || warp_ == 0) queries_.template Prepare<kHalfBits>(rows, zero_, false);
    if (!kTeamed || warp_ == 1) queries_.template Prepare<kKeyBits>(rows, zero_, true);
    __syncthreads();
  }

  // Accumulates the tile's part of a segment. Segments come in order.
  __device__ void AttendSegment(int segment, State<kRows, kChannels>& state) {
    if constexpr (kTeamed) {
      AttendAsTeams(segment, state);
    } else {
      AttendTogether(segment, state);
    }
  }

  // The thread's part of the total over segments, in shared memory.
  __device__ float& Total(int r, int c) {
    return Floats(at_.total)[(r * kChannels + c) * blockDim.x + thread_];
  }
  __device__ int row(int r) const { return first_row_ + lane_ / 4 + 8 * r; }
  __device__ int channel(int c) const {
    const int of_lane = (kTeamed ? warp_ * kChannels : 0) + c;
    return of_lane / 8 * kSide + first_ + of_lane % 8;
  }

 private:
  using LaneState = State<kRows, kLaneChannels>;
  using Scores = float[kRows][8];

  __device__ float* Floats(int offset) const { return reinterpret_cast<float*>(shared_ + offset); }
  __device__ bool IsSealed(int strip) const {
    return strip >= tile_.sealed_begin && strip < tile_.sealed_end;
  }
  // First token of a strip in its page.
  __device__ int FirstToken(int strip) const {
    return strip * kSide & (static_cast<int>(layout_.page_tokens) - 1);
  }
  // The n-th strip that the team comes to.
  __device__ int StripAt(unsigned n) const {
    constexpr unsigned kOfTeam = kStrips / kTeams;  // of a segment
    return team_strip_ + static_cast<int>(n / kOfTeam) * kStrips + static_cast<int>(n % kOfTeam);
  }
  // Waits for the team, or for all where they are one.
  __device__ void SyncTeam() const {
    if constexpr (kTeamed) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // --- pages and their way to shared memory ---

  // The head's part of a page.
  __device__ const std::byte* HeadOf(int page, bool sealed) const {
    PagedKvView kv = args_.kv;
    kv.layout = &layout_;
    if (sealed) return kv.SealedHead(page, kv_head_);
    return reinterpret_cast<const std::byte*>(kv.OpenKeys(page, kv_head_));
  }
  // Page of the team's strip n, sealed or open, as the tile's tokens see it.
  __device__ int FindPage(unsigned n) const {
    const int strip = StripAt(n);
    if (strip >= end_strip_) return -1;
    const int page = strip >> Log2Of32s(layout_.page_tokens);
    const PageRef ref = args_.pages[tile_.first_page + page];
    return IsSealed(strip) ? ref.sealed_id : ref.open_id;
  }
  // The same of the strip that is attended, n, where those up to n + kStages - 1 are being copied.
  __device__ int PageOf(unsigned n) const {
    const int pages = n / kWarpSize == (n + kStages - 1) / kWarpSize ? pages_ : earlier_pages_;
    return __shfl_sync(kAllLanes, pages, static_cast<int>(n % kWarpSize));
  }

  __device__ void BeginCopies() {
#if INNERQ_BULK_COPIES
    if (kTeamed ? lane_ == 0 : thread_ == 0) {
      for (int i = 0; i < kStages; ++i) InitBarrier(BarrierOf(i));
    }
    SyncTeam();
#endif
    for (unsigned n = 0; n < kStages; ++n) BeginCopy(n);
  }

  // Begins to copy the team's strip n to its stage; nothing where it is open.
  __device__ void BeginCopy(unsigned n) {
    const auto lane = static_cast<int>(n % kWarpSize), stage = static_cast<int>(n % kStages);
    if (lane == 0) {
      earlier_pages_ = pages_;
      pages_ = FindPage(n + static_cast<unsigned>(lane_));
    }
    const int strip = StripAt(n);
    if constexpr (kOfHalves) return;
    const bool wanted = strip < end_strip_ && IsSealed(strip);
    std::byte* to = stages_ + stage * at_.stage_bytes;
#if INNERQ_BULK_COPIES
    // The lane that knows the page copies.
    if (lane_ == lane && (kTeamed || warp_ == 0)) {
      uint64_t* barrier = BarrierOf(stage);
      ArriveAndExpect(barrier, wanted ? static_cast<uint32_t>(at_.stage_bytes) : 0u);
      if (wanted) {
        CopyStrip(sealed_heads_ + static_cast<uint32_t>(pages_) * uint64_t{page_bytes_},
                  FirstToken(strip), to,
                  [barrier](const std::byte* from, int bytes, std::byte* part) {
                    CopyBulk(part, from, static_cast<uint32_t>(bytes), barrier);
                  });
      }
    }
#else
    const int page = __shfl_sync(kAllLanes, pages_, lane);
    if (wanted) {
      const int begin = kTeamed ? lane_ : thread_;
      const int step = kTeamed ? kWarpSize : static_cast<int>(blockDim.x);
      CopyStrip(sealed_heads_ + static_cast<uint32_t>(page) * uint64_t{page_bytes_},
                FirstToken(strip), to,
                [begin, step](const std::byte* from, int bytes, std::byte* part) {
                  for (int i = begin * 16; i < bytes; i += step * 16) CopyAsync(part + i, from + i);
                });
    }
    CommitCopies();
#endif
  }
  __device__ uint64_t* BarrierOf(int stage) const {
    return reinterpret_cast<uint64_t*>(stages_ + kStages * at_.stage_bytes) + stage;
  }
  // Waits for the strip that is attended next.
  __device__ void WaitForCopy() const {
    if constexpr (kOfHalves) return;
#if INNERQ_BULK_COPIES
    WaitForPhase(BarrierOf(static_cast<int>(attended_ % kStages)), attended_ / kStages % 2);
#else
    WaitForCopies<kStages - 1>();
    SyncTeam();  // what others copied is there
#endif
  }

  // Copies a strip's codes, scales and zeros by `copy`(from, bytes, to). A page of one strip lies
  // in memory as its stage does.
  template <typename Copy>
  __device__ void CopyStrip(const std::byte* head, int t0, std::byte* stage, Copy copy) const {
    if (static_cast<int>(layout_.page_tokens) == kSide) return copy(head, at_.stage_bytes, stage);
    const QuantSpec &key = layout_.key, &value = layout_.value;
    copy(head + layout_.key_codes + t0 * kDim * kKeyBits / 8, kKeyCodeBytes, stage);
    // Parameters of keys: from [D/N][T] to [D/N][32].
    const int num_groups = kSquares >> Log2Of32s(key.group_size);
    const int group_bytes = static_cast<int>(layout_.page_tokens) * 2;
    for (int g = 0; g < num_groups; ++g) {
      const int at = g * group_bytes + t0 * 2, to = g * kSide * 2;
      copy(head + layout_.key_scales + at, kSide * 2, stage + at_.key_scales + to);
      if (!key.has_zero()) continue;
      copy(head + layout_.key_zeros + at, kSide * 2, stage + at_.key_zeros + to);
    }
    const int group_at = (t0 / kSide >> Log2Of32s(value.group_size)) * kDim * 2;
    copy(head + layout_.value_codes + t0 * kDim * kValueBits / 8, kValueCodeBytes,
         stage + at_.value_codes);
    copy(head + layout_.value_scales + group_at, kDim * 2, stage + at_.value_scales);
    if (!value.has_zero()) return;
    copy(head + layout_.value_zeros + group_at, kDim * 2, stage + at_.value_zeros);
  }
  static constexpr int kKeyCodeBytes = kSide * kDim * kKeyBits / 8;
  static constexpr int kValueCodeBytes = kSide * kDim * kValueBits / 8;

  // --- segments ---

  // Takes the team's next strip into the state, if there is one.
  __device__ void AttendNext(LaneState& state) {
    const auto stage = static_cast<int>(attended_ % kStages);
    const int strip = StripAt(attended_);
    if (strip < end_strip_) {
      WaitForCopy();
      if (first_row_ < tile_.num_rows) {
        if (IsSealed(strip)) {
          AttendSealed(strip, stages_ + stage * at_.stage_bytes, state);
        } else {
          const std::byte* keys = HeadOf(PageOf(attended_), false);
          AttendHalves<false>(strip, keys, keys + layout_.open_values, state);
        }
      }
      if constexpr (!kOfHalves) SyncTeam();  // all are done with the stage
    }
    BeginCopy(attended_ + kStages);
    ++attended_;
  }

  // Every team attends its part; then all merge the parts in order, each warp some of the channels.
  __device__ void AttendAsTeams(int segment, State<kRows, kChannels>& state) {
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
    const int num_strips = tile_.last_strip + 1 - segment * kStrips;
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
    const int stride = static_cast<int>(blockDim.x);
    float largest[kRows] = {}, sum[kRows] = {};
    const int num_strips = min(kStrips, tile_.last_strip + 1 - segment * kStrips);
    for (int begin = 0; begin < num_strips; begin += kPartStrips) {
      state.Clear();
      for (int i = begin; i < min(begin + kPartStrips, num_strips); ++i) AttendNext(state);
      const bool last = begin + kPartStrips >= num_strips;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (begin > 0) {
          const MergeWeights weights = WeightsOf(largest[r], state.largest[r]);
          state.largest[r] = weights.largest;
          state.sum[r] = Merge(weights, sum[r], state.sum[r]);
#pragma unroll
          for (int c = 0; c < kLaneChannels; ++c) {
            state.values[r][c] =
                Merge(weights, before[(r * kLaneChannels + c) * stride], state.values[r][c]);
          }
        }
        if (last) continue;
        largest[r] = state.largest[r];
        sum[r] = state.sum[r];
#pragma unroll
        for (int c = 0; c < kLaneChannels; ++c) {
          before[(r * kLaneChannels + c) * stride] = state.values[r][c];
        }
      }
    }
  }

  // --- strips ---

  __device__ void AttendSealed(int strip, const std::byte* stage, LaneState& state) const {
    if constexpr (kOfHalves) {
      const std::byte* head = HeadOf(PageOf(attended_), true);
      AttendHalves<true>(strip, head + layout_.key_codes, head + layout_.value_codes, state);
    } else {
      Scores score = {};
      ScoreCodes(stage, score);
      Finish(strip, queries_.UnitsOf(queries_.Form(true), true), score);
      AddCodes(stage, score, state);
    }
  }
  // A strip of 16 bits. `keys`, `values`: those of its page.
  template <bool kSealed>
  __device__ void AttendHalves(int strip, const std::byte* keys, const std::byte* values,
                               LaneState& state) const {
    const int t0 = FirstToken(strip);
    const std::byte* form = queries_.Form(kSealed);
    const int g = lane_ / 4, outer = g / 2 * 8 + g % 2;  // outer place of the lane's part of tile 0
    Scores score = {};
    // Keys [T][D].
    const auto* key = reinterpret_cast<const uint16_t*>(keys) + (t0 + outer) * kDim + first_;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      Operand rows[kRows];
      float* out[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        LoadOperand(form + r * Shape().operand_bytes(), s, lane_, rows[r]);
        out[r] = score[r];
      }
      MultiplyHalves(key + s * kSide, 2 * kDim, 8, rows, 1.0f, out);
    }
    Finish(strip, queries_.UnitsOf(form, kSealed), score);
    float largest[kRows], weight[kRows][8], sums[kRows];
    Weigh<kHalfBits>(score, state, largest, weight);
    Operand weights[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = 0;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float a = weight[r][2 * pair], b = weight[r][2 * pair + 1];
        PackSplit(a, b, weights[r][pair / 2] + pair % 2 * 2);
        sum += a + b;
      }
      sums[r] = RowSum(sum) * kCodeUnit;
    }
    Rescale(largest, sums, state);
    // Values [T/8][D][8 tokens], of which those up to the tile's last count.
    const int num_tokens =
        strip == tile_.last_strip ? StripOffset(args_, tile_, kMaxTileRows) + 1 : kSide;
    const auto* value =
        reinterpret_cast<const uint16_t*>(values) + (t0 + first_) * kDim + outer * 8;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      float* out[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) out[r] = state.values[r] + s * 8;
      MultiplyHalves(value + s * kSide * 8, 2 * 8, num_tokens - first_, weights, kCodeUnit, out);
    }
  }

  __device__ void ScoreCodes(const std::byte* stage, Scores& score) const {
    const std::byte* form = queries_.Form(true);
    const int group_log2 = Log2Of32s(layout_.key.group_size);  // in squares
    const auto* codes = reinterpret_cast<const uint32_t*>(stage);
    const auto* scales = reinterpret_cast<const uint16_t*>(stage + at_.key_scales) + first_;
    const auto* starts = reinterpret_cast<const Words<4>*>(form + Shape().starts()) + lane_ / 4;
    float* out[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) out[r] = score[r];
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      Operand rows;
      LoadOperand(form, s, lane_, rows);
      const Words<4> quad = starts[s * 8];
      float start[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) start[i] = FloatFromBits(quad.word[i]);
      MultiplyCodes<kKeyBits>(codes + s * kSide * kKeyBits, scales + (s >> group_log2) * kSide,
                              start, rows, out);
    }
    if (!layout_.key.has_zero()) return;
    const auto* zeros = reinterpret_cast<const uint16_t*>(stage + at_.key_zeros) + first_;
    const auto* sums = reinterpret_cast<const float*>(form + Shape().sums()) + lane_ / 4;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        AddZeros(zeros + (s >> group_log2) * kSide, sums[s * 16 + r * 8], score[r]);
      }
    }
  }

  // Scores in units of log2, those of tokens that a row does not see at -infinity.
  __device__ void Finish(int strip, const float* units, Scores& score) const {
    units += lane_ / 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < 8; ++j) score[r][j] *= units[r * 8];
      if (strip != tile_.last_strip) continue;
      const int offset = StripOffset(args_, tile_, row(r));
#pragma unroll
      for (int j = 0; j < 8; ++j) score[r][j] = first_ + j > offset ? -INFINITY : score[r][j];
    }
  }

  // Turns scores into weights in kWeightUnit, as they meet values of `kBits`; `largest`: of all
  // scores so far.
  template <int kBits>
  __device__ void Weigh(const Scores& score, const LaneState& state, float (&largest)[kRows],
                        float (&weight)[kRows][8]) const {
    static_assert(kWeightUnit == 0x1p14f);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      largest[r] = score[r][0];
#pragma unroll
      for (int j = 1; j < 8; ++j) largest[r] = fmaxf(largest[r], score[r][j]);
      largest[r] = fmaxf(state.largest[r], RowMax(largest[r]));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int at = kBits == kHalfBits ? 0 : TileCodeBit(kBits, j / 2);
        weight[r][j] = FastExp2(score[r][j] - (largest[r] - static_cast<float>(14 - at)));
      }
    }
  }
  // Brings the state to a new largest, and adds the sums of a strip's weights. A state's sums and
  // values are in kWeightUnit * kCodeUnit.
  __device__ void Rescale(const float (&largest)[kRows], const float (&sums)[kRows],
                          LaneState& state) const {
    bool larger = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) larger |= largest[r] > state.largest[r];
    // Times 1 changes nothing; a new largest is rare after the first strips.
    if (__any_sync(kAllLanes, larger)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float keep = FastExp2(state.largest[r] - largest[r]);
        state.largest[r] = largest[r];
        state.sum[r] *= keep;
#pragma unroll
        for (int c = 0; c < kLaneChannels; ++c) state.values[r][c] *= keep;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) state.sum[r] += sums[r];
  }

  __device__ void AddCodes(const std::byte* stage, const Scores& score, LaneState& state) const {
    float largest[kRows], weight[kRows][8], sums[kRows];
    Weigh<kValueBits>(score, state, largest, weight);
    Operand weights;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = 0;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float2 pair_weights = {weight[r][2 * pair], weight[r][2 * pair + 1]};
        const float two = PackRow<kRows>(pair_weights, r, zero_, weights[pair / 2] + pair % 2 * 2);
        sum = fmaf(two, 1.0f / PairUnit<kValueBits>(pair), sum);
      }
      sums[r] = RowSum(sum) * kCodeUnit;
    }
    Rescale(largest, sums, state);
    const bool has_zero = layout_.value.has_zero();
    const float implied_zero = has_zero ? 0.0f : -static_cast<float>(1 << (kValueBits - 1));
    float start[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = FloatBits(implied_zero * sums[kRows == 2 ? i / 2 : 0]);
      start[i] = FloatFromBits(InAnotherRegister(bits, zero_));
    }
    const auto* codes = reinterpret_cast<const uint32_t*>(stage + at_.value_codes);
    const auto* scales = reinterpret_cast<const uint16_t*>(stage + at_.value_scales) + first_;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
      float* out[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) out[r] = state.values[r] + s * 8;
      MultiplyCodes<kValueBits>(codes + s * kSide * kValueBits, scales + s * kSide, start, weights,
                                out);
    }
    if (!has_zero) return;
    const auto* zeros = reinterpret_cast<const uint16_t*>(stage + at_.value_zeros) + first_;
#pragma unroll
    for (int s = 0; s < kSquares; ++s) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        AddZeros(zeros + s * kSide, sums[r], state.values[r] + s * 8);
      }
    }
  }

  const AttentionKernelLaunch& args_;
  const KvLayerLayout& layout_;
  const PlannedTile& tile_;
  const int kv_head_;
  const MmaShared at_;
  std::byte* const shared_;
  const int thread_, warp_, lane_;
  const int first_row_;   // of the warp, in the tile
  const int team_strip_;  // the first that the team comes to
  const int end_strip_;   // of the item
  const int first_;       // of the lane's eight inner places, and of the outer ones of its sums
  const std::byte* const sealed_heads_;  // the head's part of sealed page 0
  const uint32_t page_bytes_;            // of a sealed page
  std::byte* const stages_;              // the team's ring
  const uint32_t zero_;                  // pages are of even sizes
  const QueryForms<kDim, kRows> queries_;
  unsigned attended_ = 0;                // of the team's strips
  int pages_ = -1, earlier_pages_ = -1;  // of the 32 strips that are copied, one in each lane
};

// Grid: [items, G]. Block: attends an item's segments for one key/value head, with a warp for every
// part of a segment, or for every 8 or 16 rows of the tile. Shared: PlanMmaShared:
// rings of sealed strips, states of parts, the total of segments, queries.
template <int kDim, int kKeyBits, int kValueBits, bool kTeamed>
__global__ void __launch_bounds__(MmaAttention<kDim, kKeyBits, kValueBits, kTeamed>::kMostThreads,
                                  MmaAttention<kDim, kKeyBits, kValueBits, kTeamed>::kLeastBlocks)
    MmaAttentionKernel(const __grid_constant__ AttentionKernelLaunch args) {
  extern __shared__ uint4 shared[];
  const AttentionItem item = args.items[blockIdx.x];
  if (item.tile < 0) return;
  const PlannedTile tile = args.tiles[item.tile];
  MmaAttention<kDim, kKeyBits, kValueBits, kTeamed> attention(args, item, tile,
                                                              reinterpret_cast<std::byte*>(shared));
  AttendItem(args, item, tile, attention);
}

template <int kDim, int kKeyBits, int kValueBits, bool kTeamed>
cudaError_t LaunchMma(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  using Attention = MmaAttention<kDim, kKeyBits, kValueBits, kTeamed>;
  const dim3 grid(static_cast<unsigned>(launch.num_items),
                  static_cast<unsigned>(launch.layout.kv_heads));
  const auto threads =
      static_cast<unsigned>(kTeamed ? kMmaTeams * kWarpSize
                                    : CeilDiv(launch.tile_rows, Attention::kWarpRows) * kWarpSize);
  const MmaShared shared =
      PlanMmaShared(launch.layout, Attention::Shape(), kStages, static_cast<int32_t>(threads));
  constexpr auto kKernel = MmaAttentionKernel<kDim, kKeyBits, kValueBits, kTeamed>;
  // Without asking, a block gets 48 KiB.
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes);
  if (allowed != cudaSuccess) return allowed;
  kKernel<<<grid, threads, static_cast<size_t>(shared.bytes), stream>>>(launch);
  return cudaGetLastError();
}

template <int kDim, int kKeyBits, int kValueBits>
cudaError_t LaunchMmaForRows(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  return launch.tile_rows <= kMmaTeamRows && !launch.in_one_go
             ? LaunchMma<kDim, kKeyBits, kValueBits, true>(launch, stream)
             : LaunchMma<kDim, kKeyBits, kValueBits, false>(launch, stream);
}

template <int kDim, int kKeyBits>
cudaError_t LaunchMmaForValues(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  switch (launch.layout.value.bits) {
    case 2:
      return LaunchMmaForRows<kDim, kKeyBits, 2>(launch, stream);
    case 3:
      return LaunchMmaForRows<kDim, kKeyBits, 3>(launch, stream);
    case 4:
      return LaunchMmaForRows<kDim, kKeyBits, 4>(launch, stream);
    case 8:
      return LaunchMmaForRows<kDim, kKeyBits, 8>(launch, stream);
  }
  return cudaErrorInvalidValue;
}

// For heads of kDim channels.
template <int kDim>
cudaError_t LaunchMmaForDim(const AttentionKernelLaunch& launch, cudaStream_t stream) {
  switch (launch.layout.key.bits) {
    case 2:
      return LaunchMmaForValues<kDim, 2>(launch, stream);
    case 3:
      return LaunchMmaForValues<kDim, 3>(launch, stream);
    case 4:
      return LaunchMmaForValues<kDim, 4>(launch, stream);
    case 8:
      return LaunchMmaForValues<kDim, 8>(launch, stream);
    case kHalfBits:
      return LaunchMmaForRows<kDim, kHalfBits, kHalfBits>(launch, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace innerq::cuda
