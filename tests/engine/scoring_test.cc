// Log-probabilities of prompts, through the engine and the cache, against other implementations'.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/engine.h"
#include "engine/model_runner.h"
#include "tests/engine/engine_test_util.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

using nlohmann::json;

double LogSoftmaxAt(const std::vector<float>& logits, int32_t id) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return logits[static_cast<size_t>(id)] - largest - std::log(sum);
}

// The log-probabilities of `tokens[1, n)`, by a model in F32 with a cache that keeps 16 bits, whose
// prompts are cut by `max_batch_tokens` and by the rows that may have logits.
std::vector<TokenEvent> Scores(const std::filesystem::path& directory,
                               const std::vector<int32_t>& tokens, int64_t max_batch_tokens) {
  ModelRunnerOptions options;
  options.dtype = WeightFormat::kF32;
  options.kv_cache.memory_bytes = int64_t{16} << 20;
  options.kv_cache.key.bits = options.kv_cache.value.bits = 16;
  options.engine.max_sequences = 2;
  options.engine.max_batch_tokens = max_batch_tokens;
  auto runner = ModelRunner::Create(Checkpoint::Open(directory).value(), options).value();
  const EngineOptions engine_options = runner->engine_options();
  const auto engine = Engine::Create(engine_options, std::move(runner)).value();
  Request request;
  request.prompt = tokens;
  request.max_tokens = 0;
  request.prompt_logprobs = 1;
  return ReadAll(engine->Submit(request).value()).events;
}

// Logits agree to 1e-3 (tests/models/golden_test.cc), and a log-softmax at most doubles that.
TEST(Scoring, TinyLlamaGivesTheLogProbabilitiesOfTransformers) {
  const auto directory = TinyLlamaDirectory();
  const json golden = json::parse(ReadAll(directory / "logits.json"));
  const auto tokens = golden["token_ids"].get<std::vector<int32_t>>();
  for (const int64_t max_batch_tokens : {512, 7}) {
    const std::vector<TokenEvent> scores = Scores(directory, tokens, max_batch_tokens);
    ASSERT_EQ(scores.size(), tokens.size() - 1);
    size_t num_compared = 0;
    for (size_t i = 0; i < golden["positions"].size(); ++i) {
      const auto position = golden["positions"][i].get<size_t>();
      if (position + 1 >= tokens.size()) continue;
      const auto logits = golden["logits"][i].get<std::vector<float>>();
      const TokenEvent& score = scores[position];
      EXPECT_EQ(score.token_id, tokens[position + 1]);
      EXPECT_NEAR(score.logprob, LogSoftmaxAt(logits, score.token_id), 2e-3);
      ASSERT_EQ(score.top.size(), 1u);
      EXPECT_NEAR(score.top[0].logprob, LogSoftmaxAt(logits, score.top[0].token_id), 2e-3);
      ++num_compared;
    }
    EXPECT_GE(num_compared, 3u);
  }
}

// The bound is that of the golden logits, see tests/models/golden_test.cc; what comes after them
// was chosen greedily, so every token must be the most likely one.
TEST(Scoring, Stories260KGivesTheGoldenLogProbabilities) {
  const auto directory = SharedPath("assets/models/stories260K-hf");
  SKIP_WITHOUT(directory);
  const json golden = json::parse(ReadAll(SharedPath("golden/stories260K_logits.json")));
  auto tokens = golden["ids"].get<std::vector<int32_t>>();
  const auto logits = golden["last_logits"].get<std::vector<float>>();
  for (int32_t token = 0; token < static_cast<int32_t>(logits.size()); token += 73) {
    auto prompt = tokens;
    prompt.push_back(token);
    const TokenEvent score = Scores(directory, prompt, 512).back();
    EXPECT_EQ(score.token_id, token);
    EXPECT_NEAR(score.logprob, LogSoftmaxAt(logits, token), 2e-3 * 17.5);
  }
  tokens.resize(1);  // the beginning of a sequence, which the golden continuation follows
  const auto greedy = golden["greedy_continuation_ids"].get<std::vector<int32_t>>();
  tokens.insert(tokens.end(), greedy.begin(), greedy.end());
  const std::vector<TokenEvent> scores = Scores(directory, tokens, 24);
  ASSERT_EQ(scores.size(), greedy.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    ASSERT_EQ(scores[i].top.size(), 1u);
    EXPECT_EQ(scores[i].top[0].token_id, greedy[i]) << "token " << i;
    EXPECT_EQ(scores[i].top[0].logprob, scores[i].logprob);
  }
}

}  // namespace
}  // namespace innerq
