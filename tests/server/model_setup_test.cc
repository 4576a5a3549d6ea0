#include "server/model_setup.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "tests/models/test_files.h"

namespace innerq {
namespace {

using nlohmann::json;

TEST(ModelSetup, AStopTokenThatTheModelDoesNotHaveIsRefusedByItsRole) {
  const std::filesystem::path demo = std::filesystem::path(INNERQ_SOURCE_DIR) / "models" / "demo";
  const TemporaryDirectory directory;
  std::filesystem::copy(demo, directory.path());
  const auto options =
      ParseOptions(json{{"model", {{"path", directory.path().string()}}}}.dump(), {});
  ASSERT_TRUE(options.ok()) << options.error().message;
  const auto refusal = [&]() -> std::string {
    const auto parts = LoadParts(*options);
    if (parts.ok()) return "none";
    EXPECT_EQ(parts.error().code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(parts.error().param, "model.path");
    return parts.error().message;
  };
  json config = json::parse(ReadAll(demo / "tokenizer_config.json"));
  json& added = config["added_tokens_decoder"];
  added["1024"] = added["4"];
  added["1024"]["content"] = "<end>";
  WriteAll(directory.path() / "tokenizer_config.json", config.dump());
  EXPECT_EQ(refusal(), "none") << "a token that nothing needs";

  config["eos_token"] = "<end>";
  WriteAll(directory.path() / "tokenizer_config.json", config.dump());
  EXPECT_EQ(refusal(),
            "model.path: the tokenizer's eos_token: expected a token id below vocab_size 1024 "
            "(config.json), found 1024");

  config["eos_token"] = "</s>";
  WriteAll(directory.path() / "tokenizer_config.json", config.dump());
  WriteAll(directory.path() / "chat_template.jinja",
           "{% for m in messages %}{{ m.role + ':' + m.content + '<end>' }}{% endfor %}");
  EXPECT_EQ(refusal(), "model.path: the end of a turn in the chat template " +
                           (directory.path() / "chat_template.jinja").string() +
                           ": expected a token id below vocab_size 1024 (config.json), found 1024");
}

TEST(ModelSetup, SaysHowLowBitWeightsAreHeld) {
  ModelConfig config;
  config.hidden_size = config.intermediate_size = 128;
  config.num_layers = config.num_heads = config.num_kv_heads = 2;
  config.head_dim = 64;
  config.vocab_size = config.max_positions = 100;
  Options options = ParseOptions("{}", {"backend.device=cuda"}).value();
  config.low_bit = LowBitSpec{.scheme = LowBitScheme::kPow2, .bits = 3, .group_size = 64};
  const std::string stored = "pow2 3-bit, groups of 64, activations 16-bit (3.25 bits per weight)";
  EXPECT_EQ(DescribeLowBit(config), stored);
  EXPECT_EQ(DescribeLowBit(options, config), stored);
  options.runner.dtype = WeightFormat::kF16;
  EXPECT_EQ(DescribeLowBit(options, config),
            stored + ", decoded to f16 (model.dtype), activations not rounded to bits");
  const auto report_has = [&](const std::string& text) {
    const std::vector<std::string> lines = DescribeModel(options, config, ModelReport());
    return std::any_of(lines.begin(), lines.end(), [&](const std::string& line) {
      return line.find(text) != std::string::npos;
    });
  };
  EXPECT_TRUE(report_has("weights: pow2 3-bit"));
  EXPECT_TRUE(report_has("decoded to f16"));
  config.low_bit.reset();
  EXPECT_FALSE(report_has("weights: "));
  config.low_bit = LowBitSpec{LowBitScheme::kUniform, 8, 0, 3};
  // A scale of 16 bits for each output of 128 inputs.
  EXPECT_EQ(DescribeLowBit(config),
            "uniform 8-bit, whole rows, activations 3-bit (8.12 bits per weight)");
  config.low_bit_scale = LowBitScale::kPow2;
  EXPECT_EQ(DescribeLowBit(config),
            "uniform 8-bit, whole rows, scales powers of two, activations 3-bit (8.12 bits per "
            "weight)");
  config.low_bit_head = LowBitSpec{LowBitScheme::kApot, 4, 64, 16};
  EXPECT_TRUE(report_has("weight); head apot 4-bit, decoded to f16"));
}

}  // namespace
}  // namespace innerq
