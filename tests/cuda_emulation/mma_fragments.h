// Products of tensor cores from the fragments of a warp's lanes: which element is in which register
// of which lane, by the tables of the PTX ISA. mma.m16n8k16, F16 or BF16 in and F32 sums ("Matrix
// Fragments for mma.m16n8k16 with floating point type"): sums are rounded after every product; the
// hardware rounds otherwise, within the same bounds. mma.m16n8k32 of bytes ("Matrix Fragments for
// mma.m16n8k32"): exact.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/float16.h"

namespace innerq::emulation {

// What one lane brings: a [16][16] and b [16][8], two halves a register, and c [16][8].
struct MmaLane {
  const uint32_t* a = nullptr;  // [4]
  uint32_t b[2] = {};
  float* c = nullptr;                   // [4]
  float (*widen)(uint16_t) = F16ToF32;  // of a and b, the same in all lanes
};

// Adds a * b to c in all lanes.
inline void MultiplyAddFragments(std::span<const MmaLane, 32> lanes) {
  const auto half = [&](uint32_t halves, int i) {
    return lanes[0].widen(static_cast<uint16_t>(halves >> (i * 16) & 0xffffu));
  };
  float a[16][16], b[16][8];
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < 16; ++m) {
      const MmaLane& lane = lanes[static_cast<size_t>(m % 8 * 4 + k % 8 / 2)];
      a[m][k] = half(lane.a[m / 8 + k / 8 * 2], k % 2);
    }
    for (int n = 0; n < 8; ++n) {
      b[k][n] = half(lanes[static_cast<size_t>(n * 4 + k % 8 / 2)].b[k / 8], k % 2);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float& sum = lanes[static_cast<size_t>(m % 8 * 4 + n / 2)].c[m / 8 * 2 + n % 2];
      for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k][n];
    }
  }
}

// What one lane brings: a [16][32] unsigned and b [32][8] signed, four bytes a register, and
// c [16][8].
struct ByteMmaLane {
  const uint32_t* a = nullptr;  // [4]
  uint32_t b[2] = {};
  int* c = nullptr;  // [4]
};

inline void MultiplyAddFragments(std::span<const ByteMmaLane, 32> lanes) {
  const auto byte = [](uint32_t bytes, int i) { return static_cast<uint8_t>(bytes >> i * 8); };
  int a[16][32], b[32][8];
  for (int k = 0; k < 32; ++k) {
    for (int m = 0; m < 16; ++m) {
      const ByteMmaLane& lane = lanes[static_cast<size_t>(m % 8 * 4 + k % 16 / 4)];
      a[m][k] = byte(lane.a[m / 8 + k / 16 * 2], k % 4);
    }
    for (int n = 0; n < 8; ++n) {
      b[k][n] = static_cast<int8_t>(
          byte(lanes[static_cast<size_t>(n * 4 + k % 16 / 4)].b[k / 16], k % 4));
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      int& sum = lanes[static_cast<size_t>(m % 8 * 4 + n / 2)].c[m / 8 * 2 + n % 2];
      for (int k = 0; k < 32; ++k) sum += a[m][k] * b[k][n];
    }
  }
}

}  // namespace innerq::emulation
