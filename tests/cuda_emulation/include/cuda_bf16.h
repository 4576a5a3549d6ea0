// The type of cuda_bf16.h.
#pragma once

#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;
};
