#include "engine/divergence.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace innerq {

Result<LogitRow> Normalize(std::span<const float> logits) {
  const auto top = std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - *top);
  // NaN anywhere and an infinite maximum make the sum NaN; -inf alone would not show.
  if (!std::isfinite(sum) || !std::isfinite(*std::min_element(logits.begin(), logits.end()))) {
    return Error{ErrorCode::kInternal, "a logit is not finite"};
  }
  return LogitRow{logits, *top + std::log(sum), static_cast<int32_t>(top - logits.begin())};
}

double KlDivergence(const LogitRow& p, const LogitRow& q) {
  CHECK(p.logits.size() == q.logits.size(), "rows of different vocabularies");
  double sum = 0;
  for (size_t i = 0; i < p.logits.size(); ++i) {
    const double log_p = p.logits[i] - p.log_sum;
    sum += std::exp(log_p) * (log_p - (q.logits[i] - q.log_sum));
  }
  return std::max(sum, 0.0);  // rounding
}

namespace {

// Sums over the tokens of one text.
struct TextSum {
  double divergence = 0;
  double tokens = 0;
};

// The standard error of sum(divergence) / sum(tokens): tokens of one text resemble each other,
// texts are independent (ratio estimator: Cochran, "Sampling Techniques", 1977, 2.11 and 6.4).
double ErrorOfMean(const std::map<int64_t, TextSum>& texts, double mean, double tokens) {
  const auto count = static_cast<double>(texts.size());
  if (count < 2) return 0;
  double squares = 0;
  for (const auto& [text, sum] : texts) {
    const double residual = sum.divergence - mean * sum.tokens;
    squares += residual * residual;
  }
  return std::sqrt(squares * count / (count - 1)) / tokens;
}

}  // namespace

ScoreSummary Summarize(std::span<const TokenScore> scores,
                       const std::function<bool(const TokenScore&)>& counts) {
  ScoreSummary summary;
  std::vector<double> divergences;
  std::map<int64_t, TextSum> texts;
  for (const TokenScore& score : scores) {
    if (!counts(score)) continue;
    summary.mean_nll += score.nll;
    summary.kl_mean += score.divergence;
    summary.top1_agreement += score.same_top ? 1 : 0;
    divergences.push_back(score.divergence);
    TextSum& text = texts[score.text];
    text.divergence += score.divergence;
    ++text.tokens;
  }
  if (divergences.empty()) return summary;
  summary.tokens = static_cast<int64_t>(divergences.size());
  const auto count = static_cast<double>(summary.tokens);
  summary.mean_nll /= count;
  summary.perplexity = std::exp(summary.mean_nll);
  summary.kl_mean /= count;
  summary.kl_error = ErrorOfMean(texts, summary.kl_mean, count);
  summary.top1_agreement /= count;
  summary.kl_median = Quantile(divergences, 0.5);
  summary.kl_p99 = Quantile(divergences, 0.99);
  summary.kl_max = *std::max_element(divergences.begin(), divergences.end());
  return summary;
}

double Quantile(std::vector<double> values, double q) {
  CHECK(!values.empty() && q >= 0 && q <= 1, "a quantile of nothing");
  const double rank = q * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(rank);
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(below);
  std::nth_element(values.begin(), at, values.end());
  const double low = *at;
  if (at + 1 == values.end()) return low;
  const double high = *std::min_element(at + 1, values.end());
  return low + (rank - static_cast<double>(below)) * (high - low);
}

}  // namespace innerq
