// The functions of AttentionOps in Highway, compiled once per instruction set.

// Scalar (the compiler's baseline), AVX2 and AVX-512: the steps between are not worth their size.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_simd.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h.
#include <algorithm>
#include <limits>
#include <numeric>

#include "hwy/highway.h"
#include "kernels/cpu/attention_ops.h"
#include "kernels/float16.h"
#include "kernels/result.h"

HWY_BEFORE_NAMESPACE();
namespace innerq {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::CappedTag<float, 16>;
using I32 = hn::RebindToSigned<F32>;
using Vector = hn::Vec<F32>;
constexpr F32 kF32;
constexpr I32 kI32;
constexpr int kLanes = static_cast<int>(HWY_LANES(float));
constexpr int kPanelVectors = static_cast<int>(kPanelWidth) / kLanes;

// Lanes for spans that are multiples of eight.
using F32x8 = hn::CappedTag<float, 8>;
constexpr int kLanesOf8 = kLanes < 8 ? kLanes : 8;

template <class D>
HWY_INLINE hn::Vec<D> LoadHalf(D d, const uint16_t* x) {
#if HWY_TARGET == HWY_SCALAR  // Highway's scalar conversion loses infinity and NaN
  return hn::Set(d, F16ToF32(*x));
#else
  const hn::Rebind<hwy::float16_t, D> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(x)));
#endif
}

void HalfToFloat(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(LoadHalf(kF32, x + i), kF32, out + i);
  for (; i < n; ++i) out[i] = F16ToF32(x[i]);
}

void FloatToHalf(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::Rebind<hwy::float16_t, F32> d16;
  for (; i + kLanes <= n; i += kLanes) {
    hn::StoreU(hn::DemoteTo(d16, hn::LoadU(kF32, x + i)), d16,
               reinterpret_cast<hwy::float16_t*>(out + i));
  }
#endif
  for (; i < n; ++i) out[i] = F32ToF16(x[i]);
}

template <class D>
HWY_INLINE void RotateAt(D d, const float* x, const float* cos, const float* sin, int64_t half,
                         int64_t i, float* out) {
  const auto a = hn::LoadU(d, x + i);
  const auto b = hn::LoadU(d, x + half + i);
  const auto c = hn::LoadU(d, cos + i);
  const auto s = hn::LoadU(d, sin + i);
  hn::StoreU(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), d, out + i);
  hn::StoreU(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), d, out + half + i);
}

void Rotate(const float* x, const float* cos, const float* sin, int64_t head_dim, float* out) {
  const int64_t half = head_dim / 2;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) RotateAt(kF32, x, cos, sin, half, i, out);
  for (; i < half; ++i) RotateAt(hn::CappedTag<float, 1>(), x, cos, sin, half, i, out);
}

// Rows that a block of the F16 functions takes together.
constexpr int kHalfRows = kLanes >= 16 ? 4 : kLanes >= 8 ? 2 : 1;

// Even and odd channels are summed apart, for shorter chains.
template <int kRows>
HWY_INLINE void HalfScoresBlock(const HalfScoresArgs& args, int64_t row, int64_t panel) {
  constexpr int kPanels = kLanes >= 16 ? 2 : 1;
  constexpr int kVectors = kPanels * kPanelVectors;
  const int64_t dim = args.head_dim;
  const int64_t stride = RoundUp(dim, kPanelWidth);
  const uint16_t* keys = args.keys + panel * dim * kPanelWidth;
  const float* q = args.q + row * stride;
  Vector sums[2][kRows][kVectors];
  for (auto& parity : sums) {
    for (auto& of_row : parity) {
      for (Vector& sum : of_row) sum = hn::Zero(kF32);
    }
  }
  for (int64_t d = 0; d < dim; d += 2) {
    HWY_UNROLL(2)
    for (int parity = 0; parity < 2; ++parity) {
      HWY_UNROLL(16)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at =
            (v / kPanelVectors * dim + d + parity) * kPanelWidth + v % kPanelVectors * kLanes;
        const Vector k = LoadHalf(kF32, keys + at);
        HWY_UNROLL(8)
        for (int r = 0; r < kRows; ++r) {
          sums[parity][r][v] =
              hn::MulAdd(hn::Set(kF32, q[r * stride + d + parity]), k, sums[parity][r][v]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      hn::StoreU(hn::Add(sums[0][r][v], sums[1][r][v]), kF32,
                 args.scores + (row + r) * args.num_tokens + panel * kPanelWidth + v * kLanes);
    }
  }
}

void HalfScores(const HalfScoresArgs& args) {
  const int64_t step = kLanes >= 16 ? 2 : 1;
  int64_t row = 0;
  for (; row + kHalfRows <= args.num_rows; row += kHalfRows) {
    for (int64_t panel = 0; panel < args.num_tokens / kPanelWidth; panel += step) {
      HalfScoresBlock<kHalfRows>(args, row, panel);
    }
  }
  for (; row < args.num_rows; ++row) {
    for (int64_t panel = 0; panel < args.num_tokens / kPanelWidth; panel += step) {
      HalfScoresBlock<1>(args, row, panel);
    }
  }
}

template <int kRows, int kVectors>
HWY_INLINE void HalfValuesBlock(const HalfValuesArgs& args, int64_t row, int64_t channel) {
  Vector sums[kRows][kVectors];
  for (auto& of_row : sums) {
    for (Vector& sum : of_row) sum = hn::Zero(kF32);
  }
  const uint16_t* values = args.values + channel;
  const float* p = args.p + row * args.p_stride;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      const Vector value = LoadHalf(kF32, values + t * args.padded_dim + v * kLanes);
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        sums[r][v] = hn::MulAdd(hn::Set(kF32, p[r * args.p_stride + t]), value, sums[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = args.out + (row + r) * args.padded_dim + channel;
    const Vector keep = hn::Set(kF32, args.keep[row + r]);
    const Vector add = hn::Set(kF32, args.add[row + r]);
    for (int v = 0; v < kVectors; ++v) {
      const Vector kept = hn::Mul(keep, hn::LoadU(kF32, out + v * kLanes));
      hn::StoreU(hn::MulAdd(add, sums[r][v], kept), kF32, out + v * kLanes);
    }
  }
}

template <int kRows>
HWY_INLINE void HalfValuesRows(const HalfValuesArgs& args, int64_t row) {
  constexpr int kWide = kLanes >= 8 ? 4 : 1;
  int64_t channel = 0;
  for (; channel + kWide * kLanes <= args.padded_dim; channel += kWide * kLanes) {
    HalfValuesBlock<kRows, kWide>(args, row, channel);
  }
  for (; channel < args.padded_dim; channel += kLanes)
    HalfValuesBlock<kRows, 1>(args, row, channel);
}

void HalfValues(const HalfValuesArgs& args) {
  int64_t row = 0;
  for (; row + kHalfRows <= args.num_rows; row += kHalfRows) HalfValuesRows<kHalfRows>(args, row);
  for (; row < args.num_rows; ++row) HalfValuesRows<1>(args, row);
}

HWY_INLINE float SumOf(Vector v) { return hn::GetLane(hn::SumOfLanes(kF32, v)); }
HWY_INLINE float MaxOf(Vector v) { return hn::GetLane(hn::MaxOfLanes(kF32, v)); }

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

// Rounds |x| < 2^22 to the nearest integer, ties to even.
HWY_INLINE hn::Vec<I32> RoundToInt(Vector x) {
  const Vector magic = hn::Set(kF32, 12582912.0f);  // 1.5 * 2^23: the unit of sums near it is 1
  return hn::Sub(hn::BitCast(kI32, hn::Add(x, magic)), hn::BitCast(kI32, magic));
}

#if HWY_TARGET == HWY_SCALAR

void SplitBytes(const int32_t* x, int64_t n, int8_t* high, int8_t* low) {
  for (int64_t i = 0; i < n; ++i) {
    high[i] = static_cast<int8_t>((x[i] + 64) >> 7);
    low[i] = static_cast<int8_t>(((x[i] + 64) & 127) - 64);
  }
}

#else

// Both to bytes, in each 128-bit block first those of a, then those of b.
using I16 = hn::Repartition<int16_t, I32>;
HWY_INLINE hn::Vec<hn::Repartition<int8_t, I32>> PackBytes(hn::Vec<I16> a, hn::Vec<I16> b) {
#if HWY_TARGET == HWY_AVX2
  return hn::Vec<hn::Repartition<int8_t, I32>>{_mm256_packs_epi16(a.raw, b.raw)};
#else
  return hn::Vec<hn::Repartition<int8_t, I32>>{_mm512_packs_epi16(a.raw, b.raw)};
#endif
}

// Splits integers of 15 bits into IntegerRows' bytes. Reads x and writes bytes up to the next
// multiple of 2 * kLanes.
HWY_INLINE void SplitBytes(const int32_t* x, int64_t n, int8_t* high, int8_t* low) {
  constexpr int kBlocks = kLanes / 4;
  alignas(64) int32_t places[kLanes];  // of quads: high bytes of both vectors, then low ones
  for (int i = 0; i < kLanes; ++i) {
    places[i] = i % kBlocks * 4 + i / (kLanes / 2) * 2 + i % (kLanes / 2) / kBlocks;
  }
  const auto place = hn::SetTableIndices(kI32, places);
  const hn::Half<hn::Repartition<int8_t, I32>> half;
  const I16 d16;
  const auto bias = hn::Set(d16, 64);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    const auto both =
        hn::ReorderDemote2To(d16, hn::LoadU(kI32, x + i), hn::LoadU(kI32, x + i + kLanes));
    const auto biased = hn::Add(both, bias);
    const auto h = hn::ShiftRight<7>(biased);
    const auto l = hn::Sub(hn::And(biased, hn::Set(d16, 127)), bias);
    const auto bytes = hn::BitCast(hn::Repartition<int8_t, I32>(),
                                   hn::TableLookupLanes(hn::BitCast(kI32, PackBytes(h, l)), place));
    hn::StoreU(hn::LowerHalf(half, bytes), half, high + i);
    hn::StoreU(hn::UpperHalf(half, bytes), half, low + i);
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

// Sums of groups of `group_size` integers; n is a multiple of it, `x` readable to whole vectors.
HWY_INLINE void SumGroups(const int32_t* x, int64_t n, int64_t group_size, int32_t* sums) {
  for (int64_t begin = 0; begin < n; begin += group_size) {
    int32_t sum = 0;
    if (group_size % kLanes == 0) {
      auto lanes = hn::Zero(kI32);
      for (int64_t i = 0; i < group_size; i += kLanes) {
        lanes = hn::Add(lanes, hn::LoadU(kI32, x + begin + i));
      }
      sum = hn::GetLane(hn::SumOfLanes(kI32, lanes));
    } else {
      for (int64_t i = 0; i < group_size; ++i) sum += x[begin + i];
    }
    *sums++ = sum;
  }
}

void Quantize(const QuantizeArgs& args) {
  alignas(64) float scaled[kMaxInner];
  alignas(64) int32_t integers[kMaxInner + kPanelWidth] = {};
  const int64_t extent = RoundUp(args.n, kPanelWidth);
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const float* x = args.x + r * args.stride;
    Vector largest = hn::Zero(kF32), constant = hn::Zero(kF32);
    for (int64_t i = 0; i < extent; i += kLanes) {
      Vector y = hn::LoadU(kF32, x + i);
      if (args.zeros != nullptr)
        constant = hn::MulAdd(y, hn::LoadU(kF32, args.zeros + i), constant);
      if (args.factors != nullptr) y = hn::Mul(y, hn::LoadU(kF32, args.factors + i));
      hn::Store(y, kF32, scaled + i);
      largest = hn::Max(hn::Abs(y), largest);
    }
    const float max = MaxOf(largest);
    constexpr float kTiny = 1e-30f;  // its reciprocal times kMaxRowInteger is finite
    const float inverse = max < kTiny ? 0.0f : kMaxRowInteger / max;
    for (int64_t i = 0; i < extent; i += kLanes) {
      const Vector y = hn::Mul(hn::Load(kF32, scaled + i), hn::Set(kF32, inverse));
      const Vector finite = hn::Min(y, hn::Set(kF32, kMaxRowInteger));  // NaN becomes the largest
      hn::Store(RoundToInt(finite), kI32, integers + i);
    }
    SplitBytes(integers, extent, args.rows.High(r), args.rows.Low(r));
    args.scales[r] = max < kTiny ? 0.0f : max / kMaxRowInteger;
    if (args.zeros != nullptr) args.constants[r] = SumOf(constant);
    SumGroups(integers, args.n, args.group_size, args.sums + r * (args.n / args.group_size));
  }
}

#if HWY_TARGET == HWY_SCALAR

void Unpack(const uint8_t* packed, int bits, int64_t num_codes, uint8_t* codes) {
  for (int64_t i = 0; i < num_codes; ++i) {
    codes[i] = static_cast<uint8_t>(ReadCode(packed, bits, i));
  }
}

#else

// 32 codes at a time. Code i of a half of 16 lies within 16 bits from byte i * bits / 8 on, at bit
// i * bits % 8: a byte shuffle brings these to 16-bit lanes, a multiplication moves the code to the
// lane's upper end and a shift brings it down.
template <int kBits>
HWY_INLINE void UnpackBits(const uint8_t* packed, int64_t num_codes, uint8_t* codes) {
  const hn::FixedTag<uint16_t, 8> d16;
  const hn::FixedTag<uint8_t, 16> d8;
  alignas(16) uint8_t places[2][16];
  alignas(16) uint16_t factors[2][8];
  for (int i = 0; i < 16; ++i) {
    const int byte = i * kBits / 8;
    places[i / 8][i % 8 * 2] = static_cast<uint8_t>(byte);
    places[i / 8][i % 8 * 2 + 1] = static_cast<uint8_t>(byte + 1);
    factors[i / 8][i % 8] = static_cast<uint16_t>(1 << (16 - kBits - i * kBits % 8));
  }
  const auto place0 = hn::Load(d8, places[0]), place1 = hn::Load(d8, places[1]);
  const auto factor0 = hn::Load(d16, factors[0]), factor1 = hn::Load(d16, factors[1]);
  for (int64_t i = 0; i < num_codes; i += 16) {
    const auto bytes = hn::LoadU(d8, packed + i * kBits / 8);
    const auto word0 = hn::BitCast(d16, hn::TableLookupBytes(bytes, place0));
    const auto word1 = hn::BitCast(d16, hn::TableLookupBytes(bytes, place1));
    const auto code0 = hn::ShiftRight<16 - kBits>(hn::Mul(word0, factor0));
    const auto code1 = hn::ShiftRight<16 - kBits>(hn::Mul(word1, factor1));
    const hn::FixedTag<int16_t, 8> d16s;
    const hn::FixedTag<uint8_t, 8> d8_half;
    hn::StoreU(hn::DemoteTo(d8_half, hn::BitCast(d16s, code0)), d8_half, codes + i);
    hn::StoreU(hn::DemoteTo(d8_half, hn::BitCast(d16s, code1)), d8_half, codes + i + 8);
  }
}

void Unpack(const uint8_t* packed, int bits, int64_t num_codes, uint8_t* codes) {
  if (bits == 2) return UnpackBits<2>(packed, num_codes, codes);
  if (bits == 3) return UnpackBits<3>(packed, num_codes, codes);
  if (bits == 4) return UnpackBits<4>(packed, num_codes, codes);
  std::copy(packed, packed + num_codes, codes);
}

#endif  // HWY_TARGET == HWY_SCALAR

#if HWY_TARGET == HWY_SCALAR

void Dot(const DotArgs& args) {
  const int64_t panel_bytes = args.inner * kPanelWidth;
  for (int64_t r = args.row_begin; r < args.row_end; ++r) {
    int32_t x[kMaxInner];
    for (int64_t i = 0; i < args.inner; ++i) {
      x[i] = 128 * args.rows.High(r)[i] + args.rows.Low(r)[i];
    }
    for (int64_t panel = args.panel_begin; panel < args.panel_end; ++panel) {
      for (int64_t g = 0; g < args.groups(); ++g) {
        int32_t sums[kPanelWidth] = {};
        for (int64_t i = g * args.group_size; i < (g + 1) * args.group_size; ++i) {
          const uint8_t* codes = args.codes + panel * panel_bytes + i / 4 * 64 + i % 4;
          for (int64_t o = 0; o < kPanelWidth; ++o) sums[o] += codes[o * 4] * x[i];
        }
        std::copy(sums, sums + kPanelWidth, args.Dots(r, g, panel));
      }
    }
  }
}

#else

using U8 = hn::Repartition<uint8_t, I32>;

// Pairwise sums of u8 * s8 in saturating int16: exact while u8 <= 15.
HWY_INLINE hn::Vec<I16> MultiplyPairs(hn::Vec<U8> codes, hn::Vec<U8> x) {
#if HWY_TARGET == HWY_AVX2
  return hn::Vec<I16>{_mm256_maddubs_epi16(codes.raw, x.raw)};
#else
  return hn::Vec<I16>{_mm512_maddubs_epi16(codes.raw, x.raw)};
#endif
}

HWY_INLINE hn::Vec<I32> AddPairs(hn::Vec<I16> pairs, int16_t factor) {
  const auto factors = hn::Set(I16(), factor);
#if HWY_TARGET == HWY_AVX2
  return hn::Vec<I32>{_mm256_madd_epi16(pairs.raw, factors.raw)};
#else
  return hn::Vec<I32>{_mm512_madd_epi16(pairs.raw, factors.raw)};
#endif
}

// Dot products of four codes with four signed bytes per 32-bit lane. Codes above 15 are split.
template <bool kWide>
HWY_INLINE hn::Vec<I32> DotQuads(hn::Vec<U8> codes, hn::Vec<U8> x) {
  if constexpr (!kWide) return AddPairs(MultiplyPairs(codes, x), 1);
  const auto mask = hn::Set(U8(), 15);
  const auto upper = hn::And(
      hn::BitCast(U8(), hn::ShiftRight<4>(hn::BitCast(hn::Repartition<uint16_t, U8>(), codes))),
      mask);
  return hn::Add(AddPairs(MultiplyPairs(hn::And(codes, mask), x), 1),
                 AddPairs(MultiplyPairs(upper, x), 16));
}

template <int kRows, bool kWide>
HWY_INLINE void DotBlock(const DotArgs& args, int64_t row, int64_t panel) {
  const int64_t quads = args.group_size / 4;
  const uint8_t* codes = args.codes + panel * args.inner * kPanelWidth;
  for (int64_t g = 0; g < args.groups(); ++g) {
    hn::Vec<I32> high[kRows][kPanelVectors], low[kRows][kPanelVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kPanelVectors; ++v) high[r][v] = low[r][v] = hn::Zero(kI32);
    }
    for (int64_t quad = g * quads; quad < (g + 1) * quads; ++quad) {
      HWY_UNROLL(4)
      for (int r = 0; r < kRows; ++r) {
        int32_t high_quad, low_quad;
        __builtin_memcpy(&high_quad, args.rows.High(row + r) + quad * 4, 4);
        __builtin_memcpy(&low_quad, args.rows.Low(row + r) + quad * 4, 4);
        const auto x_high = hn::BitCast(U8(), hn::Set(kI32, high_quad));
        const auto x_low = hn::BitCast(U8(), hn::Set(kI32, low_quad));
        HWY_UNROLL(4)
        for (int v = 0; v < kPanelVectors; ++v) {
          const auto code = hn::LoadU(U8(), codes + quad * 64 + v * kLanes * 4);
          high[r][v] = hn::Add(high[r][v], DotQuads<kWide>(code, x_high));
          low[r][v] = hn::Add(low[r][v], DotQuads<kWide>(code, x_low));
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      int32_t* out = args.Dots(row + r, g, panel);
      for (int v = 0; v < kPanelVectors; ++v) {
        hn::StoreU(hn::Add(hn::ShiftLeft<7>(high[r][v]), low[r][v]), kI32, out + v * kLanes);
      }
    }
  }
}

template <bool kWide>
void DotAll(const DotArgs& args) {
  constexpr int kRows = kLanes >= 16 ? 4 : 2;
  for (int64_t panel = args.panel_begin; panel < args.panel_end; ++panel) {
    int64_t row = args.row_begin;
    for (; row + kRows <= args.row_end; row += kRows) DotBlock<kRows, kWide>(args, row, panel);
    for (; row < args.row_end; ++row) DotBlock<1, kWide>(args, row, panel);
  }
}

void Dot(const DotArgs& args) { args.wide ? DotAll<true>(args) : DotAll<false>(args); }

#endif  // HWY_TARGET == HWY_SCALAR

// kVectors of outer elements for all rows. kGroups: the number of groups if it is small, so that
// their scales stay in registers, or 0.
template <int kVectors, int kGroups, bool kZeros>
HWY_INLINE void ScaleInnerColumns(const InnerScaleArgs& args, int64_t o) {
  const int64_t groups = kGroups > 0 ? kGroups : args.groups;
  const int64_t outer = args.outer, num_rows = args.num_rows;
  const float* keep = args.keep;
  const float* add = args.add;
  const int32_t* dots = args.dots + o;
  const int32_t* sums = args.sums;
  const int32_t* offsets = args.offsets;
  const float* scales = args.scales + o;
  const float* zeros = args.zeros + (kZeros ? o : 0);
  float* out = args.out + o;
  for (int64_t r = 0; r < num_rows; ++r) {
    Vector total[kVectors];
    HWY_UNROLL(4) for (Vector& t : total) t = hn::Zero(kF32);
    HWY_UNROLL(4) for (int64_t g = 0; g < groups; ++g) {
      const auto offset = hn::Set(kI32, *offsets++);
      HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) {
        const auto dot = hn::Sub(hn::LoadU(kI32, dots + v * kLanes), offset);
        const Vector scale = hn::LoadU(kF32, scales + g * outer + v * kLanes);
        total[v] = hn::MulAdd(hn::ConvertTo(kF32, dot), scale, total[v]);
      }
      if constexpr (kZeros) {
        const Vector sum = hn::Set(kF32, static_cast<float>(*sums++));
        HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) {
          const Vector zero = hn::LoadU(kF32, zeros + g * outer + v * kLanes);
          total[v] = hn::MulAdd(sum, zero, total[v]);
        }
      }
      dots += outer;
    }
    const Vector factor = hn::Set(kF32, add[r]);
    if (keep == nullptr) {
      HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) {
        hn::StoreU(hn::Mul(factor, total[v]), kF32, out + v * kLanes);
      }
    } else {
      const Vector of_old = hn::Set(kF32, keep[r]);
      HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) {
        const Vector kept = hn::Mul(of_old, hn::LoadU(kF32, out + v * kLanes));
        hn::StoreU(hn::MulAdd(factor, total[v], kept), kF32, out + v * kLanes);
      }
    }
    out += outer;
  }
}

template <int kVectors, bool kZeros>
HWY_INLINE void ScaleInnerColumns(const InnerScaleArgs& args, int64_t o) {
  if (args.groups == 1) {
    ScaleInnerColumns<kVectors, 1, kZeros>(args, o);
  } else if (args.groups == 2) {
    ScaleInnerColumns<kVectors, 2, kZeros>(args, o);
  } else if (args.groups == 4) {
    ScaleInnerColumns<kVectors, 4, kZeros>(args, o);
  } else {
    ScaleInnerColumns<kVectors, 0, kZeros>(args, o);
  }
}

template <bool kZeros>
HWY_INLINE void ScaleInnerAll(const InnerScaleArgs& args) {
  int64_t o = 0;
  for (; o + 2 * kLanes <= args.outer; o += 2 * kLanes) ScaleInnerColumns<2, kZeros>(args, o);
  for (; o < args.outer; o += kLanes) ScaleInnerColumns<1, kZeros>(args, o);
}

void ScaleInner(const InnerScaleArgs& args) {
  args.zeros != nullptr ? ScaleInnerAll<true>(args) : ScaleInnerAll<false>(args);
}

void ScaleOuter(const OuterScaleArgs& args) {
  constexpr F32x8 d;
  constexpr hn::RebindToSigned<F32x8> di;
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const auto scale = hn::Set(d, args.scales[r]);
    const auto constant = hn::Set(d, args.constants == nullptr ? 0.0f : args.constants[r]);
    const auto add = hn::Set(d, args.add == nullptr ? 1.0f : args.add[r]);
    const auto offset = hn::Set(di, args.offset * args.sums[r]);
    float* out = args.out + r * args.outer;
    for (int64_t o = args.begin; o < args.end; o += kLanesOf8) {
      const auto dot = hn::Sub(hn::LoadU(di, args.dots + r * args.outer + o), offset);
      auto total = hn::Mul(add, hn::MulAdd(hn::ConvertTo(d, dot), scale, constant));
      if (args.keep != nullptr) {
        total = hn::MulAdd(hn::Set(d, args.keep[r]), hn::LoadU(d, out + o), total);
      }
      hn::StoreU(total, d, out + o);
    }
  }
}

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

// 2^x for x <= 0, 0 below 2^-126, NaN for NaN.
HWY_INLINE Vector Exp2(Vector x) {
  const Vector least = hn::Set(kF32, -127.0f);
  Vector y[1] = {hn::IfThenElse(hn::Lt(x, least), least, x)};
  Exp2InRange(y);
  return y[0];
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
HWY_INLINE void RaiseMax(const float* page_max, int64_t num_rows, const AttentionState& state,
                         float* keep, float* add) {
  for (int64_t r = 0; r < num_rows; r += kLanes) {
    const Vector old_max = hn::LoadU(kF32, state.max + r);
    const Vector page = hn::LoadU(kF32, page_max + r);
    const Vector max = hn::Max(old_max, page);
    const Vector kept = Exp2(hn::Sub(old_max, max));
    hn::StoreU(max, kF32, state.max + r);
    hn::StoreU(kept, kF32, keep + r);
    hn::StoreU(Exp2(hn::Sub(page, max)), kF32, add + r);
    hn::StoreU(hn::Mul(kept, hn::LoadU(kF32, state.sum + r)), kF32, state.sum + r);
  }
}

// kAll: every row sees all tokens.
template <bool kAll>
HWY_INLINE void PageMax(const SoftmaxArgs& args, float* page_max) {
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
  ReduceRows(kF32, lanes, args.num_rows, max, page_max);
}

// add *= unit; the state's sum += add * sums; lanes are rows.
HWY_INLINE void AddSums(const float* sums, float unit, const SoftmaxArgs& args) {
  for (int64_t r = 0; r < args.num_rows; r += kLanes) {
    const Vector add = hn::Mul(hn::LoadU(kF32, args.add + r), hn::Set(kF32, unit));
    hn::StoreU(add, kF32, args.add + r);
    float* sum = args.state.sum + r;
    hn::StoreU(hn::MulAdd(add, hn::LoadU(kF32, sums + r), hn::LoadU(kF32, sum)), kF32, sum);
  }
}

void SoftmaxToFloat(const SoftmaxArgs& args) {
  alignas(64) float page_max[kTileRows] = {}, sums[kTileRows] = {};
  PageMax<false>(args, page_max);
  RaiseMax(page_max, args.num_rows, args.state, args.keep, args.add);
  for (int64_t r = 0; r < args.num_rows; ++r) {
    float* scores = args.scores + r * args.num_tokens;
    const int64_t visible = VisibleTokens(args, r);
    const Vector max = hn::Set(kF32, page_max[r]);
    Vector sum = hn::Zero(kF32);
    for (int64_t t = 0; t < args.num_tokens; t += kLanes) {
      const Vector p = Exp2(hn::Sub(VisibleScores(scores, t, visible), max));
      hn::StoreU(p, kF32, scores + t);
      sum = hn::Add(sum, p);
    }
    sums[r] = SumOf(sum);
  }
  AddSums(sums, 1.0f, args);
}

void SoftmaxToIntegers(const SoftmaxArgs& args) {
  constexpr int kBatch = 4;  // vectors; a multiple of those of a page's tokens, or they of it
  constexpr float kLog2MaxRowInteger = 13.988684686772166f;
  alignas(64) float page_max[kTileRows] = {}, sums[kTileRows] = {};
  alignas(64) int32_t integers[(kTileRows + kBatch) * kMaxPageTokens];  // [R][T]
  alignas(64) int32_t lanes[kTileRows * kMaxPageTokens];  // [R][T/span][kLanes] sums of a span
  PageMax<true>(args, page_max);
  RaiseMax(page_max, args.num_rows, args.state, args.keep, args.add);
  const int64_t num_tokens = args.num_tokens;
  const int64_t row_vectors = num_tokens / kLanes, num_vectors = args.num_rows * row_vectors;
  const int shift = hwy::Num0BitsBelowLS1Bit_Nonzero64(static_cast<uint64_t>(row_vectors));
  for (int64_t v = 0; v < num_vectors; v += kBatch) {
    Vector p[kBatch];
    HWY_UNROLL(4) for (int i = 0; i < kBatch; ++i) {
      // 2^(score - max) * kMaxRowInteger
      const Vector max = hn::Set(kF32, page_max[(v + i) >> shift] - kLog2MaxRowInteger);
      const Vector x = hn::Sub(hn::LoadU(kF32, args.scores + (v + i) * kLanes), max);
      p[i] = hn::Max(x, hn::Set(kF32, -127.0f));
    }
    Exp2InRange(p);
    HWY_UNROLL(4) for (int i = 0; i < kBatch; ++i) {
      hn::Store(RoundToInt(p[i]), kI32, integers + (v + i) * kLanes);
    }
  }
  const int64_t span = std::max<int64_t>(args.group_size, kLanes);
  int32_t* of_span = lanes;
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const int32_t* of_row = integers + r * num_tokens;
    SplitBytes(of_row, num_tokens, args.rows.High(r), args.rows.Low(r));
    for (int64_t begin = 0; begin < num_tokens; begin += span, of_span += kLanes) {
      auto total = hn::Zero(kI32);
      for (int64_t t = begin; t < begin + span; t += kLanes) {
        total = hn::Add(total, hn::Load(kI32, of_row + t));
      }
      hn::Store(total, kI32, of_span);
    }
  }
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
  AddSums(sums, 1.0f / kMaxRowInteger, args);
}

void Merge(const AttentionState& from, int64_t num_rows, int64_t padded_dim,
           const AttentionState& into) {
  alignas(64) float keep[kTileRows], add[kTileRows];
  RaiseMax(from.max, num_rows, into, keep, add);
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

AttentionOps MakeAttentionOps() {
  AttentionOps ops;
  ops.half_to_float = HalfToFloat;
  ops.float_to_half = FloatToHalf;
  ops.rotate = Rotate;
  ops.half_scores = HalfScores;
  ops.half_values = HalfValues;
  ops.quantize = Quantize;
  ops.unpack = Unpack;
  ops.dot = Dot;
  ops.scale_inner = ScaleInner;
  ops.scale_outer = ScaleOuter;
  ops.softmax_to_float = SoftmaxToFloat;
  ops.softmax_to_integers = SoftmaxToIntegers;
  ops.merge = Merge;
  return ops;
}

}  // namespace HWY_NAMESPACE
}  // namespace innerq
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace innerq {

AttentionOps AttentionOpsFor(CpuIsa isa) {
#if HWY_ARCH_X86
  if (isa == CpuIsa::kAvx2) return N_AVX2::MakeAttentionOps();
  if (isa >= CpuIsa::kAvx512) {
    AttentionOps ops = N_AVX3::MakeAttentionOps();
    if (isa >= CpuIsa::kAvx512Vnni) {
      ops.unpack = UnpackVnni;
      ops.dot = isa >= CpuIsa::kAmx ? DotAmx : DotVnni;
    }
    return ops;
  }
#endif
  CHECK(isa == CpuIsa::kScalar, "no such variant in this build");
  return HWY_STATIC_DISPATCH(MakeAttentionOps)();
}

}  // namespace innerq
#endif  // HWY_ONCE
