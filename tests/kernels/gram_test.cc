#include "kernels/cpu/gram.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "kernels/cpu/lower_triangle.h"

namespace innerq {
namespace {

std::vector<float> RandomInputs(int64_t count) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(count));
  for (float& value : x) value = normal(random);
  return x;
}

// [K][K] in double.
std::vector<double> PlainGram(const std::vector<float>& x, int64_t rows, int64_t cols) {
  std::vector<double> gram(static_cast<size_t>(cols * cols));
  for (int64_t m = 0; m < rows; ++m) {
    const float* row = x.data() + m * cols;
    for (int64_t i = 0; i < cols; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        gram[static_cast<size_t>(i * cols + j)] += static_cast<double>(row[i]) * row[j];
      }
    }
  }
  return gram;
}

TEST(Gram, AddsTheProductsOfAllColumnsWithEachOther) {
  // Beyond a block of rows and a panel of columns, and neither a multiple of it.
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {3, 32}, {700, 300}}) {
    const std::vector<float> x = RandomInputs(rows * cols);
    const std::vector<double> expected = PlainGram(x, rows, cols);
    for (const int threads : {1, 3}) {
      const auto elements = static_cast<size_t>(TriangleElements(cols));
      std::vector<double> gram(elements + 1, 0.5);
      ASSERT_TRUE(AddGram({x.data(), rows, cols, threads, gram.data()}).ok());
      const auto at = [k = cols](int64_t i, int64_t j) { return static_cast<size_t>(i * k + j); };
      size_t next = 0;
      for (int64_t i = 0; i < cols; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          // M roundings of at most the sum of the products' magnitudes (Cauchy-Schwarz).
          const double magnitude = std::sqrt(expected[at(i, i)] * expected[at(j, j)]);
          const double error =
              static_cast<double>(rows) * std::numeric_limits<float>::epsilon() * magnitude;
          ASSERT_NEAR(gram[next++], expected[at(i, j)] + 0.5, error) << i << ", " << j;
        }
      }
      ASSERT_EQ(next, elements);
      ASSERT_EQ(gram[next], 0.5) << "is not touched";
    }
  }
}

TEST(Gram, InputsThatAreNotFiniteShow) {
  constexpr int64_t kRows = 5, kCols = 40;
  std::vector<float> x = RandomInputs(kRows * kCols);
  x[2 * kCols + 7] = std::numeric_limits<float>::infinity();
  std::vector<double> gram(TriangleElements(kCols));
  ASSERT_TRUE(AddGram({x.data(), kRows, kCols, 1, gram.data()}).ok());
  EXPECT_FALSE(std::isfinite(gram[TriangleElements(7) + 7]));
  EXPECT_TRUE(std::isfinite(gram[TriangleElements(8) + 8]));
}

}  // namespace
}  // namespace innerq
