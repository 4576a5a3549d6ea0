// What kernels/cuda/ptx.cuh has, on the CPU; found before it.
#pragma once

#define INNERQ_BULK_COPIES 0  // as of sm_80

#include "kernels/float16.h"
#include "tests/cuda_emulation/emulation.h"

namespace innerq::cuda {

inline void MultiplyAdd(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
  emulation::MultiplyAdd(emulation::MmaLane{a, {b0, b1}, c});
}
inline void MultiplyAddBf16(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
  emulation::MultiplyAdd(emulation::MmaLane{a, {b0, b1}, c, BF16ToF32});
}

inline void MultiplyAddBytes(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int (&c)[4]) {
  emulation::MultiplyAdd(emulation::ByteMmaLane{a, {b0, b1}, c});
}

inline uint32_t SelectBytes(uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t all = static_cast<uint64_t>(high) << 32 | low;
  uint32_t bytes = 0;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i) & 0xfu;
    auto byte = static_cast<uint32_t>(all >> (selector & 7u) * 8 & 0xffu);
    if (selector >= 8) byte = byte >= 0x80 ? 0xffu : 0u;
    bytes |= byte << 8 * i;
  }
  return bytes;
}

inline void LoadMatrices(const void* row, uint32_t (&words)[4]) {
  emulation::LoadMatrices(row, words);
}

inline void Multiply(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&from)[4],
                     float (&c)[4]) {
  for (int i = 0; i < 4; ++i) c[i] = from[i];
  emulation::MultiplyAdd(emulation::MmaLane{a, {b0, b1}, c});
}

inline uint32_t PackHalves(float low, float high) {
  return F32ToF16(low) | static_cast<uint32_t>(F32ToF16(high)) << 16;
}

inline float FastExp2(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

inline uint32_t PackBf16(float low, float high) {
  return F32ToBF16(low) | static_cast<uint32_t>(F32ToBF16(high)) << 16;
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
