// One strip of attention: scores of its keys, sums of its values. Device functions for one warp.
//
// R rows of a tile, C channels of V that a lane sums, D head dimension, Dp D rounded up to 16,
// T page_tokens, N group size. The cache is in CodeOrder::kRowMajor.
//
// A strip is 32 tokens of one page. For keys a lane takes one token, so it has that token's whole
// score; for values a lane takes C neighbouring channels, so it has their whole sums: neither
// crosses lanes. Codes are unpacked into registers once for all R rows, as exact small integers:
// OR-ing a code into the mantissa of 2^23 and subtracting 2^23 again. With inner groups a scale
// multiplies a finished sum over its group (InnerQ, arXiv 2602.23200):
//   score = sum_g  s_g * (q_g . k_g) + z_g * sum(q_g)
//   out_c = sum_g  s_g * (p_g . v_g) + z_g * sum(p_g)
// A symmetric group's z = -s * 2^(bits-1) is implied: subtracting 2^(bits-1) more from each code
// does the same, exactly.
#pragma once

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/strip_index.h"
#include "kernels/paged_kv.h"

namespace innerq::cuda {

constexpr uint32_t kTwoTo23 = 0x4b000000u;  // bits of 2^23, whose unit is 1

// How codes become floats: ((word & mask) | 2^23) - base.
struct CodeFormat {
  int bits = 0;
  uint32_t mask = 0;
  float base = 0;
  bool has_zero = false;
};
__device__ inline CodeFormat FormatOf(const QuantSpec& spec) {
  const bool has_zero = spec.has_zero();
  const float implied_zero = has_zero ? 0.0f : static_cast<float>(1 << (spec.bits - 1));
  return {spec.bits, (1u << spec.bits) - 1u, 8388608.0f + implied_zero, has_zero};
}
__device__ inline float CodeToFloat(uint32_t word, const CodeFormat& format) {
  return __uint_as_float((word & format.mask) | kTwoTo23) - format.base;
}

// 32 bits of a string of words from bit `bit` on.
__device__ inline uint32_t ReadBits(const uint32_t* words, int bit) {
  return __funnelshift_r(words[bit >> 5], words[(bit >> 5) + 1], static_cast<uint32_t>(bit) & 31u);
}

// Copies a strip's words from global to shared memory, rows a pitch apart.
__device__ inline void CopyStrip(const std::byte* from, const PackedRows& rows, uint32_t* to) {
  const auto* words = reinterpret_cast<const uint32_t*>(from);
  const int lane = threadIdx.x;
  const int row_step = kWarpSize / rows.row_words, word_step = kWarpSize % rows.row_words;
  int row = lane / rows.row_words, word = lane % rows.row_words;
#pragma unroll 4
  for (int i = lane; i < rows.num_words; i += kWarpSize) {
    to[row * rows.pitch + word] = __ldg(words + i);
    row += row_step;
    word += word_step;
    if (word >= rows.row_words) {
      word -= rows.row_words;
      ++row;
    }
  }
}

// q of eight channels of all rows, [8][R], from shared memory.
template <int R>
__device__ inline void LoadQueries(const float* q, int d, float (&x)[8 * R]) {
  const auto* from = reinterpret_cast<const float4*>(q + d * R);
#pragma unroll
  for (int i = 0; i < 2 * R; ++i) {
    const float4 four = from[i];
    x[4 * i] = four.x;
    x[4 * i + 1] = four.y;
    x[4 * i + 2] = four.z;
    x[4 * i + 3] = four.w;
  }
}

// Eight codes of a lane's row from channel d on, as floats.
__device__ inline void UnpackKeys(const uint32_t* row, int first_bit, int d,
                                  const CodeFormat& format, float (&x)[8]) {
  const int bit = first_bit + d * format.bits;
  uint32_t word = ReadBits(row, bit);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i == 4 && format.bits == 8) word = ReadBits(row, bit + 32);
    x[i] = CodeToFloat(word, format);
    word >>= format.bits;
  }
}

// Scores of a lane's token. `row`: its first word; queries [D][R] as they meet this strip.
template <int R>
__device__ inline void ScoreHalves(const uint32_t* row, const float* queries, int dim,
                                   float (&score)[R]) {
  for (int d = 0; d < dim; d += 8) {
    float q[8 * R];
    LoadQueries<R>(queries, d, q);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = HalvesToFloats(row[d / 2 + i]);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        score[r] = fmaf(two.x, q[2 * i * R + r], score[r]);
        score[r] = fmaf(two.y, q[(2 * i + 1) * R + r], score[r]);
      }
    }
  }
}

// Groups of N channels of the token: one scale per finished sum. `scales`, `zeros`: those of the
// token, T apart.
template <int R>
__device__ inline void ScoreInner(const uint32_t* row, int first_bit, const CodeFormat& format,
                                  const KvLayerLayout& layout, const uint16_t* scales,
                                  const uint16_t* zeros, const float* queries,
                                  const float* query_sums, float (&score)[R]) {
  const int dim = static_cast<int>(layout.head_dim), size = layout.key.group_size;
  const int tokens = static_cast<int>(layout.page_tokens);
  for (int g = 0; g * size < dim; ++g) {
    float sums[R] = {};
    for (int d = g * size; d < (g + 1) * size; d += 8) {
      float q[8 * R], k[8];
      LoadQueries<R>(queries, d, q);
      UnpackKeys(row, first_bit, d, format, k);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int r = 0; r < R; ++r) sums[r] = fmaf(k[i], q[i * R + r], sums[r]);
      }
    }
    const float scale = HalfToFloat(__ldg(scales + g * tokens));
    const float zero = format.has_zero ? HalfToFloat(__ldg(zeros + g * tokens)) : 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      score[r] = fmaf(scale, sums[r], score[r]);
      if (format.has_zero) score[r] = fmaf(zero, query_sums[g * R + r], score[r]);
    }
  }
}

// Groups of N tokens of each channel: every channel has its scale. `scales`, `zeros`: those of the
// token's group, [D].
template <int R>
__device__ inline void ScoreOuter(const uint32_t* row, int first_bit, const CodeFormat& format,
                                  int dim, const uint16_t* scales, const uint16_t* zeros,
                                  const float* queries, float (&score)[R]) {
  for (int d = 0; d < dim; d += 8) {
    float q[8 * R], k[8];
    LoadQueries<R>(queries, d, q);
    UnpackKeys(row, first_bit, d, format, k);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scale = HalfToFloat(__ldg(scales + d + i));
      const float zero = format.has_zero ? HalfToFloat(__ldg(zeros + d + i)) : 0.0f;
      const float key = fmaf(scale, k[i], zero);
#pragma unroll
      for (int r = 0; r < R; ++r) score[r] = fmaf(key, q[i * R + r], score[r]);
    }
  }
}

// C codes of a lane's channels of one token, as floats.
template <int C>
__device__ inline void UnpackValues(const uint32_t* strip, int bit, const CodeFormat& format,
                                    float (&x)[C]) {
  uint32_t word = ReadBits(strip, bit);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c == 4 && format.bits == 8) word = ReadBits(strip, bit + 32);
    x[c] = CodeToFloat(word, format);
    word >>= format.bits;
  }
}

// values += weights of the strip's tokens times their F16 values. A weight of 0 adds nothing,
// whatever the bytes of its token: it may not have been written yet.
template <int R, int C>
__device__ inline void AddHalves(const uint32_t* strip, int padded, int channel, int num_tokens,
                                 const float* weights, float (&values)[R][C]) {
  for (int t = 0; t < num_tokens; ++t) {
    const uint32_t* words = strip + (t * padded + channel) / 2;
    float v[C];
#pragma unroll
    for (int c = 0; c < C; c += 2) {
      const float2 two = HalvesToFloats(words[c / 2]);
      v[c] = two.x;
      v[c + 1] = two.y;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float p = weights[t * R + r];
      if (p == 0) continue;
#pragma unroll
      for (int c = 0; c < C; ++c) values[r][c] = fmaf(p, v[c], values[r][c]);
    }
  }
}

// Groups of N tokens of a channel. `scales`, `zeros`: those of the lane's channels in the strip's
// first group; groups lie Dp apart.
template <int R, int C>
__device__ inline void AddInner(const uint32_t* strip, const CodeFormat& format,
                                const KvLayerLayout& layout, int channel, const uint16_t* scales,
                                const uint16_t* zeros, const float* weights,
                                float (&values)[R][C]) {
  const int padded = static_cast<int>(layout.padded_dim());
  const int size = layout.value.group_size < 32 ? layout.value.group_size : 32;
  for (int g = 0; g * size < 32; ++g) {
    float sums[R][C] = {};
    float weight_sums[R] = {};
    for (int t = g * size; t < (g + 1) * size; ++t) {
      float v[C];
      UnpackValues<C>(strip, (t * padded + channel) * format.bits, format, v);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float p = weights[t * R + r];
        if (format.has_zero) weight_sums[r] += p;
#pragma unroll
        for (int c = 0; c < C; ++c) sums[r][c] = fmaf(p, v[c], sums[r][c]);
      }
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float scale = HalfToFloat(__ldg(scales + g * padded + c));
      const float zero = format.has_zero ? HalfToFloat(__ldg(zeros + g * padded + c)) : 0.0f;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        values[r][c] = fmaf(scale, sums[r][c], values[r][c]);
        if (format.has_zero) values[r][c] = fmaf(zero, weight_sums[r], values[r][c]);
      }
    }
  }
}

// Groups of N channels of a token: N >= 8 >= C, so a lane's channels share a scale. `scales`,
// `zeros`: of the lane's group, one per token of the strip.
template <int R, int C>
__device__ inline void AddOuter(const uint32_t* strip, const CodeFormat& format, int padded,
                                int channel, const uint16_t* scales, const uint16_t* zeros,
                                const float* weights, float (&values)[R][C]) {
  for (int t = 0; t < 32; ++t) {
    float v[C];
    UnpackValues<C>(strip, (t * padded + channel) * format.bits, format, v);
    const float scale = HalfToFloat(__ldg(scales + t));
    const float zero = format.has_zero ? HalfToFloat(__ldg(zeros + t)) : 0.0f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float value = fmaf(scale, v[c], zero);
#pragma unroll
      for (int r = 0; r < R; ++r) values[r][c] = fmaf(weights[t * R + r], value, values[r][c]);
    }
  }
}

}  // namespace innerq::cuda
