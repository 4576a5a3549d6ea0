// Products with low-bit weights with AVX-512 VNNI.
//
// Inputs are two signed bytes each, q = low + 128 * high, of every 32 the low bytes, then the high
// ones; those of up to 8 bits have low bytes alone.
#include "kernels/cpu/low_bit_matmul.h"

#if defined(__x86_64__)
// g++ 12 takes the undefined operands inside its AVX-512 intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <array>

#include "kernels/cpu/vnni_dot.h"

#define INNERQ_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace innerq {
namespace {

constexpr int kHighShift = 7;
constexpr int64_t kBlockBytes = 64;  // of 32 inputs
constexpr int64_t kAhead = 4096;     // bytes: covers the latency of memory at the rate of one core

INNERQ_TARGET void ArrangeBytes(const int16_t* q, int64_t count, int activation_bits,
                                std::byte* to) {
  if (activation_bits <= 8) {
    for (int64_t i = 0; i < count; i += kLowBitUnit, to += kBlockBytes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm512_cvtepi16_epi8(_mm512_loadu_si512(q + i)));
    }
    return;
  }
  const __m512i half = _mm512_set1_epi16(1 << (kHighShift - 1));
  for (int64_t i = 0; i < count; i += kLowBitUnit, to += kBlockBytes) {
    const __m512i x = _mm512_loadu_si512(q + i);
    const __m512i high = _mm512_srai_epi16(_mm512_add_epi16(x, half), kHighShift);
    const __m512i low = _mm512_sub_epi16(x, _mm512_slli_epi16(high, kHighShift));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm512_cvtepi16_epi8(high));
  }
}

// Level + L of the codes of a block, a quad of half a panel at a time.
template <int kBits>
class PackedLevels {
 public:
  static constexpr int64_t kBytes = kQuadBytes * kBits;  // of a block

  INNERQ_TARGET explicit PackedLevels(const LowBitSpec& spec) {
    alignas(16) std::array<uint8_t, 16> table{};
    for (int code = 0; code < 1 << kBits; ++code) {
      table[static_cast<size_t>(code)] = static_cast<uint8_t>(spec.Level(code) + spec.max_level());
    }
    table_ = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table.data())));
  }
  INNERQ_TARGET __m512i Load(const uint8_t* block, int quad, int half) const {
    constexpr int kFieldBits = kBits == 4 ? 4 : 2;
    constexpr int kVectors = kBits == 4 ? 4 : 2;
    const uint8_t* at = block + half * 64;
    const __m512i fields = _mm512_loadu_si512(at + quad % kVectors * kQuadBytes);
    const int shift = quad / kVectors * kFieldBits;
    __m512i codes = _mm512_and_si512(_mm512_srli_epi16(fields, static_cast<unsigned>(shift)),
                                     _mm512_set1_epi8((1 << kFieldBits) - 1));
    if constexpr (kBits == 3) {
      const __m512i thirds = _mm512_loadu_si512(at + 2 * kQuadBytes);
      const __m512i moved = quad < 2 ? _mm512_slli_epi16(thirds, static_cast<unsigned>(2 - quad))
                                     : _mm512_srli_epi16(thirds, static_cast<unsigned>(quad - 2));
      // (moved & 4) | codes
      codes = _mm512_ternarylogic_epi64(moved, _mm512_set1_epi8(4), codes, 0xea);
    }
    return _mm512_shuffle_epi8(table_, codes);
  }

 private:
  __m512i table_;
};

// The same of levels that are bytes already, and of codes of 8 bits, which are L + l.
class ByteLevels {
 public:
  static constexpr int64_t kBytes = kQuadBytes * 8;
  explicit ByteLevels(const LowBitSpec& /*spec*/) {}
  INNERQ_TARGET __m512i Load(const uint8_t* block, int quad, int half) const {
    return _mm512_loadu_si512(block + quad * kQuadBytes + half * 64);
  }
};

// Adds a slice to the totals of rows [row, row + kRows). kParts: bytes of an input.
template <class Levels, int kParts, int kRows>
INNERQ_TARGET void AddRows(const LowBitSlice& slice, const uint8_t* blocks, int64_t row) {
  const Levels levels(slice.spec);
  const std::byte* q = slice.inputs + row * slice.stride;
  const uint16_t* scales = slice.scales;
  float* totals = slice.totals + row * kLowBitOutputs;
  const int64_t stride = slice.stride;
  for (int64_t c = 0; c * slice.chunk < slice.num_inputs; ++c, scales += slice.scale_step) {
    __m512i sum[kRows][kParts][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sum[r][0][0] = sum[r][0][1] = _mm512_set1_epi32(slice.Starts(row + r)[c]);
      if constexpr (kParts == 2) sum[r][1][0] = sum[r][1][1] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < slice.chunk; i += kLowBitUnit) {
      if (kRows == 1) {
#pragma GCC unroll 16
        for (int64_t line = 0; line < levels.kBytes; line += 64) {
          __builtin_prefetch(blocks + kAhead + line);
        }
      }
#pragma GCC unroll 8
      for (int quad = 0; quad < 8; ++quad) {
        const __m512i level[2] = {levels.Load(blocks, quad, 0), levels.Load(blocks, quad, 1)};
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
          for (int part = 0; part < kParts; ++part) {
            const std::byte* x = q + r * stride + part * 32 + quad * 4;
            AddDot(sum[r][part][0], level[0], x);
            AddDot(sum[r][part][1], level[1], x);
          }
        }
      }
      blocks += levels.kBytes;
      q += kBlockBytes;
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512 scale =
          _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + half * 16)));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        __m512i dot = sum[r][0][half];
        if constexpr (kParts == 2) {
          dot = _mm512_add_epi32(dot, _mm512_slli_epi32(sum[r][1][half], kHighShift));
        }
        float* total = totals + r * kLowBitOutputs + half * 16;
        _mm512_storeu_ps(total,
                         _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dot), _mm512_loadu_ps(total)));
      }
    }
  }
}

// Blocks of kRows rows from `row` on, then smaller blocks for the rest.
template <class Levels, int kParts, int kRows>
void AddBlocks(const LowBitSlice& slice, const uint8_t* blocks, int64_t row) {
  for (; row + kRows <= slice.num_rows; row += kRows) {
    AddRows<Levels, kParts, kRows>(slice, blocks, row);
  }
  if constexpr (kRows > 1) AddBlocks<Levels, kParts, kRows / 2>(slice, blocks, row);
}

template <class Levels>
void AddAll(const LowBitSlice& slice, const uint8_t* blocks) {
  slice.spec.activation_bits > 8 ? AddBlocks<Levels, 2, 4>(slice, blocks, 0)
                                 : AddBlocks<Levels, 1, 8>(slice, blocks, 0);
}

void AddPacked(const LowBitSlice& slice) {
  switch (slice.spec.bits) {
    case 2:
      return AddAll<PackedLevels<2>>(slice, slice.codes);
    case 3:
      return AddAll<PackedLevels<3>>(slice, slice.codes);
    case 4:
      return AddAll<PackedLevels<4>>(slice, slice.codes);
    default:
      return AddAll<ByteLevels>(slice, slice.codes);
  }
}

void AddUnpacked(const LowBitSlice& slice) { AddAll<ByteLevels>(slice, slice.levels); }

}  // namespace

void UseVnni(LowBitKernel* kernel) {
  kernel->arrange = ArrangeBytes;
  kernel->add = AddUnpacked;
  kernel->add_packed = AddPacked;
}

}  // namespace innerq

#endif  // __x86_64__
