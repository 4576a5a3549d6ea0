#include "engine/evaluate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <random>

#include "engine/page_budget.h"
#include "models/tokenizer.h"
#include "tests/engine/engine_test_util.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

constexpr int64_t kMemory = int64_t{8} << 20;

KvCacheOptions ThreeBits() {
  KvCacheOptions options;
  options.memory_bytes = kMemory;
  return options;
}

std::unique_ptr<ModelRunner> TinyRunner(const KvCacheOptions& kv_cache,
                                        int64_t max_batch_tokens = 64) {
  ModelRunnerOptions options;
  options.backend.threads = 1;
  options.kv_cache = kv_cache;
  options.engine.max_sequences = 4;
  options.engine.max_batch_tokens = max_batch_tokens;
  return ModelRunner::Create(TinyCheckpoint(), options).value();
}

std::vector<int32_t> RandomTokens(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 128);
  return tokens;
}

using Runners = std::vector<std::unique_ptr<ModelRunner>>;

TEST(Evaluate, EqualCachesDivergeByExactlyNothing) {
  Runners runners;
  runners.push_back(TinyRunner(ThreeBits()));
  runners.push_back(runners[0]->WithCache(ThreeBits(), {.max_context = 256}).value());
  const std::vector<EvalText> texts = {{.tokens = RandomTokens(256, 1)},
                                       {.tokens = RandomTokens(200, 2)}};
  const auto scores = ScoreTexts(runners, texts, /*compare=*/true, GoOn).value();
  for (const CacheScores& cache : scores) {
    ASSERT_EQ(cache.tokens.size(), 255u + 199u);
    for (const TokenScore& score : cache.tokens) {
      EXPECT_EQ(score.divergence, 0.0);
      EXPECT_TRUE(score.same_top);
      EXPECT_TRUE(std::isfinite(score.nll));
    }
  }
  EXPECT_TRUE(std::equal(scores[0].tokens.begin(), scores[0].tokens.end(), scores[1].tokens.begin(),
                         [](const auto& a, const auto& b) { return a.nll == b.nll; }));
}

TEST(Evaluate, AQuantizedCacheDivergesWhereItsPagesAreReadAndNowhereElse) {
  Runners runners;
  runners.push_back(TinyRunner(HalfPrecision(kMemory)));
  runners.push_back(runners[0]->WithCache(ThreeBits(), {.max_context = 256}).value());
  const std::vector<EvalText> texts = {{.tokens = RandomTokens(256, 3)}};
  const auto scores = ScoreTexts(runners, texts, /*compare=*/true, GoOn).value();
  int64_t damaged = 0;
  for (const TokenScore& score : scores[1].tokens) {
    // Sink, three recent pages and the one that is written: position 160 is the first to see one.
    EXPECT_EQ(score.reads_sealed, score.position - 1 >= 160);
    EXPECT_EQ(score.divergence > 0, score.reads_sealed) << score.position;
    damaged += score.divergence > 0 ? 1 : 0;
  }
  EXPECT_EQ(damaged, 256 - 1 - 160);
  EXPECT_FALSE(scores[0].tokens.back().reads_sealed);
  EXPECT_GT(scores[0].effective_bits, 15.9);
  EXPECT_LT(scores[1].effective_bits, 13);
  EXPECT_GT(scores[1].effective_bits, 3.5);
}

// What the engine reports for the same tokens: bit for bit, whatever the steps' size.
TEST(Evaluate, ScoresAreThoseOfTheServedModel) {
  const std::vector<int32_t> tokens = RandomTokens(250, 4);
  Request request;
  request.prompt = tokens;
  request.max_tokens = 0;
  request.prompt_logprobs = 0;
  auto served = TinyRunner(ThreeBits(), 64);
  const auto other_steps = TinyRunner(ThreeBits(), 23);
  const auto same_steps = served->WithCache(ThreeBits(), {.max_context = 256}).value();
  const EngineOptions options = served->engine_options();
  const auto engine = Engine::Create(options, std::move(served)).value();
  const Response response = ReadAll(engine->Submit(std::move(request)).value());
  ASSERT_EQ(response.events.size(), 249u);
  for (ModelRunner* runner : {same_steps.get(), other_steps.get()}) {
    std::vector<float> logprobs;
    SamplerScratch scratch;
    ASSERT_TRUE(ScoreText(
                    *runner, {.tokens = tokens},
                    [&](int64_t position, std::span<const float> logits) -> Result<void> {
                      const int32_t token = tokens[static_cast<size_t>(position)];
                      ASSIGN_OR_RETURN(const LogitRow row, Normalize(logits));
                      ASSIGN_OR_RETURN(const TokenEvent event, Score(logits, token, 0, scratch));
                      EXPECT_NEAR(row.LogProbability(token), event.logprob, 1e-6);
                      logprobs.push_back(event.logprob);
                      return {};
                    },
                    GoOn)
                    .ok());
    ASSERT_EQ(logprobs.size(), 249u);
    for (size_t i = 0; i < logprobs.size(); ++i) {
      EXPECT_EQ(logprobs[i], response.events[i].logprob) << i;
    }
  }
}

// An answer that is scored as a text gets the probabilities with which it was written, also where
// its prompt alone attends to unquantized pages.
TEST(Evaluate, AForcedAnswerIsScoredAsItWasWritten) {
  for (const bool exact : {false, true}) {
    KvCacheOptions cache = ThreeBits();
    cache.exact_prefill = exact;
    auto runner = TinyRunner(cache);
    const auto scorer = runner->WithCache(cache, {.max_context = 256}).value();
    std::vector<Request> requests(1);
    requests[0].prompt = RandomTokens(190, 5);
    requests[0].sampling.temperature = 0;
    requests[0].sampling.num_logprobs = 0;
    requests[0].max_tokens = 60;
    EvalText text{.tokens = requests[0].prompt, .first_scored = 190, .prompt_length = 190};
    std::vector<float> written;
    const auto take = [&](size_t, const TokenEvent& event) {
      text.tokens.push_back(event.token_id);
      written.push_back(event.logprob);
      return true;
    };
    ASSERT_TRUE(AnswerAll(std::move(runner), std::move(requests), take, GoOn).ok());
    ASSERT_EQ(written.size(), 60u);
    Runners runners;
    runners.push_back(scorer->WithCache(cache, {.max_context = 256}).value());
    const auto scores = ScoreTexts(runners, std::vector{text}, /*compare=*/false, GoOn).value();
    ASSERT_EQ(scores[0].tokens.size(), 60u);
    for (size_t i = 0; i < written.size(); ++i) {
      // Sampling adds exponentials in F32, evaluation in double.
      EXPECT_NEAR(-scores[0].tokens[i].nll, written[i], 1e-6) << exact << " " << i;
      EXPECT_EQ(scores[0].tokens[i].position, 190 + static_cast<int64_t>(i));
    }
  }
}

TEST(Evaluate, SaysWhatItCannotScore) {
  const auto runner = TinyRunner(ThreeBits());
  const auto refusal = [&](std::vector<int32_t> tokens, const EvalProgress& progress) {
    const auto done = ScoreText(
        *runner, {.tokens = std::move(tokens)},
        [](int64_t, std::span<const float>) { return Result<void>(); }, progress);
    return done.ok() ? Error{} : done.error();
  };
  EXPECT_EQ(refusal(RandomTokens(257, 1), GoOn).message,
            "a text of 257 tokens does not fit a context of 256");
  EXPECT_EQ(refusal({1, 128}, GoOn).message, "the tokenizer gave token 128, the model has 128");
  int calls = 0;
  const Error stopped = refusal(RandomTokens(256, 1), [&calls](int64_t) { return ++calls < 2; });
  EXPECT_EQ(stopped.code, ErrorCode::kCancelled);
  EXPECT_EQ(calls, 2);
}

TEST(Evaluate, AnswersAllRequestsAndEndsThoseThatHaveSaidEnough) {
  auto runner = TinyRunner(ThreeBits());
  std::vector<Request> requests;
  for (uint32_t i = 0; i < 9; ++i) {  // more than run at once
    Request& request = requests.emplace_back();
    request.prompt = RandomTokens(10 + i, i);
    request.sampling.temperature = 0;
    request.max_tokens = 20;
  }
  std::vector<std::vector<int32_t>> expected;
  {
    auto alone = runner->WithCache(ThreeBits(), {.max_context = 256}).value();
    const EngineOptions options = alone->engine_options();
    const auto engine = Engine::Create(options, std::move(alone)).value();
    for (const Request& request : requests) {
      expected.push_back(ReadAll(engine->Submit(request).value()).tokens());
    }
  }
  std::vector<std::vector<int32_t>> answers(9);
  int64_t done = 0;
  const auto take = [&](size_t index, const TokenEvent& event) {
    answers[index].push_back(event.token_id);
    return index != 3 || answers[3].size() < 5;
  };
  const auto progress = [&done](int64_t more) {
    done += more;
    return true;
  };
  ASSERT_TRUE(AnswerAll(runner->WithCache(ThreeBits(), {.max_context = 256}).value(), requests,
                        take, progress)
                  .ok());
  EXPECT_EQ(done, 9);
  expected[3].resize(5);
  EXPECT_EQ(answers, expected);

  requests[4].prompt.clear();
  const auto refused = AnswerAll(runner->WithCache(ThreeBits(), {.max_context = 256}).value(),
                                 requests, take, progress);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().message.substr(0, 11), "request 5: ");
  requests[4].prompt = {1};
  const auto cancelled =
      AnswerAll(std::move(runner), requests, take, [](int64_t) { return false; });
  ASSERT_FALSE(cancelled.ok());
  EXPECT_EQ(cancelled.error().code, ErrorCode::kCancelled);
}

TEST(Evaluate, AsksAgainWhereTheQueueIsShorterThanWhatMayRun) {
  ModelRunnerOptions options;
  options.backend.threads = 1;
  options.kv_cache = ThreeBits();
  options.engine.max_sequences = 4;
  options.engine.max_queue = 1;
  std::vector<Request> requests(6);
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].prompt = RandomTokens(20, static_cast<uint32_t>(i));
    requests[i].sampling.temperature = 0;
    requests[i].max_tokens = 5;
  }
  std::vector<int64_t> tokens(requests.size());
  const auto take = [&](size_t index, const TokenEvent&) { return ++tokens[index] > 0; };
  const auto answered =
      AnswerAll(ModelRunner::Create(TinyCheckpoint(), options).value(), requests, take, GoOn);
  ASSERT_TRUE(answered.ok()) << answered.error().message;
  EXPECT_EQ(tokens, std::vector<int64_t>(requests.size(), 5));
}

TEST(Evaluate, FurtherCachesHaveThePagesThatTheirSequencesNeed) {
  const auto runner = TinyRunner(HalfPrecision(kMemory));
  for (const int bits : {2, 3, 8, 16}) {
    for (const bool exact : {false, true}) {
      for (const int64_t context : {2, 31, 33, 160, 161, 256}) {
        KvCacheOptions options;  // of 1 GiB
        options.key.bits = options.value.bits = bits;
        options.exact_prefill = exact;
        const auto scorer = runner->WithCache(
            options, {.max_context = context, .max_sequences = 1, .max_batch_tokens = 32});
        ASSERT_TRUE(scorer.ok()) << scorer.error().message;
        const KvPoolPlan& pools = (*scorer)->report().pools;
        const PageCounts need = WorstPeakPages((*scorer)->layout(), context, exact);
        EXPECT_TRUE(need.FitsIn({pools.open_pages, pools.sealed_pages, pools.norm_slots}));
        EXPECT_LE(pools.open_pages, need.open + 1) << "one for the rows of a step";
        EXPECT_EQ(pools.sealed_pages, need.sealed);
        EXPECT_LT(pools.bytes, int64_t{1} << 20);
        EXPECT_GE(pools.tokens_that_fit, context);
        ASSERT_TRUE(ScoreTokens(**scorer, {.tokens = RandomTokens(context, 1)}, nullptr, GoOn));
      }
    }
  }
}

TEST(Evaluate, LogitsThatNoMachineHoldsAreAnError) {
  const auto huge = ReferenceLogits::Create(int64_t{1} << 24, int64_t{1} << 24);
  ASSERT_FALSE(huge.ok());
  EXPECT_EQ(huge.error().code, ErrorCode::kResourceExhausted);
  EXPECT_TRUE(huge.error().message.starts_with(
      "the reference's logits of 16777216 tokens: cannot allocate 1125899906842624 bytes: "))
      << huge.error().message;
}

// Greedy answers are what their cache chooses, but for tokens that must not be written.
TEST(Evaluate, ScoresSayWhetherTheCacheWouldHaveChosenTheToken) {
  const auto runner = TinyRunner(ThreeBits());
  const auto ask = [&](std::vector<int32_t> stops) {
    std::vector<Request> requests(1);
    requests[0].prompt = RandomTokens(180, 5);
    requests[0].sampling.temperature = 0;
    requests[0].max_tokens = requests[0].min_tokens = 50;
    requests[0].stop_token_ids = stops;
    EvalText text{.tokens = requests[0].prompt,
                  .first_scored = 180,
                  .prompt_length = 180,
                  .never_chosen = std::move(stops)};
    const auto take = [&](size_t, const TokenEvent& event) {
      text.tokens.push_back(event.token_id);
      return true;
    };
    EXPECT_TRUE(AnswerAll(runner->WithCache(ThreeBits(), {.max_context = 256}).value(),
                          std::move(requests), take, GoOn));
    return text;
  };
  const auto chosen = [&](const EvalText& text) {
    const auto scores = ScoreTokens(*runner, text, nullptr, GoOn).value();
    return std::count_if(scores.begin(), scores.end(), [](const auto& s) { return s.chosen; });
  };
  const EvalText free = ask({});
  EXPECT_EQ(chosen(free), 50);
  EvalText banned = ask({free.tokens[180], free.tokens[190]});
  EXPECT_NE(banned.tokens, free.tokens);
  EXPECT_EQ(chosen(banned), 50);
  banned.never_chosen.clear();
  EXPECT_LT(chosen(banned), 50);
  banned.tokens[200] = (banned.tokens[200] + 1) % 128;
  EXPECT_FALSE(ScoreTokens(*runner, banned, nullptr, GoOn).value()[20].chosen);
}

// As models/perplexity_test.cc, but in the steps that serve.
TEST(Evaluate, Stories260KOnTinyStoriesIsWhatOthersMeasure) {
#if defined(INNERQ_SANITIZED)
  GTEST_SKIP() << "minutes under a sanitizer, for steps that the other tests show it";
#endif
  const std::filesystem::path directory = SharedPath("assets/models/stories260K-hf");
  const std::filesystem::path sample =
      SharedPath("assets/eval/tinystories/tinystories_sample_2MiB.txt");
  SKIP_WITHOUT(directory);
  SKIP_WITHOUT(sample);
  const auto tokenizer = Tokenizer::Load(directory).value();
  constexpr std::string_view kSeparator = "<|endoftext|>";
  const std::string all = ReadAll(sample);
  std::vector<EvalText> texts;
  for (size_t begin = 0; texts.size() < 50;) {
    const size_t end = all.find(kSeparator, begin);
    ASSERT_NE(end, std::string::npos);
    std::string document = all.substr(begin, end - begin);
    document.erase(0, document.find_first_not_of(" \t\r\n"));
    document.resize(document.find_last_not_of(" \t\r\n") + 1);
    begin = end + kSeparator.size();
    texts.push_back({.tokens = tokenizer->Encode(document, {})});
    texts.back().tokens.resize(std::min<size_t>(texts.back().tokens.size(), 512));
  }
  ModelRunnerOptions options;
  options.backend.threads = 1;
  options.kv_cache = HalfPrecision(kMemory);
  Runners runners;
  runners.push_back(ModelRunner::Create(Checkpoint::Open(directory).value(), options).value());
  const auto scores = ScoreTexts(runners, texts, /*compare=*/false, GoOn).value();
  const ScoreSummary summary = Summarize(scores[0].tokens, [](const TokenScore&) { return true; });
  EXPECT_EQ(summary.tokens, 16247);
  EXPECT_NEAR(summary.mean_nll, 1.2386, 0.001);
}

}  // namespace
}  // namespace innerq
