// oneDNN alone on one matrix product: the peer that dense kernels are measured against.
#pragma once

#include <cstdint>

namespace innerq {

// Median seconds of out [M, N] F32 = x [M, K] BF16 times a packed BF16 weight [N, K], in oneDNN's
// own choice of layouts (AMX where it finds it). Weights rotate through several written copies, so
// that they come from memory as a model's do.
double DnnlBf16Seconds(int64_t m, int64_t n, int64_t k, int threads);

}  // namespace innerq
