// What a runner reserves of the device grows with the caches that it is given.
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "engine/evaluate.h"
#include "engine/model_runner.h"

namespace innerq {
namespace {

constexpr int64_t kLongContext = 512, kShortContext = 64;

std::unique_ptr<ModelRunner> CudaRunner(int64_t max_context, bool tied = false,
                                        std::optional<WeightFormat> format = {}) {
  ModelConfig config;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_layers = 1;
  config.num_heads = 2;
  config.num_kv_heads = 1;
  config.head_dim = 64;
  config.vocab_size = 50;
  config.max_positions = kLongContext;
  config.tie_word_embeddings = tied;
  ModelRunnerOptions options;
  options.dtype = format;
  options.backend.device = "cuda";
  options.kv_cache.memory_bytes = int64_t{8} << 20;
  options.engine.max_context = max_context;
  options.engine.max_sequences = 1;
  options.engine.max_batch_tokens = kLongContext;
  auto runner = ModelRunner::CreateRandom(config, 3, options);
  CHECK(runner.ok(), runner.error().message);
  return std::move(*runner);
}

// The logits of a text's last tokens.
std::vector<float> LastLogits(ModelRunner& runner, int64_t length) {
  EvalText text;
  for (int64_t i = 0; i < length; ++i) text.tokens.push_back(static_cast<int32_t>(i * i % 47));
  text.first_scored = length - 3;
  std::vector<float> all;
  const auto take = [&all](int64_t, std::span<const float> logits) -> Result<void> {
    all.insert(all.end(), logits.begin(), logits.end());
    return {};
  };
  const Result<void> scored = ScoreText(runner, text, take, [](int64_t) { return true; });
  CHECK(scored.ok(), scored.error().message);
  return all;
}

// The long text seals more pages in one step than the short context has.
TEST(CudaRunner, GrowsWithALongerContext) {
  KvCacheOptions cache;
  cache.memory_bytes = int64_t{8} << 20;
  const auto runner = CudaRunner(kShortContext);
  const std::vector<float> before = LastLogits(*runner, kShortContext);
  const auto longer = runner->WithCache(cache, {.max_context = kLongContext}).value();
  EXPECT_GT(longer->layout().SealedPages(kLongContext - 1).size(), kShortContext / 32);
  const std::vector<float> grown = LastLogits(*longer, kLongContext);
  EXPECT_EQ(LastLogits(*runner, kShortContext), before);
  EXPECT_EQ(LastLogits(*CudaRunner(kLongContext), kLongContext), grown);
  EXPECT_EQ(LastLogits(*longer, kLongContext), grown);
}

// Logits of a tied model are held to other implementations' by GoldenTest.
TEST(CudaRunner, ATiedTableLiesInMemoryOnce) {
  constexpr int64_t kTable = 50 * 32;
  const auto bytes = [](bool tied, std::optional<WeightFormat> format) {
    const auto runner = CudaRunner(kShortContext, tied, format);
    LastLogits(*runner, kShortContext);
    EXPECT_EQ(runner->report().weight_bytes - runner->report().step_weight_bytes,
              tied && format != WeightFormat::kF32 ? 0 : kTable * 2);
    return runner->report().weight_bytes;
  };
  for (const auto& format : {std::optional<WeightFormat>(), std::optional(WeightFormat::kBF16)}) {
    EXPECT_EQ(bytes(false, format) - bytes(true, format), kTable * 2);
  }
  EXPECT_EQ(bytes(false, WeightFormat::kF32), bytes(true, WeightFormat::kF32))
      << "the head is another format than the table";
}

}  // namespace
}  // namespace innerq
