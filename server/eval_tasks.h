// The tasks of `innerq eval`: each measures every cache of an evaluation and reports.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "server/eval_setup.h"

namespace innerq {

// What likelihoods are measured on.
struct ScoringArgs {
  std::vector<std::filesystem::path> texts;
  int64_t limit = 0;    // documents of each file; 0: all
  int64_t context = 0;  // tokens of a window; 0: 2048, or the model's context if that is less
  int64_t skip = 0;     // tokens at positions below this do not count
};

// Perplexity of texts.
Result<EvalReport> EvaluatePerplexity(const Evaluation& evaluation, const ScoringArgs& args,
                                      const std::vector<std::string>& texts);
// KL divergence of next-token distributions on texts, against the F16 cache.
Result<EvalReport> EvaluateDivergence(const Evaluation& evaluation, const ScoringArgs& args,
                                      const std::vector<std::string>& texts);

}  // namespace innerq
