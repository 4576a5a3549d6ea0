// AddDot: the product that kernels for AVX-512 VNNI are made of.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

namespace innerq {

// sum += codes * x, four bytes a lane, x one quad for all lanes. As an instruction in place: around
// the intrinsic g++ 12 copies every accumulator twice.
__attribute__((target("avx512f,avx512vnni"), always_inline)) inline void AddDot(__m512i& sum,
                                                                                __m512i codes,
                                                                                const void* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(codes), "m"(*static_cast<const uint8_t(*)[4]>(x)));
}

}  // namespace innerq

#endif
