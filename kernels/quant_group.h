// The InnerQ codec of one group: the one definition of its codes and scales, host and device.
//
// A group is `n` values that share a scale. Codes are unsigned, u in [0, 2^bits), and decode as
//   x = scale * u + zero,
// where a symmetric group's zero is implied: zero = -scale * 2^(bits-1). Scale and zero are stored
// as F16, so a scale is floored at 2^-14 (below it F16 loses precision) and saturates; a group of
// zeros has scale 0.
//
// Paper codec (InnerQ, arXiv 2602.23200, the authors' Python quantizer). Symmetric groups have
// scale = max|x| / (2^(bits-1) - 1) and u = round(x / scale) + 2^(bits-1), which leaves one code
// unused. Asymmetric ones have zero = min and scale = (max - min) / (2^bits - 1). Hybrid takes
// symmetric at `bits` or asymmetric at `bits - 1`, whichever has the smaller sum |x - x'|, ties
// asymmetric.
//
// Fitted codec (ours): every code point is used and scale (and zero) minimize sum w (x - x')^2 over
// a fixed list of candidates followed by a least-squares step. A symmetric scale carries a sign, so
// the spare code point serves the longer tail. Hybrid compares both at `bits`, ties symmetric. The
// weights w say what an error costs: keys are divided by their channel's norm c before they are
// encoded, so an error there is worth c^2 in what a query sees. Without weights, channels of small
// keys would be fitted at the expense of those that decide a score.
//
// Rounding is to nearest, ties to even, everywhere. All arithmetic is in F32 without contraction,
// in index order, so host, SIMD lanes and device give equal bits.
//
// The functions work on L groups at once, value i of group l at x[i * L + l]: L = 1 is the plain
// definition, wider L lets a caller compiled for a vector target turn groups into lanes.
#pragma once

#include <cstdint>

#include "kernels/float16.h"

#if defined(__GNUC__) && !defined(__CUDACC__)
#define INNERQ_INLINE inline __attribute__((always_inline))
#else
#define INNERQ_INLINE INNERQ_HOST_DEVICE inline
#endif

namespace innerq {

enum class QuantMode { kSymmetric, kAsymmetric, kHybrid };
enum class QuantAxis { kInner, kOuter };  // inner: along the reduced dimension; outer: as KIVI
enum class QuantCodec { kPaper, kFitted };

// How the keys or the values of one layer are stored in sealed pages.
struct QuantSpec {
  int bits = 16;  // 2, 3, 4, 8; 16 keeps F16
  QuantMode mode = QuantMode::kSymmetric;
  QuantAxis axis = QuantAxis::kInner;
  int group_size = 32;  // values per scale
  QuantCodec codec = QuantCodec::kFitted;

  INNERQ_HOST_DEVICE bool quantized() const { return bits < 16; }
  INNERQ_HOST_DEVICE bool has_zero() const { return quantized() && mode != QuantMode::kSymmetric; }
  bool operator==(const QuantSpec&) const = default;
};

constexpr float kMinF16Scale = 0x1p-14f;  // smallest normal F16
constexpr float kMaxF16 = 65504.0f;

// Scale and zero of one group. `asymmetric` says which side a hybrid group took.
struct GroupParams {
  float scale = 0;
  float zero = 0;  // for symmetric groups the implied -scale * 2^(bits-1)
  bool asymmetric = false;
};

// Rounds to the nearest integer, ties to even; exact for |x| < 2^22.
INNERQ_INLINE float RoundHalfEven(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the unit of sums near it is 1
  return (x + kMagic) - kMagic;
}

INNERQ_INLINE float ClampTo(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// Rounds a magnitude in [2^-14, 65504] to the F16 grid, sign kept; 0 stays 0.
INNERQ_INLINE float RoundToF16(float x) {
  const uint32_t bits = FloatBits(x);
  return FloatFromBits((bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu);
}

// Clamps |scale| into what F16 holds well, keeping its sign; 0 stays 0.
INNERQ_INLINE float LimitScale(float scale, int bits) {
  const float limit = kMaxF16 / static_cast<float>(1 << (bits - 1));  // its zero must fit as well
  const float magnitude = scale < 0 ? -scale : scale;
  const float limited = ClampTo(magnitude, kMinF16Scale, limit);
  return magnitude == 0 ? 0.0f : (scale < 0 ? -limited : limited);
}

// Nearest F16 of any finite zero point, saturating; tiny ones go through F16's subnormals.
INNERQ_INLINE float LimitZero(float zero) {
  return F16ToF32(F32ToF16(ClampTo(zero, -kMaxF16, kMaxF16)));
}

namespace quant_internal {

// Candidate steps of the fitted search, as multiples of the step that just covers the extreme.
constexpr int kNumCandidates = 12;
INNERQ_INLINE float CandidateFactor(int bits, int i) {
  const float first = bits <= 2 ? 0.60f : bits == 3 ? 0.72f : bits == 4 ? 0.84f : 0.98f;
  const float step = bits <= 2 ? 0.06f : bits == 3 ? 0.045f : bits == 4 ? 0.02f : 0.004f;
  return first + step * static_cast<float>(i);
}

template <int L>
INNERQ_INLINE void MinMax(const float* x, int n, float* low, float* high) {
  for (int l = 0; l < L; ++l) low[l] = high[l] = x[l];
  for (int i = 1; i < n; ++i) {
    for (int l = 0; l < L; ++l) {
      const float v = x[i * L + l];
      low[l] = v < low[l] ? v : low[l];
      high[l] = v > high[l] ? v : high[l];
    }
  }
}

// Weighted sum of squared errors of scale * (clamp(round((x - zero) * inverse), low, high)) + zero,
// and the sums that the least-squares step needs.
template <int L>
struct FitSums {
  float weight, error[L], q[L], qq[L], xq[L], x[L];
};

template <int L>
INNERQ_INLINE void Fit(const float* x, const float* weights, int n, const float* scale,
                       const float* zero, float low, float high, FitSums<L>& sums) {
  sums.weight = 0;
  float inverse[L];
  for (int l = 0; l < L; ++l) {
    inverse[l] = scale[l] == 0 ? 0.0f : 1.0f / scale[l];
    sums.error[l] = sums.q[l] = sums.qq[l] = sums.xq[l] = sums.x[l] = 0;
  }
  for (int i = 0; i < n; ++i) {
    const float weight = weights == nullptr ? 1.0f : weights[i];
    sums.weight += weight;
    for (int l = 0; l < L; ++l) {
      const float v = x[i * L + l];
      const float q = RoundHalfEven(ClampTo((v - zero[l]) * inverse[l], low, high));
      const float d = v - (scale[l] * q + zero[l]);
      const float weighted_q = weight * q;
      sums.error[l] += weight * d * d;
      sums.q[l] += weighted_q;
      sums.qq[l] += weighted_q * q;
      sums.xq[l] += weighted_q * v;
      sums.x[l] += weight * v;
    }
  }
}

// Keeps a candidate where it has less error than the best so far.
template <int L>
INNERQ_INLINE void KeepBetter(const FitSums<L>& sums, const float* scale, const float* zero,
                              float* best_error, float* best_scale, float* best_zero) {
  for (int l = 0; l < L; ++l) {
    const bool better = sums.error[l] < best_error[l];
    best_error[l] = better ? sums.error[l] : best_error[l];
    best_scale[l] = better ? scale[l] : best_scale[l];
    best_zero[l] = better ? zero[l] : best_zero[l];
  }
}

// Fitted symmetric: signed codes in [-2^(bits-1), 2^(bits-1) - 1], zero 0. Returns scale, error.
template <int L>
INNERQ_INLINE void FitSymmetric(const float* x, const float* weights, int n, int bits,
                                float* best_scale, float* best_error) {
  const float half = static_cast<float>(1 << (bits - 1));
  float low[L], high[L], base[L], zero[L], scale[L], ignored[L];
  MinMax<L>(x, n, low, high);
  for (int l = 0; l < L; ++l) {
    const float extreme = -low[l] > high[l] ? low[l] : high[l];
    base[l] = -extreme / half;  // the extreme lands on the longer, negative side
    zero[l] = 0;
    best_scale[l] = 0;
    best_error[l] = 3.0e38f;
    ignored[l] = 0;
  }
  FitSums<L> sums;
  for (int sign = 0; sign < 2; ++sign) {
    for (int i = 0; i < kNumCandidates; ++i) {
      const float factor = CandidateFactor(bits, i) * (sign ? -1.0f : 1.0f);
      for (int l = 0; l < L; ++l) scale[l] = RoundToF16(LimitScale(base[l] * factor, bits));
      Fit<L>(x, weights, n, scale, zero, -half, half - 1, sums);
      KeepBetter<L>(sums, scale, zero, best_error, best_scale, ignored);
    }
  }
  // The paper's step as well: no group may fare worse than there.
  for (int l = 0; l < L; ++l) {
    scale[l] = RoundToF16(LimitScale(base[l] * half / (half - 1), bits));
  }
  Fit<L>(x, weights, n, scale, zero, -half, half - 1, sums);
  KeepBetter<L>(sums, scale, zero, best_error, best_scale, ignored);
  Fit<L>(x, weights, n, best_scale, zero, -half, half - 1, sums);
  for (int l = 0; l < L; ++l) {
    const float exact = sums.qq[l] > 0 ? sums.xq[l] / sums.qq[l] : best_scale[l];
    scale[l] = RoundToF16(LimitScale(exact, bits));
  }
  Fit<L>(x, weights, n, scale, zero, -half, half - 1, sums);
  KeepBetter<L>(sums, scale, zero, best_error, best_scale, ignored);
}

// Fitted asymmetric: codes in [0, 2^bits - 1]. Returns scale, zero, error.
template <int L>
INNERQ_INLINE void FitAsymmetric(const float* x, const float* weights, int n, int bits,
                                 float* best_scale, float* best_zero, float* best_error) {
  const float top = static_cast<float>((1 << bits) - 1);
  float low[L], high[L], scale[L], zero[L];
  MinMax<L>(x, n, low, high);
  for (int l = 0; l < L; ++l) {
    best_scale[l] = best_zero[l] = 0;
    best_error[l] = 3.0e38f;
  }
  FitSums<L> sums;
  for (int i = 0; i < kNumCandidates; ++i) {
    // Shrinks [min, max] about its centre: outliers saturate, the rest gets finer steps.
    const float keep = 1.0f - (bits <= 2   ? 0.04f
                               : bits == 3 ? 0.025f
                               : bits == 4 ? 0.012f
                                           : 0.002f) *
                                  static_cast<float>(i);
    for (int l = 0; l < L; ++l) {
      const float center = 0.5f * (low[l] + high[l]);
      const float reach = 0.5f * (high[l] - low[l]) * keep;
      scale[l] = RoundToF16(LimitScale(2.0f * reach / top, bits));
      zero[l] = LimitZero(center - reach);
    }
    Fit<L>(x, weights, n, scale, zero, 0, top, sums);
    KeepBetter<L>(sums, scale, zero, best_error, best_scale, best_zero);
    for (int l = 0; l < L; ++l) {
      const float count = sums.weight;
      const float determinant = count * sums.qq[l] - sums.q[l] * sums.q[l];
      const bool solvable = determinant > 0;
      const float slope =
          solvable ? (count * sums.xq[l] - sums.q[l] * sums.x[l]) / determinant : scale[l];
      const bool usable = solvable && slope > 0;
      const float intercept = usable ? (sums.x[l] - slope * sums.q[l]) / count : zero[l];
      scale[l] = usable ? RoundToF16(LimitScale(slope, bits)) : scale[l];
      zero[l] = LimitZero(intercept);
    }
    Fit<L>(x, weights, n, scale, zero, 0, top, sums);
    KeepBetter<L>(sums, scale, zero, best_error, best_scale, best_zero);
  }
}

// Fitted codec of L groups; see EncodeGroups.
template <int L>
INNERQ_INLINE void EncodeFitted(const QuantSpec& spec, const float* x, const float* weights, int n,
                                uint8_t* codes, GroupParams* params) {
  const int bits = spec.bits;
  const float half = static_cast<float>(1 << (bits - 1));
  const float top = static_cast<float>((1 << bits) - 1);
  float sym_scale[L] = {}, sym_error[L] = {};
  float asym_scale[L] = {}, asym_zero[L] = {}, asym_error[L] = {};
  if (spec.mode != QuantMode::kAsymmetric) {
    FitSymmetric<L>(x, weights, n, bits, sym_scale, sym_error);
  }
  if (spec.mode != QuantMode::kSymmetric) {
    FitAsymmetric<L>(x, weights, n, bits, asym_scale, asym_zero, asym_error);
  }
  float inverse[L];
  for (int l = 0; l < L; ++l) {
    const bool asymmetric = spec.mode == QuantMode::kAsymmetric ||
                            (spec.mode == QuantMode::kHybrid && asym_error[l] < sym_error[l]);
    params[l].asymmetric = asymmetric;
    params[l].scale = asymmetric ? asym_scale[l] : sym_scale[l];
    params[l].zero = asymmetric ? asym_zero[l] : -half * sym_scale[l];
    inverse[l] = params[l].scale == 0 ? 0.0f : 1.0f / params[l].scale;
  }
  for (int i = 0; i < n; ++i) {
    for (int l = 0; l < L; ++l) {
      const float v = x[i * L + l];
      const float sym_code = RoundHalfEven(ClampTo(v * inverse[l], -half, half - 1)) + half;
      const float asym_code = RoundHalfEven(ClampTo((v - params[l].zero) * inverse[l], 0, top));
      const float code = params[l].asymmetric ? asym_code : sym_code;
      codes[i * L + l] = static_cast<uint8_t>(static_cast<int>(code));
    }
  }
}

// Paper codec of L groups; see EncodeGroups.
template <int L>
INNERQ_INLINE void EncodePaper(const QuantSpec& spec, const float* x, int n, uint8_t* codes,
                               GroupParams* params) {
  const int bits = spec.bits;
  const float half = static_cast<float>(1 << (bits - 1));
  const float sym_top = half - 1;
  const float asym_top =
      spec.mode == QuantMode::kHybrid ? half - 1 : static_cast<float>((1 << bits) - 1);
  float low[L], high[L], sym_scale[L], asym_scale[L], sym_step[L], asym_step[L];
  float sym_error[L], asym_error[L];
  MinMax<L>(x, n, low, high);
  for (int l = 0; l < L; ++l) {
    const float extreme = -low[l] > high[l] ? -low[l] : high[l];
    sym_scale[l] = LimitScale(extreme / sym_top, bits);
    asym_scale[l] = LimitScale((high[l] - low[l]) / asym_top, bits);
    sym_step[l] = sym_scale[l] == 0 ? 1.0f : sym_scale[l];  // what to divide by
    asym_step[l] = asym_scale[l] == 0 ? 1.0f : asym_scale[l];
    sym_error[l] = asym_error[l] = 0;
  }
  for (int i = 0; i < n; ++i) {
    for (int l = 0; l < L; ++l) {
      const float v = x[i * L + l];
      const float sym_q = RoundHalfEven(ClampTo(v / sym_step[l], -sym_top, sym_top));
      const float asym_q = RoundHalfEven(ClampTo((v - low[l]) / asym_step[l], 0, asym_top));
      const float sym_d = v - sym_q * sym_scale[l];
      const float asym_d = v - (asym_q * asym_scale[l] + low[l]);
      sym_error[l] += sym_d < 0 ? -sym_d : sym_d;
      asym_error[l] += asym_d < 0 ? -asym_d : asym_d;
    }
  }
  for (int l = 0; l < L; ++l) {
    const bool asymmetric = spec.mode == QuantMode::kAsymmetric ||
                            (spec.mode == QuantMode::kHybrid && asym_error[l] <= sym_error[l]);
    params[l].asymmetric = asymmetric;
    params[l].scale = asymmetric ? asym_scale[l] : sym_scale[l];
    params[l].zero = asymmetric ? low[l] : -half * sym_scale[l];
  }
  for (int i = 0; i < n; ++i) {
    for (int l = 0; l < L; ++l) {
      const float v = x[i * L + l];
      const float sym_code = RoundHalfEven(ClampTo(v / sym_step[l], -sym_top, sym_top)) + half;
      const float asym_code = RoundHalfEven(ClampTo((v - low[l]) / asym_step[l], 0, asym_top));
      const float code = params[l].asymmetric ? asym_code : sym_code;
      codes[i * L + l] = static_cast<uint8_t>(static_cast<int>(code));
    }
  }
}

}  // namespace quant_internal

// Chooses scale and zero of L groups and writes their codes.
//
// x:       [n][L] F32, finite (the caller checks)
// weights: [n] F32, finite and positive, of the squared errors, or null: all 1; fitted only
// codes:   [n][L] one code a byte
// params:  [L]; paper scales and zeros are the unrounded F32 ones (codes are computed from them, as
//          the authors do; storing rounds them to F16), fitted ones are already on the F16 grid
template <int L>
INNERQ_INLINE void EncodeGroups(const QuantSpec& spec, const float* x, const float* weights, int n,
                                uint8_t* codes, GroupParams* params) {
  if (spec.codec == QuantCodec::kFitted) {
    quant_internal::EncodeFitted<L>(spec, x, weights, n, codes, params);
  } else {
    quant_internal::EncodePaper<L>(spec, x, n, codes, params);
  }
}

// What a page stores for a group: F16 bits of scale and zero. A paper zero or scale is rounded
// here; the zero of a symmetric group is exactly -scale * 2^(bits-1) of the rounded scale.
struct StoredParams {
  uint16_t scale = 0;
  uint16_t zero = 0;
};
INNERQ_INLINE StoredParams StoreParams(const GroupParams& params, int bits) {
  const uint16_t scale = F32ToF16(params.scale);
  const float zero = params.asymmetric ? ClampTo(params.zero, -kMaxF16, kMaxF16)
                                       : -static_cast<float>(1 << (bits - 1)) * F16ToF32(scale);
  return {scale, F32ToF16(zero)};
}

// Reads code `index` of a little-endian bit string of `bits`-bit codes.
INNERQ_INLINE uint32_t ReadCode(const uint8_t* packed, int bits, int64_t index) {
  const int64_t bit = index * bits;
  const int64_t byte = bit >> 3;
  const int shift = static_cast<int>(bit & 7);
  uint32_t word = packed[byte];
  if (shift + bits > 8) word |= static_cast<uint32_t>(packed[byte + 1]) << 8;
  return (word >> shift) & ((1u << bits) - 1u);
}

// Writes code `index` of a little-endian bit string; the other bits stay.
INNERQ_INLINE void WriteCode(uint8_t* packed, int bits, int64_t index, uint32_t code) {
  const int64_t bit = index * bits;
  const int64_t byte = bit >> 3;
  const int shift = static_cast<int>(bit & 7);
  const uint32_t mask = ((1u << bits) - 1u) << shift;
  const uint32_t word = code << shift;
  packed[byte] = static_cast<uint8_t>((packed[byte] & ~mask) | word);
  if (shift + bits > 8) {
    packed[byte + 1] = static_cast<uint8_t>((packed[byte + 1] & ~(mask >> 8)) | (word >> 8));
  }
}

}  // namespace innerq
