// The products with codes of AttentionOps in Highway, and the choice of all its functions.

// Scalar (the compiler's baseline), AVX2 and AVX-512: the steps between are not worth their size.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_simd.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h.
#include <algorithm>
#include <array>

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

const uint8_t* Unpack(const UnpackArgs& args) {
  for (int64_t i = 0; i < args.outer * args.inner; ++i) {
    args.codes[i] = static_cast<uint8_t>(ReadCode(args.packed, args.bits, i));
  }
  return args.codes;
}

#else

// 32 codes at a time, two in a 16-bit lane: a byte shuffle brings the one or two bytes that they
// are in to the lane, a multiplication moves them to its upper end and a shift brings them down;
// then the second one moves to the upper byte.
template <int kBits>
struct UnpackTables {
  alignas(32) std::array<uint8_t, 32> places{};
  alignas(32) std::array<uint16_t, 16> factors{};

  constexpr UnpackTables() {
    for (size_t i = 0; i < 16; ++i) {
      const size_t bit = 2 * kBits * i;
      places[2 * i] = static_cast<uint8_t>(bit / 8);
      places[2 * i + 1] = static_cast<uint8_t>((bit + 2 * kBits - 1) / 8);
      factors[i] = static_cast<uint16_t>(1 << (16 - 2 * kBits - bit % 8));
    }
  }
};
template <int kBits>
HWY_INLINE const uint8_t* UnpackBits(const UnpackArgs& args) {
  static constexpr UnpackTables<kBits> kTables;
  const hn::FixedTag<uint16_t, 16> d16;
  const hn::Repartition<uint8_t, decltype(d16)> d8;
  const auto place = hn::Load(d8, kTables.places.data());
  const auto factor = hn::Load(d16, kTables.factors.data());
  const auto mask = hn::Set(d16, static_cast<uint16_t>(((1 << kBits) - 1) * 0x101));
  const uint8_t* packed = args.packed;
  uint8_t* codes = args.codes;
  for (int64_t left = args.outer * args.inner; left > 0; left -= 32) {
    const auto bytes = hn::LoadDup128(d8, packed);
    const auto words = hn::BitCast(d16, hn::TableLookupBytes(bytes, place));
    const auto pairs = hn::ShiftRight<16 - 2 * kBits>(hn::Mul(words, factor));
    const auto apart = hn::And(hn::Or(pairs, hn::ShiftLeft<8 - kBits>(pairs)), mask);
    hn::StoreU(hn::BitCast(d8, apart), d8, codes);
    packed += 4 * kBits;
    codes += 32;
  }
  return args.codes;
}

const uint8_t* Unpack(const UnpackArgs& args) {
  if (args.bits == 2) return UnpackBits<2>(args);
  if (args.bits == 3) return UnpackBits<3>(args);
  if (args.bits == 4) return UnpackBits<4>(args);
  return args.packed;
}

#endif  // HWY_TARGET == HWY_SCALAR

// Codes are unpacked as they are packed, one a byte.
HWY_INLINE const uint8_t* PanelCodes(const DotArgs& args, int64_t panel) {
  return args.codes + panel * args.side.inner * kPanelWidth;
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
        const DotOutputs out(args, r, panel);
        int32_t* dots = out.Dots(0, g, 0);
        std::fill(dots, dots + kPanelWidth, out.Start(0, g));
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

// Pairwise sums of u8 * s8 in saturating int16.
HWY_INLINE hn::Vec<I16> MultiplyPairs(hn::Vec<U8> codes, hn::Vec<U8> x) {
#if HWY_TARGET == HWY_AVX2
  return hn::Vec<I16>{_mm256_maddubs_epi16(codes.raw, x.raw)};
#else
  return hn::Vec<I16>{_mm512_maddubs_epi16(codes.raw, x.raw)};
#endif
}

// Pairwise sums of s16 * s16 in int32.
HWY_INLINE hn::Vec<I32> MultiplyPairs(hn::Vec<I16> a, hn::Vec<I16> b) {
#if HWY_TARGET == HWY_AVX2
  return hn::Vec<I32>{_mm256_madd_epi16(a.raw, b.raw)};
#else
  return hn::Vec<I32>{_mm512_madd_epi16(a.raw, b.raw)};
#endif
}

// sum += x, as an instruction in place: g++ 12 reorders chains of sums of integers and then keeps
// their terms in memory.
HWY_INLINE void AddInPlace(hn::Vec<I16>& sum, hn::Vec<I16> x) {
  asm("vpaddw %1, %0, %0" : "+v"(sum.raw) : "v"(x.raw));
}
HWY_INLINE void AddInPlace(hn::Vec<I32>& sum, hn::Vec<I32> x) {
  asm("vpaddd %1, %0, %0" : "+v"(sum.raw) : "v"(x.raw));
}

// The four bytes at x in every lane.
HWY_INLINE hn::Vec<I32> Broadcast(const void* x) {
  int32_t quad;
  __builtin_memcpy(&quad, x, sizeof(quad));
  return hn::Set(kI32, quad);
}

// Products of rows [row, row + kRows) with a panel of codes of up to 4 bits. Of a block of rows'
// low (or high) bytes a lane gets eight sums of two products, at most 8 * 2 * 15 * 127 = 30480,
// which int16 holds: sums widen once per block.
// kBlock: the block of IntegerRows if it is the largest, so that the loop is unrolled, or 0.
template <int kRows, int kBlock>
HWY_INLINE void DotBlock(const DotArgs& args, int64_t row, int64_t panel) {
  const int64_t block = kBlock > 0 ? kBlock : args.rows.block;
  const int64_t group_blocks = args.side.group_size / block;
  const uint8_t* codes = PanelCodes(args, panel);
  const auto one = hn::Set(I16(), int16_t{1});
  const auto high_unit = hn::Set(I16(), static_cast<int16_t>(1 << args.rows.high_shift));
  const DotOutputs out(args, row, panel);
  const int8_t* bytes[kRows];
  for (int r = 0; r < kRows; ++r) bytes[r] = args.rows.Row(row + r);
  for (int64_t g = 0; g < out.groups; ++g) {
    for (int64_t b = 0; b < group_blocks; ++b) {
      hn::Vec<I16> high[kRows][kPanelVectors], low[kRows][kPanelVectors];
      HWY_UNROLL(4) for (int r = 0; r < kRows; ++r) {
        HWY_UNROLL(2) for (int v = 0; v < kPanelVectors; ++v) {
          low[r][v] = high[r][v] = hn::Zero(I16());
        }
      }
      HWY_UNROLL(8) for (int64_t i = 0; i < block; i += 4) {
        hn::Vec<U8> code[kPanelVectors];
        HWY_UNROLL(2) for (int v = 0; v < kPanelVectors; ++v) {
          code[v] = hn::LoadU(U8(), codes + i * kPanelWidth + v * kLanes * 4);
        }
        HWY_UNROLL(4) for (int r = 0; r < kRows; ++r) {
          const auto x_low = hn::BitCast(U8(), Broadcast(bytes[r] + i));
          const auto x_high = hn::BitCast(U8(), Broadcast(bytes[r] + block + i));
          HWY_UNROLL(2) for (int v = 0; v < kPanelVectors; ++v) {
            AddInPlace(low[r][v], MultiplyPairs(code[v], x_low));
            AddInPlace(high[r][v], MultiplyPairs(code[v], x_high));
          }
        }
      }
      codes += block * kPanelWidth;
      HWY_UNROLL(4) for (int r = 0; r < kRows; ++r) {
        bytes[r] += 2 * block;
        int32_t* dots = out.Dots(r, g, 0);
        HWY_UNROLL(2) for (int v = 0; v < kPanelVectors; ++v, dots += kLanes) {
          const auto before = b == 0 ? hn::Set(kI32, out.Start(r, g)) : hn::LoadU(kI32, dots);
          const auto sum =
              hn::Add(MultiplyPairs(high[r][v], high_unit), MultiplyPairs(low[r][v], one));
          hn::StoreU(hn::Add(before, sum), kI32, dots);
        }
      }
    }
  }
}

// Rows [inner/4][4] of 16 bits, the second and the third of four swapped.
HWY_INLINE void JoinBytes(const IntegerRows& rows, int64_t row, int64_t inner, int16_t* joined) {
  const hn::FixedTag<int16_t, 8> d16;
  const hn::Rebind<int8_t, decltype(d16)> d8;
  alignas(16) constexpr uint8_t kOrder[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  const auto order = hn::Load(hn::Repartition<uint8_t, decltype(d16)>(), kOrder);
  const int8_t* low = rows.Row(row);
  const int64_t block = rows.block;
  for (int64_t begin = 0; begin < inner; begin += block, low += 2 * block) {
    for (int64_t i = 0; i < block; i += 8) {
      const auto high = hn::PromoteTo(d16, hn::LoadU(d8, low + block + i));
      const auto x = hn::Add(hn::PromoteTo(d16, hn::LoadU(d8, low + i)),
                             hn::ShiftLeftSame(high, rows.high_shift));
      hn::StoreU(hn::BitCast(d16, hn::TableLookupBytes(x, order)), d16, joined + begin + i);
    }
  }
}

// The same with codes of 8 bits, which meet joined rows: of four codes the first and the third,
// then the others.
template <int kRows>
HWY_INLINE void DotBytesBlock(const DotArgs& args, const int16_t (*joined)[kMaxInner], int64_t row,
                              int64_t panel) {
  const uint8_t* codes = PanelCodes(args, panel);
  const auto mask = hn::Set(I16(), int16_t{255});
  const int64_t group_size = args.side.group_size;
  const DotOutputs out(args, row, panel);
  int64_t at = 0;
  for (int64_t g = 0; g < out.groups; ++g) {
    hn::Vec<I32> sum[kRows][kPanelVectors];
    HWY_UNROLL(4) for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(2)
      for (int v = 0; v < kPanelVectors; ++v) sum[r][v] = hn::Set(kI32, out.Start(r, g));
    }
    for (int64_t i = 0; i < group_size; i += 4, codes += 4 * kPanelWidth, at += 4) {
      HWY_UNROLL(2) for (int v = 0; v < kPanelVectors; ++v) {
        const auto code = hn::BitCast(I16(), hn::LoadU(U8(), codes + v * kLanes * 4));
        const auto even = hn::And(code, mask);
        const auto odd =
            hn::BitCast(I16(), hn::ShiftRight<8>(hn::BitCast(hn::RebindToUnsigned<I16>(), code)));
        HWY_UNROLL(4) for (int r = 0; r < kRows; ++r) {
          const auto x_even = hn::BitCast(I16(), Broadcast(joined[r] + at));
          const auto x_odd = hn::BitCast(I16(), Broadcast(joined[r] + at + 2));
          AddInPlace(sum[r][v], MultiplyPairs(even, x_even));
          AddInPlace(sum[r][v], MultiplyPairs(odd, x_odd));
        }
      }
    }
    HWY_UNROLL(4) for (int r = 0; r < kRows; ++r) {
      int32_t* dots = out.Dots(r, g, 0);
      HWY_UNROLL(2) for (int v = 0; v < kPanelVectors; ++v, dots += kLanes) {
        hn::StoreU(sum[r][v], kI32, dots);
      }
    }
  }
}

template <bool kBytes, int kRows>
HWY_INLINE void DotRows(const DotArgs& args, int64_t row) {
  alignas(64) int16_t joined[kRows][kMaxInner];
  for (int r = 0; kBytes && r < kRows; ++r) {
    JoinBytes(args.rows, row + r, args.side.inner, joined[r]);
  }
  for (int64_t panel = args.panel_begin; panel < args.panel_end; ++panel) {
    if constexpr (kBytes) {
      DotBytesBlock<kRows>(args, joined, row, panel);
    } else {
      args.rows.block == kMaxBlock ? DotBlock<kRows, kMaxBlock>(args, row, panel)
                                   : DotBlock<kRows, 0>(args, row, panel);
    }
  }
}

template <bool kBytes>
void DotAll(const DotArgs& args) {
  constexpr int kRows = kLanes >= 16 ? 4 : 2;
  int64_t row = args.row_begin;
  for (; row + kRows <= args.row_end; row += kRows) DotRows<kBytes, kRows>(args, row);
  for (; row < args.row_end; ++row) DotRows<kBytes, 1>(args, row);
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
