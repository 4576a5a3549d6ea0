// The tasks of `innerq eval`: each measures every cache of an evaluation and reports.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "server/eval_data.h"
#include "server/eval_setup.h"

namespace innerq {

// What likelihoods are measured on.
struct ScoringArgs {
  std::vector<std::filesystem::path> texts;
  int64_t limit = 0;    // documents of each file, and windows of each document; 0: all
  int64_t context = 0;  // tokens of a window; 0: 2048, or the model's context if that is less
  int64_t skip = 0;     // tokens at positions below this do not count
};

// Problems whose answers end in a number.
struct ProblemArgs {
  std::filesystem::path data;
  std::filesystem::path shots;  // worked examples come from the start of this file; empty: none
  int64_t num_shots = 5;
  int64_t limit = 0;  // problems; 0: all
  int64_t max_tokens = 400;
  bool chat = false;  // examples and problem are turns of a conversation
};

// Needles to find.
struct RecallArgs {
  std::vector<int64_t> lengths = {512, 1024, 2048};    // tokens of a prompt
  std::vector<int64_t> depths = {0, 25, 50, 75, 100};  // percent
  int64_t trials = 4;  // per length and depth; their share of sentences that state codes differs
  int64_t max_tokens = 32;
  uint64_t seed = 1;
  bool chat = false;
};

// A long answer.
struct LongAnswerArgs {
  std::vector<std::string> prompts;
  std::vector<std::filesystem::path> texts;  // further prompts: the beginning of each document
  int64_t limit = 0;                         // documents of each file; 0: all
  int64_t prompt_tokens = 256;               // of a document
  int64_t tokens = 512;                      // of the answer
  float temperature = 0;
  uint64_t seed = 0;
};

// Perplexity of texts.
Result<EvalReport> EvaluatePerplexity(const Evaluation& evaluation, const ScoringArgs& args,
                                      const std::vector<std::string>& texts);
// KL divergence of next-token distributions on texts, against the F16 cache.
Result<EvalReport> EvaluateDivergence(const Evaluation& evaluation, const ScoringArgs& args,
                                      const std::vector<std::string>& texts);
// KL divergence along what the F16 cache writes by itself, by position. `texts` are prompts.
// Tokens that would end the answer are not chosen.
Result<EvalReport> EvaluateLongAnswers(const Evaluation& evaluation, const LongAnswerArgs& args,
                                       const std::vector<std::string>& texts);

// Share of problems with the right number, answered greedily after the worked examples.
Result<EvalReport> EvaluateProblems(const Evaluation& evaluation, const ProblemArgs& args,
                                    const std::vector<Problem>& problems,
                                    const std::vector<Problem>& shots);
// Share of needles found, by the length of the text and the needle's depth in it.
Result<EvalReport> EvaluateRecall(const Evaluation& evaluation, const RecallArgs& args);

}  // namespace innerq
