#include "engine/engine.h"

#include <atomic>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <thread>

#include "gtest/gtest.h"
#include "tests/engine/engine_test_util.h"

namespace innerq {
namespace {

constexpr PageCounts kPlenty{400, 400, 64};

EngineOptions OptionsOf(int64_t max_batch_tokens = 512, int64_t max_queue = 256) {
  EngineOptions options;
  options.max_sequences = 32;
  options.max_batch_tokens = max_batch_tokens;
  options.max_queue = max_queue;
  options.max_context = 600;
  return options;
}

std::unique_ptr<Engine> EngineOf(const EngineOptions& options, PageCounts pools = kPlenty,
                                 HashModel::Hook hook = nullptr, KvLayout layout = TestLayout(),
                                 int64_t max_logit_rows = 512) {
  return Engine::Create(options, std::make_unique<HashModel>(std::move(layout), pools,
                                                             std::move(hook), max_logit_rows))
      .value();
}

// At rest nothing is held and every accepted request has finished.
void ExpectAtRest(const Engine& engine) {
  const EngineStats stats = engine.Stats();
  EXPECT_EQ(stats.accepted, stats.finished);
  int64_t by_reason = 0;
  for (const auto& [reason, count] : stats.finished_by_reason) by_reason += count;
  EXPECT_EQ(by_reason, stats.finished);
  EXPECT_EQ(stats.running, 0);
  EXPECT_EQ(stats.waiting, 0);
  EXPECT_EQ(stats.open_pages_used, 0);
  EXPECT_EQ(stats.sealed_pages_used, 0);
}

// A request whose answer depends on all the state there is: penalties, random numbers, windows. Its
// prompt is scored.
Request HardRequest(int64_t prompt_length = 230, uint64_t seed = 5) {
  Request request = RequestOf(prompt_length, 70, seed);
  request.sampling.temperature = 0.8f;
  request.sampling.top_p = 0.95f;
  request.sampling.repetition_penalty = 1.1f;
  request.sampling.frequency_penalty = 0.3f;
  request.sampling.num_logprobs = 3;
  request.prompt_logprobs = 2;
  return request;
}

struct Schedule {
  int64_t max_batch_tokens;
  int num_neighbours;
  bool tiny_pools;
  int64_t max_logit_rows = 512;
};

class EngineExactness : public testing::TestWithParam<std::tuple<bool, bool>> {};

TEST_P(EngineExactness, AnswerDoesNotDependOnBatchChunksOrPreemption) {
  const auto [quantized, exact_prefill] = GetParam();
  const KvLayout layout = TestLayout(quantized);
  const Request request = HardRequest();
  const std::vector<TokenEvent> expected = OracleAnswer(request, layout, exact_prefill);
  for (const Schedule& schedule : {Schedule{512, 0, false},
                                   {512, 16, false},
                                   {1, 0, false},
                                   {32, 0, false},
                                   {33, 0, false},
                                   {33, 16, false},
                                   {512, 0, false, 32},
                                   {512, 16, false, 33},
                                   {1, 4, true},
                                   {40, 16, true},
                                   {512, 16, true},
                                   {512, 16, true, 50}}) {
    SCOPED_TRACE("batch " + std::to_string(schedule.max_batch_tokens) + ", neighbours " +
                 std::to_string(schedule.num_neighbours) + (schedule.tiny_pools ? ", tiny" : ""));
    EngineOptions options = OptionsOf(schedule.max_batch_tokens);
    options.max_context = 310;
    options.exact_prefill = exact_prefill;
    PageCounts pools = WorstPeakPages(layout, options.max_context, exact_prefill);
    if (!schedule.tiny_pools) pools = kPlenty;
    const auto engine = EngineOf(options, pools, nullptr, layout, schedule.max_logit_rows);
    // The request under test comes third, so that both older and younger ones disturb it. As one
    // group they meet in the first step, whatever the threads' pace.
    std::vector<Request> requests;
    for (int i = 0; i < schedule.num_neighbours; ++i) {
      const auto seed = static_cast<uint64_t>(100 + i);
      requests.push_back(RequestOf(20 + 15 * i, 20 + 5 * (i % 5), seed));
    }
    const auto tested = std::min<size_t>(2, requests.size());
    requests.insert(requests.begin() + static_cast<std::ptrdiff_t>(tested), request);
    const ResponseGroup group = engine->SubmitGroup(requests).value();
    int64_t prompt_tokens = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      SCOPED_TRACE("request " + std::to_string(i));
      ExpectSameEvents(ReadAll(group.readers[i]).events,
                       i == tested ? expected : OracleAnswer(requests[i], layout, exact_prefill));
      prompt_tokens += std::ssize(requests[i].prompt);
    }
    ExpectAtRest(*engine);
    EXPECT_EQ(engine->Stats().prompt_tokens, prompt_tokens) << "also of those computed again";
    if (schedule.tiny_pools && schedule.num_neighbours == 16) {
      EXPECT_GT(engine->Stats().preemptions, 0) << "the pools were too large";
      EXPECT_GT(engine->Stats().recomputed_tokens, 0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Caches, EngineExactness,
                         testing::Values(std::tuple(true, false), std::tuple(true, true),
                                         std::tuple(false, false)),
                         [](const auto& chosen) {
                           return std::string(std::get<0>(chosen.param) ? "Quantized" : "Plain") +
                                  (std::get<1>(chosen.param) ? "ExactPrefill" : "Served");
                         });

TEST(Engine, EndsAtMaxTokensOrAStopTokenAndCountsIt) {
  const KvLayout layout = TestLayout();
  const auto engine = EngineOf(OptionsOf());
  Request request = RequestOf(10, 40);
  const std::vector<TokenEvent> free = OracleAnswer(request, layout, false);
  Response response = ReadAll(engine->Submit(request).value());
  EXPECT_EQ(response.finish->reason, FinishReason::kLength);
  EXPECT_EQ(response.finish->usage.prompt_tokens, 10);
  EXPECT_EQ(response.finish->usage.completion_tokens, 40);
  EXPECT_EQ(response.finish->usage.cached_tokens, 0);
  ExpectSameEvents(response.events, free);

  // Stops at the first appearance of a token that comes later in the free answer.
  request.stop_token_ids = {free[20].token_id};
  size_t first = 0;
  while (free[first].token_id != free[20].token_id) ++first;
  response = ReadAll(engine->Submit(request).value());
  EXPECT_EQ(response.finish->reason, FinishReason::kStop);
  ASSERT_EQ(response.events.size(), first + 1);
  EXPECT_TRUE(response.events.back().is_stop);
  EXPECT_FALSE(response.events.front().is_stop && first > 0);

  request.min_tokens = static_cast<int64_t>(first) + 5;
  response = ReadAll(engine->Submit(request).value());
  EXPECT_GE(response.finish->usage.completion_tokens, request.min_tokens);
  ExpectSameEvents(response.events, OracleAnswer(request, layout, false));
  ExpectAtRest(*engine);
  EXPECT_EQ(engine->Stats().generation_tokens,
            40 + static_cast<int64_t>(first) + 1 + response.finish->usage.completion_tokens);
  EXPECT_EQ(engine->Stats().prompt_tokens, 30);
  EXPECT_GT(engine->Stats().finish_per_second, 0);
}

TEST(Engine, AConversationComputesOnlyWhatIsNew) {
  const KvLayout layout = TestLayout();
  const auto engine = EngineOf(OptionsOf());
  Request turn = RequestOf(200, 60, 7);
  int64_t computed = 0, lengths = 0;
  for (int i = 0; i < 4; ++i) {
    const ResponseReader reader = engine->Submit(turn).value();
    const Response response = ReadAll(reader);
    ExpectSameEvents(response.events, OracleAnswer(turn, layout, false));
    // The last page that was full when the answer ended; its last token was not fed back.
    const int64_t length = std::ssize(turn.prompt);
    const int64_t known = i == 0 ? 0 : (length - 1 - 10) / 32 * 32;
    EXPECT_EQ(response.finish->usage.cached_tokens, known) << "turn " << i;
    EXPECT_EQ(reader->cached_tokens(), known);
    computed += length - known;
    lengths += length;
    EXPECT_EQ(engine->Stats().prompt_tokens_computed, computed);
    EXPECT_EQ(engine->Stats().prompt_tokens, lengths);
    for (const int32_t token : response.tokens()) turn.prompt.push_back(token);
    for (const int32_t token : PromptOf(10, 50 + static_cast<uint64_t>(i))) {
      turn.prompt.push_back(token);
    }
  }
  ExpectAtRest(*engine);
  const EngineStats stats = engine->Stats();
  EXPECT_EQ(stats.prefix_cache_queries, 200 + 270 + 340 + 410);
  EXPECT_EQ(stats.prefix_cache_hits, stats.prefix_cache_queries - computed);
  EXPECT_GT(stats.open_pages_cached, 0);
  EXPECT_GT(stats.sealed_pages_cached, 0);
  EXPECT_EQ(stats.prefix_cache_evictions, 0);
}

// A request that is cancelled leaves what it has computed; one that fails does not spoil it.
TEST(Engine, WhatACancelledRequestHasComputedIsFound) {
  Gate gate;
  bool fails = false;
  EngineOptions options = OptionsOf(/*max_batch_tokens=*/64);
  const auto engine = EngineOf(options, kPlenty, [&](const ForwardBatch&) -> Result<void> {
    gate.Pass();
    if (fails) return Error{ErrorCode::kInternal, "for a while"};
    return {};
  });
  const Request request = RequestOf(250, 5, 9);
  std::optional<ResponseReader> cancelled(engine->Submit(request).value());
  for (int i = 0; i < 3; ++i) gate.LetOnePass();
  gate.AwaitArrivals(4);
  cancelled.reset();
  gate.LetOnePass();  // the fourth chunk, which nobody needs any more, is still computed
  const ResponseReader first = engine->Submit(request).value();
  gate.Open();
  const Response response = ReadAll(first);
  ExpectSameEvents(response.events, OracleAnswer(request, TestLayout(), false));
  EXPECT_EQ(response.finish->usage.cached_tokens, 7 * 32) << "page 7 is not full";
  fails = true;  // the engine is at rest
  EXPECT_EQ(ReadAll(engine->Submit(RequestOf(250, 5, 9)).value()).finish->reason,
            FinishReason::kError);
  fails = false;
  ExpectSameEvents(ReadAll(engine->Submit(request).value()).events,
                   OracleAnswer(request, TestLayout(), false));
  ExpectAtRest(*engine);
}

TEST(Engine, SharesNothingWithExactPrefillOrWhenToldNotTo) {
  for (const bool exact : {false, true}) {
    EngineOptions options = OptionsOf();
    options.exact_prefill = exact;
    options.prefix_cache = exact;
    const auto engine = EngineOf(options);
    for (int i = 0; i < 2; ++i) {
      const Response response = ReadAll(engine->Submit(RequestOf(250, 30)).value());
      EXPECT_EQ(response.finish->usage.cached_tokens, 0);
      ExpectSameEvents(response.events, OracleAnswer(RequestOf(250, 30), TestLayout(), exact));
    }
    EXPECT_EQ(engine->Stats().prefix_cache_queries, 0);
    EXPECT_EQ(engine->Stats().open_pages_cached, 0);
  }
}

// 20 requests of nine pages each: with what they share they fit the pools together.
TEST(Engine, RequestsThatShareALongBeginningRunTogether) {
  Gate gate;
  const KvLayout layout = TestLayout();
  // Alone each wants 6, 5 and 1; a sink, 4 sealed pages and the norm are shared.
  const PageCounts pools{20 * 5 + 1, 20 + 4, 2};
  const auto engine = EngineOf(
      OptionsOf(), pools,
      [&](const ForwardBatch&) {
        gate.Pass();
        return Result<void>();
      },
      layout);
  const auto request_of = [](uint64_t seed) {
    Request request = RequestOf(288, 5, 4);
    request.sampling.seed = seed;
    for (const int32_t token : PromptOf(12, seed)) request.prompt.push_back(token);
    return request;
  };
  for (int i = 0; i < 2 * 5; ++i) gate.LetOnePass();
  ReadAll(engine->Submit(request_of(1)).value());
  ReadAll(engine->Submit(request_of(2)).value());  // learns where they part
  std::vector<Request> requests;
  for (uint64_t seed = 10; seed < 30; ++seed) requests.push_back(request_of(seed));
  const ResponseGroup group = engine->SubmitGroup(requests).value();
  gate.AwaitArrivals(2 * 5 + 1);
  EXPECT_EQ(engine->Stats().running, 20);
  EXPECT_EQ(engine->Stats().waiting, 0);
  gate.Open();
  for (size_t i = 0; i < requests.size(); ++i) {
    const Response response = ReadAll(group.readers[i]);
    ExpectSameEvents(response.events, OracleAnswer(requests[i], layout, false));
    EXPECT_EQ(response.finish->usage.cached_tokens, 288);
  }
  EXPECT_EQ(engine->Stats().preemptions, 0);
  ExpectAtRest(*engine);
}

// Scoring is preempted in its middle, and goes on where it was when its tokens are back.
TEST(Engine, APreemptedPromptIsScoredOnce) {
  constexpr int32_t kFirst = 95;  // token of the prompt that is scored, and not of the elder
  const KvLayout layout = TestLayout();
  EngineOptions options = OptionsOf();
  options.max_context = 310;
  Gate gate;
  int num_starts = 0;
  int64_t num_computed = 0;  // of the prompt, before it was preempted
  const auto engine = EngineOf(
      options, WorstPeakPages(layout, options.max_context, false) + PageCounts{2, 0, 1},
      [&](const ForwardBatch& batch) {
        gate.Pass();
        for (const SequenceSlice& slice : batch.slices) {
          const int32_t token = batch.token_ids[static_cast<size_t>(slice.row_begin)];
          if (slice.first_position == 0 && token == kFirst) ++num_starts;
          const bool prefill = num_starts == 1 && slice.num_rows > 1;  // the elder decodes
          if (prefill) num_computed = slice.first_position + slice.num_rows;
        }
        return Result<void>();
      },
      layout, 36);
  Request scoring = RequestOf(300, 0, 3);
  scoring.prompt[0] = kFirst;
  scoring.prompt_logprobs = 1;
  Request elder = RequestOf(60, 200, 2);
  elder.prompt[0] = kFirst - 1;
  const ResponseReader other = engine->Submit(elder).value();
  gate.AwaitArrivals(1);
  const ResponseReader reader = engine->Submit(scoring).value();
  gate.Open();
  // When the elder reaches its fourth page, the prompt has to make room.
  const Response response = ReadAll(reader);
  ExpectSameEvents(response.events, OracleAnswer(scoring, layout, false));
  EXPECT_EQ(response.finish->reason, FinishReason::kLength);
  EXPECT_EQ(response.finish->usage.completion_tokens, 0);
  ExpectSameEvents(ReadAll(other).events, OracleAnswer(elder, layout, false));
  ExpectAtRest(*engine);
  EXPECT_EQ(engine->Stats().prompt_tokens, 300 + 60);
  EXPECT_EQ(num_starts, 2) << "the pools have the wrong size";
  EXPECT_GT(num_computed, 100);
  EXPECT_LT(num_computed, 299);
}

TEST(Engine, AnAnswerOfNoTokensEndsByItself) {
  const auto engine = EngineOf(OptionsOf());
  for (const int64_t length : {int64_t{1}, int64_t{2}, int64_t{600}}) {
    for (const bool scores : {false, true}) {
      Request request = RequestOf(length, 0);
      request.prompt_logprobs = scores ? 0 : -1;
      const Response response = ReadAll(engine->Submit(request).value());
      EXPECT_EQ(response.finish->reason, FinishReason::kLength);
      EXPECT_EQ(response.finish->usage.prompt_tokens, length);
      ExpectSameEvents(response.events, OracleAnswer(request, TestLayout(), false));
    }
  }
  EXPECT_EQ(engine->Stats().prompt_tokens_computed, 0 + 1 + 599)
      << "the last token need not be computed";
  EXPECT_EQ(engine->Stats().prompt_tokens, 2 * (1 + 2 + 600));
  EXPECT_EQ(engine->Stats().generation_tokens, 0);
  ExpectAtRest(*engine);
}

TEST(Engine, AGroupIsAcceptedAsAWholeOrNotAtAll) {
  Gate gate;
  EngineOptions options = OptionsOf(512, /*max_queue=*/10);
  options.max_sequences = 1;
  const auto engine = EngineOf(options, kPlenty, [&](const ForwardBatch&) {
    gate.Pass();
    return Result<void>();
  });
  const auto group_of = [](size_t size) { return std::vector<Request>(size, RequestOf(5, 3)); };
  const ResponseReader running = engine->Submit(RequestOf(5, 3)).value();
  gate.AwaitArrivals(1);
  const ResponseGroup first = engine->SubmitGroup(group_of(7)).value();
  EXPECT_EQ(engine->SubmitGroup(group_of(4)).error().code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(engine->Stats().accepted, 8) << "of the four that did not fit, none came in";
  std::vector<Request> flawed = group_of(2);
  flawed[1].prompt.clear();
  EXPECT_EQ(engine->SubmitGroup(flawed).error().param, "prompt");
  EXPECT_EQ(engine->SubmitGroup(group_of(11)).error().code, ErrorCode::kInvalidArgument)
      << "waiting would not help";
  EXPECT_EQ(engine->SubmitGroup({}).error().code, ErrorCode::kInvalidArgument);
  const ResponseGroup second = engine->SubmitGroup(group_of(3)).value();
  EXPECT_EQ(engine->Stats().waiting, 10);
  gate.Open();
  for (const ResponseGroup* group : {&first, &second}) {
    for (const ResponseReader& reader : group->readers) {
      EXPECT_EQ(ReadAll(reader).events.size(), 3u);
    }
  }
  ReadAll(running);
  ExpectAtRest(*engine);
}

TEST(Engine, AGroupThatIsDroppedIsCancelledAsAWhole) {
  Gate gate;
  EngineOptions options = OptionsOf(/*max_batch_tokens=*/16);
  options.max_sequences = 2;
  const auto engine = EngineOf(options, kPlenty, [&](const ForwardBatch&) {
    gate.Pass();
    return Result<void>();
  });
  {
    const std::vector<Request> requests(5, RequestOf(10, 500));
    const ResponseGroup group = engine->SubmitGroup(requests).value();
    gate.AwaitArrivals(1);
  }
  const ResponseReader next = engine->Submit(RequestOf(5, 3)).value();
  gate.Open();
  EXPECT_EQ(ReadAll(next).events.size(), 3u);
  ExpectAtRest(*engine);
  EXPECT_EQ(engine->Stats().finished_by_reason[FinishReason::kCancelled], 5);
}

// Whoever waits for a group hears of each of its tokens and endings.
TEST(Engine, AGroupWakesItsReader) {
  const auto engine = EngineOf(OptionsOf());
  std::vector<Request> requests;
  for (uint64_t seed = 1; seed <= 6; ++seed) requests.push_back(RequestOf(10, 20, seed));
  const ResponseGroup group = engine->SubmitGroup(requests).value();
  std::vector<Response> responses(requests.size());
  size_t num_finished = 0;
  while (num_finished < requests.size()) {
    group.signal->Wait(kLong);
    for (size_t i = 0; i < requests.size(); ++i) {
      if (responses[i].finish) continue;
      const ResponseReader& reader = group.readers[i];
      for (TokenEvent& event : reader->NextBatch(std::chrono::milliseconds(0))) {
        responses[i].events.push_back(std::move(event));
      }
      responses[i].finish = reader->finish();
      if (responses[i].finish) ++num_finished;
    }
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    ExpectSameEvents(responses[i].events, OracleAnswer(requests[i], TestLayout(), false));
  }
}

TEST(Engine, AcceptsARequestThatFillsTheContextAndRefusesALongerOne) {
  const KvLayout layout = TestLayout();
  EngineOptions options = OptionsOf();
  options.max_context = 400;
  const auto engine = EngineOf(options, WorstPeakPages(layout, 399, false));
  EXPECT_EQ(ReadAll(engine->Submit(RequestOf(350, 50)).value()).events.size(), 50u);
  const auto refused = engine->Submit(RequestOf(350, 51));
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(refused.error().param, "max_tokens");
  EXPECT_FALSE(engine->Submit(RequestOf(10, std::numeric_limits<int64_t>::max())).ok());
  EXPECT_FALSE(engine->Submit(RequestOf(400, 1)).ok());
  EXPECT_EQ(engine->Stats().accepted, 1) << "what is refused is not accepted";
}

TEST(Engine, RefusesRequestsThatMakeNoSense) {
  const auto engine = EngineOf(OptionsOf());
  const auto refused = [&](const char* param, const std::function<void(Request&)>& change) {
    Request request = RequestOf(10, 10);
    change(request);
    const auto result = engine->Submit(request);
    ASSERT_FALSE(result.ok()) << param;
    EXPECT_EQ(result.error().code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(result.error().param, param);
  };
  refused("prompt", [](Request& r) { r.prompt.clear(); });
  refused("prompt", [](Request& r) { r.prompt[3] = -1; });
  refused("prompt", [](Request& r) { r.prompt[3] = hash_decoder::kVocab; });
  refused("max_tokens", [](Request& r) { r.max_tokens = -1; });
  refused("max_tokens", [](Request& r) { r.prompt = PromptOf(601, 1); });
  refused("min_tokens", [](Request& r) { r.max_tokens = 0, r.min_tokens = 1; });
  refused("prompt_logprobs", [](Request& r) { r.prompt_logprobs = 21; });
  refused("prompt_logprobs", [](Request& r) { r.prompt_logprobs = -2; });
  refused("min_tokens", [](Request& r) { r.min_tokens = 11; });
  refused("min_tokens", [](Request& r) { r.min_tokens = -1; });
  refused("stop_token_ids", [](Request& r) { r.stop_token_ids = {hash_decoder::kVocab}; });
  refused("top_p", [](Request& r) { r.sampling.top_p = 2; });
  EXPECT_EQ(engine->Stats().accepted, 0);
}

TEST(Engine, RefusesToStartWithPoolsThatCannotHoldTheContext) {
  const KvLayout layout = TestLayout();
  PageCounts pools = WorstPeakPages(layout, 399, false);
  --pools.sealed;
  EngineOptions options = OptionsOf();
  options.max_context = 400;
  auto result = Engine::Create(options, std::make_unique<HashModel>(layout, pools));
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(result.error().param, "scheduler.max_context");
  options = OptionsOf(/*max_batch_tokens=*/0);
  result = Engine::Create(options, std::make_unique<HashModel>(layout, kPlenty));
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.error().param, "scheduler.max_batch_tokens");
}

TEST(Engine, RefusesWhatDoesNotFitTheQueueExactly) {
  Gate gate;
  EngineOptions options = OptionsOf(512, /*max_queue=*/10);
  options.max_sequences = 1;
  const auto engine = EngineOf(options, kPlenty, [&](const ForwardBatch&) {
    gate.Pass();
    return Result<void>();
  });
  std::vector<ResponseReader> readers;
  readers.push_back(engine->Submit(RequestOf(5, 3)).value());
  gate.AwaitArrivals(1);  // it runs, and no longer waits
  // Four wait in the scheduler by the time the others come.
  for (int i = 0; i < 4; ++i) readers.push_back(engine->Submit(RequestOf(5, 3)).value());
  gate.LetOnePass();
  gate.AwaitArrivals(2);
  std::mutex mutex;
  std::atomic<int> refused = 0;
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 64; ++i) {
      threads.emplace_back([&, i] {
        auto result = engine->Submit(RequestOf(5, 3, static_cast<uint64_t>(i)));
        const std::lock_guard lock(mutex);
        if (result.ok()) return readers.push_back(std::move(result).value());
        EXPECT_EQ(result.error().code, ErrorCode::kResourceExhausted);
        ++refused;
      });
    }
  }
  EXPECT_EQ(readers.size(), 11u);
  EXPECT_EQ(refused, 58);
  EXPECT_EQ(engine->Stats().waiting, 10);
  EXPECT_EQ(engine->Stats().running, 1);
  gate.Open();
  for (const ResponseReader& reader : readers) EXPECT_EQ(ReadAll(reader).events.size(), 3u);
  ExpectAtRest(*engine);
  EXPECT_TRUE(engine->Submit(RequestOf(5, 3)).ok()) << "there is room again";
}

// Memory pressure must not turn requests away that the queue has room for.
TEST(Engine, APreemptedRequestTakesNoPlaceInTheQueue) {
  Gate gate;
  EngineOptions options = OptionsOf(512, /*max_queue=*/1);
  options.max_context = 130;
  const KvLayout layout = TestLayout(/*quantized=*/false);
  const auto engine = EngineOf(
      options, {5, 0, 0},
      [&](const ForwardBatch&) {
        gate.Pass();
        return Result<void>();
      },
      layout);
  std::vector<ResponseReader> readers;
  int steps = 0;
  for (uint64_t seed = 1; seed <= 2; ++seed) {
    readers.push_back(engine->Submit(RequestOf(60, 60, seed)).value());
    if (steps > 0) gate.LetOnePass();
    gate.AwaitArrivals(++steps);
  }
  while (engine->Stats().preemptions == 0) {
    ASSERT_LT(steps, 100) << "there were pages enough";
    gate.LetOnePass();
    gate.AwaitArrivals(++steps);
  }
  EXPECT_EQ(engine->Stats().waiting, 1);
  auto third = engine->Submit(RequestOf(60, 60, 3));
  EXPECT_TRUE(third.ok());
  EXPECT_EQ(engine->Submit(RequestOf(60, 60, 4)).error().code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(engine->Stats().waiting, 2);
  if (third.ok()) readers.push_back(std::move(third).value());
  gate.LetOnePass();
  gate.AwaitArrivals(++steps);  // what was submitted has reached the scheduler
  EXPECT_EQ(engine->Submit(RequestOf(60, 60, 4)).error().code, ErrorCode::kResourceExhausted);
  gate.Open();
  for (size_t i = 0; i < readers.size(); ++i) {
    ExpectSameEvents(ReadAll(readers[i]).events,
                     OracleAnswer(RequestOf(60, 60, i + 1), layout, false));
  }
  ExpectAtRest(*engine);
}

TEST(Engine, ShowsHowFarRunningRequestsHaveCome) {
  Gate gate;
  EngineOptions options = OptionsOf(/*max_batch_tokens=*/64);
  options.max_sequences = 2;
  const auto engine = EngineOf(options, kPlenty, [&](const ForwardBatch&) {
    gate.Pass();
    return Result<void>();
  });
  EXPECT_TRUE(engine->Running().empty());
  std::vector<ResponseReader> readers;
  readers.push_back(engine->Submit(RequestOf(100, 9)).value());
  gate.AwaitArrivals(1);  // 64 rows
  for (int i = 0; i < 2; ++i) readers.push_back(engine->Submit(RequestOf(5, 7)).value());
  for (int step = 2; step <= 4; ++step) {  // 36 + 5 rows, then two steps of two
    gate.LetOnePass();
    gate.AwaitArrivals(step);
  }
  const std::vector<RunningRequest> running = engine->Running();
  ASSERT_EQ(running.size(), 2u);  // the third has no place
  EXPECT_EQ(running[0].number, 1);
  EXPECT_EQ(running[0].prompt_tokens, 100);
  EXPECT_EQ(running[0].computed_tokens, 101);
  EXPECT_EQ(running[0].generated_tokens, 2);
  EXPECT_EQ(running[0].max_tokens, 9);
  EXPECT_EQ(running[0].pages, 4);  // of 32 tokens
  EXPECT_EQ(running[1].number, 2);
  EXPECT_EQ(running[1].prompt_tokens, 5);
  EXPECT_EQ(running[1].computed_tokens, 6);
  EXPECT_EQ(running[1].pages, 1);
  gate.Open();
  for (const ResponseReader& reader : readers) ReadAll(reader);
  EXPECT_TRUE(engine->Running().empty());
}

TEST(Engine, EndsCancelledRequestsWhereverTheyAre) {
  Gate gate;
  EngineOptions options = OptionsOf(/*max_batch_tokens=*/16);
  options.max_sequences = 3;
  const auto engine = EngineOf(options, kPlenty, [&](const ForwardBatch&) {
    gate.Pass();
    return Result<void>();
  });
  const Request survivor = RequestOf(3, 100, 9);
  const ResponseReader living = engine->Submit(survivor).value();
  const ResponseReader decoding = engine->Submit(RequestOf(3, 500, 2)).value();
  const ResponseReader prefilling = engine->Submit(RequestOf(500, 5, 3)).value();
  const ResponseReader queued = engine->Submit(RequestOf(5, 5, 4)).value();
  gate.AwaitArrivals(1);
  for (const ResponseReader* reader : {&decoding, &prefilling, &queued}) (*reader)->Cancel();
  gate.Open();
  for (const ResponseReader* reader : {&decoding, &prefilling, &queued}) {
    const Response response = ReadAll(*reader);
    EXPECT_EQ(response.finish->reason, FinishReason::kCancelled);
    EXPECT_LE(response.events.size(), 1u);
  }
  ExpectSameEvents(ReadAll(living).events, OracleAnswer(survivor, TestLayout(), false));
  ExpectAtRest(*engine);
}

TEST(Engine, DroppedReadersCancelAtAnyPointAndNeighboursNeverNotice) {
  const KvLayout layout = TestLayout();
  EngineOptions options = OptionsOf(48);
  options.max_sequences = 6;
  options.max_context = 310;
  // Readers are dropped during the steps that they are filed under: queued, prefilling, decoding.
  std::mutex mutex;
  int64_t step = 0;
  std::multimap<int64_t, ResponseReader> doomed;
  const auto engine = EngineOf(options, WorstPeakPages(layout, 309, false) + PageCounts{4, 2, 1},
                               [&](const ForwardBatch&) {
                                 const std::lock_guard lock(mutex);
                                 doomed.erase(++step);
                                 return Result<void>();
                               });
  std::mt19937 random(3);
  const Request survivor = HardRequest();
  const std::vector<TokenEvent> expected = OracleAnswer(survivor, layout, false);
  for (int round = 0; round < 6; ++round) {
    std::optional<ResponseReader> reader;
    {
      const std::lock_guard lock(mutex);  // holds the steps until all are there
      for (uint64_t i = 0; i < 8; ++i) {
        if (i == 4) reader.emplace(engine->Submit(survivor).value());
        // Nobody gets as far as 80 tokens in 60 steps.
        doomed.emplace(step + 1 + random() % 60, engine->Submit(RequestOf(100, 80, i)).value());
      }
    }
    ExpectSameEvents(ReadAll(*reader).events, expected);
  }
  EXPECT_TRUE(engine->Drain(kLong));
  ExpectAtRest(*engine);
  EXPECT_EQ(engine->Stats().finished_by_reason[FinishReason::kCancelled], 6 * 8);
}

TEST(Engine, FailedStepEndsItsSequencesAndNoOthers) {
  std::atomic<bool> fail = true;
  const auto engine = EngineOf(OptionsOf(), kPlenty, [&](const ForwardBatch&) -> Result<void> {
    if (!fail.exchange(false)) return {};
    return Error{ErrorCode::kInternal, "a broken step"};
  });
  const Response first = ReadAll(engine->Submit(RequestOf(40, 5)).value());
  EXPECT_EQ(first.finish->reason, FinishReason::kError);
  EXPECT_EQ(first.finish->error->code, ErrorCode::kInternal);
  EXPECT_EQ(first.finish->error->message, "a broken step");
  EXPECT_TRUE(engine->ready());
  const Request next = RequestOf(40, 5, 2);
  ExpectSameEvents(ReadAll(engine->Submit(next).value()).events,
                   OracleAnswer(next, TestLayout(), false));
  ExpectAtRest(*engine);
}

TEST(Engine, LostDeviceEndsEverythingAndIsNotReady) {
  Gate gate;
  EngineOptions options = OptionsOf();
  options.max_sequences = 1;
  const auto engine = EngineOf(options, kPlenty, [&](const ForwardBatch&) -> Result<void> {
    gate.Pass();
    return Error{ErrorCode::kUnavailable, "the device is gone"};
  });
  std::vector<ResponseReader> readers;
  for (int i = 0; i < 5; ++i) readers.push_back(engine->Submit(RequestOf(10, 5)).value());
  gate.AwaitArrivals(1);
  readers.push_back(engine->Submit(RequestOf(10, 5)).value());
  gate.Open();
  for (const ResponseReader& reader : readers) {
    const Response response = ReadAll(reader);
    EXPECT_EQ(response.finish->reason, FinishReason::kError);
    EXPECT_EQ(response.finish->error->code, ErrorCode::kInternal) << "to try again does not help";
    EXPECT_EQ(response.finish->error->message, "the device is lost: the device is gone");
  }
  EXPECT_FALSE(engine->ready());
  EXPECT_EQ(engine->Submit(RequestOf(10, 5)).error().code, ErrorCode::kUnavailable);
  ExpectAtRest(*engine);
  EXPECT_FALSE(engine->Drain(std::chrono::milliseconds(0))) << "they did not finish by themselves";
}

// A model that returns NaN for the rows of one token.
class PoisonedModel : public HashModel {
 public:
  using HashModel::HashModel;
  Result<std::span<const float>> Step(const ForwardBatch& batch) override {
    ASSIGN_OR_RETURN(const std::span<const float> logits, HashModel::Step(batch));
    logits_.assign(logits.begin(), logits.end());
    for (size_t i = 0; i < batch.logit_rows.size(); ++i) {
      if (batch.token_ids[static_cast<size_t>(batch.logit_rows[i])] != 13) continue;
      logits_[i * hash_decoder::kVocab + 5] = std::numeric_limits<float>::quiet_NaN();
    }
    return std::span<const float>(logits_);
  }

 private:
  std::vector<float> logits_;
};

TEST(Engine, BrokenLogitsEndTheirRequestAlone) {
  const auto engine =
      Engine::Create(OptionsOf(), std::make_unique<PoisonedModel>(TestLayout(), kPlenty)).value();
  Request broken = RequestOf(10, 5);
  broken.prompt.back() = 13;
  Request healthy = RequestOf(10, 20, 2);
  healthy.sampling.logit_bias = {{13, -100.0f}};
  healthy.prompt.back() = 12;
  const ResponseReader a = engine->Submit(healthy).value();
  const ResponseReader b = engine->Submit(broken).value();
  const Response response = ReadAll(b);
  EXPECT_EQ(response.finish->reason, FinishReason::kError);
  EXPECT_EQ(response.finish->error->code, ErrorCode::kInternal);
  EXPECT_TRUE(response.events.empty());
  ExpectSameEvents(ReadAll(a).events, OracleAnswer(healthy, TestLayout(), false));
  ExpectAtRest(*engine);
}

// A model that cannot seal pages of sequences that began with one token.
class UnsealableModel : public HashModel {
 public:
  using HashModel::HashModel;
  Result<std::span<const float>> Step(const ForwardBatch& batch) override {
    ASSIGN_OR_RETURN(const std::span<const float> logits, HashModel::Step(batch));
    failed_.clear();
    for (const SequenceSlice& slice : batch.slices) {
      const bool begins = slice.first_position == 0;
      if (!begins || batch.token_ids[static_cast<size_t>(slice.row_begin)] != 13) continue;
      for (size_t i = 0; i < batch.seals.size(); ++i) {
        const bool owns = std::any_of(
            slice.pages.begin(), slice.pages.end(),
            [&](const PageRef& page) { return page.sealed_id == batch.seals[i].sealed_id; });
        if (owns) failed_.push_back(static_cast<int64_t>(i));
      }
    }
    std::sort(failed_.begin(), failed_.end());
    if (failed_.empty()) return logits;
    return Error{ErrorCode::kInternal, "non-finite key or value in the cache"};
  }
  std::vector<int64_t> failed_seals() const override { return failed_; }

 private:
  std::vector<int64_t> failed_;
};

TEST(Engine, PagesThatCannotBeSealedEndTheirRequestAlone) {
  EngineOptions options = OptionsOf(/*max_batch_tokens=*/1024);
  const auto engine =
      Engine::Create(options, std::make_unique<UnsealableModel>(TestLayout(), kPlenty)).value();
  std::vector<Request> requests;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    requests.push_back(RequestOf(230, 20, seed));
    requests.back().prompt.front() = seed % 2 == 0 ? 13 : 12;
  }
  const std::vector<Request> asked = requests;
  const ResponseGroup group = engine->SubmitGroup(std::move(requests)).value();  // one step
  for (size_t i = 0; i < asked.size(); ++i) {
    const Response response = ReadAll(group.readers[i]);
    if (asked[i].prompt.front() == 12) {
      ExpectSameEvents(response.events, OracleAnswer(asked[i], TestLayout(), false));
      continue;
    }
    EXPECT_EQ(response.finish->reason, FinishReason::kError);
    EXPECT_EQ(response.finish->error->code, ErrorCode::kInternal);
    EXPECT_TRUE(response.events.empty());
  }
  ExpectAtRest(*engine);
}

TEST(Engine, DrainFinishesWhatItAcceptedAndTakesNoMore) {
  Gate gate;
  const auto engine = EngineOf(OptionsOf(), kPlenty, [&](const ForwardBatch&) {
    gate.Pass();
    return Result<void>();
  });
  const ResponseReader reader = engine->Submit(RequestOf(10, 30)).value();
  gate.AwaitArrivals(1);
  std::atomic<bool> drained = false;
  std::jthread drainer([&] { drained = engine->Drain(kLong); });
  while (engine->ready()) std::this_thread::yield();
  EXPECT_EQ(engine->Submit(RequestOf(10, 5)).error().code, ErrorCode::kUnavailable);
  gate.Open();
  EXPECT_EQ(ReadAll(reader).finish->reason, FinishReason::kLength);
  drainer.join();
  EXPECT_TRUE(drained);
  ExpectAtRest(*engine);
}

TEST(Engine, DrainEndsWhatTakesTooLong) {
  std::atomic<int> steps = 0;
  const auto engine = EngineOf(OptionsOf(/*max_batch_tokens=*/1), kPlenty,
                               [&](const ForwardBatch&) -> Result<void> {
                                 ++steps;
                                 std::this_thread::sleep_for(std::chrono::milliseconds(2));
                                 return {};
                               });
  const ResponseReader reader = engine->Submit(RequestOf(500, 90)).value();
  EXPECT_FALSE(engine->Drain(std::chrono::milliseconds(20)));
  ExpectAtRest(*engine);
  const Response response = ReadAll(reader);
  EXPECT_EQ(response.finish->reason, FinishReason::kError);
  EXPECT_EQ(response.finish->error->code, ErrorCode::kUnavailable);
  EXPECT_LT(steps, 589);
}

TEST(Engine, DestructorEndsRequestsInFlight) {
  Gate gate;
  EngineOptions options = OptionsOf();
  options.max_sequences = 2;
  auto engine = EngineOf(options, kPlenty, [&](const ForwardBatch&) {
    gate.Pass();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // 500 tokens outlast the engine
    return Result<void>();
  });
  std::vector<ResponseReader> readers;
  for (int i = 0; i < 6; ++i) readers.push_back(engine->Submit(RequestOf(10, 500)).value());
  gate.AwaitArrivals(1);
  std::jthread destroyer([&] { engine.reset(); });
  gate.Open();
  for (const ResponseReader& reader : readers) {
    const Response response = ReadAll(reader);
    EXPECT_EQ(response.finish->reason, FinishReason::kError);
    EXPECT_EQ(response.finish->error->code, ErrorCode::kUnavailable);
  }
}

TEST(Engine, ServesSixtyFourThreadsThatSubmitReadAndLeave) {
  EngineOptions options = OptionsOf(96);
  options.max_context = 310;
  const KvLayout layout = TestLayout();
  const auto engine = EngineOf(options, WorstPeakPages(layout, 309, false) + PageCounts{40, 10, 4});
  std::atomic<int64_t> accepted = 0;
  std::atomic<int64_t> wrong = 0;
  {
    std::vector<std::jthread> threads;
    for (int thread = 0; thread < 64; ++thread) {
      threads.emplace_back([&, thread] {
        std::mt19937 random(static_cast<uint32_t>(thread));
        for (int i = 0; i < 3; ++i) {
          const auto seed = static_cast<uint64_t>(thread * 10 + i);
          const Request request = RequestOf(1 + random() % 60, 1 + random() % 20, seed);
          auto reader = engine->Submit(request);
          if (!reader.ok()) continue;
          ++accepted;
          if (random() % 4 == 0) continue;  // leaves at once
          const Response response = ReadAll(*reader);
          const auto expected = OracleAnswer(request, layout, false);
          bool same = response.events.size() == expected.size();
          for (size_t k = 0; same && k < expected.size(); ++k) {
            same = response.events[k].token_id == expected[k].token_id;
          }
          wrong += same ? 0 : 1;
        }
      });
    }
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(engine->Drain(kLong));
  ExpectAtRest(*engine);
  EXPECT_EQ(engine->Stats().accepted, accepted);
  EXPECT_GE(accepted, 100);
}

}  // namespace
}  // namespace innerq
