// Low-bit weights: codes and levels, and products of every CPU variant against the reference.
// M rows, N outputs, K inputs.
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
#include "tests/kernels/low_bit_case.h"

namespace innerq {
namespace {

constexpr uint64_t kLowBitSeed = 20261127;
constexpr int64_t kLowBitMaxRows = 300;
constexpr int64_t kLowBitMaxCols = 2304;
#if defined(INNERQ_SANITIZED)  // ten times as slow
const std::vector<int64_t> kLowBitGroups = {0, 32};
const std::vector<int> kLowBitActivations = {16};
#else
const std::vector<int64_t> kLowBitGroups = {0, 32, 128};
const std::vector<int> kLowBitActivations = {4, 8, 16};
#endif

std::vector<float> LowBitInputsOf(std::mt19937_64& random, int64_t count) {
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> x(static_cast<size_t>(count));
  for (float& v : x) v = normal(random);
  return x;
}

std::unique_ptr<Backend> LowBitBackend(const std::string& variant, int threads = 2) {
  BackendOptions options;
  if (variant == "reference") {
    options.device = variant;
  } else {
    options.variant = variant;
  }
  options.threads = threads;
  std::unique_ptr<Backend> backend = CreateBackend(options).value();
  CHECK(backend->Reserve({.max_rows = kLowBitMaxRows, .max_features = kLowBitMaxCols}).ok(),
        "Reserve");
  return backend;
}

// x [m, K] times the weight; added to `out` if that is not empty.
std::vector<float> LowBitProduct(Backend& backend, const float* x, int64_t m, const Weight& weight,
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

std::string LowBitName(const LowBitSpec& spec) {
  return std::string(LowBitSchemeName(spec.scheme)) + std::to_string(spec.bits) + " group " +
         std::to_string(spec.group_size) + " activations " + std::to_string(spec.activation_bits);
}

TEST(LowBitWeight, LevelsAreThoseOfTheScheme) {
  const auto levels = [](LowBitScheme scheme, int bits) {
    std::vector<int> all;
    for (int code = 0; code < 1 << bits; ++code) {
      all.push_back(LowBitSpec{.scheme = scheme, .bits = bits}.Level(code));
    }
    return all;
  };
  using Levels = std::vector<int>;
  EXPECT_EQ(levels(LowBitScheme::kPow2, 2), (Levels{0, 1, 0, -1}));
  EXPECT_EQ(levels(LowBitScheme::kPow2, 3), (Levels{0, 1, 2, 4, 0, -1, -2, -4}));
  EXPECT_EQ(levels(LowBitScheme::kPow2, 4),
            (Levels{0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64}));
  EXPECT_EQ(levels(LowBitScheme::kApot, 4),
            (Levels{0, 1, 2, 3, 4, 5, 6, 8, 0, -1, -2, -3, -4, -5, -6, -8}));
  EXPECT_EQ(levels(LowBitScheme::kUniform, 2), (Levels{-1, 0, 1, 1}));
  EXPECT_EQ(levels(LowBitScheme::kUniform, 3), (Levels{-3, -2, -1, 0, 1, 2, 3, 3}));
  const Levels bytes = levels(LowBitScheme::kUniform, 8);
  EXPECT_EQ(bytes.front(), -127);
  EXPECT_EQ(bytes[254], 127);
  EXPECT_EQ(bytes[255], 127);
}

TEST(LowBitWeight, TheNearestCodeIsNearest) {
  for (const LowBitSpec& spec : LowBitSpecs({64}, {16})) {
    const int most = spec.max_level();
    for (int i = -3000; i <= 3000; ++i) {
      const float u = static_cast<float>(i) / 2500.0f;
      const int code = NearestLowBitCode(spec, u);
      ASSERT_TRUE(code >= 0 && code < 1 << spec.bits);
      const auto distance = [&](int c) {
        return std::fabs(u - static_cast<float>(spec.Level(c)) / static_cast<float>(most));
      };
      for (int other = 0; other < 1 << spec.bits; ++other) {
        ASSERT_LE(distance(code), distance(other) + 1e-6f) << LowBitName(spec) << " u " << u;
      }
    }
  }
}

TEST(LowBitWeight, BitsOfASchemeAreTold) {
  for (const LowBitScheme scheme :
       {LowBitScheme::kPow2, LowBitScheme::kApot, LowBitScheme::kUniform}) {
    const std::string words = LowBitSchemeBits(scheme);
    for (int bits = 0; bits <= 9; ++bits) {
      EXPECT_EQ(words.find(std::to_string(bits)) != words.npos, HasLowBitCodes(scheme, bits))
          << LowBitSchemeName(scheme) << " " << bits;
    }
  }
}

TEST(LowBitWeight, StringsHoldTheirCodes) {
  for (const int bits : {2, 3, 4, 8}) {
    std::vector<uint8_t> codes(static_cast<size_t>(64 * bits / 8), 0);
    const auto code = [bits](int64_t i) {
      return static_cast<int>(i * 2654435761u >> 7) & ((1 << bits) - 1);
    };
    for (int64_t i = 0; i < 64; ++i) WriteLowBitCode(codes.data(), bits, i, code(i));
    for (int64_t i = 0; i < 64; ++i) EXPECT_EQ(ReadLowBitCode(codes.data(), bits, i), code(i));
  }
}

TEST(LowBitWeight, TheReferenceMultipliesDecodedWeights) {
  std::mt19937_64 random(kLowBitSeed);
  const auto backend = LowBitBackend("reference");
  const int64_t m = 3, n = 20, k = 128;
  for (const LowBitSpec& spec : LowBitSpecs({0, 32}, {3, 8, 16})) {
    for (const float clip : {0.0f, 1.5f}) {
      const LowBitCase c(random, spec, n, k, clip);
      const Weight weight = backend->PackLowBitWeight({&c.matrix, 1}, {}).value();
      const std::vector<float> x = LowBitInputsOf(random, m * k);
      const std::vector<float> out = LowBitProduct(*backend, x.data(), m, weight);
      for (int64_t i = 0; i < m * n; ++i) {
        const float* row = x.data() + i / n * k;
        float largest = clip;
        for (int64_t j = 0; j < k && clip == 0; ++j) largest = std::max(largest, std::fabs(row[j]));
        double sum = 0, magnitude = 0, weights = 0;
        for (int64_t j = 0; j < k; ++j) {
          const double a = std::clamp(row[j], -largest, largest), w = c.matrix.Value(i % n, j);
          sum += a * w;
          magnitude += std::fabs(a * w);
          weights += std::fabs(w);
        }
        // Half a unit of each input; F32 roundings beside.
        const double unit = largest / spec.max_activation();
        ASSERT_NEAR(out[static_cast<size_t>(i)], sum, unit / 2 * weights + 1e-5 * magnitude);
      }
    }
  }
}

class LowBitOfVariant : public ::testing::TestWithParam<std::string> {};

// Rows within the rounding of a chain of chunks: two for each and some for the ends.
TEST_P(LowBitOfVariant, IsWithinRoundingOfTheReference) {
  std::mt19937_64 random(kLowBitSeed);
  const auto reference = LowBitBackend("reference");
  const auto backend = LowBitBackend(GetParam());
  struct Case {
    int64_t m, n, k;
  };
  for (const LowBitSpec& spec : LowBitSpecs(kLowBitGroups, kLowBitActivations)) {
    for (const Case& size : {Case{1, 1, 128}, {3, 33, 256}, {9, 31, 1152}, {18, 64, 384}}) {
      const float clip = random() % 2 == 0 ? 0.0f : 2.0f;
      const LowBitCase a(random, spec, size.n, size.k, clip), b(random, spec, 5, size.k, clip);
      const LowBitMatrix parts[] = {a.matrix, b.matrix};
      const int64_t n = size.n + 5;
      const std::vector<float> bias = LowBitInputsOf(random, n);
      const ConstTensorView biases[] = {
          {reinterpret_cast<const std::byte*>(bias.data()), DType::kF32, Shape{size.n}},
          {reinterpret_cast<const std::byte*>(bias.data() + size.n), DType::kF32, Shape{5}}};
      const Weight exact = reference->PackLowBitWeight(parts, biases).value();
      const Weight packed = backend->PackLowBitWeight(parts, biases).value();
      const std::vector<float> x = LowBitInputsOf(random, size.m * size.k);
      const std::vector<float> residual = LowBitInputsOf(random, size.m * n);
      const auto want = LowBitProduct(*reference, x.data(), size.m, exact, residual);
      const auto got = LowBitProduct(*backend, x.data(), size.m, packed, residual);
      double largest = 0;
      for (int64_t i = 0; i < size.m * n; ++i) {
        const int64_t col = i % n;
        const LowBitMatrix& part = col < size.n ? a.matrix : b.matrix;
        double magnitude =
            std::fabs(bias[static_cast<size_t>(col)]) + std::fabs(residual[static_cast<size_t>(i)]);
        for (int64_t k = 0; k < size.k; ++k) {
          magnitude += std::fabs(part.Value(col < size.n ? col : col - size.n, k) *
                                 x[static_cast<size_t>(i / n * size.k + k)]);
        }
        const double chunks = static_cast<double>(size.k) / 32;
        const auto at = static_cast<size_t>(i);
        largest = std::max(largest, std::fabs(static_cast<double>(want[at])));
        const bool near = std::fabs(got[at] - want[at]) <= (2 * chunks + 8) * 0x1p-24 * magnitude;
        ASSERT_TRUE(near) << LowBitName(spec) << " M " << size.m << " K " << size.k << ", output "
                          << i << ": expected " << want[at] << ", got " << got[at];
      }
      EXPECT_GT(largest, 0.5) << "the case is trivial: its outputs are tiny";
    }
  }
}

TEST_P(LowBitOfVariant, GivesTheBitsOfTheScalarVariantForEveryNumberOfRowsAndThreads) {
  std::mt19937_64 random(kLowBitSeed);
  const auto scalar = LowBitBackend("scalar");
  const auto one_thread = LowBitBackend(GetParam(), 1);
  const auto two_threads = LowBitBackend(GetParam(), 2);
  const int64_t m = 280, n = 36, k = kLowBitMaxCols;  // more rows than a task, than a slice inputs
  for (const LowBitSpec& spec : LowBitSpecs({64}, kLowBitActivations)) {
    const LowBitCase c(random, spec, n, k);
    const std::vector<float> x = LowBitInputsOf(random, m * k);
    const Weight weight = two_threads->PackLowBitWeight({&c.matrix, 1}, {}).value();
    const std::vector<float> all = LowBitProduct(*two_threads, x.data(), m, weight);
    EXPECT_EQ(all, LowBitProduct(*one_thread, x.data(), m, weight)) << LowBitName(spec);
    for (const int64_t rows : {1, 2, 3, 5, 7, 8, 9, 31}) {
      const int64_t first = m - rows;
      const auto some = LowBitProduct(*two_threads, x.data() + first * k, rows, weight);
      ASSERT_EQ(std::memcmp(some.data(), all.data() + first * n,
                            static_cast<size_t>(rows * n) * sizeof(float)),
                0)
          << LowBitName(spec) << " rows " << rows;
    }
    const Weight plain = scalar->PackLowBitWeight({&c.matrix, 1}, {}).value();
    const auto few = LowBitProduct(*scalar, x.data(), 2, plain);
    EXPECT_EQ(std::memcmp(few.data(), all.data(), few.size() * sizeof(float)), 0)
        << LowBitName(spec);
  }
}

TEST_P(LowBitOfVariant, KeepsANonFiniteRowToItself) {
  std::mt19937_64 random(kLowBitSeed);
  const auto backend = LowBitBackend(GetParam());
  const int64_t m = 12, n = 40, k = 96;
  for (const float clip : {0.0f, 1.0f}) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      const LowBitCase c(random, {LowBitScheme::kPow2, 3, 32, 16}, n, k, clip);
      const Weight weight = backend->PackLowBitWeight({&c.matrix, 1}, {}).value();
      std::vector<float> x = LowBitInputsOf(random, m * k);
      const std::vector<float> clean = LowBitProduct(*backend, x.data(), m, weight);
      x[static_cast<size_t>(7 * k + 3)] = bad;
      const std::vector<float> out = LowBitProduct(*backend, x.data(), m, weight);
      for (int64_t i = 0; i < m * n; ++i) {
        const auto at = static_cast<size_t>(i);
        if (i / n == 7) {
          EXPECT_TRUE(std::isnan(out[at]));
        } else {
          EXPECT_EQ(out[at], clean[at]);
        }
      }
    }
  }
}

TEST_P(LowBitOfVariant, ARowOfZerosGivesTheBias) {
  std::mt19937_64 random(kLowBitSeed);
  const auto backend = LowBitBackend(GetParam());
  const LowBitCase c(random, {LowBitScheme::kUniform, 4, 0, 8}, 33, 32);
  const std::vector<float> bias = LowBitInputsOf(random, 33);
  const ConstTensorView view{reinterpret_cast<const std::byte*>(bias.data()), DType::kF32,
                             Shape{33}};
  const Weight weight = backend->PackLowBitWeight({&c.matrix, 1}, {&view, 1}).value();
  for (const float tiny : {0.0f, 1e-38f}) {
    const std::vector<float> x(32, tiny);
    EXPECT_EQ(LowBitProduct(*backend, x.data(), 1, weight), bias);
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, LowBitOfVariant, ::testing::ValuesIn(CpuVariants()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace innerq
