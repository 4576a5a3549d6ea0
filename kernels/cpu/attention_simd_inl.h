// What the Highway files of AttentionOps share, compiled once per instruction set: vector types,
// integers of 15 bits, and the functions that attention_simd.cc takes from the other files.

// Not a plain include guard: the file is read anew for every instruction set.
#if defined(INNERQ_KERNELS_CPU_ATTENTION_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef INNERQ_KERNELS_CPU_ATTENTION_SIMD_INL_H_
#undef INNERQ_KERNELS_CPU_ATTENTION_SIMD_INL_H_
#else
#define INNERQ_KERNELS_CPU_ATTENTION_SIMD_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels/cpu/attention_ops.h"

HWY_BEFORE_NAMESPACE();
namespace innerq {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// attention_half.cc
void HalfToFloat(const uint16_t* x, int64_t n, float* out);
void FloatToHalf(const float* x, int64_t n, uint16_t* out);
void Rotate(const float* x, const float* cos, const float* sin, int64_t head_dim, float* out);
void HalfScores(const HalfScoresArgs& args);
void HalfValues(const HalfValuesArgs& args);

// attention_softmax.cc
void SoftmaxToFloat(const SoftmaxArgs& args);
void SoftmaxToIntegers(const SoftmaxArgs& args);
void Merge(const AttentionState& from, int64_t num_rows, int64_t padded_dim,
           const AttentionState& into);

using F32 = hn::CappedTag<float, 16>;
using I32 = hn::RebindToSigned<F32>;
using Vector = hn::Vec<F32>;
constexpr F32 kF32;
constexpr I32 kI32;
constexpr int kLanes = static_cast<int>(HWY_LANES(float));
constexpr int kPanelVectors = static_cast<int>(kPanelWidth) / kLanes;

HWY_INLINE float SumOf(Vector v) { return hn::GetLane(hn::SumOfLanes(kF32, v)); }
HWY_INLINE float MaxOf(Vector v) { return hn::GetLane(hn::MaxOfLanes(kF32, v)); }

// Rounds |x| < 2^22 to the nearest integer, ties to even.
HWY_INLINE hn::Vec<I32> RoundToInt(Vector x) {
  const Vector magic = hn::Set(kF32, 12582912.0f);  // 1.5 * 2^23: the unit of sums near it is 1
  return hn::Sub(hn::BitCast(kI32, hn::Add(x, magic)), hn::BitCast(kI32, magic));
}

#if HWY_TARGET == HWY_SCALAR

HWY_INLINE void SplitBytes(const int32_t* x, int64_t n, int8_t* high, int8_t* low) {
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

}  // namespace HWY_NAMESPACE
}  // namespace innerq
HWY_AFTER_NAMESPACE();

#endif  // the guard above
