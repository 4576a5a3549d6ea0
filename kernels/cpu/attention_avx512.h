// What the AVX-512 kernels of attention share: unpacking of codes and reductions over rows. (Each
// function may be inlined into any for AVX-512 F, BW and VBMI.)
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <cstddef>
#include <cstdint>

#define INNERQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi"), always_inline)) inline

namespace innerq {

// Vectors of 64 codes of a bit string, 8 * kBits bytes, unpacked one a byte. Each 64-bit lane takes
// the kBits bytes of its eight codes by a byte permutation; VPMULTISHIFTQB brings code i of the
// lane to byte i; the mask drops its neighbours.
template <int kBits>
class PackedCodes {
 public:
  static constexpr int64_t kBytes = 8 * kBits;

  INNERQ_AVX512 PackedCodes()
      : place_(_mm512_load_si512(kTables.places.data())),
        shift_(_mm512_load_si512(kTables.shifts.data())),
        mask_(_mm512_set1_epi8((1 << kBits) - 1)) {}
  // Reads 32 bytes.
  INNERQ_AVX512 __m512i Load(const uint8_t* at) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m512i lanes = _mm512_permutexvar_epi8(place_, _mm512_castsi256_si512(bytes));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shift_, lanes), mask_);
  }

 private:
  struct Tables {
    alignas(64) std::array<uint8_t, 64> places{}, shifts{};

    constexpr Tables() {
      for (size_t i = 0; i < 64; ++i) {
        places[i] = static_cast<uint8_t>(i / 8 * kBits + (i % 8 < kBits ? i % 8 : 0));
        shifts[i] = static_cast<uint8_t>(i % 8 * kBits);
      }
    }
  };
  static constexpr Tables kTables{};

  __m512i place_, shift_, mask_;
};

// The same of codes that are bytes already.
class ByteCodes {
 public:
  static constexpr int64_t kBytes = 64;
  INNERQ_AVX512 __m512i Load(const uint8_t* at) const { return _mm512_loadu_si512(at); }
};

// Of ReduceRows: the largest of F32 lanes, or the sum of int32 ones.
struct MaxOfRow {
  INNERQ_AVX512 static __m512 Of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};
struct SumOfRow {
  INNERQ_AVX512 static __m512 Of(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

// Op over the lanes of each of 16 vectors. Those from num_rows on do not count; they are read as
// far as num_rows rounded up to a multiple of four.
template <class Op>
INNERQ_AVX512 __m512 ReduceRows(const __m512* x, int64_t num_rows = 16) {
  __m512 quads[4];  // of rows 4 i to 4 i + 3 in each 128 bits
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, x += 4) {
    quads[i] = _mm512_setzero_ps();
    if (4 * i >= num_rows) continue;
    __m512d pairs[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 a = x[2 * j], b = x[2 * j + 1];
      pairs[j] = _mm512_castps_pd(Op::Of(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    }
    quads[i] = Op::Of(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                      _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
  }
  __m512 halves[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = quads[2 * i], b = quads[2 * i + 1];
    halves[i] = Op::Of(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  return Op::Of(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

}  // namespace innerq

#undef INNERQ_AVX512

#endif  // __x86_64__
