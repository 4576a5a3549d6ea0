// Sigma-based low-bit weights: their codes, levels and scales; host and device.
//
// After the abstract of Standard Deviation-Based Quantization for Deep Neural Networks (arXiv
// 2202.12422); the formulas are ours. The weights w of a group, `group_size` inputs of an output or
// all of them, share a clip T = alpha * sigma, sigma their standard deviation and alpha learned. A
// code of B bits stands for one of a few levels, integers l with |l| <= L, and decodes as
// w = T * l / L:
//   pow2     0 and +-2^i for i < 2^(B-1) - 1, so L = 2^(2^(B-1) - 2): 1, 4, 64 for 2, 3, 4 bits.
//            The highest bit of a code is the sign, the others are i + 1, or 0 for a zero.
//   apot     sums of two powers of two (after APoT, arXiv 1909.13144), of 4 bits alone: 0 and +-1,
//            2, 3, 4, 5, 6 and 8, so L = 8. Codes as those of pow2.
//   uniform  all of -L to L, L = 2^(B-1) - 1. A code is l + L; the one beyond 2 L stands for L.
// T is stored as F16 and is not negative. Where every T is a power of two or zero, products with
// levels of pow2 are shifts but for what a row of inputs is scaled by.
//
// Inputs x are rounded to integers as well, q = round(x * (Q / R)) with ties to even, |q| <= Q, in
// F32. Q is 2^(A-1) - 1 for A activation bits, 127 * 128 for 16. R, the range, is the largest |x|
// of the row of inputs, or a clip that the weight brings. So a product is integer but for a scale
// per group and one per row:
//   y = R / (Q L) * sum over groups of T * (sum of l * q)
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>

#include "kernels/float16.h"

namespace innerq {

enum class LowBitScheme { kPow2, kApot, kUniform };

constexpr const char* LowBitSchemeName(LowBitScheme scheme) {
  switch (scheme) {
    case LowBitScheme::kPow2:
      return "pow2";
    case LowBitScheme::kApot:
      return "apot";
    case LowBitScheme::kUniform:
      return "uniform";
  }
  return "?";
}
// The scheme of that name, or nothing.
inline std::optional<LowBitScheme> FindLowBitScheme(std::string_view name) {
  for (const LowBitScheme scheme :
       {LowBitScheme::kPow2, LowBitScheme::kApot, LowBitScheme::kUniform}) {
    if (name == LowBitSchemeName(scheme)) return scheme;
  }
  return std::nullopt;
}

// Whether a scheme has codes of B bits, and all B of which it has some, in words.
constexpr bool HasLowBitCodes(LowBitScheme scheme, int bits) {
  if (scheme == LowBitScheme::kApot) return bits == 4;
  return (bits >= 2 && bits <= 4) || (bits == 8 && scheme == LowBitScheme::kUniform);
}
constexpr const char* LowBitSchemeBits(LowBitScheme scheme) {
  switch (scheme) {
    case LowBitScheme::kPow2:
      return "2, 3 or 4";
    case LowBitScheme::kApot:
      return "4";
    case LowBitScheme::kUniform:
      return "2, 3, 4 or 8";
  }
  return "?";
}

// What T may be: any number, or a power of two or zero. Products are computed alike.
enum class LowBitScale { kFree, kPow2 };

constexpr const char* LowBitScaleName(LowBitScale scale) {
  switch (scale) {
    case LowBitScale::kFree:
      return "free";
    case LowBitScale::kPow2:
      return "pow2";
  }
  return "?";
}
// The scale of that name, or nothing.
inline std::optional<LowBitScale> FindLowBitScale(std::string_view name) {
  for (const LowBitScale scale : {LowBitScale::kFree, LowBitScale::kPow2}) {
    if (name == LowBitScaleName(scale)) return scale;
  }
  return std::nullopt;
}

// Whether a T as F16, finite and not negative, is a power of two, subnormal ones included, or zero.
constexpr bool IsPowerOfTwoScale(uint16_t half) {
  const int exponent = half >> 10, fraction = half & 0x3ff;
  return exponent == 0 ? (fraction & (fraction - 1)) == 0 : fraction == 0;
}

// K of a low-bit matrix, and its groups, are multiples of this.
constexpr int64_t kLowBitUnit = 32;

// How a matrix is held and multiplied.
struct LowBitSpec {
  LowBitScheme scheme = LowBitScheme::kPow2;
  int bits = 4;              // B: as HasLowBitCodes says
  int64_t group_size = 64;   // 32, 64 or 128 inputs, or 0: all of an output
  int activation_bits = 16;  // A: 3, 4, 8 or 16

  bool operator==(const LowBitSpec&) const = default;

  bool valid() const {
    const bool known_group =
        group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128;
    return HasLowBitCodes(scheme, bits) && known_group &&
           (activation_bits == 3 || activation_bits == 4 || activation_bits == 8 ||
            activation_bits == 16);
  }
  // Whether a matrix of K inputs can be held so.
  bool Divides(int64_t cols) const {
    return cols % kLowBitUnit == 0 && (group_size == 0 || cols % group_size == 0);
  }
  int64_t Groups(int64_t cols) const { return group_size == 0 ? 1 : cols / group_size; }
  int64_t RowBytes(int64_t cols) const { return cols * bits / 8; }  // of codes
  // Of codes and scales of a matrix [rows, cols].
  int64_t Bytes(int64_t rows, int64_t cols) const {
    return rows * (RowBytes(cols) + Groups(cols) * static_cast<int64_t>(sizeof(uint16_t)));
  }
  INNERQ_HOST_DEVICE int max_level() const {  // L
    if (scheme == LowBitScheme::kApot) return 8;
    return scheme == LowBitScheme::kPow2 ? 1 << ((1 << (bits - 1)) - 2) : (1 << (bits - 1)) - 1;
  }
  INNERQ_HOST_DEVICE int max_activation() const {  // Q
    return activation_bits == 16 ? 127 * 128 : (1 << (activation_bits - 1)) - 1;
  }
  INNERQ_HOST_DEVICE int Level(int code) const {
    if (scheme == LowBitScheme::kUniform) {
      const int level = code - max_level();
      return level > max_level() ? max_level() : level;
    }
    const int half = 1 << (bits - 1), index = code & (half - 1);
    if (index == 0) return 0;
    const int level =
        scheme == LowBitScheme::kPow2 ? 1 << (index - 1) : index + (index == half - 1 ? 1 : 0);
    return code < half ? level : -level;
  }
};

// A matrix in the order of a file. Borrowed.
struct LowBitMatrix {
  LowBitSpec spec;
  int64_t rows = 0;                  // N
  int64_t cols = 0;                  // K, which spec divides
  const uint8_t* codes = nullptr;    // [N][K * B / 8], strings of codes, the lowest bits first
  const uint16_t* scales = nullptr;  // [N][groups] F16: T
  float input_clip = 0;              // R of all rows of inputs; 0: each row's own

  float Clip(int64_t n, int64_t k) const {  // T of weight [n][k]
    const int64_t group = spec.group_size == 0 ? 0 : k / spec.group_size;
    return F16ToF32(scales[n * spec.Groups(cols) + group]);
  }
  int Level(int64_t n, int64_t k) const;
  float Value(int64_t n, int64_t k) const {
    return Clip(n, k) * static_cast<float>(Level(n, k)) / static_cast<float>(spec.max_level());
  }
};

// Code i of a string of codes.
INNERQ_HOST_DEVICE inline int ReadLowBitCode(const uint8_t* codes, int bits, int64_t i) {
  const int64_t bit = i * bits;
  const int shift = static_cast<int>(bit % 8);
  int two = codes[bit / 8];
  if (shift + bits > 8) two |= codes[bit / 8 + 1] << 8;
  return two >> shift & ((1 << bits) - 1);
}
// The same, to a string that was all zero.
inline void WriteLowBitCode(uint8_t* codes, int bits, int64_t i, int code) {
  const int64_t bit = i * bits;
  const int shifted = code << bit % 8;
  codes[bit / 8] = static_cast<uint8_t>(codes[bit / 8] | shifted);
  if (shifted > 255) codes[bit / 8 + 1] = static_cast<uint8_t>(codes[bit / 8 + 1] | shifted >> 8);
}

inline int LowBitMatrix::Level(int64_t n, int64_t k) const {
  return spec.Level(ReadLowBitCode(codes + n * spec.RowBytes(cols), spec.bits, k));
}

// The code of the level nearest to u = w / T, `|u| <= 1` or clipped to it; of two as near, the
// larger in magnitude.
inline int NearestLowBitCode(const LowBitSpec& spec, float u) {
  const int max_level = spec.max_level();
  const float magnitude = (u < 0 ? -u : u) * static_cast<float>(max_level);
  const bool uniform = spec.scheme == LowBitScheme::kUniform;
  if (!(magnitude >= 0.5f)) return uniform ? max_level : 0;  // NaN too
  if (uniform) {
    const int level =
        magnitude >= static_cast<float>(max_level) ? max_level : static_cast<int>(magnitude + 0.5f);
    return max_level + (u < 0 ? -level : level);
  }
  const int sign = u < 0 ? 1 << (spec.bits - 1) : 0;
  if (spec.scheme == LowBitScheme::kApot) {
    return sign | (magnitude >= 7.0f   ? 7
                   : magnitude >= 6.0f ? 6
                                       : static_cast<int>(magnitude + 0.5f));
  }
  int exponent = 1;  // levels 2^(exponent - 1), with halfway points of 1.5 of them
  for (int level = 1; level < max_level && magnitude >= 1.5f * static_cast<float>(level);
       level *= 2) {
    ++exponent;
  }
  return sign | exponent;
}

// The largest |x|; infinity where an x is not finite.
inline float LargestInput(const float* x, int64_t count) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(x[i]);
    if (magnitude > largest || std::isnan(magnitude)) largest = magnitude;
    if (!std::isfinite(largest)) return std::numeric_limits<float>::infinity();
  }
  return largest;
}

// How a row of inputs becomes integers: q = round(clamp(x * up, -Q, Q)), and x about q * down.
struct InputRounding {
  float up = 0, down = 0;

  // `clip`: as of LowBitMatrix; `largest` input of the row. A row that is not finite gives NaN.
  INNERQ_HOST_DEVICE static InputRounding Of(const LowBitSpec& spec, float clip, float largest) {
    constexpr float kTiny = 1e-30f;  // its reciprocal times Q is finite
    constexpr uint32_t kExponent = 0x7f800000, kNaN = 0x7fc00000;
    const auto most = static_cast<float>(spec.max_activation());
    if ((FloatBits(largest) & kExponent) == kExponent) return {0, FloatFromBits(kNaN)};
    const float range = clip > 0 ? clip : largest;
    if (range < kTiny) return {0, 0};
    return {most / range, range / most};
  }
  int Integer(const LowBitSpec& spec, float x) const {
    const auto most = static_cast<float>(spec.max_activation());
    const float scaled = x * up;
    return static_cast<int>(std::nearbyintf(std::fmin(std::fmax(scaled, -most), most)));
  }
};

}  // namespace innerq
