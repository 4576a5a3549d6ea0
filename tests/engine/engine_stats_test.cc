// What the engine measures of requests and steps, and of the groups that were sealed.
#include <filesystem>

#include "engine/engine.h"
#include "engine/model_runner.h"
#include "gtest/gtest.h"
#include "tests/engine/engine_test_util.h"

namespace innerq {
namespace {

int64_t Count(const Histogram& histogram) {
  int64_t sum = 0;
  for (const int64_t count : histogram.counts()) sum += count;
  return sum;
}

TEST(Histogram, ABoundBelongsToTheBucketThatItEnds) {
  Histogram histogram({1, 2});
  for (const double value : {0.0, 1.0, 1.5, 2.0}) histogram.Observe(value);
  histogram.Observe(3.0, 2);
  EXPECT_EQ(histogram.counts(), (std::vector<int64_t>{2, 2, 2}));
  EXPECT_EQ(histogram.sum(), 10.5);
}

TEST(EngineStats, PhasesAreThoseThatARequestWentThrough) {
  Gate gate;
  EngineOptions options;
  options.max_sequences = 2;
  options.max_batch_tokens = 16;
  options.max_context = 600;
  const auto engine =
      Engine::Create(options, std::make_unique<HashModel>(TestLayout(), PageCounts{400, 400, 64},
                                                          [&](const ForwardBatch&) {
                                                            gate.Pass();
                                                            return Result<void>();
                                                          }))
          .value();
  const ResponseReader whole = engine->Submit(RequestOf(3, 20, 1)).value();
  const ResponseReader prefilling = engine->Submit(RequestOf(500, 5, 2)).value();
  const ResponseReader queued = engine->Submit(RequestOf(7, 5, 3)).value();
  gate.LetOnePass();
  gate.AwaitArrivals(2);  // both have had a step, the third waits for a place
  prefilling->Cancel();
  queued->Cancel();
  gate.Open();
  for (const ResponseReader* reader : {&whole, &prefilling, &queued}) ReadAll(*reader);

  const EngineStats stats = engine->Stats();
  EXPECT_EQ(Count(stats.queue_seconds), 2);
  EXPECT_EQ(Count(stats.prefill_seconds), 1);
  EXPECT_EQ(Count(stats.decode_seconds), 1);
  EXPECT_GT(stats.prefill_seconds.sum() + stats.decode_seconds.sum(), 0);
  EXPECT_EQ(Count(stats.request_prompt_tokens), 3);
  EXPECT_EQ(stats.request_prompt_tokens.sum(), 510);
  EXPECT_EQ(stats.request_generation_tokens.sum(), 20);
  EXPECT_EQ(Count(stats.step_tokens), stats.steps);
  EXPECT_EQ(stats.step_tokens.sum(),
            static_cast<double>(stats.prompt_tokens_computed + stats.generation_tokens - 1))
      << "the last token is never fed back";
  EXPECT_EQ(stats.prompt_tokens, 3) << "the others were never complete";
  EXPECT_TRUE(stats.sealed_groups.empty()) << "this model does not count";
}

// Of answers, too: what steps compute is what the requests need and what preemptions lost.
TEST(EngineStats, TokensComputedAgainAreCounted) {
  EngineOptions options;
  options.max_context = 130;
  options.prefix_cache = false;
  const auto engine =
      Engine::Create(options, std::make_unique<HashModel>(TestLayout(/*quantized=*/false),
                                                          PageCounts{5, 0, 0}))
          .value();
  const ResponseGroup group =
      engine->SubmitGroup({RequestOf(60, 60, 1), RequestOf(60, 60, 2)}).value();
  for (const ResponseReader& reader : group.readers) ReadAll(reader);
  const EngineStats stats = engine->Stats();
  EXPECT_GT(stats.preemptions, 0);
  const double needed = 2 * (60 + 60 - 1);
  EXPECT_EQ(stats.step_tokens.sum(), needed + static_cast<double>(stats.recomputed_tokens));
  EXPECT_GT(stats.recomputed_tokens, stats.prompt_tokens_computed - stats.prompt_tokens)
      << "tokens of the answer were lost as well";
}

TEST(EngineStats, GroupsOfEverySealedPageAreCountedPerLayer) {
  const auto checkpoint = TinyCheckpoint();
  for (const QuantCodec codec : {QuantCodec::kPaper, QuantCodec::kFitted}) {
    ModelRunnerOptions options;
    options.kv_cache.memory_bytes = int64_t{8} << 20;
    options.kv_cache.key.codec = options.kv_cache.value.codec = codec;
    options.kv_cache.layers = {
        {.first_layer = 0, .last_layer = 0, .value = {.mode = QuantMode::kHybrid}},
        {.first_layer = 1,
         .last_layer = 1,
         .key = {.mode = QuantMode::kAsymmetric, .group_size = 64},
         .value = {.bits = 16}}};
    auto runner = ModelRunner::Create(checkpoint, options).value();
    const KvLayout layout = runner->layout();
    const EngineOptions engine_options = runner->engine_options();
    const auto engine = Engine::Create(engine_options, std::move(runner)).value();
    Request request = RequestOf(200, 50);
    request.sampling.temperature = 0;
    ReadAll(engine->Submit(request).value());

    const EngineStats stats = engine->Stats();
    const int64_t pages = layout.SealedPages(248).size();
    ASSERT_GT(pages, 1);
    ASSERT_EQ(stats.sealed_groups.size(), 2u);
    const LayerGroups& first = stats.sealed_groups[0];
    const LayerGroups& second = stats.sealed_groups[1];
    EXPECT_EQ(first.key.groups, pages * 2 * 32 * 64 / 32);
    EXPECT_EQ(first.key.asymmetric, 0);
    EXPECT_EQ(first.value.groups, pages * 2 * 32 * 64 / 32);
    EXPECT_GT(first.value.asymmetric, 0);
    EXPECT_LT(first.value.asymmetric, first.value.groups);
    EXPECT_EQ(second.key.groups, pages * 2 * 32 * 64 / 64);
    EXPECT_EQ(second.key.asymmetric, second.key.groups);
    EXPECT_EQ(second.value.groups, 0);
  }
}

}  // namespace
}  // namespace innerq
