// Request, SamplingParams, TokenEvent, Finish, ResponseStream, ResponseGroup: what crosses between
// the server's threads and the engine's.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "kernels/result.h"

namespace innerq {

constexpr int32_t kMaxLogprobs = 20;  // alternatives that a request may ask for at each token

// How the next token is chosen. Ranges are checked by ValidateSamplingParams.
struct SamplingParams {
  float temperature = 1.0f;         // [0, 2]; 0 is greedy
  float top_p = 1.0f;               // [0, 1]; 0 is greedy
  int32_t top_k = 0;                // 0: off; else keep the k most likely
  float min_p = 0.0f;               // [0, 1]: keep tokens with p >= min_p * p_max
  float repetition_penalty = 1.0f;  // (0, 2]: divides (multiplies) positive (negative) logits of
                                    // tokens seen in prompt or answer
  float presence_penalty = 0.0f;    // [-2, 2]: subtracted once from tokens seen in the answer
  float frequency_penalty = 0.0f;   // [-2, 2]: subtracted per occurrence in the answer
  std::map<int32_t, float> logit_bias;  // token id to [-100, 100], added to logits
  uint64_t seed = 0;                    // same seed, request and configuration give the same tokens
  int32_t num_logprobs = -1;            // -1: none; k >= 0: the chosen token's and the k best
};

// A prompt and what to do with it. Immutable once submitted.
struct Request {
  std::vector<int32_t> prompt;  // at least one token
  SamplingParams sampling;
  int64_t max_tokens = 16;              // of the answer; 0: nothing but what the prompt gives
  int64_t min_tokens = 0;               // stop tokens are not chosen before so many
  std::vector<int32_t> stop_token_ids;  // end the answer (reason stop); the token itself is
                                        // reported as an event with `is_stop`
  int32_t prompt_logprobs = -1;  // -1: none; k >= 0: those of all prompt tokens but the first, each
                                 // with the k best in its place
  std::string cache_salt{};      // cached prefixes are shared among requests of the same salt
};

struct TokenLogprob {
  int32_t token_id = 0;
  float logprob =
      0;  // natural logarithm, of the model's distribution before temperature and filters
};

// One generated token, or a prompt token with its log-probability.
struct TokenEvent {
  int32_t token_id = 0;
  bool is_prompt = false;         // not part of the answer; comes before whatever is
  bool is_stop = false;           // a stop token: ends the answer and is not part of its text
  float logprob = 0;              // valid if logprobs were asked for
  std::vector<TokenLogprob> top;  // most likely first
};

enum class FinishReason { kStop, kLength, kCancelled, kError };

struct Usage {
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t cached_tokens = 0;  // of the prompt: found in the cache, not computed
};

// How a request ended. Every accepted request gets exactly one.
struct Finish {
  FinishReason reason = FinishReason::kStop;
  Usage usage;
  std::optional<Error> error;  // with kError
};

// Wakes the reader of several streams. Thread-safe; one waiter.
class ResponseSignal {
 public:
  void Raise();
  // Waits until it is raised, at most `timeout`, and lowers it. What was raised before counts.
  void Wait(std::chrono::milliseconds timeout);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool raised_ = false;
};

// The channel of one request: the engine writes TokenEvents and exactly one Finish, the server
// reads. Bounded by what the request may bring, so the writer never waits. Closing the reader's end
// cancels the request. Thread-safe; one reader, one writer.
class ResponseStream {
 public:
  // Room for `capacity` events. `signal` may be null; else it is raised at every change.
  explicit ResponseStream(int64_t capacity, std::shared_ptr<ResponseSignal> signal = nullptr)
      : capacity_(capacity), signal_(std::move(signal)) {}

  // Reader: takes all events at hand, waiting for at least one, the end, or the timeout. None: the
  // stream has ended (then `finish()` is set) or the timeout passed (then it is not).
  std::vector<TokenEvent> NextBatch(std::chrono::milliseconds timeout);
  // Reader: prompt tokens that were found in the cache; known when the first event is there.
  int64_t cached_tokens() const { return cached_tokens_.load(std::memory_order_acquire); }
  // Reader: how it ended; nullopt while events remain or it goes on.
  std::optional<Finish> finish() const;
  // Reader: gives up; the engine will finish the request as cancelled. Idempotent.
  void Cancel() { cancelled_.store(true, std::memory_order_release); }

  // Writer.
  void SetCachedTokens(int64_t count) { cached_tokens_.store(count, std::memory_order_release); }
  // CHECK: not finished, within capacity.
  void Push(TokenEvent event);
  void Close(Finish finish);
  bool cancelled() const { return cancelled_.load(std::memory_order_acquire); }

 private:
  void Notify();

  const int64_t capacity_;
  const std::shared_ptr<ResponseSignal> signal_;
  std::atomic<bool> cancelled_{false};
  std::atomic<int64_t> cached_tokens_{0};
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<TokenEvent> events_;
  std::optional<Finish> finish_;
};

// The reader's handle: cancels when dropped.
class ResponseReader {
 public:
  explicit ResponseReader(std::shared_ptr<ResponseStream> stream) : stream_(std::move(stream)) {}
  ResponseReader(ResponseReader&&) = default;
  ResponseReader& operator=(ResponseReader&&) = delete;
  ~ResponseReader() {
    if (stream_) stream_->Cancel();
  }
  ResponseStream* operator->() const { return stream_.get(); }
  ResponseStream& operator*() const { return *stream_; }

 private:
  std::shared_ptr<ResponseStream> stream_;
};

// The handles of requests that were submitted together, in their order, and what wakes whoever
// reads them all.
struct ResponseGroup {
  std::vector<ResponseReader> readers;
  std::shared_ptr<ResponseSignal> signal;
};

// Errors: invalid argument with the parameter's name in `param` (OpenAI's names).
Result<void> ValidateSamplingParams(const SamplingParams& params, int64_t vocab_size);
// The same for all of a request, which must fit a context of `max_context` tokens.
Result<void> ValidateRequest(const Request& request, int64_t vocab_size, int64_t max_context);

}  // namespace innerq
