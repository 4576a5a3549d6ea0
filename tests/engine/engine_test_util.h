// Helpers of the tests that run an engine: a small model, collecting responses, holding a step, an
// oracle's answer.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/kv_cache.h"
#include "engine/model_runner.h"
#include "engine/sampler.h"
#include "gtest/gtest.h"
#include "models/checkpoint.h"
#include "tests/engine/hash_model.h"
#include "tests/models/test_files.h"

namespace innerq {

inline std::shared_ptr<const Checkpoint> TinyCheckpoint() {
  return Checkpoint::Open(TinyLlamaDirectory()).value();
}

inline KvCacheOptions HalfPrecision(int64_t memory_bytes = int64_t{1} << 30) {
  KvCacheOptions options;
  options.key.bits = options.value.bits = 16;
  options.memory_bytes = memory_bytes;
  return options;
}

// For one thread and little memory.
inline ModelRunnerOptions TinyOptions() {
  ModelRunnerOptions options;
  options.backend.threads = 1;
  options.kv_cache.memory_bytes = int64_t{8} << 20;
  options.engine.max_sequences = 4;
  options.engine.max_batch_tokens = 64;
  return options;
}

// Progress that stops nothing.
inline bool GoOn(int64_t) { return true; }

constexpr std::chrono::seconds kLong(60);  // only a defect makes a test wait so long

// All that came out of a stream.
struct Response {
  std::vector<TokenEvent> events;
  std::optional<Finish> finish;

  // Of the answer.
  std::vector<int32_t> tokens() const {
    std::vector<int32_t> ids;
    for (const TokenEvent& event : events) {
      if (!event.is_prompt) ids.push_back(event.token_id);
    }
    return ids;
  }
};

// Reads a stream to its end.
inline Response ReadAll(const ResponseReader& reader) {
  Response response;
  const auto deadline = std::chrono::steady_clock::now() + kLong;
  while (!response.finish.has_value() && std::chrono::steady_clock::now() < deadline) {
    for (TokenEvent& event : reader->NextBatch(kLong)) response.events.push_back(std::move(event));
    response.finish = reader->finish();
  }
  EXPECT_TRUE(response.finish.has_value()) << "the stream never ended";
  if (!response.finish.has_value()) response.finish.emplace();
  EXPECT_EQ(response.finish->usage.completion_tokens,
            static_cast<int64_t>(response.tokens().size()));
  EXPECT_EQ(response.finish->reason == FinishReason::kError, response.finish->error.has_value());
  return response;
}

// Holds whoever passes until it is opened or a pass is given.
class Gate {
 public:
  void Pass() {
    std::unique_lock lock(mutex_);
    ++num_arrived_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_ || num_passes_ > 0; });
    --num_passes_;
  }
  void Open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void LetOnePass() {
    const std::lock_guard lock(mutex_);
    ++num_passes_;
    changed_.notify_all();
  }
  // Waits until the gate has been reached `count` times in all.
  void AwaitArrivals(int count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return num_arrived_ >= count; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  int num_passes_ = 0;
  int num_arrived_ = 0;
};

// A prompt that no other `seed` shares.
inline std::vector<int32_t> PromptOf(int64_t length, uint64_t seed,
                                     int64_t vocab_size = hash_decoder::kVocab) {
  std::vector<int32_t> prompt;
  for (int64_t i = 0; i < length; ++i) {
    prompt.push_back(static_cast<int32_t>(HashOf(seed, static_cast<uint64_t>(i)) %
                                          static_cast<uint64_t>(vocab_size)));
  }
  return prompt;
}

inline Request RequestOf(int64_t prompt_length, int64_t max_tokens, uint64_t seed = 1) {
  Request request;
  request.prompt = PromptOf(prompt_length, seed);
  request.max_tokens = max_tokens;
  request.sampling.seed = seed;
  return request;
}

// What the hash decoder answers to a request, computed without engine, scheduler or pages.
inline std::vector<TokenEvent> OracleAnswer(const Request& request, const KvLayout& layout,
                                            bool exact_prefill) {
  hash_decoder::Oracle oracle(layout,
                              exact_prefill ? static_cast<int64_t>(request.prompt.size()) : 0);
  SamplerScratch scratch;
  std::vector<TokenEvent> events;
  std::vector<float> logits;
  for (const int32_t token : request.prompt) {
    if (!logits.empty() && request.prompt_logprobs >= 0) {
      events.push_back(Score(logits, token, request.prompt_logprobs, scratch).value());
      events.back().is_prompt = true;
    }
    logits = oracle.Next(token);
  }
  SeenTokens seen = SeenTokens::InPrompt(request.prompt);
  const std::set<int32_t> stops(request.stop_token_ids.begin(), request.stop_token_ids.end());
  for (int64_t i = 0; i < request.max_tokens; ++i) {
    SampleArgs args{logits, &request.sampling, &seen, {}, i};
    if (i < request.min_tokens) args.masked = request.stop_token_ids;
    events.push_back(Sample(args, scratch).value());
    const int32_t token = events.back().token_id;
    events.back().is_stop = stops.contains(token);
    if (events.back().is_stop) break;
    seen.AddToAnswer(token);
    logits = oracle.Next(token);
  }
  return events;
}

// Equal to the bit: tokens, log-probabilities, flags.
inline void ExpectSameEvents(const std::vector<TokenEvent>& actual,
                             const std::vector<TokenEvent>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(actual[i].token_id, expected[i].token_id) << "token " << i;
    EXPECT_EQ(actual[i].is_prompt, expected[i].is_prompt);
    EXPECT_EQ(actual[i].is_stop, expected[i].is_stop);
    EXPECT_EQ(actual[i].logprob, expected[i].logprob);
    ASSERT_EQ(actual[i].top.size(), expected[i].top.size());
    for (size_t j = 0; j < actual[i].top.size(); ++j) {
      EXPECT_EQ(actual[i].top[j].token_id, expected[i].top[j].token_id);
      EXPECT_EQ(actual[i].top[j].logprob, expected[i].top[j].logprob);
    }
  }
}

}  // namespace innerq
