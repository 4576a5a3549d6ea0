// What the Highway files of AttentionOps share, compiled once per instruction set: vector types,
// integers of two bytes, and the functions that attention_simd.cc takes from the other files.

// Not a plain include guard: the file is read anew for every instruction set.
#if defined(INNERQ_KERNELS_CPU_ATTENTION_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef INNERQ_KERNELS_CPU_ATTENTION_SIMD_INL_H_
#undef INNERQ_KERNELS_CPU_ATTENTION_SIMD_INL_H_
#else
#define INNERQ_KERNELS_CPU_ATTENTION_SIMD_INL_H_
#endif

#include <algorithm>
#include <array>

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
void Advance(const AdvanceArgs& args);
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

HWY_INLINE void SplitBytes(const int32_t* x, int64_t n, const IntegerRows& rows, int64_t row) {
  const int shift = rows.high_shift, half = 1 << shift >> 1;
  for (int64_t i = 0; i < n; ++i) {
    int8_t* low = rows.Row(row) + i / rows.block * 2 * rows.block + i % rows.block;
    const int32_t high = (x[i] + half) >> shift;
    low[rows.block] = static_cast<int8_t>(high);
    *low = static_cast<int8_t>(x[i] - (high << shift));
  }
}

#else

using I16 = hn::Repartition<int16_t, I32>;
using I8 = hn::Repartition<int8_t, I32>;

// Both to bytes, in each 128-bit block first those of a, then those of b.
HWY_INLINE hn::Vec<I8> PackBytes(hn::Vec<I16> a, hn::Vec<I16> b) {
#if HWY_TARGET == HWY_AVX2
  return hn::Vec<I8>{_mm256_packs_epi16(a.raw, b.raw)};
#else
  return hn::Vec<I8>{_mm512_packs_epi16(a.raw, b.raw)};
#endif
}

constexpr int64_t kSplitStep = 2 * kLanes;  // integers that ByteSplitter::Split takes

// Of quads packed from two vectors: those with low bytes, then those with high ones.
constexpr std::array<int32_t, kLanes> SplitPlaces() {
  constexpr int kBlocks = kLanes / 4;
  std::array<int32_t, kLanes> places{};
  for (int i = 0; i < kLanes; ++i) {
    places[static_cast<size_t>(i)] =
        i % kBlocks * 4 + i / (kLanes / 2) * 2 + i % (kLanes / 2) / kBlocks;
  }
  return places;
}
alignas(64) constexpr std::array<int32_t, kLanes> kSplitPlaces = SplitPlaces();

// Splits two vectors of integers of an IntegerRows: low bytes in the lower half of the result, high
// ones in the upper.
class ByteSplitter {
 public:
  explicit ByteSplitter(int high_shift)
      : shift_(high_shift), half_(hn::Set(I16(), static_cast<int16_t>(1 << high_shift >> 1))) {}

  HWY_INLINE hn::Vec<I8> Split(hn::Vec<I32> a, hn::Vec<I32> b) const {
    const auto x = hn::ReorderDemote2To(I16(), a, b);
    const auto high = hn::ShiftRightSame(hn::Add(x, half_), shift_);
    const auto low = hn::Sub(x, hn::ShiftLeftSame(high, shift_));
    const auto place = hn::SetTableIndices(kI32, kSplitPlaces.data());
    return hn::BitCast(I8(), hn::TableLookupLanes(hn::BitCast(kI32, PackBytes(low, high)), place));
  }

 private:
  int shift_;
  hn::Vec<I16> half_;
};

// Integers [0, n) of an IntegerRows' row. Reads x up to the next multiple of kSplitStep.
HWY_INLINE void SplitBytes(const int32_t* x, int64_t n, const IntegerRows& rows, int64_t row) {
  const ByteSplitter splitter(rows.high_shift);
  const hn::Half<I8> half;
  const int64_t block = rows.block;
  int8_t* to = rows.Row(row);
  for (int64_t i = 0; i < n; i += kSplitStep) {
    const auto bytes = splitter.Split(hn::LoadU(kI32, x + i), hn::LoadU(kI32, x + i + kLanes));
    if (block >= kSplitStep) {
      int8_t* low = to + i / block * 2 * block + i % block;
      hn::StoreU(hn::LowerHalf(half, bytes), half, low);
      hn::StoreU(hn::UpperHalf(half, bytes), half, low + block);
    } else {
      alignas(64) int8_t split[2][kSplitStep];
      hn::Store(bytes, I8(), split[0]);
      const int64_t count = std::min(n - i, kSplitStep);
      for (int64_t j = 0; j < count; j += block) {
        std::copy_n(split[0] + j, block, to + (i + j) * 2);
        std::copy_n(split[1] + j, block, to + (i + j) * 2 + block);
      }
    }
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
