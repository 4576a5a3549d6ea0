// Passes over logits, on every variant of this machine, against the standard library.
#include "kernels/cpu/logit_ops.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace innerq {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> NormalLogits(size_t size, float spread) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(size);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

class LogitOpsTest : public testing::TestWithParam<CpuIsa> {
 protected:
  const LogitOps ops_ = LogitOpsFor(GetParam());
};

TEST_P(LogitOpsTest, TheLargestIsFoundWhereverItIs) {
  for (const size_t size : {1, 2, 7, 8, 15, 16, 17, 31, 100, 515}) {
    std::vector<float> logits(size, -3.0f);
    for (size_t i = 0; i < size; ++i) {
      logits[i] = -2.5f;
      EXPECT_EQ(ops_.largest(logits).value, -2.5f) << i << " of " << size;
      EXPECT_TRUE(ops_.largest(logits).finite) << i << " of " << size;
      for (const float bad : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()}) {
        logits[i] = bad;
        EXPECT_FALSE(ops_.largest(logits).finite) << bad << " at " << i << " of " << size;
      }
      logits[i] = -kInf;
      EXPECT_EQ(ops_.largest(logits).value, size == 1 ? -kInf : -3.0f);
      logits[i] = -3.0f;
    }
  }
  constexpr float kMax = std::numeric_limits<float>::max();
  const std::vector<float> extremes(100, kMax);  // whose sum would be infinite
  EXPECT_EQ(ops_.largest(extremes).value, kMax);
  EXPECT_TRUE(ops_.largest(extremes).finite);
}

TEST_P(LogitOpsTest, WeightsAreExponentials) {
  for (const size_t size : {1, 5, 16, 511, 512, 513, 1500}) {
    for (const float temperature : {1e-30f, 0.1f, 1.0f, 2.0f}) {
      for (const float spread : {0.1f, 5.0f, 80.0f}) {
        std::vector<float> logits = NormalLogits(size, spread);
        if (size > 4) logits[size / 2] = -kInf;
        const float max = *std::max_element(logits.begin(), logits.end());
        const size_t blocks = (size + kLogitBlock - 1) / kLogitBlock;
        std::vector<float> weights(size, 99.0f);
        std::vector<double> sums(blocks, 99.0);
        ops_.weigh({logits, max, temperature, weights, sums});
        for (size_t i = 0; i < size; ++i) {
          const double u = (static_cast<double>(logits[i]) - max) / temperature;
          // The exponent is rounded in F32, so its error grows with its size.
          const double wanted = std::exp(u), error = wanted * (1e-6 + std::fabs(u) * 0x1p-22);
          const bool near =
              u < -100 ? weights[i] < 1e-37f : std::fabs(weights[i] - wanted) <= error + 1e-38;
          EXPECT_TRUE(near) << logits[i] - max << ": " << weights[i] << ", expected " << wanted;
          EXPECT_LE(weights[i], 1.0f);
          EXPECT_GE(weights[i], 0.0f);
          if (logits[i] == max) {
            EXPECT_EQ(weights[i], 1.0f);
          }
        }
        if (size > 4) {
          EXPECT_EQ(weights[size / 2], 0.0f) << "of a masked token";
        }
        for (size_t b = 0; b < blocks; ++b) {
          const auto begin = b * static_cast<size_t>(kLogitBlock);
          double sum = 0;
          for (size_t i = begin; i < std::min(begin + kLogitBlock, size); ++i) sum += weights[i];
          EXPECT_NEAR(sums[b], sum, 1e-12 * sum);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Variants, LogitOpsTest, testing::ValuesIn(SupportedCpuIsas()),
                         [](const auto& isa) { return std::string(CpuIsaName(isa.param)); });

}  // namespace
}  // namespace innerq
