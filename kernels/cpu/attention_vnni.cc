// Unpacking of codes with AVX-512 VBMI and their integer products with VNNI.
#include "kernels/cpu/attention_ops.h"

#if defined(__x86_64__)
// g++ 12 takes the undefined operands inside its AVX-512 intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#include "kernels/cpu/attention_avx512.h"

#define INNERQ_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")))

namespace innerq {
namespace {

template <int kBits>
INNERQ_TARGET const uint8_t* UnpackBits(const UnpackArgs& args) {
  const PackedCodes<kBits> packed;
  const uint8_t* from = args.packed;
  uint8_t* codes = args.codes;
  for (int64_t left = args.outer * args.inner; left > 0; left -= 64) {
    _mm512_store_si512(codes, packed.Load(from));
    codes += 64;
    from += packed.kBytes;
  }
  return args.codes;
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

// The low and the high bytes of rows have sums of their own. (One sum of both, with codes shifted
// for the high ones as in AMX tiles, unpacks and loads twice the codes and is slower for few rows.)
// kBlock: the block of IntegerRows if it is the largest, so that the loop is unrolled, or 0.
template <int kRows, int kPanels, int kBlock>
INNERQ_TARGET void DotBlock(const DotArgs& args, int64_t row, int64_t panel) {
  const int64_t block = kBlock > 0 ? kBlock : args.rows.block;
  const int64_t panel_bytes = args.side.inner * kPanelWidth, stride = args.rows.stride;
  const int64_t group_size = args.side.group_size;
  const uint8_t* codes = args.codes + panel * panel_bytes;
  const int8_t* rows = args.rows.Row(row);
  const __m128i high_shift = _mm_cvtsi32_si128(args.rows.high_shift);
  const DotOutputs out(args, row, panel);
  for (int64_t g = 0; g < out.groups; ++g) {
    __m512i high[kRows][kPanels], low[kRows][kPanels];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i start = _mm512_set1_epi32(out.Start(r, g));
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        low[r][p] = start;
        high[r][p] = _mm512_setzero_si512();
      }
    }
    for (int64_t left = group_size; left > 0; left -= block) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < block; i += 4) {
        __m512i code[kPanels];
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) {
          code[p] = _mm512_loadu_si512(codes + p * panel_bytes + i * kPanelWidth);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i x_low = Broadcast(rows + r * stride + i);
          const __m512i x_high = Broadcast(rows + r * stride + block + i);
#pragma GCC unroll 2
          for (int p = 0; p < kPanels; ++p) {
            AddDot(low[r][p], code[p], x_low);
            AddDot(high[r][p], code[p], x_high);
          }
        }
      }
      rows += 2 * block;
      codes += block * kPanelWidth;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        const __m512i shifted = _mm512_sll_epi32(high[r][p], high_shift);
        _mm512_storeu_si512(out.Dots(r, g, p), _mm512_add_epi32(shifted, low[r][p]));
      }
    }
  }
}

template <int kPanels, int kBlock>
INNERQ_TARGET void DotPanels(const DotArgs& args, int64_t panel) {
  int64_t row = args.row_begin;
  for (; row + 4 <= args.row_end; row += 4) DotBlock<4, kPanels, kBlock>(args, row, panel);
  for (; row < args.row_end; ++row) DotBlock<1, kPanels, kBlock>(args, row, panel);
}

template <int kBlock>
INNERQ_TARGET void DotAll(const DotArgs& args) {
  int64_t panel = args.panel_begin;
  for (; panel + 2 <= args.panel_end; panel += 2) DotPanels<2, kBlock>(args, panel);
  for (; panel < args.panel_end; ++panel) DotPanels<1, kBlock>(args, panel);
}

}  // namespace

const uint8_t* UnpackVnni(const UnpackArgs& args) {
  if (args.bits == 2) return UnpackBits<2>(args);
  if (args.bits == 3) return UnpackBits<3>(args);
  if (args.bits == 4) return UnpackBits<4>(args);
  return args.packed;
}

void DotVnni(const DotArgs& args) {
  args.rows.block == kMaxBlock ? DotAll<kMaxBlock>(args) : DotAll<0>(args);
}

}  // namespace innerq

#endif  // __x86_64__
