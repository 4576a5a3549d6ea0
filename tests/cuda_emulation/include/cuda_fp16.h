// Conversions of cuda_fp16.h by our own.
#pragma once

#include "kernels/float16.h"

inline uint16_t __ushort_as_half(uint16_t bits) { return bits; }
inline float __half2float(uint16_t half) { return innerq::F16ToF32(half); }
