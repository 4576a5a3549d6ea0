// What benchmarks are measured against, in the same run: the memory's bandwidth, and oneDNN.
#pragma once

#include <cstdint>
#include <vector>

namespace innerq {

double Median(std::vector<double> values);
double Fastest(const std::vector<double>& values);

// Bytes per second of the plain loop that MeasureReadBandwidth times.
double ReadBandwidth(int threads);

// Median seconds of out [M, N] F32 = x [M, K] BF16 times a packed BF16 weight [N, K], in oneDNN's
// own choice of layouts (AMX where it finds it). Weights rotate through several written copies, so
// that they come from memory as a model's do.
double DnnlBf16Seconds(int64_t m, int64_t n, int64_t k, int threads);

}  // namespace innerq
