#include "engine/divergence.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>

namespace innerq {
namespace {

// Logits whose softmax is `p`, shifted: softmax does not see the shift.
std::vector<float> LogitsOf(const std::vector<double>& p, double shift) {
  std::vector<float> logits;
  for (const double value : p) logits.push_back(static_cast<float>(std::log(value) + shift));
  return logits;
}

TEST(Divergence, OfKnownDistributionsIsTheTextbooksNumber) {
  // 0.5 log(0.5/0.25) + 0.25 log(0.25/0.5) + 0.25 log 1 = 0.25 log 2.
  const std::vector<float> p = LogitsOf({0.5, 0.25, 0.25}, 3);
  const std::vector<float> q = LogitsOf({0.25, 0.5, 0.25}, -40);
  const LogitRow p_row = Normalize(p).value();
  const LogitRow q_row = Normalize(q).value();
  // Logits near 40 have an absolute error of 2^-19 in F32; both terms that differ see it.
  const double bound = 4 * std::ldexp(1.0, -19);
  EXPECT_NEAR(KlDivergence(p_row, q_row), 0.25 * std::log(2.0), bound);
  EXPECT_NEAR(KlDivergence(q_row, p_row), 0.25 * std::log(2.0), bound);
  EXPECT_EQ(p_row.top, 0);
  EXPECT_EQ(q_row.top, 1);
  EXPECT_NEAR(p_row.LogProbability(1), std::log(0.25), bound);
}

TEST(Divergence, OfEqualRowsIsExactlyZeroAndNeverNegative) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 8);
  for (int i = 0; i < 100; ++i) {
    std::vector<float> logits(257);
    for (float& logit : logits) logit = normal(random);
    const LogitRow row = Normalize(logits).value();
    EXPECT_EQ(KlDivergence(row, row), 0.0);
    std::vector<float> near = logits;
    near[3] += 1e-6f;
    EXPECT_GE(KlDivergence(row, Normalize(near).value()), 0.0);
    double sum = 0;
    for (int32_t token = 0; token < 257; ++token) sum += std::exp(row.LogProbability(token));
    EXPECT_NEAR(sum, 1.0, 257 * 1e-15);
  }
}

TEST(Divergence, TakesHugeLogitsAndTiesAndRefusesWhatIsNotFinite) {
  const std::vector<float> huge = {3e38f, 3e38f, -3e38f};
  const LogitRow row = Normalize(huge).value();
  EXPECT_EQ(row.top, 0) << "the lowest id among equals";
  EXPECT_TRUE(std::isfinite(row.log_sum));
  EXPECT_EQ(KlDivergence(row, row), 0.0);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const float bad : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()}) {
    for (size_t at = 0; at < 3; ++at) {
      std::vector<float> logits = {1, 2, 3};
      logits[at] = bad;
      const auto refused = Normalize(logits);
      ASSERT_FALSE(refused.ok()) << bad << " at " << at;
      EXPECT_EQ(refused.error().code, ErrorCode::kInternal);
    }
  }
}

TEST(Quantile, InterpolatesAsNumpyDoes) {
  EXPECT_EQ(Quantile({7}, 0.99), 7);
  EXPECT_EQ(Quantile({4, 1, 3, 2}, 0.5), 2.5);
  EXPECT_EQ(Quantile({3, 1, 2}, 0.5), 2);
  EXPECT_EQ(Quantile({3, 1, 2}, 0), 1);
  EXPECT_EQ(Quantile({3, 1, 2}, 1), 3);
  std::vector<double> values(101);
  std::iota(values.rbegin(), values.rend(), 0.0);
  EXPECT_NEAR(Quantile(values, 0.99), 99, 1e-12);
  EXPECT_NEAR(Quantile(values, 0.125), 12.5, 1e-12);
}

TEST(Summarize, CountsOnlyWhatItIsAskedFor) {
  std::vector<TokenScore> scores;
  for (int i = 0; i < 10; ++i) {
    scores.push_back({.position = i,
                      .reads_sealed = i >= 5,
                      .nll = 1.0 + (i >= 5),
                      .divergence = i / 10.0,
                      .same_top = i != 9});
  }
  const ScoreSummary all = Summarize(scores, [](const TokenScore&) { return true; });
  EXPECT_EQ(all.tokens, 10);
  EXPECT_NEAR(all.mean_nll, 1.5, 1e-12);
  EXPECT_NEAR(all.perplexity, std::exp(1.5), 1e-12);
  EXPECT_NEAR(all.kl_mean, 0.45, 1e-12);
  EXPECT_NEAR(all.kl_median, 0.45, 1e-12);
  EXPECT_NEAR(all.kl_p99, 0.891, 1e-12);
  EXPECT_EQ(all.kl_max, 0.9);
  EXPECT_NEAR(all.top1_agreement, 0.9, 1e-12);
  const ScoreSummary sealed = Summarize(scores, [](const auto& s) { return s.reads_sealed; });
  EXPECT_EQ(sealed.tokens, 5);
  EXPECT_EQ(sealed.mean_nll, 2.0);
  EXPECT_NEAR(sealed.kl_mean, 0.7, 1e-12);
  EXPECT_EQ(all.kl_error, 0.0) << "one text is no sample";
  const ScoreSummary none = Summarize(scores, [](const TokenScore&) { return false; });
  EXPECT_EQ(none.tokens, 0);
  EXPECT_EQ(none.kl_mean, 0.0);
}

TEST(Summarize, TakesTextsAsTheSample) {
  // Texts of 2, 1 and 3 tokens with divergences that add up to 2, 3 and 1: a mean of 1, residuals
  // of 0, 2 and -2.
  std::vector<TokenScore> scores;
  for (const double divergence : {0.5, 1.5})
    scores.push_back({.text = 4, .divergence = divergence});
  scores.push_back({.text = 7, .divergence = 3});
  for (const double divergence : {0.0, 1.0, 0.0}) {
    scores.push_back({.text = 9, .divergence = divergence});
  }
  const ScoreSummary summary = Summarize(scores, [](const TokenScore&) { return true; });
  EXPECT_NEAR(summary.kl_mean, 1, 1e-12);
  EXPECT_NEAR(summary.kl_error, std::sqrt((4 + 4) * 3.0 / 2) / 6, 1e-12);
  // Texts of one token: the error of a mean as in every textbook.
  std::erase_if(scores, [](const auto& s) { return s.divergence == 0.5 || s.divergence == 0; });
  const ScoreSummary plain = Summarize(scores, [](const TokenScore&) { return true; });
  const double mean = (1.5 + 3 + 1) / 3;
  const double variance =
      (std::pow(1.5 - mean, 2) + std::pow(3 - mean, 2) + std::pow(1 - mean, 2)) / 2;
  EXPECT_NEAR(plain.kl_error, std::sqrt(variance / 3), 1e-12);
}

}  // namespace
}  // namespace innerq
