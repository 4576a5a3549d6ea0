// LowerTriangle: half of a symmetric matrix.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace innerq {

// Elements of the lower triangle of a square of `size` rows, its diagonal included; they lie row
// after row: row k has columns 0 to k and begins at element TriangleElements(k).
constexpr int64_t TriangleElements(int64_t size) { return size * (size + 1) / 2; }

// One that owns its elements.
template <typename T>
class LowerTriangle {
 public:
  explicit LowerTriangle(int64_t size) : values_(static_cast<size_t>(TriangleElements(size))) {}
  T* Row(int64_t k) { return values_.data() + TriangleElements(k); }
  const T* Row(int64_t k) const { return values_.data() + TriangleElements(k); }

 private:
  std::vector<T> values_;
};

}  // namespace innerq
