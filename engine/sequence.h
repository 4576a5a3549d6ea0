// Sequence: a request on its way through the engine.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/block_allocator.h"
#include "engine/request.h"
#include "engine/sampler.h"

namespace innerq {

// The tokens of a request so far and where their K and V are. Built by the thread that submits,
// then used by the engine thread alone. The scheduler changes `num_computed` and pages, the engine
// the rest.
struct Sequence {
  // Positions [0, exact_before) attend to unquantized K and V. `stream` may be null for whoever
  // takes results elsewhere. Ended at once if the request asks for nothing that must be computed.
  Sequence(Request request, std::shared_ptr<ResponseStream> stream, int64_t exact_before);
  Sequence(Request, std::shared_ptr<ResponseStream>, bool) = delete;  // a length, not a choice

  const Request request;
  const std::shared_ptr<ResponseStream> stream;  // written until `finish` is delivered
  const int64_t exact_before;                    // see KvLayout::SealedPages; survives preemption

  int64_t number = 0;           // by arrival at the engine thread, from 1
  std::vector<int32_t> tokens;  // prompt, then answer
  int64_t num_computed = 0;     // positions [0, num_computed) are in the cache
  int64_t max_computed = 0;     // the most that it ever was; survives preemption
  int64_t num_scored = 0;  // positions [0, num_scored) have scored the prompt token after them;
                           // survives preemption
  BlockTable pages;
  BlockRef norm;                      // slot of the key norm, from the first sealed page on
  std::optional<int64_t> num_cached;  // of the prompt, found in the cache when it first started
  bool prompt_counted = false;        // in the statistics
  int64_t branch_pages = 0;   // boundary after which it leaves the prefixes known when it started
  int64_t passing_pages = 0;  // boundary of its passing checkpoint; 0: it has none
  SeenTokens seen;            // for penalties
  std::optional<Finish> finish;  // set when it has ended and is to leave the scheduler

  // When it was accepted, first took part in a step, and got its first and its latest token.
  using TimePoint = std::chrono::steady_clock::time_point;
  const TimePoint accepted_at = std::chrono::steady_clock::now();
  std::optional<TimePoint> started_at, first_token_at, last_token_at;

  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }
  int64_t prompt_length() const { return static_cast<int64_t>(request.prompt.size()); }
  int64_t num_generated() const { return num_tokens() - prompt_length(); }
  // Positions [0, num_to_compute) are needed for what comes next.
  int64_t num_to_compute() const;
  int64_t num_uncomputed() const { return num_to_compute() - num_computed; }
  // Positions [0, num_to_score) score the prompt token after them.
  int64_t num_to_score() const { return request.prompt_logprobs >= 0 ? prompt_length() - 1 : 0; }
  // Tokens that the next one must not be.
  std::span<const int32_t> masked() const;

  // Takes one more token of the answer.
  void Append(int32_t token);
  // Records how it ended, unless it has ended already.
  void End(FinishReason reason, std::optional<Error> error = std::nullopt);
};

// Positions that a request of these lengths computes: the last token, of an answer or of a prompt
// without one, is never fed back.
constexpr int64_t NumPositions(int64_t prompt_length, int64_t max_tokens) {
  return prompt_length + max_tokens - 1;
}

}  // namespace innerq
