// Conversions between float and the two 16-bit floating-point formats; host and device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define INNERQ_HOST_DEVICE __host__ __device__
#else
#define INNERQ_HOST_DEVICE
#endif

namespace innerq {

INNERQ_HOST_DEVICE inline uint32_t FloatBits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

INNERQ_HOST_DEVICE inline float FloatFromBits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// IEEE binary16 to binary32, exact.
INNERQ_HOST_DEVICE inline float F16ToF32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity or NaN
    return FloatFromBits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude < 0x0400u) {  // zero or subnormal: an integer count of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return FloatFromBits(sign | ((magnitude + 0x1c000u) << 13));  // rebias: 112 << 10
}

// binary32 to IEEE binary16; nearest, ties to even; overflow gives infinity; NaN stays NaN.
INNERQ_HOST_DEVICE inline uint16_t F32ToF16(float x) {
  const uint32_t bits = FloatBits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65536
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, counted in 2^-24
    // Adding 0.5 aligns the unit of the sum with 2^-24, so the addition does the rounding.
    const float aligned = FloatFromBits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (FloatBits(aligned) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t rounded = magnitude + 0xfffu + odd;  // may carry into 65536: infinity
  return static_cast<uint16_t>(sign | ((rounded >> 13) - 0x1c000u));
}

// bfloat16 to binary32, exact.
INNERQ_HOST_DEVICE inline float BF16ToF32(uint16_t h) {
  return FloatFromBits(static_cast<uint32_t>(h) << 16);
}

// binary32 to bfloat16; nearest, ties to even; NaN stays NaN.
INNERQ_HOST_DEVICE inline uint16_t F32ToBF16(float x) {
  const uint32_t bits = FloatBits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace innerq
