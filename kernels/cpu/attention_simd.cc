// The products with codes of AttentionOps in Highway, and the choice of all its functions.

// Scalar (the compiler's baseline), AVX2 and AVX-512: the steps between are not worth their size.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_simd.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h.
#include <algorithm>

#include "kernels/cpu/attention_simd_inl.h"
#include "kernels/result.h"

HWY_BEFORE_NAMESPACE();
namespace innerq {
namespace HWY_NAMESPACE {

// Lanes for spans that are multiples of eight.
using F32x8 = hn::CappedTag<float, 8>;
constexpr int kLanesOf8 = kLanes < 8 ? kLanes : 8;

void Quantize(const QuantizeArgs& args) {
  alignas(64) float scaled[kMaxInner];
  alignas(64) int32_t integers[kMaxInner + kPanelWidth] = {};
  const int64_t extent = RoundUp(args.n, kPanelWidth);
  const auto max_integer = static_cast<float>(MaxRowInteger(args.rows.high_shift));
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
    constexpr float kTiny = 1e-30f;  // its reciprocal times the largest integer is finite
    const float inverse = max < kTiny ? 0.0f : max_integer / max;
    for (int64_t i = 0; i < extent; i += kLanes) {
      const Vector y = hn::Mul(hn::Load(kF32, scaled + i), hn::Set(kF32, inverse));
      const Vector finite = hn::Min(y, hn::Set(kF32, max_integer));  // NaN becomes the largest
      hn::Store(RoundToInt(finite), kI32, integers + i);
    }
    SplitBytes(integers, args.n, args.rows, r);
    args.scales[r] = max < kTiny ? 0.0f : max / max_integer;
    if (args.zeros != nullptr) args.constants[r] = SumOf(constant);
    SumGroups(integers, args.n, args.group_size, args.sums + r * (args.n / args.group_size));
  }
}

#if HWY_TARGET == HWY_SCALAR

void Unpack(const UnpackArgs& args) {
  for (int64_t i = 0; i < args.outer * args.inner; ++i) {
    args.codes[i] = static_cast<uint8_t>(ReadCode(args.packed, args.bits, i));
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

void Unpack(const UnpackArgs& args) {
  const int64_t num_codes = args.outer * args.inner;
  if (args.bits == 2) return UnpackBits<2>(args.packed, num_codes, args.codes);
  if (args.bits == 3) return UnpackBits<3>(args.packed, num_codes, args.codes);
  if (args.bits == 4) return UnpackBits<4>(args.packed, num_codes, args.codes);
  std::copy(args.packed, args.packed + num_codes, args.codes);
}

#endif  // HWY_TARGET == HWY_SCALAR

// Codes are unpacked as they are packed, one a byte.
HWY_INLINE const uint8_t* PanelCodes(const DotArgs& args, int64_t panel) {
  return args.side.codes + panel * args.side.inner * kPanelWidth;
}

#if HWY_TARGET == HWY_SCALAR

void Dot(const DotArgs& args) {
  const int64_t block = args.rows.block, group_size = args.side.group_size;
  for (int64_t r = args.row_begin; r < args.row_end; ++r) {
    int32_t x[kMaxInner];
    for (int64_t i = 0; i < args.side.inner; ++i) {
      const int8_t* low = args.rows.Row(r) + i / block * 2 * block + i % block;
      x[i] = *low + (low[block] << args.rows.high_shift);
    }
    for (int64_t panel = args.panel_begin; panel < args.panel_end; ++panel) {
      for (int64_t g = 0; g < args.groups(); ++g) {
        int32_t* dots = args.Dots(r, g, panel);
        std::fill(dots, dots + kPanelWidth, -args.Excess(r, g));
        for (int64_t i = g * group_size; i < (g + 1) * group_size; ++i) {
          const uint8_t* codes = PanelCodes(args, panel) + i / 4 * 64 + i % 4;
          for (int64_t o = 0; o < kPanelWidth; ++o) dots[o] += codes[o * 4] * x[i];
        }
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
  const int64_t block = args.rows.block, group_size = args.side.group_size;
  const uint8_t* codes = PanelCodes(args, panel);
  for (int64_t g = 0; g < args.groups(); ++g) {
    hn::Vec<I32> high[kRows][kPanelVectors], low[kRows][kPanelVectors];
    for (int r = 0; r < kRows; ++r) {
      const auto none = hn::Set(kI32, -args.Excess(row + r, g));
      for (int v = 0; v < kPanelVectors; ++v) {
        low[r][v] = none;
        high[r][v] = hn::Zero(kI32);
      }
    }
    for (int64_t begin = g * group_size; begin < (g + 1) * group_size; begin += block) {
      for (int64_t i = 0; i < block; i += 4) {
        HWY_UNROLL(4)
        for (int r = 0; r < kRows; ++r) {
          const int8_t* bytes = args.rows.Row(row + r) + begin * 2 + i;
          int32_t high_quad, low_quad;
          __builtin_memcpy(&low_quad, bytes, 4);
          __builtin_memcpy(&high_quad, bytes + block, 4);
          const auto x_high = hn::BitCast(U8(), hn::Set(kI32, high_quad));
          const auto x_low = hn::BitCast(U8(), hn::Set(kI32, low_quad));
          HWY_UNROLL(4)
          for (int v = 0; v < kPanelVectors; ++v) {
            const auto code = hn::LoadU(U8(), codes + (begin + i) * 16 + v * kLanes * 4);
            high[r][v] = hn::Add(high[r][v], DotQuads<kWide>(code, x_high));
            low[r][v] = hn::Add(low[r][v], DotQuads<kWide>(code, x_low));
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      int32_t* out = args.Dots(row + r, g, panel);
      for (int v = 0; v < kPanelVectors; ++v) {
        const auto shifted = hn::ShiftLeftSame(high[r][v], args.rows.high_shift);
        hn::StoreU(hn::Add(shifted, low[r][v]), kI32, out + v * kLanes);
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

void Dot(const DotArgs& args) { args.side.bits > 4 ? DotAll<true>(args) : DotAll<false>(args); }

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
  const float* scales = args.scales + o;
  const float* zeros = args.zeros + (kZeros ? o : 0);
  float* out = args.out + o;
  for (int64_t r = 0; r < num_rows; ++r) {
    Vector total[kVectors];
    HWY_UNROLL(4) for (Vector& t : total) t = hn::Zero(kF32);
    HWY_UNROLL(4) for (int64_t g = 0; g < groups; ++g) {
      HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) {
        const Vector dot = hn::ConvertTo(kF32, hn::LoadU(kI32, dots + v * kLanes));
        const Vector scale = hn::LoadU(kF32, scales + g * outer + v * kLanes);
        total[v] = hn::MulAdd(dot, scale, total[v]);
      }
      if constexpr (kZeros) {
        const Vector factor = hn::Set(kF32, static_cast<float>(*sums++));
        HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) {
          const Vector zero = hn::LoadU(kF32, zeros + g * outer + v * kLanes);
          total[v] = hn::MulAdd(factor, zero, total[v]);
        }
      }
      dots += outer;
    }
    if (add == nullptr) {
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) hn::StoreU(total[v], kF32, out + v * kLanes);
    } else {
      const Vector factor = hn::Set(kF32, add[r]);
      Vector kept[kVectors];
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) kept[v] = hn::LoadU(kF32, out + v * kLanes);
      if (keep[r] != 1.0f) {  // seldom: most pages do not raise the largest score
        const Vector of_old = hn::Set(kF32, keep[r]);
        HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) kept[v] = hn::Mul(of_old, kept[v]);
      }
      HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) {
        hn::StoreU(hn::MulAdd(factor, total[v], kept[v]), kF32, out + v * kLanes);
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
    float* out = args.out + r * args.outer;
    for (int64_t o = args.begin; o < args.end; o += kLanesOf8) {
      const auto dot = hn::LoadU(di, args.dots + r * args.outer + o);
      auto total = hn::Mul(add, hn::MulAdd(hn::ConvertTo(d, dot), scale, constant));
      if (args.keep != nullptr) {
        total = hn::MulAdd(hn::Set(d, args.keep[r]), hn::LoadU(d, out + o), total);
      }
      hn::StoreU(total, d, out + o);
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
  ops.begin = ops.end = [](int64_t) {};
  ops.unpack = Unpack;
  ops.dot = Dot;
  ops.scale_inner = ScaleInner;
  ops.scale_outer = ScaleOuter;
  ops.softmax_to_float = SoftmaxToFloat;
  ops.softmax_to_integers = SoftmaxToIntegers;
  ops.advance = Advance;
  ops.attend_coded_pages_few = ops.attend_coded_pages_many = nullptr;
  ops.attend_small_coded_pages_many = nullptr;
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
      ops.dot = DotVnni;
      ops.attend_coded_pages_few = ops.attend_coded_pages_many = AttendCodedPagesVnni;
      ops.attend_small_coded_pages_many = AttendCodedPagesVnni;
    }
    if (isa >= CpuIsa::kAmx) {
      ops.begin = BeginAmx;
      ops.end = EndAmx;
      ops.unpack = UnpackAmx;
      ops.dot = DotAmx;
      ops.attend_coded_pages_many = nullptr;
      ops.attend_small_coded_pages_many = AttendCodedPagesAmx;
    }
    return ops;
  }
#endif
  CHECK(isa == CpuIsa::kScalar, "no such variant in this build");
  return HWY_STATIC_DISPATCH(MakeAttentionOps)();
}

}  // namespace innerq
#endif  // HWY_ONCE
