#include "engine/benchmark.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/engine/engine_test_util.h"
#include "tests/engine/llama_step_model.h"

namespace innerq {
namespace {

std::unique_ptr<ModelRunner> TinyRunner(const ModelRunnerOptions& options = TinyOptions()) {
  return ModelRunner::CreateRandom(TinyLlama(), /*seed=*/11, options).value();
}

TEST(Benchmark, RandomWeightsAreThoseOfTheirSeed) {
  ForwardBatch batch;
  batch.token_ids = {7};
  batch.positions = {0};
  batch.page_tables.push_back({PageRef{.open_id = 0}});
  batch.slices = {{.num_rows = 1, .pages = batch.page_tables[0]}};
  batch.logit_rows = {0};
  std::vector<std::vector<float>> logits;
  for (const uint64_t seed : {1, 1, 2}) {
    const auto runner = ModelRunner::CreateRandom(TinyLlama(), seed, TinyOptions()).value();
    const std::span<const float> row = runner->Step(batch).value();
    logits.emplace_back(row.begin(), row.end());
    EXPECT_EQ(runner->report().weight_bytes - runner->report().step_weight_bytes, 256 * 256 * 2)
        << "a step reads all but the table of embeddings";
  }
  EXPECT_EQ(logits[0], logits[1]);
  EXPECT_NE(logits[0], logits[2]);
}

TEST(Benchmark, EveryTokenIsComputedOnceInACacheThatHoldsThemAll) {
  const auto model = TinyRunner();
  KvCacheOptions exact;
  exact.exact_prefill = true;
  KvCacheOptions alone;
  alone.prefix_cache = false;
  // Prompts that fill steps, that end within them, and that look like decodes.
  const std::vector<BenchLoad> loads = {{.batch = 1, .prompt = 200, .generate = 40},
                                        {.batch = 4, .prompt = 180, .generate = 3},
                                        {.batch = 3, .depth = 170, .prompt = 65, .generate = 2},
                                        {.batch = 4, .depth = 1, .prompt = 1, .generate = 1},
                                        {.batch = 4, .depth = 192, .prompt = 1, .generate = 33},
                                        {.batch = 2, .prompt = 2, .generate = 5}};
  for (const KvCacheOptions& cache : {KvCacheOptions(), HalfPrecision(), exact, alone}) {
    for (const BenchLoad& load : loads) {
      int64_t computed = 0;
      const auto run = RunLoad(*model, cache, load, [&](int64_t more) {
        computed += more;
        return true;
      });
      ASSERT_TRUE(run.ok()) << run.error().message;
      EXPECT_EQ(computed, load.num_tokens());
      EXPECT_GT(run->prefill_seconds, 0);
      ASSERT_EQ(static_cast<int64_t>(run->step_seconds.size()), load.generate);
      for (const double seconds : run->step_seconds) EXPECT_GT(seconds, 0);
      const auto planned = PlanLoad(TinyLlama(), model->engine_options(), cache, load).value();
      EXPECT_EQ(run->cache_bytes, planned);
      EXPECT_GE(static_cast<double>(planned),
                run->bytes_per_token * static_cast<double>(load.num_tokens()));
    }
  }
}

TEST(Benchmark, AStepReadsWhatItsSequencesHaveWritten) {
  const auto model = TinyRunner();
  constexpr double kHalfBytes =
      2 * 2 * 2 * 64 * 2;  // of a token: layers, K and V, heads of 64, F16
  const BenchLoad load{.batch = 2, .depth = 100, .prompt = 60, .generate = 40};
  const BenchRun half = RunLoad(*model, HalfPrecision(), load, GoOn).value();
  EXPECT_NEAR(half.step_cache_bytes, 2 * kHalfBytes * (160 + 1 + 19.5), 1e-6);
  EXPECT_EQ(half.sealed_bits, 16);
  EXPECT_GE(half.bytes_per_token, kHalfBytes);

  // Position 160 is the first that reads a sealed page, 192 the first that reads two.
  const BenchRun three_bits = RunLoad(*model, {}, load, GoOn).value();
  constexpr double kPageBytes = 32 * kHalfBytes;
  constexpr double kSealedPages = (32 * 1 + 8 * 2) / 40.0;  // mean of a sequence
  EXPECT_NEAR(three_bits.step_cache_bytes,
              half.step_cache_bytes - 2 * kSealedPages * kPageBytes * (1 - 3.5 / 16), 1e-6);
  EXPECT_EQ(three_bits.sealed_bits, 3.5);
  EXPECT_LT(three_bits.bytes_per_token, half.bytes_per_token);
}

TEST(Benchmark, RefusesWhatTheModelDoesNotRunAndEndsWhenItIsTold) {
  const auto model = TinyRunner();
  const auto refusal = [&](const BenchLoad& load) {
    const Error error = RunLoad(*model, {}, load, GoOn).error();
    EXPECT_EQ(PlanLoad(TinyLlama(), model->engine_options(), {}, load).error().message,
              error.message);
    return error;
  };
  EXPECT_EQ(refusal({.batch = 5}).message, "a batch of 5 sequences; at most 4 run at once");
  EXPECT_EQ(refusal({.depth = 1000, .prompt = 24}).param, "scheduler.max_context");
  KvCacheOptions wide;
  wide.key.group_size = 128;
  EXPECT_EQ(RunLoad(*model, wide, {}, GoOn).error().param, "kv_cache.key.group_size");

  int64_t calls = 0;
  const auto stopped = RunLoad(*model, {}, {.prompt = 200}, [&](int64_t) { return ++calls < 2; });
  EXPECT_EQ(stopped.error().code, ErrorCode::kCancelled);
  EXPECT_EQ(calls, 2);
}

TEST(Benchmark, SpeedsAreThoseOfTheMedianRun) {
  const BenchLoad load{.batch = 2, .depth = 1000, .prompt = 30, .generate = 3};
  std::vector<BenchRun> runs(3);
  runs[0] = {.prefill_seconds = 2, .step_seconds = {1, 1, 1}};
  runs[1] = {.prefill_seconds = 9, .step_seconds = {0.5, 1.5, 4}};
  runs[2] = {.prefill_seconds = 1, .step_seconds = {9, 9, 9}};
  const BenchSpeed speed = Summarize(load, runs);
  EXPECT_DOUBLE_EQ(speed.prefill_tokens_per_second, 60 / 2.0);
  EXPECT_DOUBLE_EQ(speed.decode_tokens_per_second, 6 / 6.0);
  EXPECT_DOUBLE_EQ(speed.step_seconds, 2);
  EXPECT_DOUBLE_EQ(speed.total_tokens_per_second, 66 / 15.0);
}

TEST(CheckMemory, SaysWhatIsNeededAndWhatThereIs) {
  EXPECT_TRUE(CheckMemory(TinyLlama(), TinyOptions(), 1 << 20).ok());
  ModelConfig large = TinyLlama();
  large.num_layers = 1'000'000'000;
  const Error model = CheckMemory(large, TinyOptions(), 0).error();
  EXPECT_EQ(model.code, ErrorCode::kResourceExhausted);
  // A layer has 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 512 + 2 * 256 parameters, in BF16.
  EXPECT_EQ(model.message.substr(0, 51), "weights of 1180672000262656 bytes and a cache of 0 ")
      << model.message;
  // As codes of 3 bits, with a scale of 16 bits for each 64.
  large.low_bit = LowBitSpec{.bits = 3};
  ModelRunnerOptions codes = TinyOptions();
  codes.backend.device = "reference";
  const Error low_bit = CheckMemory(large, codes, 0).error();
  EXPECT_EQ(low_bit.message.substr(0, 32), "weights of 240640000262656 bytes") << low_bit.message;
  codes.dtype = WeightFormat::kBF16;
  const Error decoded = CheckMemory(large, codes, 0).error();
  EXPECT_EQ(decoded.message.substr(0, 33), "weights of 1180672000262656 bytes") << decoded.message;
  ModelRunnerOptions wide = TinyOptions();
  wide.dtype = WeightFormat::kF32;
  const Error cache = CheckMemory(TinyLlama(), wide, int64_t{1} << 60).error();
  EXPECT_NE(cache.message.find("a cache of 1152921504606846976 are more than cpu/"),
            std::string::npos)
      << cache.message;
}

}  // namespace
}  // namespace innerq
