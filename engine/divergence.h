// Numerics of evaluation: how likely a model finds a text, and how far two next-token distributions
// are apart.
//
// V vocabulary.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/result.h"

namespace innerq {

// A row of logits and what normalizes it: log p_i = logits_i - log_sum.
struct LogitRow {
  std::span<const float> logits;  // [V]
  double log_sum = 0;             // log sum exp(logits)
  int32_t top = 0;                // the largest logit, the lowest id among equals

  double LogProbability(int32_t token) const {
    return logits[static_cast<size_t>(token)] - log_sum;
  }
};

// Normalizes a row, in double. Errors: internal if a logit is not finite.
Result<LogitRow> Normalize(std::span<const float> logits);

// Kullback-Leibler divergence KL(p || q) = sum p_i (log p_i - log q_i), in nats and in double; 0
// for equal rows, never below.
double KlDivergence(const LogitRow& p, const LogitRow& q);

// What one token of a text says about a cache.
struct TokenScore {
  int64_t text = 0;           // index of the text
  int64_t position = 0;       // of the token; the row before it gave the distribution
  bool reads_sealed = false;  // that row attended to quantized pages
  double nll = 0;             // -log p(token)
  bool chosen = false;        // greedily, of those tokens that may be chosen
  double divergence = 0;      // KL(reference || this) of the distribution
  bool same_top = true;       // both have the same most likely token
};

// Statistics of scores.
struct ScoreSummary {
  int64_t tokens = 0;  // all else is 0 if there are none
  double mean_nll = 0;
  double perplexity = 0;  // exp(mean_nll)
  double kl_mean = 0;
  double kl_error = 0;  // standard error of `kl_mean`, for texts as a sample; 0 for fewer than two
  double kl_median = 0;
  double kl_p99 = 0;
  double kl_max = 0;
  double top1_agreement = 0;  // share of tokens with `same_top`
};

// Of those scores that `counts` takes.
ScoreSummary Summarize(std::span<const TokenScore> scores,
                       const std::function<bool(const TokenScore&)>& counts);

// The value below which a share of `q` in [0, 1] of the values lies, interpolated linearly between
// neighbours (R's type 7, numpy's default). CHECK: there are values.
double Quantile(std::vector<double> values, double q);

}  // namespace innerq
