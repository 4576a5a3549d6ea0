// What kernels/cuda/ptx.cuh has, on the CPU; found before it.
#pragma once

#define INNERQ_BULK_COPIES 0  // as of sm_80

#include "kernels/float16.h"
#include "tests/cuda_emulation/emulation.h"

namespace innerq::cuda {

inline void MultiplyAdd(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
  emulation::MultiplyAdd({a, {b0, b1}, c});
}

inline void Multiply(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&from)[4],
                     float (&c)[4]) {
  for (int i = 0; i < 4; ++i) c[i] = from[i];
  emulation::MultiplyAdd({a, {b0, b1}, c});
}

inline uint32_t PackHalves(float low, float high) {
  return F32ToF16(low) | static_cast<uint32_t>(F32ToF16(high)) << 16;
}

inline float FastExp2(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

inline void CopyAsync(void* shared, const void* global) { emulation::CopyAsync(shared, global); }
inline void CommitCopies() { emulation::CommitCopies(); }
template <int kPending>
void WaitForCopies() {
  emulation::WaitForCopies(kPending);
}

}  // namespace innerq::cuda
