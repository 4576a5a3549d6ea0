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

// Codes of up to 4 bits are unpacked to [outer/16][inner/block][plain, shifted][block/4][16 outer]
// [4 inner], shifted by HighShift, as the rows have their bytes. Those of 8 bits stay as they are.
//
// 64 codes are 8 * bits bytes. Each 64-bit lane takes the `bits` bytes of its eight codes by a byte
// permutation; VPMULTISHIFTQB brings code i of the lane to byte i; the mask drops its neighbours.
template <int kBits>
INNERQ_TARGET void UnpackBits(const UnpackArgs& args, int32_t offset) {
  alignas(64) uint8_t places[64], shifts[64];
  for (int i = 0; i < 64; ++i) {
    places[i] = static_cast<uint8_t>(i / 8 * kBits + (i % 8 < kBits ? i % 8 : 0));
    shifts[i] = static_cast<uint8_t>(i % 8 * kBits);
  }
  const __m512i place = _mm512_load_si512(places);
  const __m512i shift = _mm512_load_si512(shifts);
  const __m512i mask = _mm512_set1_epi8((1 << kBits) - 1);
  constexpr int kShift = HighShift(kBits);
  const __m512i plain_offset = _mm512_set1_epi8(static_cast<char>(offset));
  const __m512i shifted_offset = _mm512_set1_epi8(static_cast<char>(offset << kShift));
  const int64_t block_codes = BlockOf(args.group_size) * kPanelWidth;
  uint8_t* codes = args.codes;
  for (int64_t i = 0; i < args.outer * args.inner; codes += block_codes) {
    for (const int64_t end = i + block_codes; i < end; i += 64, codes += 64) {
      const __m512i bytes = _mm512_loadu_si512(args.packed + i / 8 * kBits);
      const __m512i lanes = _mm512_permutexvar_epi8(place, bytes);
      const __m512i code = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, lanes), mask);
      const __m512i shifted = _mm512_slli_epi16(code, kShift);  // stays within its byte
      _mm512_store_si512(codes, _mm512_sub_epi8(code, plain_offset));
      _mm512_store_si512(codes + block_codes, _mm512_sub_epi8(shifted, shifted_offset));
    }
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

// kBlock: the block of IntegerRows if it is the largest, so that the loop is unrolled, or 0.
template <int kRows, int kPanels, int kBlock>
INNERQ_TARGET void DotBlock(const DotArgs& args, int64_t row, int64_t panel) {
  const int64_t block = kBlock > 0 ? kBlock : args.rows.block;
  const int64_t panel_bytes = 2 * args.side.inner * kPanelWidth, stride = args.rows.stride;
  const uint8_t* codes = args.side.codes + panel * panel_bytes;
  const int8_t* rows = args.rows.Row(row);
  for (int64_t g = 0; g < args.groups(); ++g) {
    __m512i sums[kRows][kPanels];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i none = _mm512_set1_epi32(-args.Excess(row + r, g));
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) sums[r][p] = none;
    }
    for (int64_t left = args.side.group_size; left > 0; left -= block) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < 2 * block; i += 4) {
        __m512i code[kPanels];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
          code[p] = _mm512_load_si512(codes + p * panel_bytes + i * kPanelWidth);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m512i x = Broadcast(rows + r * stride + i);
#pragma GCC unroll 4
          for (int p = 0; p < kPanels; ++p) AddDot(sums[r][p], code[p], x);
        }
      }
      rows += 2 * block;
      codes += 2 * block * kPanelWidth;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        _mm512_storeu_si512(args.Dots(row + r, g, panel + p), sums[r][p]);
      }
    }
  }
}

// Codes of 8 bits: the low and the high bytes of rows have sums of their own.
template <int kRows, int kPanels>
INNERQ_TARGET void DotBlockWide(const DotArgs& args, int64_t row, int64_t panel) {
  const int64_t block = args.rows.block;
  const int64_t panel_bytes = args.side.inner * kPanelWidth, stride = args.rows.stride;
  const uint8_t* codes = args.side.codes + panel * panel_bytes;
  const int8_t* rows = args.rows.Row(row);
  for (int64_t g = 0; g < args.groups(); ++g) {
    __m512i high[kRows][kPanels], low[kRows][kPanels];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        low[r][p] = _mm512_set1_epi32(-args.Excess(row + r, g));
        high[r][p] = _mm512_setzero_si512();
      }
    }
    for (int64_t left = args.side.group_size; left > 0; left -= block) {
      for (int64_t i = 0; i < block; i += 4) {
        __m512i code[kPanels];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
          code[p] = _mm512_load_si512(codes + p * panel_bytes + i * kPanelWidth);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m512i x_low = Broadcast(rows + r * stride + i);
          const __m512i x_high = Broadcast(rows + r * stride + block + i);
#pragma GCC unroll 4
          for (int p = 0; p < kPanels; ++p) {
            AddDot(low[r][p], code[p], x_low);
            AddDot(high[r][p], code[p], x_high);
          }
        }
      }
      rows += 2 * block;
      codes += block * kPanelWidth;
    }
    constexpr int kShift = HighShift(8);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[r][p], kShift), low[r][p]);
        _mm512_storeu_si512(args.Dots(row + r, g, panel + p), sum);
      }
    }
  }
}

template <int kPanels>
INNERQ_TARGET void DotPanels(const DotArgs& args, int64_t panel) {
  int64_t row = args.row_begin;
  if (args.side.bits > 4) {
    for (; row + 4 <= args.row_end; row += 4) DotBlockWide<4, kPanels>(args, row, panel);
    for (; row < args.row_end; ++row) DotBlockWide<1, kPanels>(args, row, panel);
  } else if (args.rows.block == kMaxBlock) {
    for (; row + 8 <= args.row_end; row += 8) DotBlock<8, kPanels, kMaxBlock>(args, row, panel);
    for (; row + 4 <= args.row_end; row += 4) DotBlock<4, kPanels, kMaxBlock>(args, row, panel);
    for (; row < args.row_end; ++row) DotBlock<1, kPanels, kMaxBlock>(args, row, panel);
  } else {
    for (; row + 4 <= args.row_end; row += 4) DotBlock<4, kPanels, 0>(args, row, panel);
    for (; row < args.row_end; ++row) DotBlock<1, kPanels, 0>(args, row, panel);
  }
}

void UnpackAll(const UnpackArgs& args, int32_t offset) {
  if (args.bits == 2) return UnpackBits<2>(args, offset);
  if (args.bits == 3) return UnpackBits<3>(args, offset);
  if (args.bits == 4) return UnpackBits<4>(args, offset);
  for (int64_t i = 0; i < args.outer * args.inner; ++i) {
    args.codes[i] = static_cast<uint8_t>(args.packed[i] - offset);
  }
}

}  // namespace

void UnpackVnni(const UnpackArgs& args) { UnpackAll(args, 0); }

void UnpackSigned(const UnpackArgs& args) { UnpackAll(args, args.offset); }

void DotVnni(const DotArgs& args) {
  int64_t panel = args.panel_begin;
  for (; panel + 2 <= args.panel_end; panel += 2) DotPanels<2>(args, panel);
  for (; panel < args.panel_end; ++panel) DotPanels<1>(args, panel);
}

}  // namespace innerq

#endif  // __x86_64__
