// How the sums of a product become its output: units, bias, residual. `Launch`: MatMulLaunch, or
// what has its m, n, bias, accumulate and out.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace innerq::cuda {

// What 1 is worth in the sums of a row; 1 beyond the output.
__device__ inline float UnitOf(const MatMulLaunch& args, int64_t row) {
  return args.units != nullptr && row < args.m ? args.units[row] : 1.0f;
}

// Finishes an element; nothing beyond the output.
template <typename Launch>
__device__ inline void Store(const Launch& args, int64_t row, int64_t col, float sum) {
  if (row >= args.m || col >= args.n) return;
  if (args.bias != nullptr) sum += args.bias[col];
  float& out = args.out[row * args.n + col];
  out = args.accumulate ? out + sum : sum;
}

// The same of columns col and col + 1; col is even.
template <typename Launch>
__device__ inline void StoreTwo(const Launch& args, int64_t row, int64_t col, float first,
                                float second) {
  if (args.n % 2 != 0) {
    Store(args, row, col, first);
    Store(args, row, col + 1, second);
    return;
  }
  if (row >= args.m || col >= args.n) return;
  if (args.bias != nullptr) {
    first += args.bias[col];
    second += args.bias[col + 1];
  }
  auto* out = reinterpret_cast<float2*>(args.out + row * args.n + col);
  if (args.accumulate) {
    const float2 before = *out;
    first = before.x + first;
    second = before.y + second;
  }
  *out = {first, second};
}

}  // namespace innerq::cuda
