// MatMul of every CPU variant and weight format against double sums, and its independence of the
// number of rows and threads. M rows, N outputs, K inputs.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/float16.h"

namespace innerq {
namespace {

constexpr uint64_t kMatMulSeed = 20260722;
constexpr double kU = 0x1p-24;  // unit roundoff of F32
constexpr int64_t kMaxRows = 600;
constexpr int64_t kMaxInputs = 2100;
constexpr WeightFormat kFormats[] = {WeightFormat::kBF16, WeightFormat::kF16, WeightFormat::kF32};

// Normal, but no closer to zero than a half: a single product is not tiny.
std::vector<float> Normal(std::mt19937_64& random, int64_t n) {
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) {
    v = normal(random);
    v += std::copysign(0.5f, v);
  }
  return x;
}

ConstTensorView View(const std::vector<float>& x, Shape shape) {
  return {reinterpret_cast<const std::byte*>(x.data()), DType::kF32, shape};
}

std::unique_ptr<Backend> MakeBackend(const std::string& variant, int threads,
                                     bool deterministic = true) {
  BackendOptions options;
  options.variant = variant;
  options.threads = threads;
  options.deterministic = deterministic;
  std::unique_ptr<Backend> backend = CreateBackend(options).value();
  CHECK(backend->Reserve({.max_rows = kMaxRows, .max_features = kMaxInputs}).ok(), "Reserve");
  return backend;
}

Weight Pack(Backend& backend, const std::vector<float>& w, int64_t n, int64_t k,
            WeightFormat format, const std::vector<float>& bias = {}) {
  const ConstTensorView part = View(w, Shape{n, k});
  std::vector<ConstTensorView> biases;
  if (!bias.empty()) biases.push_back(View(bias, Shape{n}));
  return backend.PackWeight({&part, 1}, biases, format).value();
}

// x [m, weight.cols] times the weight; `out` [m, weight.rows] is added to if `accumulate`.
std::vector<float> Multiply(Backend& backend, const float* x, int64_t m, const Weight& weight,
                            std::vector<float> out = {}) {
  const bool accumulate = !out.empty();
  out.resize(static_cast<size_t>(m * weight.rows), std::numeric_limits<float>::quiet_NaN());
  backend.MatMul(
      {.x = {reinterpret_cast<const std::byte*>(x), DType::kF32, Shape{m, weight.cols}},
       .weight = &weight,
       .accumulate = accumulate,
       .out = {reinterpret_cast<std::byte*>(out.data()), DType::kF32, Shape{m, weight.rows}}});
  EXPECT_TRUE(backend.Synchronize().ok());
  return out;
}

// Values as the format multiplies them, in double.
std::vector<double> Rounded(WeightFormat format, bool is_weight, const std::vector<float>& x) {
  std::vector<double> rounded;
  for (const float v : x) {
    if (format == WeightFormat::kBF16) {
      rounded.push_back(BF16ToF32(F32ToBF16(v)));
    } else {
      rounded.push_back(format == WeightFormat::kF16 && is_weight ? F16ToF32(F32ToF16(v)) : v);
    }
  }
  return rounded;
}

// Double sums of x [m, k] times w [n, k], and the sums of the terms' magnitudes: both [m, n].
struct Expected {
  Expected(WeightFormat format, const std::vector<float>& x, const std::vector<float>& w,
           int64_t num_inputs)
      : k(num_inputs), n(static_cast<int64_t>(w.size()) / num_inputs) {
    const std::vector<double> a = Rounded(format, false, x), b = Rounded(format, true, w);
    for (size_t row = 0; row < a.size(); row += static_cast<size_t>(k)) {
      for (size_t col = 0; col < b.size(); col += static_cast<size_t>(k)) {
        double sum = 0, magnitude = 0;
        for (size_t i = 0; i < static_cast<size_t>(k); ++i) {
          sum += a[row + i] * b[col + i];
          magnitude += std::fabs(a[row + i] * b[col + i]);
        }
        sums.push_back(sum);
        magnitudes.push_back(magnitude);
      }
    }
  }
  int64_t k, n;
  std::vector<double> sums, magnitudes;
};

// What is wrong with the rows of `out`, or nothing; bias [n] and residual may be empty. K
// multiply-adds of two roundings each, one addition for the bias and one for the residual:
// |error| <= 2 (K + 2) u sum |terms|.
std::string Wrong(const Expected& expected, const std::vector<float>& out,
                  const std::vector<float>& bias = {}, const std::vector<float>& residual = {}) {
  double largest = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    double sum = expected.sums[i], magnitude = expected.magnitudes[i];
    const double b = bias.empty() ? 0 : bias[i % static_cast<size_t>(expected.n)];
    const double r = residual.empty() ? 0 : residual[i];
    sum += b + r;
    magnitude += std::fabs(b) + std::fabs(r);
    largest = std::max(largest, std::fabs(sum));
    const double bound = 2 * static_cast<double>(expected.k + 2) * kU * magnitude;
    const bool near = std::fabs(out[i] - sum) <= bound;
    if (!near) {
      return "N " + std::to_string(expected.n) + " K " + std::to_string(expected.k) + ", output " +
             std::to_string(i) + " of " + std::to_string(out.size()) + ": expected " +
             std::to_string(sum) + ", got " + std::to_string(out[i]);
    }
  }
  // A few outputs may all be small because their terms cancel.
  return largest > 0.1 || out.size() < 16 ? "" : "the case is trivial: its outputs are tiny";
}

class MatMulOfVariant : public ::testing::TestWithParam<std::string> {};

// Products of several sizes, plain and with bias and residual, on one backend.
void CheckSizes(Backend& backend, const std::vector<int64_t>& ms, const std::vector<int64_t>& ns,
                const std::vector<int64_t>& ks) {
  std::mt19937_64 random(kMatMulSeed);
  for (const WeightFormat format : kFormats) {
    for (const int64_t n : ns) {
      for (const int64_t k : ks) {
        const std::vector<float> w = Normal(random, n * k), bias = Normal(random, n);
        const std::vector<float> x = Normal(random, ms.back() * k);
        const Expected expected(format, x, w, k);
        const Weight plain = Pack(backend, w, n, k, format);
        const Weight biased = Pack(backend, w, n, k, format, bias);
        for (const int64_t m : ms) {
          ASSERT_EQ(Wrong(expected, Multiply(backend, x.data(), m, plain)), "");
          const std::vector<float> residual = Normal(random, m * n);
          ASSERT_EQ(
              Wrong(expected, Multiply(backend, x.data(), m, biased, residual), bias, residual),
              "");
        }
      }
    }
  }
}

TEST_P(MatMulOfVariant, IsWithinRoundingOfDoubleSumsAtEveryEdgeOfItsBlocks) {
  const auto backend = MakeBackend(GetParam(), 1);
  CheckSizes(*backend, {1, 2, 15, 16, 17, 31, 32, 33, 100}, {1, 15, 16, 17, 31, 33, 100},
             {1, 2, 7, 8, 32, 40, 64, 96, 1000});
}

// More than one task of rows, and more than one cache block of inputs.
TEST_P(MatMulOfVariant, IsWithinRoundingOfDoubleSumsAcrossCacheBlocksAndTasks) {
  const auto backend = MakeBackend(GetParam(), 2);
  CheckSizes(*backend, {33, 130, 290}, {70}, {260, 2100});
}

TEST_P(MatMulOfVariant, GivesARowTheSameBitsForEveryNumberOfRowsAndThreads) {
  std::mt19937_64 random(kMatMulSeed);
  const auto one_thread = MakeBackend(GetParam(), 1);
  const auto two_threads = MakeBackend(GetParam(), 2);
  const int64_t m = 512, n = 80;
  for (const WeightFormat format : kFormats) {
    for (const int64_t k : {100, 2080}) {  // the larger is more than one span of inputs
      const std::vector<float> x = Normal(random, m * k), w = Normal(random, n * k);
      const std::vector<float> bias = Normal(random, n);
      const Weight weight = Pack(*two_threads, w, n, k, format, bias);
      const std::vector<float> all = Multiply(*two_threads, x.data(), m, weight);
      EXPECT_EQ(all, Multiply(*one_thread, x.data(), m, weight));
      for (const int64_t rows : {1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 100, 300}) {
        const int64_t first = m - rows;
        const std::vector<float> some = Multiply(*two_threads, x.data() + first * k, rows, weight);
        EXPECT_EQ(std::memcmp(some.data(), all.data() + first * n,
                              static_cast<size_t>(rows * n) * sizeof(float)),
                  0)
            << WeightFormatName(format) << " K " << k << " rows " << rows;
      }
    }
  }
}

TEST_P(MatMulOfVariant, KeepsANonFiniteRowToItself) {
  std::mt19937_64 random(kMatMulSeed);
  const auto backend = MakeBackend(GetParam(), 2);
  const int64_t m = 33, n = 40, k = 72;
  for (const WeightFormat format : kFormats) {
    std::vector<float> x = Normal(random, m * k);
    const Weight weight = Pack(*backend, Normal(random, n * k), n, k, format);
    const std::vector<float> clean = Multiply(*backend, x.data(), m, weight);
    x[static_cast<size_t>(20 * k + 3)] = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> out = Multiply(*backend, x.data(), m, weight);
    for (int64_t i = 0; i < m * n; ++i) {
      const size_t at = static_cast<size_t>(i);
      if (i / n == 20) {
        EXPECT_TRUE(std::isnan(out[at]));
      } else {
        EXPECT_EQ(out[at], clean[at]);
      }
    }
  }
}

TEST_P(MatMulOfVariant, StacksPartsOfAnyTypeAndTheirBiases) {
  std::mt19937_64 random(kMatMulSeed);
  const auto backend = MakeBackend(GetParam(), 2);
  const int64_t m = 5, k = 48, rows[3] = {20, 7, 30}, n = 57;
  std::vector<float> w = Normal(random, n * k), bias = Normal(random, n);
  w[0] = 0x1p-24f;  // the smallest subnormal F16
  for (float& v : w) v = BF16ToF32(F32ToBF16(v));
  std::vector<uint16_t> halves, bfloats;
  for (int64_t i = 0; i < rows[0] * k; ++i) {  // exact in F16 and in BF16: multiples of 2^-9
    float& v = w[static_cast<size_t>(i)];
    if (i > 0) v = BF16ToF32(F32ToBF16(std::round(v * 64.0f) / 64.0f));
    halves.push_back(F32ToF16(v));
  }
  for (int64_t i = 0; i < rows[1] * k; ++i) {
    bfloats.push_back(F32ToBF16(w[static_cast<size_t>(rows[0] * k + i)]));
  }
  const std::vector<ConstTensorView> parts = {
      {reinterpret_cast<const std::byte*>(halves.data()), DType::kF16, Shape{rows[0], k}},
      {reinterpret_cast<const std::byte*>(bfloats.data()), DType::kBF16, Shape{rows[1], k}},
      {reinterpret_cast<const std::byte*>(w.data() + (rows[0] + rows[1]) * k), DType::kF32,
       Shape{rows[2], k}}};
  std::vector<ConstTensorView> biases;
  int64_t first = 0;
  for (const int64_t count : rows) {
    biases.push_back(
        {reinterpret_cast<const std::byte*>(bias.data() + first), DType::kF32, Shape{count}});
    first += count;
  }
  for (const WeightFormat format : kFormats) {
    const Weight weight = backend->PackWeight(parts, biases, format).value();
    EXPECT_EQ(weight.rows, n);
    EXPECT_EQ(weight.cols, k);
    const std::vector<float> x = Normal(random, m * k);
    EXPECT_EQ(Wrong(Expected(format, x, w, k), Multiply(*backend, x.data(), m, weight), bias), "");
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, MatMulOfVariant, ::testing::ValuesIn(CpuVariants()),
                         [](const auto& param) { return param.param; });

TEST(MatMul, OfANondeterministicBackendIsWithinRoundingOfDoubleSums) {
  const auto backend = MakeBackend("auto", 1, false);
  EXPECT_FALSE(backend->deterministic());
  CheckSizes(*backend, {1, 17, 100}, {1, 33, 100}, {8, 40, 1000});
}

TEST(MatMul, OfANondeterministicBackendRepeatsItselfAfterManySizes) {
  const auto backend = MakeBackend("auto", 1, false);
  std::mt19937_64 random(kMatMulSeed);
  const int64_t n = 40, k = 64, most = 70;  // more sizes than oneDNN's plans that are kept
  const std::vector<float> x = Normal(random, most * k);
  const Weight weight = Pack(*backend, Normal(random, n * k), n, k, WeightFormat::kF32);
  const std::vector<float> first = Multiply(*backend, x.data(), 3, weight);
  for (int64_t m = 1; m <= most; ++m) Multiply(*backend, x.data(), m, weight);
  EXPECT_EQ(Multiply(*backend, x.data(), 3, weight), first);
}

TEST(MatMul, OfAForcedLesserVariantStaysOursWithoutDeterminism) {
  if (CpuVariants().size() < 2) GTEST_SKIP() << "this machine has one variant";
  const auto backend = MakeBackend("scalar", 1, false);
  EXPECT_EQ(backend->name(), "cpu/scalar");
  EXPECT_TRUE(backend->deterministic());
}

}  // namespace
}  // namespace innerq
