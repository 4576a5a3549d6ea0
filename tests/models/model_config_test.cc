#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "models/checkpoint.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

using nlohmann::json;

json Llama2Config() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 4096},
          {"intermediate_size", 11008},
          {"num_hidden_layers", 32},
          {"num_attention_heads", 32},
          {"num_key_value_heads", 32},
          {"vocab_size", 32000},
          {"max_position_embeddings", 4096},
          {"rms_norm_eps", 1e-5},
          {"hidden_act", "silu"},
          {"rope_scaling", nullptr},
          {"bos_token_id", 1},
          {"eos_token_id", 2}};
}

json Llama32Config() {  // Llama-3.2-1B
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 2048},
          {"intermediate_size", 8192},
          {"num_hidden_layers", 16},
          {"num_attention_heads", 32},
          {"num_key_value_heads", 8},
          {"head_dim", 64},
          {"vocab_size", 128256},
          {"max_position_embeddings", 131072},
          {"rms_norm_eps", 1e-5},
          {"tie_word_embeddings", true},
          {"rope_theta", 500000.0},
          {"rope_scaling",
           {{"rope_type", "llama3"},
            {"factor", 32.0},
            {"low_freq_factor", 1.0},
            {"high_freq_factor", 4.0},
            {"original_max_position_embeddings", 8192}}},
          {"bos_token_id", 128000},
          {"eos_token_id", {128001, 128008, 128009}}};
}

class ModelConfigTest : public testing::Test {
 protected:
  Result<ModelConfig> Read(const std::string& text) {
    WriteAll(directory_.path() / "config.json", text);
    return ReadModelConfig(directory_.path());
  }
  Result<ModelConfig> Read(const json& config) { return Read(config.dump()); }

  // Expects a refusal whose message names the file and `part`.
  void ExpectRefused(const Result<ModelConfig>& config, const std::string& part) {
    ASSERT_FALSE(config.ok()) << part;
    EXPECT_NE(config.error().message.find(part), std::string::npos) << config.error().message;
    EXPECT_NE(config.error().message.find("config.json"), std::string::npos)
        << config.error().message;
  }

  TemporaryDirectory directory_;
};

TEST_F(ModelConfigTest, ReadsLlama2WithImpliedDefaults) {
  const auto config = Read(Llama2Config());
  ASSERT_TRUE(config.ok()) << config.error().message;
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->rope_theta, 10000.0);
  EXPECT_EQ(config->rope_scaling.type, RopeScaling::Type::kNone);
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_EQ(config->eos_token_ids, std::vector<int32_t>{2});
  EXPECT_EQ(config->num_parameters(), 6738415616);  // Llama-2-7B, as published
}

TEST_F(ModelConfigTest, ReadsLlama32WithScaledRotaryEmbeddings) {
  const auto config = Read(Llama32Config());
  ASSERT_TRUE(config.ok()) << config.error().message;
  EXPECT_EQ(config->num_parameters(), 1235814400);  // Llama-3.2-1B, as published
  EXPECT_EQ(config->rope_scaling.type, RopeScaling::Type::kLlama3);
  EXPECT_EQ(config->rope_scaling.original_max_positions, 8192);
  EXPECT_EQ(config->eos_token_ids, (std::vector<int32_t>{128001, 128008, 128009}));
}

TEST_F(ModelConfigTest, ReadsRopeParametersAsNewerTransformersWriteThem) {
  json file = Llama32Config();
  file["rope_parameters"] = file["rope_scaling"];
  file["rope_parameters"]["rope_theta"] = 500000.0;
  const auto expected = Read(file);
  file.erase("rope_scaling");
  file.erase("rope_theta");
  const auto config = Read(file);
  ASSERT_TRUE(config.ok() && expected.ok());
  EXPECT_EQ(config->InverseFrequencies(), expected->InverseFrequencies());
}

TEST_F(ModelConfigTest, ReadsLinearScalingUnderBothOfItsNames) {
  for (const char* key : {"type", "rope_type"}) {
    json file = Llama2Config();
    file["rope_scaling"] = {{key, "linear"}, {"factor", 4.0}};
    const auto config = Read(file);
    ASSERT_TRUE(config.ok()) << config.error().message;
    EXPECT_EQ(config->InverseFrequencies()[0], 0.25f);
  }
}

TEST_F(ModelConfigTest, InverseFrequenciesEqualTransformersInAllThreeBands) {
  const auto directory = TinyLlamaDirectory();
  const auto config = ReadModelConfig(directory);
  ASSERT_TRUE(config.ok()) << config.error().message;
  const json golden = json::parse(ReadAll(directory / "logits.json"))["inverse_frequencies"];
  const std::vector<float> actual = config->InverseFrequencies();
  ASSERT_EQ(actual.size(), golden.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    const float expected = golden[i];
    // One unit of pow, one of the division, one of the interpolation.
    EXPECT_NEAR(actual[i], expected, 4 * 0x1p-24f * expected) << i;
  }
}

TEST_F(ModelConfigTest, ReadsMistralWhoseWindowIsOff) {
  json file = Llama2Config();
  file["architectures"] = {"MistralForCausalLM"};
  file["sliding_window"] = nullptr;
  EXPECT_TRUE(Read(file).ok());
  file["sliding_window"] = 4096;  // as long as the context
  EXPECT_TRUE(Read(file).ok());
  for (const int window : {4095, 1, 0, -1}) {
    file["sliding_window"] = window;
    ExpectRefused(Read(file), "sliding_window: expected");
  }
  file["use_sliding_window"] = true;
  ExpectRefused(Read(file), "sliding_window: expected");
  file["use_sliding_window"] = false;
  EXPECT_TRUE(Read(file).ok());
  file["use_sliding_window"] = 0;
  ExpectRefused(Read(file), "use_sliding_window: expected true or false");
}

TEST_F(ModelConfigTest, AbsentKeyValueHeadsAreThoseThatTransformersTakes) {
  json file = Llama2Config();
  for (const auto& [architecture, absent] :
       {std::pair("LlamaForCausalLM", 32), std::pair("MistralForCausalLM", 8)}) {
    file["architectures"] = {architecture};
    file["num_key_value_heads"] = nullptr;
    ASSERT_TRUE(Read(file).ok());
    EXPECT_EQ(Read(file)->num_kv_heads, 32);
    file.erase("num_key_value_heads");
    ASSERT_TRUE(Read(file).ok());
    EXPECT_EQ(Read(file)->num_kv_heads, absent) << architecture;
  }
}

TEST_F(ModelConfigTest, LlamaHasNoWindowWhateverItsFileSays) {
  json file = Llama2Config();
  for (const json& window : {json(1024), json(0), json(nullptr)}) {
    file["sliding_window"] = window;
    const auto config = Read(file);
    EXPECT_TRUE(config.ok()) << config.error().message;
  }
}

TEST_F(ModelConfigTest, AnAbsentWindowIsTheOneThatTransformersTakes) {
  json file = Llama2Config();
  file["architectures"] = {"MistralForCausalLM"};
  EXPECT_TRUE(Read(file).ok()) << "a window of 4096 in a context of 4096";
  file["max_position_embeddings"] = 4097;
  ExpectRefused(Read(file), "sliding_window");
  file["sliding_window"] = nullptr;
  EXPECT_TRUE(Read(file).ok());
  file.erase("sliding_window");
  file["architectures"] = {"LlamaForCausalLM"};
  EXPECT_TRUE(Read(file).ok()) << "Llama knows no window";
}

TEST_F(ModelConfigTest, HowManyDevicesAModelWasTrainedOnChangesNothing) {
  json file = Llama2Config();
  file["pretraining_tp"] = 2;  // as Llama-2-13B is published
  const auto config = Read(file);
  EXPECT_TRUE(config.ok()) << config.error().message;
}

TEST_F(ModelConfigTest, GenerationConfigReplacesTheEndTokens) {
  WriteAll(directory_.path() / "generation_config.json",
           R"({"bos_token_id": 1, "eos_token_id": [2, 7]})");
  const auto config = Read(Llama2Config());
  ASSERT_TRUE(config.ok()) << config.error().message;
  EXPECT_EQ(config->eos_token_ids, (std::vector<int32_t>{2, 7}));
  WriteAll(directory_.path() / "generation_config.json", R"({"eos_token_id": 32000})");
  const auto beyond = Read(Llama2Config());
  ASSERT_FALSE(beyond.ok());
  EXPECT_NE(beyond.error().message.find("generation_config.json: eos_token_id"), std::string::npos);
}

TEST_F(ModelConfigTest, WhatBeginsATextIsTheTokenizersBusiness) {
  json file = Llama2Config();
  file["bos_token_id"] = 32000;  // out of range, and never used
  const auto config = Read(file);
  EXPECT_TRUE(config.ok()) << config.error().message;
}

TEST_F(ModelConfigTest, RefusesWhatItCannotComputeByName) {
  const std::vector<std::pair<std::string, json>> unsupported = {
      {"architectures", {"Qwen2ForCausalLM"}},
      {"architectures", json::array()},
      {"hidden_act", "gelu"},
      {"quantization_config", {{"quant_method", "gptq"}}},
      {"partial_rotary_factor", 0.5},
      {"rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}},
      {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 2.0}}},
      {"rope_scaling", {{"rope_type", "linear"}}},
      {"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}},
      {"rope_scaling", "linear"},
  };
  for (const auto& [key, value] : unsupported) {
    json file = Llama2Config();
    file[key] = value;
    ExpectRefused(Read(file), key);
  }
}

TEST_F(ModelConfigTest, RefusesNumbersOutOfRangeByName) {
  const std::vector<std::pair<std::string, json>> bad = {
      {"hidden_size", 0},
      {"hidden_size", -4096},
      {"hidden_size", 4096.5},
      {"hidden_size", "4096"},
      {"hidden_size", 18446744073709551615u},
      {"hidden_size", 4097},  // 32 heads do not divide it
      {"head_dim", 63},
      {"head_dim", 258},
      {"num_key_value_heads", 5},
      {"num_key_value_heads", 0},
      {"num_hidden_layers", 1001},
      {"vocab_size", (1 << 24) + 1},
      {"rms_norm_eps", 0.0},
      {"rms_norm_eps", -1e-5},
      {"rope_theta", 0.5},
      {"tie_word_embeddings", "yes"},
      {"eos_token_id", 32000},
      {"eos_token_id", {2, -1}},
      {"max_position_embeddings", nullptr},
  };
  for (const auto& [key, value] : bad) {
    json file = Llama2Config();
    file[key] = value;
    ExpectRefused(Read(file), key);
  }
}

json SigmaConfig() {
  return {{"quant_method", "sigma"},
          {"scheme", "pow2"},
          {"bits", 3},
          {"group_size", 64},
          {"activation_bits", 8}};
}

TEST_F(ModelConfigTest, ReadsHowMatricesAreCoded) {
  json file = Llama2Config();
  EXPECT_EQ(Read(file)->low_bit, std::nullopt);
  file["quantization_config"] = nullptr;
  EXPECT_EQ(Read(file)->low_bit, std::nullopt);
  file["quantization_config"] = SigmaConfig();
  const auto config = Read(file);
  ASSERT_TRUE(config.ok()) << config.error().message;
  EXPECT_EQ(config->low_bit, (LowBitSpec{LowBitScheme::kPow2, 3, 64, 8}));
  EXPECT_EQ(config->num_parameters(), 6738415616) << "whatever they are stored in";
  // 32 layers of 4 C^2 + 3 C I weights, each group of 64 with a scale of 16 bits.
  constexpr int64_t kWeights = 32 * (4 * 4096ll * 4096 + 3 * 4096ll * 11008);
  EXPECT_EQ(config->num_layer_weights(), kWeights);
  EXPECT_EQ(config->low_bit_bytes(), kWeights / 64 * (64 * 3 + 16) / 8);

  file["quantization_config"]["scheme"] = "uniform";
  file["quantization_config"]["bits"] = 8;
  file["quantization_config"]["group_size"] = 0;
  const auto whole = Read(file);
  ASSERT_TRUE(whole.ok()) << whole.error().message;
  EXPECT_EQ(whole->low_bit, (LowBitSpec{LowBitScheme::kUniform, 8, 0, 8}));
  // A scale for each of 5 C + 2 I outputs.
  EXPECT_EQ(whole->low_bit_bytes(), kWeights + 32 * 2 * (5 * 4096 + 2 * 11008));

  EXPECT_EQ(whole->low_bit_scale, LowBitScale::kFree) << "what an absent key means";
  for (const auto& [name, scale] :
       {std::pair("free", LowBitScale::kFree), std::pair("pow2", LowBitScale::kPow2)}) {
    file["quantization_config"]["scale"] = name;
    ASSERT_TRUE(Read(file).ok());
    EXPECT_EQ(Read(file)->low_bit_scale, scale);
  }
}

TEST_F(ModelConfigTest, RefusesOtherQuantizationsByName) {
  json file = Llama2Config();
  file["quantization_config"] = {{"quant_method", "gptq"}, {"bits", 4}, {"desc_act", true}};
  ExpectRefused(Read(file),
                "config.json: quantization_config.quant_method: expected sigma, which `innerq "
                "quantize` makes and which alone is supported, found \"gptq\"");
  file["quantization_config"] = "sigma";
  ExpectRefused(Read(file), "quantization_config: expected an object");
  file["quantization_config"] = json::object();
  ExpectRefused(Read(file), "quantization_config.quant_method: missing");
}

TEST_F(ModelConfigTest, RefusesCodesThatDoNotExistByTheirKey) {
  const std::vector<std::pair<std::string, json>> bad = {
      {"scheme", "log2"},
      {"scheme", 2},
      {"bits", 1},
      {"bits", 5},
      {"bits", 8},  // of pow2
      {"bits", 9},
      {"bits", "3"},
      {"bits", 3.5},
      {"bits", 18446744073709551615u},
      {"group_size", -32},
      {"group_size", 16},
      {"group_size", 96},
      {"group_size", 256},
      {"group_size", "none"},
      {"activation_bits", 2},
      {"activation_bits", 5},
      {"activation_bits", 32},
      {"activation_bits", true},
      {"scale", "pow3"},
      {"scale", 2},
      {"alpha", 1.0},
      {"version", nullptr},
  };
  for (const auto& [key, value] : bad) {
    json file = Llama2Config();
    file["quantization_config"] = SigmaConfig();
    file["quantization_config"][key] = value;
    ExpectRefused(Read(file), "quantization_config." + key + ": expected");
  }
  const json good = SigmaConfig();
  for (const auto& [key, value] : good.items()) {
    json file = Llama2Config();
    file["quantization_config"] = good;
    file["quantization_config"].erase(key);
    ExpectRefused(Read(file), "quantization_config." + key + ": missing");
    file["quantization_config"][key] = nullptr;
    ExpectRefused(Read(file), "quantization_config." + key + ": missing");
    file["quantization_config"][key] = "here";
    std::string text = file.dump();
    text.replace(text.find("\"here\""), 6, DeepJson());
    ExpectRefused(Read(text), "quantization_config." + key);
  }
}

TEST_F(ModelConfigTest, ReadsHowTheHeadIsCoded) {
  json file = Llama2Config();
  json& config = file["quantization_config"] = SigmaConfig();
  EXPECT_EQ(Read(file)->low_bit_head, std::nullopt);
  config["head"] = nullptr;
  EXPECT_EQ(Read(file)->low_bit_head, std::nullopt);
  const json head = {
      {"scheme", "uniform"}, {"bits", 8}, {"group_size", 32}, {"activation_bits", 16}};
  config["head"] = head;
  const auto read = Read(file);
  ASSERT_TRUE(read.ok()) << read.error().message;
  EXPECT_EQ(read->low_bit_head, (LowBitSpec{LowBitScheme::kUniform, 8, 32, 16}));
  EXPECT_EQ(read->LowBitOf("lm_head"), read->low_bit_head);
  EXPECT_EQ(read->LowBitOf("model.layers.0.mlp.up_proj"), read->low_bit);
  EXPECT_EQ(read->low_bit_head_bytes(), 32000 * (4096 + 4096 / 32 * 2));

  config["head"] = "uniform";
  ExpectRefused(Read(file), "quantization_config.head: expected an object");
  for (const auto& [key, value] : head.items()) {
    config["head"] = head;
    config["head"].erase(key);
    ExpectRefused(Read(file), "quantization_config.head." + key + ": missing");
  }
  config["head"] = head;
  config["head"]["bits"] = 5;
  ExpectRefused(Read(file), "quantization_config.head.bits: expected");
  config["head"] = head;
  config["head"]["scale"] = "free";
  ExpectRefused(Read(file), "quantization_config.head.scale: expected");
  // A head of 32-wide groups can be had where layers have none of 64, but not the other way round.
  config["head"] = head;
  config["head"]["group_size"] = 128;
  config["group_size"] = 32;
  file["hidden_size"] = 4096 + 32;
  file["head_dim"] = 128;
  ExpectRefused(Read(file), "hidden_size: expected a multiple of 128 for quantization_config.head");
}

TEST_F(ModelConfigTest, SumsOfTwoPowersHaveFourBits) {
  json file = Llama2Config();
  file["quantization_config"] = SigmaConfig();
  file["quantization_config"]["scheme"] = "apot";
  ExpectRefused(Read(file), "quantization_config.bits: expected 4 for scheme apot, found 3");
  file["quantization_config"]["bits"] = 4;
  ASSERT_TRUE(Read(file).ok());
  EXPECT_EQ(Read(file)->low_bit->scheme, LowBitScheme::kApot);
}

TEST_F(ModelConfigTest, RefusesExtentsThatGroupsDoNotDivide) {
  json file = Llama2Config();
  file["quantization_config"] = SigmaConfig();
  file["intermediate_size"] = 11008 + 32;
  ExpectRefused(Read(file), "intermediate_size: expected a multiple of 64 for quantization_config");
  file["quantization_config"]["group_size"] = 32;
  EXPECT_TRUE(Read(file).ok());
  file["quantization_config"]["group_size"] = 0;
  EXPECT_TRUE(Read(file).ok());
  file["intermediate_size"] = 11008 + 16;
  ExpectRefused(Read(file), "intermediate_size: expected a multiple of 32 for quantization_config");
  file["intermediate_size"] = 11008;
  file["quantization_config"]["group_size"] = 128;
  file["head_dim"] = 66;  // 32 heads
  ExpectRefused(Read(file),
                "head_dim: expected that, times num_attention_heads 32, a multiple of 128");
  file["head_dim"] = 128;
  file["hidden_size"] = 4096 + 64;
  ExpectRefused(Read(file), "hidden_size: expected a multiple of 128 for quantization_config");
}

TEST_F(ModelConfigTest, RefusesFilesThatAreNotJsonObjects) {
  std::string infinite = Llama2Config().dump();
  infinite.replace(infinite.find("1e-05"), 5, "1e999");
  for (const std::string& text :
       {std::string("{"), std::string("[]"), std::string(1, '\0'), std::string("{\"a\": NaN}"),
        infinite, std::string(1'000'000, '[')}) {
    ExpectRefused(Read(text), "not a JSON object");
  }
  std::filesystem::remove(directory_.path() / "config.json");
  const auto absent = ReadModelConfig(directory_.path());
  ASSERT_FALSE(absent.ok());
  EXPECT_EQ(absent.error().code, ErrorCode::kNotFound);
}

TEST_F(ModelConfigTest, SurvivesDeeplyNestedValuesOfEveryKey) {
  json every_key = Llama2Config();
  for (const char* key :
       {"head_dim", "rope_theta", "rope_parameters", "quantization_config", "rope_interleaved",
        "partial_rotary_factor", "tie_word_embeddings", "attention_bias", "mlp_bias", "unknown"}) {
    every_key[key] = nullptr;
  }
  for (const auto& [key, value] : every_key.items()) {
    json file = Llama2Config();
    file[key] = "here";
    std::string text = file.dump();
    text.replace(text.find("\"here\""), 6, DeepJson());
    if (key == "unknown" || key == "bos_token_id") {
      EXPECT_TRUE(Read(text).ok());
    } else {
      ExpectRefused(Read(text), key);
    }
  }
  for (const char* key : {"sliding_window", "use_sliding_window"}) {
    json file = Llama2Config();
    file["architectures"] = {"MistralForCausalLM"};
    file[key] = "here";
    std::string text = file.dump();
    text.replace(text.find("\"here\""), 6, DeepJson());
    ExpectRefused(Read(text), key);
  }
  for (const char* key : {"rope_theta", "rope_type", "type", "partial_rotary_factor", "factor",
                          "low_freq_factor", "high_freq_factor"}) {
    json file = Llama32Config();
    if (key == std::string("type")) file["rope_scaling"].erase("rope_type");
    file["rope_scaling"][key] = "here";
    std::string text = file.dump();
    text.replace(text.find("\"here\""), 6, DeepJson());
    ExpectRefused(Read(text), std::string("rope_scaling.") + key);
  }
  WriteAll(directory_.path() / "generation_config.json",
           "{\"eos_token_id\": [" + DeepJson() + "]}");
  EXPECT_FALSE(Read(Llama2Config()).ok());
}

}  // namespace
}  // namespace innerq
