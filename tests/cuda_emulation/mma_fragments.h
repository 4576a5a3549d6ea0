// The product mma.m16n8k16, F16 or BF16 in and F32 sums, from the fragments of a warp's lanes:
// which element is in which register of which lane, by the tables of the PTX ISA ("Matrix Fragments
// for mma.m16n8k16 with floating point type"). Sums are rounded after every product; the hardware
// rounds otherwise, within the same bounds.
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

}  // namespace innerq::emulation
