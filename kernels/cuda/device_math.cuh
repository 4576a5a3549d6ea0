// Small device functions that several kernels use.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace innerq::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kMostSharedBytes = 99 * 1024;  // that a block may have on sm_120; others have more

// F16 bits as F32, exact.
__device__ inline float HalfToFloat(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// The two halves of a word, the lower one first.
__device__ inline float2 HalvesToFloats(uint32_t word) {
  return {HalfToFloat(static_cast<uint16_t>(word & 0xffffu)),
          HalfToFloat(static_cast<uint16_t>(word >> 16))};
}

// Elements [4 * quad, 4 * quad + 4) of a row of F32, which lies at a multiple of 16 bytes if its
// width is a multiple of 4; beyond the width zeros.
__device__ inline float4 ReadQuad(const float* row, int64_t width, int64_t quad) {
  if (width % 4 == 0) return reinterpret_cast<const float4*>(row)[quad];
  const auto element = [&](int i) { return quad * 4 + i < width ? row[quad * 4 + i] : 0.0f; };
  return {element(0), element(1), element(2), element(3)};
}
__device__ inline void WriteQuad(float* row, int64_t width, int64_t quad, const float4& four) {
  if (width % 4 == 0) {
    reinterpret_cast<float4*>(row)[quad] = four;
    return;
  }
  const float elements[4] = {four.x, four.y, four.z, four.w};
  for (int i = 0; i < 4 && quad * 4 + i < width; ++i) row[quad * 4 + i] = elements[i];
}

// Reductions over a warp; every lane gets the result, in an order that the lane ids fix.
__device__ inline float WarpMax(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}
__device__ inline float WarpSum(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// The same over four neighbouring lanes, which share a row of a tensor-core fragment.
__device__ inline float RowMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float RowSum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace innerq::cuda
