// The softmax of AttentionOps in Highway, and the merging of partial attentions.

// Scalar (the compiler's baseline), AVX2 and AVX-512: the steps between are not worth their size.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_softmax.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h.
#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/cpu/attention_simd_inl.h"
#include "kernels/cpu/attention_weights.h"

HWY_BEFORE_NAMESPACE();
namespace innerq {
namespace HWY_NAMESPACE {

// Zeroes rows of x [R][kLanes] up to the next multiple of four.
template <typename T>
HWY_INLINE void ClearTail(T* x, int64_t num_rows) {
  std::fill(x + num_rows * kLanes, x + RoundUp(num_rows, 4) * kLanes, T{0});
}

#if HWY_TARGET == HWY_SCALAR

template <class D, class T, class Op>
void ReduceRows(D, const T* x, int64_t num_rows, Op, T* out) {
  std::copy(x, x + num_rows, out);
}

#else

// out[r] = op over the lanes of x[r], x [R][kLanes]; x is readable up to the next multiple of four
// rows, out writable up to the next multiple of kLanes. Reduces kLanes rows together, transposing
// as it goes: a third of the work of one row at a time.
template <class D, class T, class Op>
HWY_INLINE void ReduceRows(D d, const T* HWY_RESTRICT x, int64_t num_rows, Op op,
                           T* HWY_RESTRICT out) {
  const hn::Repartition<double, D> pairs;
  constexpr int kBlocks = kLanes / 4;  // of 128 bits
  for (int64_t row = 0; row < num_rows; row += kLanes) {
    hn::Vec<D> blocks[kBlocks];  // [i]: rows 4 i to 4 i + 3 in each block, its partial results
    HWY_UNROLL(4)
    for (int i = 0; i < kBlocks; ++i) {
      if (row + 4 * i >= num_rows) {
        blocks[i] = hn::Zero(d);
        continue;
      }
      hn::Vec<D> halves[2];
      HWY_UNROLL(2)
      for (int j = 0; j < 2; ++j) {
        const auto a = hn::Load(d, x + (row + 4 * i + 2 * j) * kLanes);
        const auto b = hn::Load(d, x + (row + 4 * i + 2 * j + 1) * kLanes);
        halves[j] = op(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
      }
      const auto a = hn::BitCast(pairs, halves[0]);
      const auto b = hn::BitCast(pairs, halves[1]);
      blocks[i] = op(hn::BitCast(d, hn::InterleaveLower(pairs, a, b)),
                     hn::BitCast(d, hn::InterleaveUpper(pairs, a, b)));
    }
    if constexpr (kBlocks == 2) {
      hn::Store(op(hn::ConcatLowerLower(d, blocks[1], blocks[0]),
                   hn::ConcatUpperUpper(d, blocks[1], blocks[0])),
                d, out + row);
    } else {
      const auto even = op(hn::ConcatLowerLower(d, blocks[2], blocks[0]),
                           hn::ConcatUpperUpper(d, blocks[2], blocks[0]));
      const auto odd = op(hn::ConcatLowerLower(d, blocks[3], blocks[1]),
                          hn::ConcatUpperUpper(d, blocks[3], blocks[1]));
      hn::Store(op(hn::OddEvenBlocks(hn::SwapAdjacentBlocks(odd), even),
                   hn::OddEvenBlocks(odd, hn::SwapAdjacentBlocks(even))),
                d, out + row);
    }
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

// x = 2^x for x in [-127, 127], 0 for -127; relative error below 2e-7: a polynomial of degree 5
// through the Chebyshev nodes of [-1/2, 1/2] (1.02e-7) and its rounding. Step by step for N vectors
// together, for each alone is one long chain.
template <int N>
HWY_INLINE void Exp2InRange(Vector (&x)[N]) {
  constexpr float kCoefficients[] = {0.009676031918324862f, 0.05550357114219182f,
                                     0.24022107485308267f, 0.6931471880262287f,
                                     1.0000000754548972f};
  // x + magic has the unit 1 and, in its lowest bits, round(x) + 127: the exponent of 2^round(x).
  const Vector magic = hn::Set(kF32, 12582912.0f + 127.0f);
  Vector shifted[N], y[N];
  HWY_UNROLL(4) for (int i = 0; i < N; ++i) shifted[i] = hn::Add(x[i], magic);
  HWY_UNROLL(4) for (int i = 0; i < N; ++i) x[i] = hn::Sub(x[i], hn::Sub(shifted[i], magic));
  HWY_UNROLL(4) for (int i = 0; i < N; ++i) y[i] = hn::Set(kF32, 0.0013390863364620869f);
  HWY_UNROLL(5) for (const float coefficient : kCoefficients) {
    HWY_UNROLL(4) for (int i = 0; i < N; ++i) {
      y[i] = hn::MulAdd(y[i], x[i], hn::Set(kF32, coefficient));
    }
  }
  HWY_UNROLL(4) for (int i = 0; i < N; ++i) {
    const auto power = hn::ShiftLeft<23>(hn::BitCast(kI32, shifted[i]));
    x[i] = hn::Mul(y[i], hn::BitCast(kF32, power));
  }
}

// x = 2^x for x <= 0, 0 below 2^-126, NaN for NaN.
template <int N>
HWY_INLINE void Exp2(Vector (&x)[N]) {
  const Vector least = hn::Set(kF32, -127.0f);
  HWY_UNROLL(2) for (Vector& y : x) y = hn::IfThenElse(hn::Lt(y, least), least, y);
  Exp2InRange(x);
}

// Scores [t, t + lanes) of a row, -infinity beyond `visible`.
HWY_INLINE Vector VisibleScores(const float* scores, int64_t t, int64_t visible) {
  const Vector x = hn::LoadU(kF32, scores + t);
  if (t + kLanes <= visible) return x;
  const auto mask = hn::FirstN(kF32, static_cast<size_t>(std::max<int64_t>(visible - t, 0)));
  return hn::IfThenElse(mask, x, hn::Set(kF32, -std::numeric_limits<float>::infinity()));
}

HWY_INLINE int64_t VisibleTokens(const SoftmaxArgs& args, int64_t r) {
  return args.visible == nullptr ? args.num_tokens : args.visible[r];
}

// Moves the state to the maximum over its pages and this one; lanes are rows.
HWY_INLINE void RaiseMax(const AdvanceArgs& args) {
  const AttentionState& state = args.state;
  for (int64_t r = 0; r < args.num_rows; r += kLanes) {
    const Vector old_max = hn::LoadU(kF32, state.max + r);
    const Vector page = hn::LoadU(kF32, args.page_max + r);
    const Vector max = hn::Max(old_max, page);
    Vector factors[2] = {hn::Sub(old_max, max), hn::Sub(page, max)};
    Exp2(factors);
    hn::StoreU(max, kF32, state.max + r);
    hn::StoreU(factors[0], kF32, args.keep + r);
    hn::StoreU(factors[1], kF32, args.add + r);
    hn::StoreU(hn::Mul(factors[0], hn::LoadU(kF32, state.sum + r)), kF32, state.sum + r);
  }
}

// The largest scores, in units of args.scales. kAll: every row sees all tokens.
template <bool kAll>
HWY_INLINE void LargestScores(const SoftmaxArgs& args, float* largest) {
  alignas(64) float lanes[kTileRows * kLanes];
  ClearTail(lanes, args.num_rows);
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const float* scores = args.scores + r * args.num_tokens;
    const int64_t visible = kAll ? args.num_tokens : VisibleTokens(args, r);
    Vector max = VisibleScores(scores, 0, visible);
    for (int64_t t = kLanes; t < args.num_tokens; t += kLanes) {
      max = hn::Max(max, kAll ? hn::LoadU(kF32, scores + t) : VisibleScores(scores, t, visible));
    }
    hn::Store(max, kF32, lanes + r * kLanes);
  }
  const auto max = [](Vector a, Vector b) HWY_ATTR { return hn::Max(a, b); };
  ReduceRows(kF32, lanes, args.num_rows, max, largest);
}

// add *= unit; the state's sum += add * sums; lanes are rows.
HWY_INLINE void AddSums(const AdvanceArgs& args) {
  for (int64_t r = 0; r < args.num_rows; r += kLanes) {
    const Vector add = hn::Mul(hn::LoadU(kF32, args.add + r), hn::Set(kF32, args.unit));
    hn::StoreU(add, kF32, args.add + r);
    float* sum = args.state.sum + r;
    hn::StoreU(hn::MulAdd(add, hn::LoadU(kF32, args.sums + r), hn::LoadU(kF32, sum)), kF32, sum);
  }
}

void Advance(const AdvanceArgs& args) {
  RaiseMax(args);
  AddSums(args);
}

// The same for all that softmax was asked for.
HWY_INLINE AdvanceArgs AdvanceOf(const SoftmaxArgs& args, const float* page_max,
                                 const float* sums) {
  AdvanceArgs advance;
  advance.page_max = page_max;
  advance.sums = sums;
  advance.num_rows = args.num_rows;
  advance.state = args.state;
  advance.keep = args.keep;
  advance.add = args.add;
  return advance;
}

void SoftmaxToFloat(const SoftmaxArgs& args) {
  alignas(64) float page_max[kTileRows] = {}, sums[kTileRows] = {};
  LargestScores<false>(args, page_max);
  if (args.scales != nullptr) {
    for (int64_t r = 0; r < args.num_rows; ++r) page_max[r] *= args.scales[r];
  }
  const AdvanceArgs advance = AdvanceOf(args, page_max, sums);
  RaiseMax(advance);
  for (int64_t r = 0; r < args.num_rows; ++r) {
    float* scores = args.scores + r * args.num_tokens;
    const int64_t visible = VisibleTokens(args, r);
    const Vector max = hn::Set(kF32, page_max[r]);
    const Vector scale = hn::Set(kF32, args.scales == nullptr ? 1.0f : args.scales[r]);
    Vector sum = hn::Zero(kF32);
    for (int64_t t = 0; t < args.num_tokens; t += kLanes) {
      const Vector score = hn::Mul(VisibleScores(scores, t, visible), scale);
      Vector p[1] = {hn::Sub(score, max)};
      Exp2(p);
      hn::StoreU(p[0], kF32, scores + t);
      sum = hn::Add(sum, p[0]);
    }
    sums[r] = SumOf(sum);
  }
  AddSums(advance);
}

// The factors and origins of rows whose scores in units of `scales` (null: one) are at most
// `largest`: what IntegerWeights and WeighBlocks take.
void ScaleScores(const float* largest, const float* scales, int64_t num_rows, float* factors,
                 float* origins) {
#if HWY_TARGET == HWY_AVX3
  for (int64_t r = 0; r < num_rows; r += kLanes) {
    const Vector one = hn::Set(kF32, 1.0f);
    const Vector scale = scales == nullptr ? one : hn::LoadU(kF32, scales + r);
    const auto steps = WeightTables::StepsOf(hn::LoadU(kF32, largest + r).raw, scale.raw);
    _mm512_storeu_ps(factors + r, steps.factor);
    _mm512_storeu_ps(origins + r, steps.origin);
  }
#else
  std::copy(largest, largest + num_rows, origins);
  for (int64_t r = 0; r < num_rows; ++r) factors[r] = scales == nullptr ? 1.0f : scales[r];
#endif
}

// out = round(MaxRowInteger * 2^((score - largest) * scale)), 0 for NaN.
template <int N>
HWY_INLINE void IntegerWeights(const Vector (&score)[N], const Vector (&factor)[N],
                               const Vector (&origin)[N], int high_shift, hn::Vec<I32> (&out)[N]) {
#if HWY_TARGET == HWY_AVX3
  const WeightTables tables(high_shift);
  HWY_UNROLL(2) for (int i = 0; i < N; i += 2) {
    const __m512i pair = tables.Weights(score[i].raw, factor[i].raw, origin[i].raw,
                                        score[i + 1].raw, factor[i + 1].raw, origin[i + 1].raw);
    out[i] = hn::Vec<I32>{_mm512_unpacklo_epi16(pair, _mm512_setzero_si512())};
    out[i + 1] = hn::Vec<I32>{_mm512_unpackhi_epi16(pair, _mm512_setzero_si512())};
  }
#else
  const Vector largest = hn::Set(kF32, static_cast<float>(MaxRowInteger(high_shift)));
  Vector y[N];
  HWY_UNROLL(4) for (int i = 0; i < N; ++i) {
    y[i] = hn::Max(hn::Mul(hn::Sub(score[i], origin[i]), factor[i]), hn::Set(kF32, -127.0f));
  }
  Exp2InRange(y);
  HWY_UNROLL(4) for (int i = 0; i < N; ++i) out[i] = RoundToInt(hn::Mul(y[i], largest));
#endif
}

// What weighing a page's rows takes and gives.
struct Weighing {
  const float* factors;  // [R] of ScaleScores
  const float* origins;  // [R] likewise
  int32_t* lanes;        // [R][T/span][kLanes] sums; a span is a group, or kLanes of smaller ones
};

// Scores become weights in args.rows, and sums of spans.
HWY_INLINE void WeighRows(const SoftmaxArgs& args, const Weighing& weighing) {
  constexpr int kBatch = 4;  // vectors; a multiple of those of a page's tokens, or they of it
  alignas(64) int32_t integers[(kTileRows + kBatch) * kMaxPageTokens];  // [R][T]
  const int64_t num_tokens = args.num_tokens;
  const int64_t row_vectors = num_tokens / kLanes, num_vectors = args.num_rows * row_vectors;
  const int shift = hwy::Num0BitsBelowLS1Bit_Nonzero64(static_cast<uint64_t>(row_vectors));
  for (int64_t v = 0; v < num_vectors; v += kBatch) {
    Vector score[kBatch], factor[kBatch], origin[kBatch];
    hn::Vec<I32> p[kBatch];
    HWY_UNROLL(4) for (int i = 0; i < kBatch; ++i) {
      const int64_t r = (v + i) >> shift;
      score[i] = hn::LoadU(kF32, args.scores + (v + i) * kLanes);
      factor[i] = hn::Set(kF32, weighing.factors[r]);
      origin[i] = hn::Set(kF32, weighing.origins[r]);
    }
    IntegerWeights(score, factor, origin, args.rows.high_shift, p);
    HWY_UNROLL(4) for (int i = 0; i < kBatch; ++i) {
      hn::Store(p[i], kI32, integers + (v + i) * kLanes);
    }
  }
  const int64_t span = std::max<int64_t>(args.group_size, kLanes);
  int32_t* of_span = weighing.lanes;
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const int32_t* of_row = integers + r * num_tokens;
    SplitBytes(of_row, num_tokens, args.rows, r);
    for (int64_t begin = 0; begin < num_tokens; begin += span, of_span += kLanes) {
      auto total = hn::Zero(kI32);
      for (int64_t t = begin; t < begin + span; t += kLanes) {
        total = hn::Add(total, hn::Load(kI32, of_row + t));
      }
      hn::Store(total, kI32, of_span);
    }
  }
}

#if HWY_TARGET == HWY_AVX3
// The same where every group has whole blocks of bytes.
HWY_INLINE void WeighBlocks(const SoftmaxArgs& args, const Weighing& weighing) {
  const WeightTables tables(args.rows.high_shift);
  const float* scores = args.scores;
  int32_t* of_span = weighing.lanes;
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const __m512 factor = _mm512_set1_ps(weighing.factors[r]);
    const __m512 origin = _mm512_set1_ps(weighing.origins[r]);
    int8_t* bytes = args.rows.Row(r);
    for (int64_t begin = 0; begin < args.num_tokens; begin += args.group_size) {
      auto total = hn::Zero(kI32);
      for (int64_t t = 0; t < args.group_size; t += kMaxBlock, scores += kMaxBlock) {
        const __m512i weights = tables.Weights(_mm512_loadu_ps(scores), factor, origin,
                                               _mm512_loadu_ps(scores + kLanes), factor, origin);
        total = hn::Add(total, hn::Vec<I32>{tables.Sums(weights)});
        _mm512_store_si512(bytes, tables.Bytes(weights));
        bytes += 2 * kMaxBlock;
      }
      hn::Store(total, kI32, of_span);
      of_span += kLanes;
    }
  }
}
#endif

void SoftmaxToIntegers(const SoftmaxArgs& args) {
  alignas(64) float largest[kTileRows] = {}, page_max[kTileRows] = {}, sums[kTileRows] = {};
  alignas(64) int32_t lanes[kTileRows * kMaxPageTokens];
  LargestScores<true>(args, largest);
  alignas(64) float factors[kTileRows], origins[kTileRows];
  ScaleScores(largest, args.scales, args.num_rows, factors, origins);
  for (int64_t r = 0; r < args.num_rows; ++r) {
    page_max[r] = largest[r] * (args.scales == nullptr ? 1.0f : args.scales[r]);
  }
  AdvanceArgs advance = AdvanceOf(args, page_max, sums);
  advance.unit = 1.0f / static_cast<float>(MaxRowInteger(args.rows.high_shift));
  RaiseMax(advance);
  const Weighing weighing{factors, origins, lanes};
#if HWY_TARGET == HWY_AVX3
  args.rows.block == kMaxBlock ? WeighBlocks(args, weighing) : WeighRows(args, weighing);
#else
  WeighRows(args, weighing);
#endif
  const int64_t num_tokens = args.num_tokens, span = std::max<int64_t>(args.group_size, kLanes);
  if (args.group_size >= kLanes) {
    const int64_t num_spans = args.num_rows * (num_tokens / span);
    ClearTail(lanes, num_spans);
    const auto add = [](hn::Vec<I32> a, hn::Vec<I32> b) HWY_ATTR { return hn::Add(a, b); };
    ReduceRows(kI32, lanes, num_spans, add, args.sums);
  } else {
    SumGroups(lanes, args.num_rows * num_tokens, args.group_size, args.sums);
  }
  const int64_t groups = num_tokens / args.group_size;
  if (groups == 1) {
    for (int64_t r = 0; r < args.num_rows; r += kLanes) {
      hn::Store(hn::ConvertTo(kF32, hn::LoadU(kI32, args.sums + r)), kF32, sums + r);
    }
  } else {
    for (int64_t r = 0; r < args.num_rows; ++r) {
      const int32_t* of_row = args.sums + r * groups;
      sums[r] = static_cast<float>(std::accumulate(of_row, of_row + groups, int32_t{0}));
    }
  }
  AddSums(advance);
}

void Merge(const AttentionState& from, int64_t num_rows, int64_t padded_dim,
           const AttentionState& into) {
  alignas(64) float keep[kTileRows], add[kTileRows];
  AdvanceArgs advance;
  advance.page_max = from.max;
  advance.num_rows = num_rows;
  advance.state = into;
  advance.keep = keep;
  advance.add = add;
  RaiseMax(advance);
  for (int64_t r = 0; r < num_rows; ++r) {
    into.sum[r] += add[r] * from.sum[r];
    float* out = into.out + r * padded_dim;
    for (int64_t c = 0; c < padded_dim; c += kLanes) {
      const Vector kept = hn::Mul(hn::Set(kF32, keep[r]), hn::LoadU(kF32, out + c));
      const Vector more = hn::LoadU(kF32, from.out + r * padded_dim + c);
      hn::StoreU(hn::MulAdd(hn::Set(kF32, add[r]), more, kept), kF32, out + c);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace innerq
HWY_AFTER_NAMESPACE();
