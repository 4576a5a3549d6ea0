// Evaluation: what a model says through a cache, measured on the way that serving takes. Texts are
// scored by the scheduler's steps (chunks of prompts, pages that seal by position), answers come
// from an engine.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/divergence.h"
#include "engine/model_runner.h"
#include "engine/request.h"
#include "kernels/tensor.h"

namespace innerq {

// Called as evaluation goes on, with the work done since the last time: tokens of texts or
// answered requests. False ends it with the error "cancelled".
using EvalProgress = std::function<bool(int64_t done)>;

// A text and which part of it counts.
struct EvalText {
  std::vector<int32_t> tokens;
  int64_t first_scored = 1;  // tokens [first_scored, size) are scored; at least 1
  // Where the cache's prefill is exact, tokens [0, prompt_length) are the prompt.
  int64_t prompt_length = 0;
  std::vector<int32_t> never_chosen = {};  // tokens that were not to be written
};

// Takes the logits [V] that predict the token at a position. The row is valid during the call.
using LogitSink = std::function<Result<void>(int64_t position, std::span<const float> logits)>;

// Computes a text from an empty cache in the steps that would serve it as a scored prompt, and
// hands out the logits before each scored token, in order. Errors: invalid argument if the text
// does not fit the runner's context or has an id beyond the vocabulary; those of `take` and steps.
Result<void> ScoreText(ModelRunner& runner, const EvalText& text, const LogitSink& take,
                       const EvalProgress& progress);

// A text's logits [R][V] through a reference, R scored tokens: what other caches are compared with.
class ReferenceLogits {
 public:
  // Errors: resource exhausted, with the size.
  static Result<ReferenceLogits> Create(int64_t num_rows, int64_t vocab_size);
  // Copies the row's logits. CHECK: there is room.
  void Add(LogitRow row);
  const LogitRow& row(int64_t index) const { return rows_[static_cast<size_t>(index)]; }

 private:
  Buffer logits_;               // F32
  std::vector<LogitRow> rows_;  // over `logits_`
};

// Scores one text. Fills `reference` if it is empty, else compares with it; null: does neither.
// Errors: as of ScoreText and ReferenceLogits.
Result<std::vector<TokenScore>> ScoreTokens(ModelRunner& runner, const EvalText& text,
                                            std::optional<ReferenceLogits>* reference,
                                            const EvalProgress& progress);

// Scores of all texts through one cache.
struct CacheScores {
  std::vector<TokenScore> tokens;
  // Bits per cached element at the end of each text, F16 windows included; mean, weighted by
  // length.
  double effective_bits = 0;
};

// Scores texts through several caches; result i is of runners[i]. With `compare`, runners[0] is the
// reference of divergences: its logits of one text, 4 bytes for each token and word of the
// vocabulary, are kept while the others run that text. Errors: as of ScoreTokens.
Result<std::vector<CacheScores>> ScoreTexts(std::span<const std::unique_ptr<ModelRunner>> runners,
                                            std::span<const EvalText> texts, bool compare,
                                            const EvalProgress& progress);

// Takes a token of the answer to requests[index]. False: no more are wanted.
using TokenSink = std::function<bool(size_t index, const TokenEvent& event)>;

// Answers requests by continuous batching, as many at once as the runner's limits allow. Errors:
// of the first request that is refused or fails, with its number, from 1.
Result<void> AnswerAll(std::unique_ptr<ModelRunner> runner, std::vector<Request> requests,
                       const TokenSink& take, const EvalProgress& progress);

}  // namespace innerq
