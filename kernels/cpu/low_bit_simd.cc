// The functions of LowBitKernel in Highway, compiled once per instruction set.
//
// Inputs are int16 here: of a quad the first and the third, then the second and the fourth, since
// levels are bytes that a mask and a shift spread to 16 bits.

// Scalar (the compiler's baseline), AVX2 and AVX-512: the steps between are not worth their size.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/low_bit_simd.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "hwy/highway.h"
#include "kernels/cpu/low_bit_matmul.h"

#if HWY_ONCE
#include "kernels/result.h"
#endif

HWY_BEFORE_NAMESPACE();
namespace innerq {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using LevelTable = std::array<uint8_t, 16>;  // level + L of codes of up to 4 bits

LevelTable LevelsOf(const LowBitSpec& spec) {
  LevelTable table{};
  for (int code = 0; code < 1 << std::min(spec.bits, 4); ++code) {
    table[static_cast<size_t>(code)] = static_cast<uint8_t>(spec.Level(code) + spec.max_level());
  }
  return table;
}

#if HWY_TARGET == HWY_SCALAR

float LargestOf(const float* x, int64_t count) { return LargestInput(x, count); }

void RoundInputs(const float* x, int64_t count, float up, float most, int16_t* q) {
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = std::min(std::max(-most, x[i] * up), most);  // NaN: -most
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the unit of sums near it is 1
    q[i] = static_cast<int16_t>(scaled + kMagic - kMagic);
  }
}

void Arrange(const int16_t* q, int64_t count, int /*activation_bits*/, std::byte* to) {
  std::copy_n(q, count, reinterpret_cast<int16_t*>(to));
}

void Unpack(const LowBitSlice& slice) {
  const int bits = slice.spec.bits;
  const LevelTable table = LevelsOf(slice.spec);
  uint8_t* to = slice.levels;
  for (int64_t begin = 0; begin < slice.num_inputs; begin += kLowBitUnit) {
    const uint8_t* block = slice.codes + begin / kLowBitUnit * kQuadBytes * bits;
    for (int64_t quad = 0; quad < kLowBitUnit / 4; ++quad) {
      for (int64_t i = 0; i < kQuadBytes; ++i) {
        const auto vector = [=](int64_t v) { return block[v * kQuadBytes + i]; };
        size_t code = 0;
        if (bits == 8) {
          *to++ = vector(quad);
          continue;
        }
        if (bits == 4) code = vector(quad % 4) >> (quad / 4 * 4) & 15;
        if (bits < 4) code = vector(quad % 2) >> (quad / 2 * 2) & 3;
        if (bits == 3) code |= static_cast<size_t>(vector(2) >> quad & 1) << 2;
        *to++ = table[code];
      }
    }
  }
}

void Add(const LowBitSlice& slice) {
  for (int64_t r = 0; r < slice.num_rows; ++r) {
    const auto* q = reinterpret_cast<const int16_t*>(slice.inputs + r * slice.stride);
    const uint8_t* levels = slice.levels;
    for (int64_t c = 0; c * slice.chunk < slice.num_inputs; ++c) {
      int32_t sums[kLowBitOutputs];
      std::fill(sums, sums + kLowBitOutputs, slice.Starts(r)[c]);
      for (int64_t i = 0; i < slice.chunk; i += 4, q += 4, levels += kQuadBytes) {
        for (int64_t n = 0; n < kLowBitOutputs; ++n) {
          for (int64_t j = 0; j < 4; ++j) sums[n] += levels[n * 4 + j] * q[j];
        }
      }
      for (int64_t n = 0; n < kLowBitOutputs; ++n) {
        float& total = slice.totals[r * kLowBitOutputs + n];
        total = std::fma(F16ToF32(slice.scales[c * slice.scale_step + n]),
                         static_cast<float>(sums[n]), total);
      }
    }
  }
}

void FinishRow(const float* totals, float unit, const float* bias, int64_t count, bool accumulate,
               float* out) {
  for (int64_t n = 0; n < count; ++n) {
    float value = totals[n] * unit;
    if (bias != nullptr) value += bias[n];
    out[n] = accumulate ? out[n] + value : value;
  }
}

#else

using F32 = hn::CappedTag<float, 16>;
using I32 = hn::RebindToSigned<F32>;
using I16 = hn::Repartition<int16_t, I32>;
using U16 = hn::RebindToUnsigned<I16>;
using U8 = hn::Repartition<uint8_t, I32>;
using Vector = hn::Vec<F32>;
constexpr F32 kF32;
constexpr I32 kI32;
constexpr int64_t kLanes = HWY_LANES(float);
constexpr int64_t kVectors = kLowBitOutputs / kLanes;  // of a panel's outputs

float LargestOf(const float* x, int64_t count) {
  Vector largest = hn::Zero(kF32);
  auto all_finite = hn::IsFinite(largest);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector v = hn::LoadU(kF32, x + i);
    largest = hn::Max(largest, hn::Abs(v));
    all_finite = hn::And(all_finite, hn::IsFinite(v));
  }
  return hn::AllTrue(kF32, all_finite) ? hn::GetLane(hn::MaxOfLanes(kF32, largest))
                                       : std::numeric_limits<float>::infinity();
}

void RoundInputs(const float* x, int64_t count, float up, float most, int16_t* q) {
  const hn::Rebind<int16_t, I32> d16;
  const Vector magic = hn::Set(kF32, 12582912.0f);  // 1.5 * 2^23: the unit of sums near it is 1
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector scaled = hn::Mul(hn::LoadU(kF32, x + i), hn::Set(kF32, up));
    const Vector inside = hn::Min(hn::Max(scaled, hn::Set(kF32, -most)), hn::Set(kF32, most));
    const auto rounded =
        hn::Sub(hn::BitCast(kI32, hn::Add(inside, magic)), hn::BitCast(kI32, magic));
    hn::StoreU(hn::DemoteTo(d16, rounded), d16, q + i);
  }
}

void Arrange(const int16_t* q, int64_t count, int /*activation_bits*/, std::byte* to) {
  const hn::FixedTag<int16_t, 8> d16;
  alignas(16) constexpr uint8_t kOrder[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  const auto order = hn::Load(hn::Repartition<uint8_t, decltype(d16)>(), kOrder);
  for (int64_t i = 0; i < count; i += 8) {
    hn::StoreU(hn::BitCast(d16, hn::TableLookupBytes(hn::LoadU(d16, q + i), order)), d16,
               reinterpret_cast<int16_t*>(to) + i);
  }
}

// The codes of quad `quad` in the bytes from `at` on in a block's vectors.
template <int kBits, int kQuad>
HWY_INLINE hn::Vec<U8> CodesAt(const uint8_t* at) {
  const auto load = [at](int vector) { return hn::LoadU(U8(), at + vector * kQuadBytes); };
  if constexpr (kBits == 8) return load(kQuad);
  constexpr int kVectorsOfField = kBits == 4 ? 4 : 2;
  constexpr int kFieldBits = kBits == 4 ? 4 : 2;
  constexpr int kShift = kQuad / kVectorsOfField * kFieldBits;
  const auto fields = hn::BitCast(U16(), load(kQuad % kVectorsOfField));
  const auto mask = hn::Set(U8(), static_cast<uint8_t>((1 << kFieldBits) - 1));
  const auto codes = hn::And(hn::BitCast(U8(), hn::ShiftRight<kShift>(fields)), mask);
  if constexpr (kBits != 3) return codes;
  const auto thirds = hn::BitCast(U16(), load(2));
  hn::Vec<U16> moved;  // to bit 2
  if constexpr (kQuad < 2) {
    moved = hn::ShiftLeft<2 - kQuad>(thirds);
  } else {
    moved = hn::ShiftRight<kQuad - 2>(thirds);
  }
  return hn::Or(codes, hn::And(hn::BitCast(U8(), moved), hn::Set(U8(), uint8_t{4})));
}

template <int kBits, int kQuad = 0>
HWY_INLINE void UnpackQuads(const uint8_t* at, hn::Vec<U8> table, uint8_t* to) {
  const auto codes = CodesAt<kBits, kQuad>(at);
  hn::StoreU(kBits == 8 ? codes : hn::TableLookupBytes(table, codes), U8(),
             to + kQuad * kQuadBytes);
  if constexpr (kQuad < 7) UnpackQuads<kBits, kQuad + 1>(at, table, to);
}

template <int kBits>
HWY_INLINE void UnpackBits(const LowBitSlice& slice) {
  const auto table = hn::LoadDup128(U8(), LevelsOf(slice.spec).data());
  const uint8_t* block = slice.codes;
  uint8_t* to = slice.levels;
  for (int64_t k = 0; k < slice.num_inputs; k += kLowBitUnit) {
    for (int64_t i = 0; i < kQuadBytes; i += kLanes * 4) {
      UnpackQuads<kBits>(block + i, table, to + i);
    }
    block += kQuadBytes * kBits;
    to += kQuadBytes * 8;
  }
}

void Unpack(const LowBitSlice& slice) {
  switch (slice.spec.bits) {
    case 2:
      return UnpackBits<2>(slice);
    case 3:
      return UnpackBits<3>(slice);
    case 4:
      return UnpackBits<4>(slice);
    default:
      return UnpackBits<8>(slice);
  }
}

// sum += pairwise sums of a * b, as instructions in place: g++ 12 reorders chains of sums of
// integers and then keeps their terms in memory.
HWY_INLINE void AddPairs(hn::Vec<I32>& sum, hn::Vec<I16> a, hn::Vec<I16> b) {
#if HWY_TARGET == HWY_AVX2
  const auto product = _mm256_madd_epi16(a.raw, b.raw);
#else
  const auto product = _mm512_madd_epi16(a.raw, b.raw);
#endif
  asm("vpaddd %1, %0, %0" : "+v"(sum.raw) : "v"(product));
}

// Two int16 in every lane.
HWY_INLINE hn::Vec<I16> BroadcastPair(const std::byte* at) {
  int32_t pair;
  __builtin_memcpy(&pair, at, sizeof(pair));
  return hn::BitCast(I16(), hn::Set(kI32, pair));
}

template <int kRows>
HWY_INLINE void AddRows(const LowBitSlice& slice, int64_t row) {
  const hn::Rebind<hwy::float16_t, F32> d16;
  const auto mask = hn::Set(I16(), int16_t{255});
  const std::byte* q = slice.inputs + row * slice.stride;
  const uint8_t* levels = slice.levels;
  const uint16_t* scales = slice.scales;
  float* totals = slice.totals + row * kLowBitOutputs;
  const int64_t chunk = slice.chunk, stride = slice.stride;
  for (int64_t c = 0; c * chunk < slice.num_inputs; ++c, scales += slice.scale_step) {
    hn::Vec<I32> sum[kRows][kVectors];
    HWY_UNROLL(4) for (int r = 0; r < kRows; ++r) {
      const int32_t start = slice.Starts(row + r)[c];
      HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::Set(kI32, start);
    }
    for (int64_t i = 0; i < chunk; i += 4, q += 8, levels += kQuadBytes) {
      HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) {
        const auto quad = hn::BitCast(I16(), hn::LoadU(U8(), levels + v * kLanes * 4));
        const auto even = hn::And(quad, mask);
        const auto odd = hn::BitCast(I16(), hn::ShiftRight<8>(hn::BitCast(U16(), quad)));
        HWY_UNROLL(4) for (int r = 0; r < kRows; ++r) {
          AddPairs(sum[r][v], even, BroadcastPair(q + r * stride));
          AddPairs(sum[r][v], odd, BroadcastPair(q + r * stride + 4));
        }
      }
    }
    HWY_UNROLL(4) for (int v = 0; v < kVectors; ++v) {
      const auto* halves = reinterpret_cast<const hwy::float16_t*>(scales + v * kLanes);
      const Vector scale = hn::PromoteTo(kF32, hn::LoadU(d16, halves));
      HWY_UNROLL(4) for (int r = 0; r < kRows; ++r) {
        float* total = totals + r * kLowBitOutputs + v * kLanes;
        const Vector dot = hn::ConvertTo(kF32, sum[r][v]);
        hn::StoreU(hn::MulAdd(scale, dot, hn::LoadU(kF32, total)), kF32, total);
      }
    }
  }
}

void Add(const LowBitSlice& slice) {
  constexpr int kRows = kLanes >= 16 ? 4 : 2;
  int64_t row = 0;
  for (; row + kRows <= slice.num_rows; row += kRows) AddRows<kRows>(slice, row);
  for (; row < slice.num_rows; ++row) AddRows<1>(slice, row);
}

void FinishRow(const float* totals, float unit, const float* bias, int64_t count, bool accumulate,
               float* out) {
  if (count < kLowBitOutputs) {
    for (int64_t n = 0; n < count; ++n) {
      float value = totals[n] * unit;
      if (bias != nullptr) value += bias[n];
      out[n] = accumulate ? out[n] + value : value;
    }
    return;
  }
  for (int64_t n = 0; n < kLowBitOutputs; n += kLanes) {
    Vector value = hn::Mul(hn::LoadU(kF32, totals + n), hn::Set(kF32, unit));
    if (bias != nullptr) value = hn::Add(value, hn::LoadU(kF32, bias + n));
    if (accumulate) value = hn::Add(hn::LoadU(kF32, out + n), value);
    hn::StoreU(value, kF32, out + n);
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

LowBitKernel MakeLowBitKernel() {
  return {.round = RoundInputs,
          .largest = LargestOf,
          .arrange = Arrange,
          .unpack = Unpack,
          .add = Add,
          .add_packed = nullptr,
          .finish = FinishRow};
}

}  // namespace HWY_NAMESPACE
}  // namespace innerq
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace innerq {

LowBitKernel LowBitKernelFor(CpuIsa isa) {
#if HWY_ARCH_X86
  if (isa == CpuIsa::kAvx2) return N_AVX2::MakeLowBitKernel();
  if (isa >= CpuIsa::kAvx512) {
    LowBitKernel kernel = N_AVX3::MakeLowBitKernel();
    if (isa >= CpuIsa::kAvx512Vnni) UseVnni(&kernel);
    return kernel;
  }
#endif
  CHECK(isa == CpuIsa::kScalar, "no such variant in this build");
  return HWY_STATIC_DISPATCH(MakeLowBitKernel)();
}

}  // namespace innerq
#endif  // HWY_ONCE
