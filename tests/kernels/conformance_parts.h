// What the conformance suite's checks are made of: inputs from a fixed seed, outputs that are
// guarded by known bytes, and comparisons that return what is wrong.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace innerq::conformance {

inline constexpr uint64_t kSeed = 20260223;
inline constexpr double kU = 0x1p-24;                                 // unit roundoff of F32
inline constexpr uint16_t kHalfInfinity = 0x7c00, kHalfNaN = 0x7e00;  // of F16

inline std::vector<float> Normal(std::mt19937_64& random, int64_t n, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = normal(random);
  return x;
}

inline ConstTensorView View(const std::vector<float>& x, Shape shape) {
  return {reinterpret_cast<const std::byte*>(x.data()), DType::kF32, shape};
}

// An output of F32, prefilled with NaN, with known bytes before and after it.
class Guarded {
 public:
  explicit Guarded(Shape shape, const std::vector<float>* initial = nullptr)
      : shape_(shape),
        bytes_(static_cast<size_t>(shape.num_elements()) * 4),
        memory_(bytes_ + 2 * kGuard, kGuardByte) {
    for (int64_t i = 0; i < shape.num_elements(); ++i) {
      data()[i] =
          initial ? (*initial)[static_cast<size_t>(i)] : std::numeric_limits<float>::quiet_NaN();
    }
  }
  float* data() { return reinterpret_cast<float*>(memory_.data() + kGuard); }
  TensorView view() { return {memory_.data() + kGuard, DType::kF32, shape_}; }
  bool intact() const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (memory_[i] != kGuardByte || memory_[kGuard + bytes_ + i] != kGuardByte) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr std::byte kGuardByte{0xa5};

  Shape shape_;
  size_t bytes_;
  std::vector<std::byte> memory_;
};

// Compares element by element; `bound(i)` is the largest difference allowed. NaN never passes.
inline std::string Compare(Guarded& expected, Guarded& actual, int64_t n, const std::string& what,
                           const std::function<double(int64_t)>& bound) {
  if (!actual.intact()) return what + ": wrote outside its output";
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double want = expected.data()[i], got = actual.data()[i];
    largest = std::max(largest, std::fabs(want));
    const bool near = std::fabs(want - got) <= bound(i);
    if (!near) {
      return what + "[" + std::to_string(i) + "]: expected " + std::to_string(want) + ", got " +
             std::to_string(got) + ", bound " + std::to_string(bound(i));
    }
  }
  if (n > 0 && largest < 1e-2) return what + ": the case is trivial, its largest output is tiny";
  return "";
}

// The bound of an element adds up the worst of every rounding. Errors of independent sign add as
// squares, so all outputs together must be far closer: a few `units` of relative rounding, and
// within F16's unit.
inline std::string CompareRms(Guarded& expected, Guarded& actual, int64_t n, double units,
                              const std::string& what) {
  const double limit = std::min(1.5e-4 + 2.25 * units, 0x1p-10);
  double squares = 0, errors = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double want = expected.data()[i], difference = want - actual.data()[i];
    squares += want * want;
    errors += difference * difference;
  }
  const double relative = std::sqrt(errors / squares);
  const bool near = relative <= limit;
  return near ? "" : what + ": relative RMS error " + std::to_string(relative);
}

// Returns from a check what is wrong, if anything is.
#define RETURN_IF_WRONG(expression)                                     \
  do {                                                                  \
    if (std::string wrong = (expression); !wrong.empty()) return wrong; \
  } while (false)

inline std::string Failed(Backend& backend, const std::string& what) {
  const Result<void> result = backend.Synchronize();
  return result.ok() ? "" : what + ": " + result.error().message;
}

}  // namespace innerq::conformance
