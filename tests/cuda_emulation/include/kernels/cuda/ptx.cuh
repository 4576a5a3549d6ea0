// What kernels/cuda/ptx.cuh has, on the CPU; found before it.
#pragma once

#include "kernels/float16.h"
#include "tests/cuda_emulation/emulation.h"

namespace innerq::cuda {

inline void MultiplyAdd(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
  emulation::MultiplyAdd({a, {b0, b1}, c});
}
inline void MultiplyAddBf16(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
  emulation::MultiplyAdd({a, {b0, b1}, c, BF16ToF32});
}

inline void LoadMatrices(const void* row, uint32_t (&words)[4]) {
  emulation::LoadMatrices(row, words);
}

inline uint32_t PackHalves(float low, float high) {
  return F32ToF16(low) | static_cast<uint32_t>(F32ToF16(high)) << 16;
}

inline uint32_t PackBf16(float low, float high) {
  return F32ToBF16(low) | static_cast<uint32_t>(F32ToBF16(high)) << 16;
}

// Rounds twice, which shows only where the sum is no F16.
inline uint32_t MultiplyAddHalves(uint32_t x, uint32_t y, uint32_t z) {
  const auto half = [&](int shift) {
    const auto part = [&](uint32_t halves) {
      return F16ToF32(static_cast<uint16_t>(halves >> shift & 0xffffu));
    };
    return fmaf(part(x), part(y), part(z));
  };
  return PackHalves(half(0), half(16));
}

inline void CopyAsync(void* shared, const void* global, int bytes = 16) {
  emulation::CopyAsync(shared, global, bytes);
}
inline void CommitCopies() { emulation::CommitCopies(); }
template <int kPending>
void WaitForCopies() {
  emulation::WaitForCopies(kPending);
}

}  // namespace innerq::cuda
