#include "engine/self_check.h"

#include <gtest/gtest.h>

#include <random>

#include "tests/engine/engine_test_util.h"

namespace innerq {
namespace {

KvCacheOptions TwoBits() {
  KvCacheOptions options;
  options.memory_bytes = int64_t{8} << 20;
  options.key.bits = options.value.bits = 2;
  return options;
}

class SelfCheckTest : public testing::Test {
 protected:
  SelfCheckTest() {
    ModelRunnerOptions options;
    options.backend.threads = 1;
    options.kv_cache = TwoBits();
    options.engine.max_sequences = 4;
    options.engine.max_batch_tokens = 512;
    runner_ = ModelRunner::Create(TinyCheckpoint(), options).value();
    std::mt19937 random(1);
    for (int i = 0; i < 240; ++i) tokens_.push_back(static_cast<int32_t>(random() % 128));
  }

  // Every look at the clock takes a second.
  Result<SelfCheckReport> Check(const KvCacheOptions& kv_cache, double max_kl, double seconds) {
    return CheckCache(*runner_, TinyCheckpoint()->config(),
                      {.kv_cache = kv_cache,
                       .tokens = tokens_,
                       .max_kl = max_kl,
                       .seconds = seconds,
                       .now = [this] { return time_ += 1; }});
  }

  std::unique_ptr<ModelRunner> runner_;
  std::vector<int32_t> tokens_;
  double time_ = 0;
};

TEST_F(SelfCheckTest, BlamesTheLayersThatAreQuantized) {
  KvCacheOptions options = TwoBits();
  options.layers = {{.first_layer = 0,
                     .last_layer = 0,
                     .key = {.bits = 16},
                     .normalize_keys = false,
                     .value = {.bits = 16}}};
  const SelfCheckReport report = Check(options, 0, 1e6).value();
  EXPECT_TRUE(report.too_different);
  EXPECT_EQ(report.all.tokens, 239 - 160);
  EXPECT_GT(report.all.kl_mean, 0);
  ASSERT_EQ(report.layers.size(), 2u);
  EXPECT_EQ(report.layers[0].first_layer, 0);
  EXPECT_EQ(report.layers[0].last_layer, 0);
  EXPECT_EQ(report.layers[0].kl_mean, 0) << "it keeps F16";
  EXPECT_EQ(report.layers[1].first_layer, 1);
  EXPECT_EQ(report.layers[1].kl_mean, report.all.kl_mean) << "it is all that is quantized";
  EXPECT_GT(report.keys, 0);
  EXPECT_GT(report.values, 0);
}

TEST_F(SelfCheckTest, TellsKeysFromValues) {
  KvCacheOptions options = TwoBits();
  options.key.bits = 16;
  options.normalize_keys = false;
  const SelfCheckReport report = Check(options, 0, 1e6).value();
  EXPECT_EQ(report.keys, 0);
  EXPECT_EQ(report.values, report.all.kl_mean);
  EXPECT_GT(report.layers[0].kl_mean, 0);
  EXPECT_GT(report.layers[1].kl_mean, 0);
}

TEST_F(SelfCheckTest, LooksNoFurtherWhereTheCacheIsGoodEnough) {
  const SelfCheckReport report = Check(TwoBits(), 1000, 1e6).value();
  EXPECT_FALSE(report.too_different);
  EXPECT_GT(report.all.kl_mean, 0);
  EXPECT_TRUE(report.layers.empty());
  KvCacheOptions exact = TwoBits();
  exact.exact_prefill = true;
  EXPECT_NEAR(Check(exact, 1000, 1e6)->all.kl_mean, report.all.kl_mean, 0.5 * report.all.kl_mean)
      << "measured as an answer, or it would be 0";
}

TEST_F(SelfCheckTest, LeavesOutWhatTheTimeDoesNotAllow) {
  const double begin = time_;
  ASSERT_TRUE(Check(TwoBits(), 1000, 1e6).ok());
  const double one_run = (time_ - begin) / 2;  // two caches
  EXPECT_GE(one_run, 240 / 32) << "the whole text fits a step, but then who looks at the clock";
  const auto too_short = Check(TwoBits(), 0, one_run);
  ASSERT_FALSE(too_short.ok());
  EXPECT_EQ(too_short.error().code, ErrorCode::kCancelled);
  const SelfCheckReport no_layers = Check(TwoBits(), 0, 3 * one_run).value();
  EXPECT_TRUE(no_layers.too_different);
  EXPECT_TRUE(no_layers.layers.empty());
  // Keys, values and one group, a fifth of the time to spare.
  const SelfCheckReport together = Check(TwoBits(), 0, 6.5 * one_run).value();
  ASSERT_EQ(together.layers.size(), 1u);
  EXPECT_EQ(together.layers[0].last_layer, 1);
  EXPECT_EQ(together.layers[0].kl_mean, together.all.kl_mean);
}

}  // namespace
}  // namespace innerq
