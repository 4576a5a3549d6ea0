// The conformance suite on every CPU variant, on CUDA, and on the reference itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "tests/kernels/conformance_parts.h"
#include "tests/kernels/conformance_suite.h"
#include "tests/kernels/cuda_test.h"

namespace innerq::conformance {
namespace {

void ExpectConformance(Backend& backend) {
  for (const ConformanceCheck& check : ConformanceChecks()) {
    EXPECT_EQ(check.run(backend), "") << check.name;
  }
  for (const CacheCheck& check : CacheChecks()) {
    for (const CacheCase& c : CacheCases()) {
      if (!check.applies(c.spec.layers[0])) continue;
      EXPECT_EQ(check.run(backend, c), "") << check.name << " " << c.name;
    }
  }
}

TEST(ConformanceSuite, PassesOnTheReferenceItself) { ExpectConformance(*CreateReferenceBackend()); }

class Conformance : public ::testing::TestWithParam<std::string> {};

TEST_P(Conformance, EveryOperationMatchesTheReference) {
  const Result<std::unique_ptr<Backend>> backend = CreateBackend({.variant = GetParam()});
  ASSERT_TRUE(backend.ok()) << backend.error().message;
  ASSERT_EQ((*backend)->name(), "cpu/" + GetParam()) << "the forced variant is not the one made";
  ASSERT_TRUE((*backend)->Reserve({.max_rows = 128, .max_features = 2048}).ok());
  ExpectConformance(**backend);
}

INSTANTIATE_TEST_SUITE_P(Cpu, Conformance, ::testing::ValuesIn(CpuVariants()),
                         [](const auto& variant) { return variant.param; });

class ConformanceOfCuda : public CudaTest {
 protected:
  ConformanceOfCuda()
      : CudaTest(
            {.max_rows = 256, .max_features = 2048, .max_logit_rows = 8, .max_vocab = 300000}) {}

  // Another one, without a mirror.
  static std::unique_ptr<Backend> MakeDevice(std::function<void(std::string_view)> warn = {}) {
    return std::move(
        *CreateBackend({.device = "cuda", .deterministic = GetParam(), .warn = std::move(warn)}));
  }
};

TEST_P(ConformanceOfCuda, EveryOperationMatchesTheReference) { ExpectConformance(*mirror_); }

TEST_P(ConformanceOfCuda, RowsDoNotDependOnTheBatch) {
  for (const CacheCase& c : CacheCases()) EXPECT_EQ(CheckAttentionRows(*mirror_, c), "");
  if (GetParam()) {
    EXPECT_EQ(CheckMatMulRows(*mirror_), "");
  }
}

// A product of what another operation wrote right before is that of any other x.
void ExpectProductsOfWhatWasWrittenLast(Backend& device, WeightFormat format) {
  std::mt19937_64 random(kSeed);
  const int64_t m = 33, n = 48, k = 64;
  const std::vector<float> values = Normal(random, m * 2 * k), ones(static_cast<size_t>(k), 1.0f),
                           w = Normal(random, n * k);
  const ConstTensorView part = View(w, Shape{n, k});
  const Weight weight = std::move(*device.PackWeight({&part, 1}, {}, format));
  Buffer pairs = *device.Import(View(values, Shape{m, 2 * k}));
  Buffer scale = *device.Import(View(ones, Shape{k}));
  Buffer x = *device.Allocate(m * k * 4), copy = *device.Allocate(m * k * 4);
  Buffer out = *device.Allocate(m * n * 4);
  const auto view = [](Buffer& buffer, int64_t width) {
    return buffer.View(DType::kF32, Shape{m, width});
  };
  std::vector<int64_t> rows(static_cast<size_t>(m));
  std::iota(rows.begin(), rows.end(), 0);
  const auto product_of = [&](Buffer& of) {
    device.MatMul({view(of, k), &weight, false, view(out, n)});
    std::vector<float> product(static_cast<size_t>(m * n));
    device.ReadToHost(out.data(), out.bytes(), reinterpret_cast<std::byte*>(product.data()));
    EXPECT_EQ(Failed(device, "MatMul"), "");
    return product;
  };
  const auto product_of_copy = [&] {
    device.GatherRows({view(x, k), rows, view(copy, k)});
    return product_of(copy);
  };
  device.SwiGlu({view(pairs, 2 * k), view(x, k)});
  const std::vector<float> gated = product_of(x);
  EXPECT_EQ(gated, product_of_copy());
  device.RmsNorm({view(x, k), scale.View(DType::kF32, Shape{k}), 1e-5f, view(copy, k)});
  const std::vector<float> normed = product_of(copy);
  EXPECT_NE(normed, gated);
  device.RmsNorm({view(x, k), scale.View(DType::kF32, Shape{k}), 1e-5f, view(copy, k)});
  EXPECT_EQ(gated, product_of_copy());  // written over
  device.RmsNorm({view(x, k), scale.View(DType::kF32, Shape{k}), 1e-5f, view(copy, k)});
  EXPECT_EQ(gated, product_of(x));  // another x
  EXPECT_EQ(normed, product_of(copy));
}

TEST_P(ConformanceOfCuda, ProductsReadWhatWasWrittenLast) {
  const std::unique_ptr<Backend> device = MakeDevice();
  ASSERT_TRUE(device->Reserve({.max_rows = 64, .max_features = 64}).ok());
  // What is rounded in advance for BF16 weights is not for the F16 weights that come beside them.
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF16, WeightFormat::kBF16}) {
    SCOPED_TRACE(WeightFormatName(format));
    ExpectProductsOfWhatWasWrittenLast(*device, format);
  }
}

// Rows of x that differ by a power of two have products that do, though F16 holds few of these rows
// as they are; what is not finite reaches all of a row's outputs and no others.
TEST_P(ConformanceOfCuda, ProductsTakeRowsOfAnySize) {
  std::mt19937_64 random(kSeed);
  const int64_t n = 49, k = 100;
  std::vector<float> base = Normal(random, k), w = Normal(random, n * k);
  for (std::vector<float>* values : {&base, &w}) {  // no sum is near zero
    for (float& value : *values) value = std::fabs(value) + 0.5f;
  }
  constexpr int kExponents[] = {0, 1, -14, 16, -40, 110, -113, -120};
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kOthers[] = {0.0f, std::numeric_limits<float>::quiet_NaN(), kInfinity,
                               -kInfinity};
  constexpr auto kScaled = static_cast<int64_t>(std::size(kExponents));
  constexpr auto kRows = kScaled + static_cast<int64_t>(std::size(kOthers));
  std::vector<float> x;
  for (const int exponent : kExponents) {
    for (const float value : base) x.push_back(std::ldexp(value, exponent));
  }
  for (const float other : kOthers) {
    x.insert(x.end(), base.begin(), base.end());
    if (other == 0) std::fill(x.end() - k, x.end(), 0.0f);
    *(x.end() - k / 2) = other;
  }
  const ConstTensorView part = View(w, Shape{n, k});
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF16, WeightFormat::kF32}) {
    SCOPED_TRACE(WeightFormatName(format));
    const Result<Weight> weight = mirror_->PackWeight({&part, 1}, {}, format);
    ASSERT_TRUE(weight.ok());
    Guarded out(Shape{kRows, n});
    mirror_->MatMul({View(x, Shape{kRows, k}), &*weight, false, out.view()});
    ASSERT_EQ(Failed(*mirror_, "MatMul"), "");
    for (int64_t column = 0; column < n; ++column) {
      const auto at = [&](int64_t row) { return out.data()[row * n + column]; };
      EXPECT_GT(at(0), static_cast<float>(k) / 4);
      for (int64_t row = 0; row < kScaled; ++row) {
        const double expected = std::ldexp(double{at(0)}, kExponents[row]);
        const double bound = GetParam() ? 0 : 2 * static_cast<double>(k) * kU * expected;
        EXPECT_NEAR(at(row), expected, bound) << "2^" << kExponents[row];
      }
      EXPECT_EQ(at(kScaled), 0.0f);
      EXPECT_TRUE(std::isnan(at(kScaled + 1)));
      EXPECT_EQ(at(kScaled + 2), kInfinity);
      EXPECT_EQ(at(kScaled + 3), -kInfinity);
    }
  }
}

TEST_P(ConformanceOfCuda, SaysOnceThatF32WeightsAreSlow) {
  std::vector<std::string> warnings;
  const std::unique_ptr<Backend> device =
      MakeDevice([&warnings](std::string_view text) { warnings.emplace_back(text); });
  const std::vector<float> w(64, 1.0f);
  const ConstTensorView part = View(w, Shape{4, 16});
  const auto warnings_after = [&](WeightFormat format) {
    EXPECT_TRUE(device->PackWeight({&part, 1}, {}, format).ok());
    return warnings.size();
  };
  EXPECT_EQ(warnings_after(WeightFormat::kBF16), 0u);
  EXPECT_EQ(warnings_after(WeightFormat::kF16), 0u);
  EXPECT_EQ(warnings_after(WeightFormat::kF32), 1u);
  EXPECT_EQ(warnings_after(WeightFormat::kF32), 1u);
  EXPECT_NE(warnings[0].find("F32"), std::string::npos) << warnings[0];
}

INSTANTIATE_TEST_SUITE_P(Cuda, ConformanceOfCuda, ::testing::Bool(), [](const auto& chosen) {
  return chosen.param ? "deterministic" : "not_deterministic";
});

}  // namespace
}  // namespace innerq::conformance
