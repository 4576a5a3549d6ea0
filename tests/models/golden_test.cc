// The forward pass against logits that other implementations computed.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "models/checkpoint.h"
#include "models/llama.h"
#include "tests/models/step_harness.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

using nlohmann::json;

constexpr int64_t kMaxRows = 256;

std::vector<BackendOptions> AllBackends() {
  std::vector<BackendOptions> all = {{.device = "reference"}, {.device = "cuda"}};
  for (const std::string& variant : CpuVariants()) {
    all.push_back({.device = "cpu", .variant = variant, .threads = 1});
  }
  return all;
}

// Largest |a - b|; infinite if the sizes differ or anything is NaN.
float MaxDifference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return INFINITY;
  float worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const float difference = std::abs(a[i] - b[i]);
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
  }
  return worst;
}

int32_t Argmax(const std::vector<float>& logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

class GoldenTest : public testing::TestWithParam<BackendOptions> {
 protected:
  void SetUp() override {
    const auto backend = CreateBackend(GetParam());
    if (!backend.ok() && GetParam().device == "cuda") GTEST_SKIP() << backend.error().message;
  }

  // Weights in F32, so that only the order of sums differs from the other implementation's.
  void Load(const std::filesystem::path& directory) {
    auto backend = CreateBackend(GetParam());
    ASSERT_TRUE(backend.ok()) << backend.error().message;
    backend_ = std::move(*backend);
    auto checkpoint = Checkpoint::Open(directory);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
    auto model =
        LlamaModel::Load(*checkpoint, backend_.get(), {kMaxRows, kMaxRows, WeightFormat::kF32, {}});
    ASSERT_TRUE(model.ok()) << model.error().message;
    model_ = std::move(*model);
  }

  std::vector<std::vector<float>> Run(const std::vector<int32_t>& tokens, int64_t chunk,
                                      const KvCacheSpec& spec) {
    const auto harness = StepHarness::Create(backend_.get(), spec, 1024);
    return harness == nullptr ? std::vector<std::vector<float>>()
                              : harness->Run(*model_, tokens, chunk);
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LlamaModel> model_;
};

// The golden run rounds keys and values to F16 as we do, but sums in another order, so now and then
// a value lands on the other side of a rounding boundary. In transformers itself F64 against F32
// arithmetic moves these logits (up to 5.2) by 2.7e-4 that way, and no rounding at all by 3.7e-3.
TEST_P(GoldenTest, TinyLlamaMatchesTransformersForEveryChunkSize) {
  ASSERT_NO_FATAL_FAILURE(Load(TinyLlamaDirectory()));
  const json golden = json::parse(ReadAll(TinyLlamaDirectory() / "logits.json"));
  const auto tokens = golden["token_ids"].get<std::vector<int32_t>>();
  for (const int64_t chunk : {int64_t{1000}, int64_t{32}, int64_t{7}, int64_t{1}}) {
    const auto logits = Run(tokens, chunk, UniformCacheSpec(model_->config()));
    ASSERT_EQ(logits.size(), tokens.size());
    float worst = 0, largest = 0;
    for (size_t i = 0; i < golden["positions"].size(); ++i) {
      const auto expected = golden["logits"][i].get<std::vector<float>>();
      const auto& actual = logits[golden["positions"][i].get<size_t>()];
      worst = std::max(worst, MaxDifference(actual, expected));
      for (const float x : expected) largest = std::max(largest, std::abs(x));
    }
    EXPECT_LE(worst, 1e-3f) << "chunks of " << chunk;
    EXPECT_GT(largest, 3.0f) << "the golden logits are too small to tell anything";
    RecordProperty("worst_" + std::to_string(chunk), std::to_string(worst));
  }
}

// The bound is 1e-3 of the largest logit (17.46): the golden logits come from a cache in F32, and
// rounding keys and values to F16, as we do, moves them by 8e-3 in transformers already.
TEST_P(GoldenTest, Stories260KContinuesAPromptWithTheGoldenTokens) {
  const auto directory = SharedPath("assets/models/stories260K-hf");
  SKIP_WITHOUT(directory);
  ASSERT_NO_FATAL_FAILURE(Load(directory));
  const json golden = json::parse(ReadAll(SharedPath("golden/stories260K_logits.json")));
  const auto prompt = golden["ids"].get<std::vector<int32_t>>();
  const auto expected = golden["last_logits"].get<std::vector<float>>();
  float largest = 0;
  for (const float x : expected) largest = std::max(largest, std::abs(x));
  EXPECT_GT(largest, 10.0f) << "the golden logits are too small to tell anything";
  const KvCacheSpec spec = UniformCacheSpec(model_->config());
  for (const int64_t chunk : {int64_t{1000}, int64_t{5}}) {
    const auto logits = Run(prompt, chunk, spec);
    ASSERT_EQ(logits.size(), prompt.size());
    EXPECT_LE(MaxDifference(logits.back(), expected), 1e-3f * largest) << "chunks of " << chunk;
  }
}

// Here keys and values pass through F16 on both sides. What is left is the order of F32 sums, and
// the keys and values that it rounds to the other F16 number: the golden file says how far those
// can move a row. Rows that they hardly move are held to 1e-3.
TEST_P(GoldenTest, Stories260KMatchesNumpyToAThousandth) {
  const auto directory = SharedPath("assets/models/stories260K-hf");
  SKIP_WITHOUT(directory);
  ASSERT_NO_FATAL_FAILURE(Load(directory));
  constexpr float kBound = 1e-3f;
  const json golden = json::parse(ReadAll(std::filesystem::path(INNERQ_SOURCE_DIR) /
                                          "tests/models/golden/stories260k_logits.json"));
  for (const int64_t chunk : {int64_t{1000}, int64_t{2}}) {
    int num_strict = 0;
    for (const json& row : golden) {
      const auto tokens = row["token_ids"].get<std::vector<int32_t>>();
      const auto moves = row["moves"].get<float>();
      const bool strict = moves <= kBound / 2;
      num_strict += strict;
      const auto logits = Run(tokens, chunk, UniformCacheSpec(model_->config()));
      ASSERT_EQ(logits.size(), tokens.size());
      const float off = MaxDifference(logits.back(), row["logits"].get<std::vector<float>>());
      const bool same_sums = backend_->name() == "reference";
      EXPECT_LE(off, strict || same_sums ? kBound : kBound + moves)
          << tokens.size() << " tokens, by " << chunk;
      RecordProperty("off_" + std::to_string(tokens.size()), std::to_string(off));
    }
    EXPECT_GE(num_strict, 6);
  }
}

TEST_P(GoldenTest, Stories260KGeneratesTheGoldenSixtyTokensGreedily) {
  const auto directory = SharedPath("assets/models/stories260K-hf");
  SKIP_WITHOUT(directory);
  ASSERT_NO_FATAL_FAILURE(Load(directory));
  const json golden = json::parse(ReadAll(SharedPath("golden/stories260K_logits.json")));
  const auto harness = StepHarness::Create(backend_.get(), UniformCacheSpec(model_->config()), 128);
  ASSERT_NE(harness, nullptr);
  std::vector<int32_t> tokens;
  int32_t token = golden["ids"][0];  // BOS
  while (tokens.size() < 60) {
    token = Argmax(harness->Step(*model_, {{0, {token}}}).front());
    tokens.push_back(token);
  }
  EXPECT_EQ(tokens, golden["greedy_continuation_ids"].get<std::vector<int32_t>>());
}

// Visibility is a matter of position alone, so the same bits come out however a prompt is cut.
TEST_P(GoldenTest, QuantizedCacheGivesTheSameBitsForEveryChunkSize) {
  ASSERT_NO_FATAL_FAILURE(Load(TinyLlamaDirectory()));
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < 240; ++i) tokens.push_back((i * 37 + i * i / 3) % 128);
  const QuantSpec three_bits{.bits = 3};
  const KvCacheSpec spec = UniformCacheSpec(model_->config(), three_bits, three_bits, true);
  const auto whole = Run(tokens, 1000, spec);
  const auto exact = Run(tokens, 1000, UniformCacheSpec(model_->config()));
  ASSERT_EQ(whole.size(), tokens.size());
  for (const int64_t chunk : {int64_t{1}, int64_t{31}, int64_t{64}}) {
    EXPECT_EQ(Run(tokens, chunk, spec), whole) << "chunks of " << chunk;
  }
  // Queries up to the fifth page see F16 only; those after it must see quantized pages.
  EXPECT_EQ(whole[159], exact[159]);
  EXPECT_GT(MaxDifference(whole.back(), exact.back()), 1e-3f);
}

TEST_P(GoldenTest, SequencesOfOneStepDoNotDisturbEachOther) {
  ASSERT_NO_FATAL_FAILURE(Load(TinyLlamaDirectory()));
  std::vector<int32_t> first, second;
  for (int32_t i = 0; i < 70; ++i) first.push_back((i * 31 + 5) % 128);
  for (int32_t i = 0; i < 40; ++i) second.push_back((i * 17 + 9) % 128);
  const KvCacheSpec spec = UniformCacheSpec(model_->config());
  const auto alone = Run(second, 1000, spec);
  const auto harness = StepHarness::Create(backend_.get(), spec, 128, 2);
  ASSERT_NE(harness, nullptr);
  const auto mixed = harness->Step(*model_, {{1, first}, {0, second}});
  ASSERT_EQ(mixed.size(), first.size() + second.size());
  for (size_t i = 0; i < second.size(); ++i) {
    EXPECT_EQ(mixed[first.size() + i], alone[i]) << "position " << i;
  }
}

std::string BackendName(const testing::TestParamInfo<BackendOptions>& backend) {
  if (backend.param.device != "cpu") return backend.param.device;
  return "cpu_" + backend.param.variant;
}

INSTANTIATE_TEST_SUITE_P(Backends, GoldenTest, testing::ValuesIn(AllBackends()), BackendName);

}  // namespace
}  // namespace innerq
