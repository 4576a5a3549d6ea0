// Histogram: counts of observations up to each of some bounds, and their sum.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace innerq {

// Not thread-safe; a plain value.
class Histogram {
 public:
  // `bounds` ascend; each belongs to the bucket that it ends.
  explicit Histogram(std::vector<double> bounds)
      : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}

  // Counts a finite value, so many times.
  void Observe(double value, int64_t times = 1) {
    const auto bound = std::lower_bound(bounds_.begin(), bounds_.end(), value);
    counts_[static_cast<size_t>(bound - bounds_.begin())] += times;
    sum_ += value * static_cast<double>(times);
  }

  const std::vector<double>& bounds() const { return bounds_; }
  // Per bound, not cumulative; one more for what lies beyond the last.
  const std::vector<int64_t>& counts() const { return counts_; }
  double sum() const { return sum_; }

 private:
  std::vector<double> bounds_;
  std::vector<int64_t> counts_;
  double sum_ = 0;
};

// Bounds for times of whole requests or their phases, in seconds, and for numbers of tokens of
// requests and of steps: vLLM's, so that dashboards made for it can compare.
inline Histogram RequestSeconds() {
  return Histogram({0.3,  0.5,  0.8,  1.0,  1.5,   2.0,   2.5,   5.0,   10.0,   15.0,  20.0,
                    30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0});
}
inline Histogram RequestTokens() {
  return Histogram(
      {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000});
}
inline Histogram StepTokens() {
  return Histogram({1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384});
}

}  // namespace innerq
