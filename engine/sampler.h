// Sampler: one row of logits to one token.
//
// V vocabulary.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/request.h"
#include "kernels/backend.h"
#include "kernels/result.h"

namespace innerq {

// Which tokens a sequence has seen, and how often its answer had them.
class SeenTokens {
 public:
  static SeenTokens InPrompt(std::span<const int32_t> prompt);
  void AddToAnswer(int32_t token) { ++answer_counts_[token]; }
  // Token to its occurrences in the answer; 0 for tokens of the prompt alone.
  const std::unordered_map<int32_t, int32_t>& answer_counts() const { return answer_counts_; }

 private:
  std::unordered_map<int32_t, int32_t> answer_counts_;
};

// Whether `seen` matters to these parameters.
bool UsesPenalties(const SamplingParams& params);

// What a choice depends on, and nothing else: not on neighbours, threads or earlier calls.
struct SampleArgs {
  std::span<const float> logits;  // [V], the model's
  const SamplingParams* params = nullptr;
  const SeenTokens* seen = nullptr;
  std::span<const int32_t> masked = {};  // tokens that must not be chosen
  int64_t index = 0;  // of the generated token, from 0: selects the random number
  // In place of `logits`, if not empty: the largest, at least NumTopLogits() of them.
  std::span<const TopLogit> top = {};
};

// How many of the largest logits a choice depends on, as SelectTop orders them, at most
// kMaxTopLogits; 0: on more, or on all. Where there are no more than that it takes all.
int32_t NumTopLogits(const SamplingParams& params, std::span<const int32_t> masked);

// Memory that calls reuse.
struct SamplerScratch {
  struct Candidate {
    float logit;
    int32_t id;
    float weight;
  };
  std::vector<float> logits;   // [V]
  std::vector<float> weights;  // [V]
  std::vector<double> sums;    // of weights, block by block
  std::vector<Candidate> candidates;
};

// Chooses the next token. In this order: logit_bias; repetition, presence and frequency penalties;
// masked tokens; temperature; top_k; top_p over what top_k left; min_p. Temperature 0 or top_p 0
// takes the largest logit, the lowest id among equals. Reports log-softmax of the raw logits where
// `params->num_logprobs` asks for it. `is_stop` is left to the caller. Some passes over V: vectors
// of exponentials, selections instead of sorts. Errors: internal if a logit is not finite or no
// token is left to choose.
Result<TokenEvent> Sample(const SampleArgs& args, SamplerScratch& scratch);

// The log-probability of `token` where the model gave `logits` [V], and the `num_top` best ones, as
// Sample reports them. Errors: internal if a logit is not finite.
Result<TokenEvent> Score(std::span<const float> logits, int32_t token, int32_t num_top,
                         SamplerScratch& scratch);

// What is wanted of a row of logits: Sample, or, with a token to score, Score of `sample.logits`.
struct RowArgs {
  SampleArgs sample{};
  std::optional<int32_t> scored{};
  int32_t num_top = 0;  // of Score
};

// Samples and scores the rows of a step, on several threads where there is much to do.
class RowSampler {
 public:
  explicit RowSampler(int threads) : scratch_(static_cast<size_t>(threads)) {}
  // A result per row, valid until the next call; none depends on the other rows or on threads.
  std::span<Result<TokenEvent>> Run(std::span<const RowArgs> rows);

 private:
  std::vector<SamplerScratch> scratch_;  // of each thread
  std::vector<Result<TokenEvent>> results_;
};

// The seed of one of several answers to the same prompt. Answer 0 has the request's own seed; none
// depends on how many there are.
uint64_t SeedOfChoice(uint64_t seed, int64_t choice);

}  // namespace innerq
