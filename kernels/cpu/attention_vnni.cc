// Unpacking of codes with AVX-512 VBMI and their integer products with VNNI.
#include "kernels/cpu/attention_ops.h"

#if defined(__x86_64__)
// g++ 12 takes the undefined operands inside its AVX-512 intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#define INNERQ_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")))

namespace innerq {
namespace {

// 64 codes are 8 * bits bytes. Each 64-bit lane takes the `bits` bytes of its eight codes by a byte
// permutation; VPMULTISHIFTQB brings code i of the lane to byte i; the mask drops its neighbours.
template <int kBits>
INNERQ_TARGET void UnpackBits(const uint8_t* packed, int64_t num_codes, uint8_t* codes) {
  alignas(64) uint8_t places[64], shifts[64];
  for (int i = 0; i < 64; ++i) {
    places[i] = static_cast<uint8_t>(i / 8 * kBits + (i % 8 < kBits ? i % 8 : 0));
    shifts[i] = static_cast<uint8_t>(i % 8 * kBits);
  }
  const __m512i place = _mm512_load_si512(places);
  const __m512i shift = _mm512_load_si512(shifts);
  const __m512i mask = _mm512_set1_epi8((1 << kBits) - 1);
  for (int64_t i = 0; i < num_codes; i += 64) {
    const __m512i bytes = _mm512_loadu_si512(packed + i / 8 * kBits);
    const __m512i lanes = _mm512_permutexvar_epi8(place, bytes);
    const __m512i shifted = _mm512_multishift_epi64_epi8(shift, lanes);
    _mm512_store_si512(codes + i, _mm512_and_si512(shifted, mask));
  }
}

INNERQ_TARGET inline __m512i Broadcast(const int8_t* quad) {
  int32_t value;
  std::memcpy(&value, quad, sizeof(value));
  return _mm512_set1_epi32(value);
}

// sum += codes * x, four bytes a lane. As an instruction in place: around the intrinsic g++ 12
// copies every accumulator twice.
INNERQ_TARGET inline void AddDot(__m512i& sum, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}

// kGroup: the group size if it is common, so that the loop is unrolled, or 0.
template <int kRows, int kPanels, int kGroup>
INNERQ_TARGET void DotBlock(const DotArgs& args, int64_t row, int64_t panel) {
  const int64_t panel_bytes = args.inner * kPanelWidth;
  const int64_t stride = args.rows.stride;
  const int64_t row_dots = args.groups() * args.outer;
  const uint8_t* codes = args.codes + panel * panel_bytes;
  const int8_t* high_rows = args.rows.High(row);
  const int8_t* low_rows = args.rows.Low(row);
  int32_t* dots = args.Dots(row, 0, panel);
  const int64_t inner = args.inner, outer = args.outer;
  const int64_t group_size = kGroup > 0 ? kGroup : args.group_size;
  for (int64_t begin = 0; begin < inner; begin += group_size, dots += outer) {
    __m512i high[kRows][kPanels], low[kRows][kPanels];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) high[r][p] = low[r][p] = _mm512_setzero_si512();
    }
#pragma GCC unroll 8
    for (int64_t i = begin; i < begin + group_size; i += 4) {
      __m512i code[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        code[p] = _mm512_load_si512(codes + p * panel_bytes + i * kPanelWidth);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i x_high = Broadcast(high_rows + r * stride + i);
        const __m512i x_low = Broadcast(low_rows + r * stride + i);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
          AddDot(high[r][p], code[p], x_high);
          AddDot(low[r][p], code[p], x_low);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[r][p], 7), low[r][p]);
        _mm512_storeu_si512(dots + r * row_dots + p * kPanelWidth, sum);
      }
    }
  }
}

template <int kPanels, int kGroup>
INNERQ_TARGET void DotPanels(const DotArgs& args, int64_t panel) {
  int64_t row = args.row_begin;
  for (; row + 4 <= args.row_end; row += 4) DotBlock<4, kPanels, kGroup>(args, row, panel);
  for (; row < args.row_end; ++row) DotBlock<1, kPanels, kGroup>(args, row, panel);
}

template <int kGroup>
INNERQ_TARGET void DotAll(const DotArgs& args) {
  int64_t panel = args.panel_begin;
  for (; panel + 2 <= args.panel_end; panel += 2) DotPanels<2, kGroup>(args, panel);
  for (; panel < args.panel_end; ++panel) DotPanels<1, kGroup>(args, panel);
}

}  // namespace

void UnpackVnni(const uint8_t* packed, int bits, int64_t num_codes, uint8_t* codes) {
  if (bits == 2) return UnpackBits<2>(packed, num_codes, codes);
  if (bits == 3) return UnpackBits<3>(packed, num_codes, codes);
  if (bits == 4) return UnpackBits<4>(packed, num_codes, codes);
  std::memcpy(codes, packed, static_cast<size_t>(num_codes));
}

void DotVnni(const DotArgs& args) { args.group_size == 32 ? DotAll<32>(args) : DotAll<0>(args); }

}  // namespace innerq

#endif  // __x86_64__
