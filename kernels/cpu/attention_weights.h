// WeightTables: the exponentials of softmax as integers, 32 at a time, for AVX-512 BW.
//
// A weight 2^x, x <= 0, of at most 14 bits needs no more of x than 16 octaves in steps of 2^-12, so
// x is held in 16 bits: vectors are half as many as those of floats. A fraction's five highest bits
// look up 2^x and its slope in two registers, the other seven interpolate, and a shift divides by
// the octaves. The relative error is below 1.5e-4: 8.5e-5 from the step of x, 3e-5 from the chords,
// the rest from 16 bits; then the weight is rounded to an integer.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <cstdint>

#define INNERQ_WEIGHTS __attribute__((target("avx512f,avx512bw"), always_inline)) inline

namespace innerq {

constexpr float kWeightUnits = 4096.0f;  // steps per octave
constexpr float kWeightTop = 65535.0f;   // the step of the largest weight

struct WeightTable {
  alignas(64) std::array<uint16_t, 32> values{}, slopes{};
};

// 127 * 2^(x + 9) for the x of multiples of 1/32 in the highest octave, of which the last step is
// x = 0, and the differences between them.
constexpr WeightTable MakeWeightTable() {
  constexpr double kStep = 1.0218971486541166;       // 2^(1/32)
  constexpr double kFirst = 1.0001692397053021 / 2;  // 2^(1/4096 - 1)
  // Chords lie above by up to (ln(2) / 32)^2 / 8, by two thirds of it in the mean.
  constexpr double kExcess = 5.865e-5 * 2 / 3;
  WeightTable table;
  double value = 127 * 512 * kFirst * (1 - kExcess);
  for (size_t i = 0; i < table.values.size(); ++i) {
    table.values[i] = static_cast<uint16_t>(value + 1);  // products of slopes are cut off
    table.slopes[i] = static_cast<uint16_t>(value * (kStep - 1) + 0.5);
    value *= kStep;
  }
  return table;
}
inline constexpr WeightTable kWeightTable = MakeWeightTable();

// The instructions of one kind of rows. (Each function may be inlined into any for AVX-512 BW.)
class WeightTables {
 public:
  // For weights of up to MaxRowInteger(high_shift).
  INNERQ_WEIGHTS explicit WeightTables(int high_shift)
      : values_(_mm512_load_si512(kWeightTable.values.data())),
        slopes_(_mm512_load_si512(kWeightTable.slopes.data())),
        octaves_(_mm512_set1_epi16(static_cast<int16_t>(15 + 8 - high_shift))),
        low_mask_(_mm512_set1_epi16(static_cast<int16_t>((1 << high_shift) - 1))),
        high_shift_(_mm_cvtsi32_si128(high_shift)) {}

  // The steps of rows' scores, score * factor + origin, for their largest ones in units of `scale`.
  struct Steps {
    __m512 factor, origin;
  };
  INNERQ_WEIGHTS static Steps StepsOf(__m512 largest, __m512 scale) {
    // The origin is rounded up, so that the largest score has the top step or one that saturates to
    // it, however large it is; below 1000 octaves that moves all weights by less than a step. From
    // 2^41 octaves on, where any other score is far below, the factor is such that no step is too
    // large for an int32.
    const __m512 most = _mm512_mul_ps(_mm512_rcp14_ps(_mm512_abs_ps(largest)),
                                      _mm512_set1_ps(static_cast<float>(int64_t{1} << 53)));
    const __m512 factor = _mm512_min_ps(_mm512_mul_ps(scale, _mm512_set1_ps(kWeightUnits)), most);
    return {factor, _mm512_fnmadd_round_ps(largest, factor, _mm512_set1_ps(kWeightTop),
                                           _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)};
  }

  // round(MaxRowInteger * 2^((step - kWeightTop) / kWeightUnits)) for the steps of scores a, then
  // of b, in the order of _mm512_packus_epi32; 0 for NaN.
  INNERQ_WEIGHTS __m512i Weights(__m512 a, __m512 factor_a, __m512 origin_a, __m512 b,
                                 __m512 factor_b, __m512 origin_b) const {
    // What is too small for an int32, and NaN, becomes the smallest, and 0 when packed.
    const __m512i steps =
        _mm512_packus_epi32(_mm512_cvtps_epi32(_mm512_fmadd_ps(a, factor_a, origin_a)),
                            _mm512_cvtps_epi32(_mm512_fmadd_ps(b, factor_b, origin_b)));
    const __m512i place = _mm512_srli_epi16(steps, 7);  // 5 bits of it
    const __m512i value = _mm512_permutexvar_epi16(place, values_);
    const __m512i slope = _mm512_permutexvar_epi16(place, slopes_);
    const __m512i more = _mm512_mulhi_epu16(slope, _mm512_slli_epi16(steps, 9));
    const __m512i octaves = _mm512_sub_epi16(octaves_, _mm512_srli_epi16(steps, 12));
    const __m512i twice = _mm512_srlv_epi16(_mm512_add_epi16(value, more), octaves);
    return _mm512_avg_epu16(twice, _mm512_setzero_si512());
  }

  // The low bytes of weights, then the high ones: a block of 32 of IntegerRows.
  INNERQ_WEIGHTS __m512i Bytes(__m512i weights) const {
    const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i high = _mm512_srl_epi16(weights, high_shift_);
    const __m512i low = _mm512_and_si512(weights, low_mask_);
    return _mm512_permutexvar_epi32(places, _mm512_packus_epi16(low, high));
  }

  // Their sums, spread over 16 lanes.
  INNERQ_WEIGHTS __m512i Sums(__m512i weights) const {
    return _mm512_madd_epi16(weights, _mm512_set1_epi16(1));
  }

 private:
  __m512i values_, slopes_, octaves_, low_mask_;
  __m128i high_shift_;
};

}  // namespace innerq

#undef INNERQ_WEIGHTS

#endif  // __x86_64__
