// Products with low-bit weights on a GPU, or an emulated one, bit for bit: sums of chunks are exact
// integers, so what they add up to follows from low_bit_layout.h and the order that
// low_bit_mma.cu states. M rows, N outputs, K inputs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "tests/kernels/cuda_test.h"
#include "tests/kernels/low_bit_case.h"

namespace innerq {
namespace {

constexpr int64_t kRecord = 256, kParts = 8, kMostChunk = 128;
constexpr int64_t kMostRows = 70, kMostCols = 16384 + 256;
constexpr int64_t kFirstOutputs = 19, kSecondOutputs = 39, kManyOutputs = 6961;

// Two matrices stacked, so that the second does not begin with a tile, a bias, and rows of inputs.
class Product {
 public:
  Product(std::mt19937_64& random, const LowBitSpec& spec, int64_t cols, float clip = 0,
          int64_t second_outputs = kSecondOutputs)
      : first_(random, spec, kFirstOutputs, cols, clip),
        second_(random, spec, second_outputs, cols, clip) {
    std::normal_distribution<float> normal;
    x.resize(static_cast<size_t>(kMostRows * cols));
    for (float& value : x) value = normal(random);
    std::fill(x.begin() + cols, x.begin() + 2 * cols, 0.0f);                    // row 1
    x[static_cast<size_t>(2 * cols + 5)] = std::nanf("");                       // row 2
    x[static_cast<size_t>(4 * cols)] = std::numeric_limits<float>::infinity();  // row 4
    for (int64_t n = 0; n < rows(); ++n) bias.push_back(normal(random));
  }

  const LowBitSpec& spec() const { return first_.matrix.spec; }
  int64_t cols() const { return first_.matrix.cols; }
  int64_t rows() const { return first_.matrix.rows + second_.matrix.rows; }

  Result<Weight> Pack(Backend& backend) const {
    const std::vector<LowBitMatrix> parts = {first_.matrix, second_.matrix};
    std::vector<ConstTensorView> biases;
    const float* from = bias.data();
    for (const LowBitMatrix& part : parts) {
      biases.push_back({reinterpret_cast<const std::byte*>(from), DType::kF32, Shape{part.rows}});
      from += part.rows;
    }
    return backend.PackLowBitWeight(parts, biases);
  }

  // Element [m][n] added to `before`.
  float Element(int64_t m, int64_t n, float before) const {
    const bool in_first = n < first_.matrix.rows;
    const LowBitMatrix& matrix = in_first ? first_.matrix : second_.matrix;
    const int64_t row = in_first ? n : n - first_.matrix.rows;
    const int64_t chunk = spec().group_size == 0 ? kMostChunk : spec().group_size;
    const int64_t part = (cols() + kRecord - 1) / kRecord;
    const int64_t part_cols = (part + kParts - 1) / kParts * kRecord;
    const float* inputs = x.data() + m * cols();
    const InputRounding rounding =
        InputRounding::Of(spec(), matrix.input_clip, LargestInput(inputs, cols()));
    float total = 0;
    for (int64_t begin = 0; begin < cols(); begin += part_cols) {
      float sum = 0;
      for (int64_t k = begin; k < std::min(begin + part_cols, cols()); k += chunk) {
        int dot = 0;
        for (int64_t i = k; i < std::min(k + chunk, cols()); ++i) {
          dot += matrix.Level(row, i) * rounding.Integer(spec(), inputs[i]);
        }
        sum = std::fmaf(matrix.Clip(row, k), static_cast<float>(dot), sum);
      }
      total += sum;
    }
    const float value = total * (rounding.down / static_cast<float>(spec().max_level()));
    return before + (value + bias[static_cast<size_t>(n)]);
  }

  std::vector<float> x, bias;

 private:
  LowBitCase first_, second_;
};

class LowBitOnCuda : public CudaTest {
 protected:
  LowBitOnCuda() : CudaTest({.max_rows = kMostRows, .max_features = kMostCols}) {}

  // Products of so many rows, added to ones. Of many outputs the first and last are checked.
  void Check(const Product& product, const std::vector<int64_t>& row_counts) {
    const Result<Weight> weight = product.Pack(*mirror_);
    ASSERT_TRUE(weight.ok()) << weight.error().message;
    const int64_t n = product.rows();
    const auto is_checked = [n](int64_t i) { return i % n < 150 || i % n >= n - 20; };
    std::vector<float> expected(static_cast<size_t>(row_counts.back() * n));
    for (int64_t i = 0; i < row_counts.back() * n; ++i) {
      if (is_checked(i)) expected[static_cast<size_t>(i)] = product.Element(i / n, i % n, 1.0f);
    }
    for (const int64_t m : row_counts) {
      std::vector<float> out(static_cast<size_t>(m * n), 1.0f);
      mirror_->MatMul(
          {.x = {reinterpret_cast<const std::byte*>(product.x.data()), DType::kF32,
                 Shape{m, product.cols()}},
           .weight = &*weight,
           .accumulate = true,
           .out = {reinterpret_cast<std::byte*>(out.data()), DType::kF32, Shape{m, n}}});
      ASSERT_TRUE(mirror_->Synchronize().ok());
      for (size_t i = 0; i < out.size(); ++i) {
        if (!is_checked(static_cast<int64_t>(i))) continue;
        const bool both_nan = std::isnan(out[i]) && std::isnan(expected[i]);
        ASSERT_TRUE(both_nan || out[i] == expected[i])
            << LowBitSchemeName(product.spec().scheme) << ' ' << product.spec().bits << ", group "
            << product.spec().group_size << ", inputs of " << product.spec().activation_bits
            << " bits, K " << product.cols() << ", M " << m << ": element " << i << " is " << out[i]
            << ", not " << expected[i];
      }
    }
  }
};

// Up to the kernel for many rows, of which an emulated device takes one block to be many, and a GPU
// some hundred.
TEST_P(LowBitOnCuda, GivesTheBitsOfExactSumsForEveryNumberOfRows) {
  const bool emulated = mirror_->name() == "cuda/sm_emulated";
  std::mt19937_64 random(20261127);
  for (const LowBitSpec& spec : LowBitSpecs({64}, {8, 16})) {
    Check(Product(random, spec, 576, 0, emulated ? 131 : kManyOutputs), {1, 8, 9, 17, kMostRows});
  }
}

// 2304 and 2336 inputs are 9 and 10 records, two for each of some parts; 352 have two in all. More
// than 16384 are rounded in more than one go.
TEST_P(LowBitOnCuda, TakesGroupsInputsAndLengthsOfAllSizes) {
  std::mt19937_64 random(20261128);
  for (const LowBitSpec& spec : LowBitSpecs({0, 32}, {16})) {
    for (const int64_t cols : {32, 352}) Check(Product(random, spec, cols), {5});
    Check(Product(random, spec, 2336), {5, kMostRows});
  }
  for (const LowBitSpec& spec : LowBitSpecs({64, 128}, {16})) {
    Check(Product(random, spec, 2304), {5});
  }
  for (const LowBitSpec& spec : LowBitSpecs({32}, {3, 4, 8})) {
    for (const float clip : {0.0f, 1.5f}) Check(Product(random, spec, 352, clip), {5});
  }
  Check(Product(random, {}, kMostCols), {5});
}

// More codes than are packed at once.
TEST_P(LowBitOnCuda, PacksMatricesInSlices) {
  std::mt19937_64 random(20261129);
  const LowBitSpec spec{.scheme = LowBitScheme::kUniform, .bits = 8};
  Check(Product(random, spec, 256, 0, kManyOutputs), {1});
}

INSTANTIATE_TEST_SUITE_P(Cuda, LowBitOnCuda, ::testing::Bool(), [](const auto& chosen) {
  return chosen.param ? "deterministic" : "not_deterministic";
});

}  // namespace
}  // namespace innerq
