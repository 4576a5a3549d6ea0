// The conformance suite on every CPU variant, on CUDA, and on the reference itself.
#include <gtest/gtest.h>

#include <memory>
#include <numeric>
#include <random>

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
};

TEST_P(ConformanceOfCuda, EveryOperationMatchesTheReference) { ExpectConformance(*mirror_); }

TEST_P(ConformanceOfCuda, RowsDoNotDependOnTheBatch) {
  for (const CacheCase& c : CacheCases()) EXPECT_EQ(CheckAttentionRows(*mirror_, c), "");
  if (GetParam()) {
    EXPECT_EQ(CheckMatMulRows(*mirror_), "");
  }
}

// A product of what another operation wrote right before is that of any other x.
TEST_P(ConformanceOfCuda, ProductsReadWhatWasWrittenLast) {
  const std::unique_ptr<Backend> device =
      std::move(*CreateBackend({.device = "cuda", .deterministic = GetParam()}));
  ASSERT_TRUE(device->Reserve({.max_rows = 64, .max_features = 64}).ok());
  std::mt19937_64 random(kSeed);
  const int64_t m = 33, n = 48, k = 64;
  const std::vector<float> values = Normal(random, m * 2 * k), ones(static_cast<size_t>(k), 1.0f),
                           w = Normal(random, n * k);
  const ConstTensorView part = View(w, Shape{n, k});
  const Weight weight = std::move(*device->PackWeight({&part, 1}, {}, WeightFormat::kBF16));
  Buffer pairs = *device->Import(View(values, Shape{m, 2 * k}));
  Buffer scale = *device->Import(View(ones, Shape{k}));
  Buffer x = *device->Allocate(m * k * 4), copy = *device->Allocate(m * k * 4);
  Buffer out = *device->Allocate(m * n * 4);
  const auto view = [](Buffer& buffer, int64_t width) {
    return buffer.View(DType::kF32, Shape{m, width});
  };
  std::vector<int64_t> rows(static_cast<size_t>(m));
  std::iota(rows.begin(), rows.end(), 0);
  const auto product_of = [&](Buffer& of) {
    device->MatMul({view(of, k), &weight, false, view(out, n)});
    std::vector<float> product(static_cast<size_t>(m * n));
    device->ReadToHost(out.data(), out.bytes(), reinterpret_cast<std::byte*>(product.data()));
    EXPECT_EQ(Failed(*device, "MatMul"), "");
    return product;
  };
  const auto product_of_copy = [&] {
    device->GatherRows({view(x, k), rows, view(copy, k)});
    return product_of(copy);
  };
  device->SwiGlu({view(pairs, 2 * k), view(x, k)});
  const std::vector<float> gated = product_of(x);
  EXPECT_EQ(gated, product_of_copy());
  device->RmsNorm({view(x, k), scale.View(DType::kF32, Shape{k}), 1e-5f, view(copy, k)});
  const std::vector<float> normed = product_of(copy);
  EXPECT_NE(normed, gated);
  device->RmsNorm({view(x, k), scale.View(DType::kF32, Shape{k}), 1e-5f, view(copy, k)});
  EXPECT_EQ(gated, product_of_copy());  // written over
  device->RmsNorm({view(x, k), scale.View(DType::kF32, Shape{k}), 1e-5f, view(copy, k)});
  EXPECT_EQ(gated, product_of(x));  // another x
  EXPECT_EQ(normed, product_of(copy));
}

INSTANTIATE_TEST_SUITE_P(Cuda, ConformanceOfCuda, ::testing::Bool(), [](const auto& chosen) {
  return chosen.param ? "deterministic" : "not_deterministic";
});

}  // namespace
}  // namespace innerq::conformance
