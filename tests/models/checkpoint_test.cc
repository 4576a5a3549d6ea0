#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>

#include "models/checkpoint.h"
#include "models/llama.h"
#include "tests/models/step_harness.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

using nlohmann::json;

constexpr char kConfig[] = R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 8,
  "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 4,
  "max_position_embeddings": 64})";

// A directory with a valid config.json, to put tensor files in.
class CheckpointTest : public testing::Test {
 protected:
  void SetUp() override { Write("config.json", kConfig); }
  void Write(const std::string& name, const std::string& bytes) {
    WriteAll(directory_.path() / name, bytes);
  }
  Result<std::shared_ptr<const Checkpoint>> Open() { return Checkpoint::Open(directory_.path()); }

  // Expects that a model.safetensors is refused with a message that names it and has `part`.
  void ExpectRefused(const std::string& bytes, const std::string& part,
                     const std::string& file = "model.safetensors") {
    if (file == "model.safetensors") Write(file, bytes);
    const auto checkpoint = Open();
    ASSERT_FALSE(checkpoint.ok()) << part;
    const std::string& message = checkpoint.error().message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_NE(message.find(file), std::string::npos) << message;
  }

  TemporaryDirectory directory_;
};

// A header entry of four F32.
std::string Entry(const std::string& name, const std::string& shape, const std::string& offsets,
                  const std::string& dtype = "F32") {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}

// A header padded so that the data is aligned.
std::string File(const std::string& entries, size_t data_bytes) {
  std::string header = "{" + entries + "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return Safetensors(header, std::string(data_bytes, '\1'));
}

TEST_F(CheckpointTest, MapsTensorsOfEveryDtypeSortedByName) {
  std::string floats(8, '\0');
  const float values[] = {1.5f, -2.0f};
  std::memcpy(floats.data(), values, sizeof(values));
  Write("model.safetensors", Safetensors({{"z", {2}, floats},
                                          {"a", {1, 2, 1, 1}, std::string(4, '\2'), "BF16"},
                                          {"m", {}, std::string(2, '\3'), "F16"},
                                          {"u", {3}, "\1\2\xff", "U8"}}));
  const auto checkpoint = Open();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
  const auto& tensors = (*checkpoint)->tensors();
  ASSERT_EQ(tensors.size(), 4u);
  EXPECT_EQ(tensors[0].name, "a");
  EXPECT_EQ(tensors[0].view.dtype, DType::kBF16);
  EXPECT_EQ(tensors[0].view.shape, (Shape{1, 2, 1, 1}));
  EXPECT_EQ(tensors[1].view.shape, Shape{});
  EXPECT_EQ((*checkpoint)->Find("z")->view.As<float>()[1], -2.0f);
  EXPECT_EQ((*checkpoint)->Find("y"), nullptr);
  const ConstTensorView bytes = (*checkpoint)->Find("u")->view;
  EXPECT_EQ(bytes.dtype, DType::kU8);
  EXPECT_EQ(bytes.bytes(), 3);
  EXPECT_EQ(ElementAsFloat(bytes, 2), 255.0f);
  EXPECT_TRUE((*checkpoint)->Get("z", {2}).ok());
  EXPECT_NE(
      (*checkpoint)->Get("u", {3}).error().message.find("tensor u: expected F32, F16 or BF16"),
      std::string::npos);
}

TEST_F(CheckpointTest, RefusesDamagedHeaders) {
  const std::string good = File(Entry("a", "[4]", "[0,16]"), 16);
  Write("model.safetensors", good);
  ASSERT_TRUE(Open().ok());
  ExpectRefused("", "empty");
  ExpectRefused(good.substr(0, 7), "too short");
  ExpectRefused(good.substr(0, 20), "truncated");
  std::string huge = good;
  huge.replace(0, 8, std::string(8, '\xff'));
  ExpectRefused(huge, "limit");
  ExpectRefused(Safetensors("{\"a\": ", ""), "not a JSON object");
  ExpectRefused(Safetensors("[]", ""), "not a JSON object");
  ExpectRefused(Safetensors("{\"\xff\": 1}", ""), "not a JSON object");
  ExpectRefused(Safetensors("{\"a\": 1}", ""), "tensor a: not an object");
  ExpectRefused(Safetensors(std::string(1'000'000, '['), ""), "not a JSON object");
}

TEST_F(CheckpointTest, NamesFilesThatGitLfsHasNotFetched) {
  const std::string pointer =
      "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976570304\n";
  ExpectRefused(pointer,
                "model.safetensors: is a Git LFS pointer; `git lfs pull` fetches the file");
  Write("config.json", pointer);
  ExpectRefused(pointer, "config.json: is a Git LFS pointer", "config.json");
}

TEST_F(CheckpointTest, RefusesDeeplyNestedHeadersAndIndices) {
  const std::string deep = DeepJson();
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return Safetensors("{\"a\":{\"dtype\":" + dtype + ",\"shape\":" + shape +
                           ",\"data_offsets\":" + offsets + "}}",
                       "");
  };
  ExpectRefused(Safetensors(deep, ""), "not a JSON object");
  ExpectRefused(Safetensors("{\"a\":" + deep + "}", ""), "tensor a: not an object");
  ExpectRefused(entry(deep, "[1]", "[0,4]"), "no \"dtype\"");
  ExpectRefused(entry("\"F32\"", deep, "[0,4]"), "not a number of elements");
  ExpectRefused(entry("\"F32\"", "[1]", deep), "two unsigned integers");
  ExpectRefused(entry("\"F32\"", "[1]", "[0," + deep + "]"), "two unsigned integers");
  Write("model.safetensors", Safetensors("{\"__metadata__\":" + deep + "}", ""));
  EXPECT_TRUE(Open().ok());  // nobody reads it

  std::filesystem::remove(directory_.path() / "model.safetensors");
  const std::string index = "model.safetensors.index.json";
  for (const std::string& text :
       {deep, "{\"weight_map\":" + deep + "}", "{\"weight_map\":{\"a\":" + deep + "}}"}) {
    Write(index, text);
    ExpectRefused("", "", index);
  }
}

TEST_F(CheckpointTest, RefusesEveryTruncationOfAGoodFile) {
  const std::string good =
      Safetensors({{"a", {4}, std::string(16, '\1')}, {"b", {2, 2}, std::string(16, '\2')}});
  for (size_t size = 0; size < good.size(); ++size) {
    Write("model.safetensors", good.substr(0, size));
    EXPECT_FALSE(Open().ok()) << size;
  }
}

TEST_F(CheckpointTest, RefusesTensorsThatDoNotFitTheirFile) {
  const std::string a = Entry("a", "[4]", "[0,16]") + ",";
  ExpectRefused(File(Entry("a", "[4]", "[0,16]"), 15), "truncated");
  ExpectRefused(File(Entry("a", "[4]", "[0,16]"), 17), "belong to no tensor");
  ExpectRefused(File(a + Entry("b", "[4]", "[8,24]"), 24), "tensor b: begins at byte 8");
  ExpectRefused(File(a + Entry("b", "[4]", "[0,16]"), 16), "overlap");
  ExpectRefused(File(a + Entry("b", "[4]", "[20,36]"), 36), "hole");
  ExpectRefused(File(a + Entry("a", "[4]", "[16,32]"), 32), "tensor a occurs twice");
}

TEST_F(CheckpointTest, RefusesShapesAndOffsetsThatDisagree) {
  ExpectRefused(File(Entry("a", "[5]", "[0,16]"), 16), "tensor a: data_offsets [0, 16)");
  ExpectRefused(File(Entry("a", "[4]", "[16,0]"), 16), "data_offsets [16, 0)");
  ExpectRefused(File(Entry("a", "[4]", "[-16,0]"), 16), "two unsigned integers");
  ExpectRefused(File(Entry("a", "[4]", "[0,16.0]"), 16), "two unsigned integers");
  ExpectRefused(File(Entry("a", "[4]", "[0]"), 16), "two unsigned integers");
  ExpectRefused(File(Entry("a", "[-4]", "[0,16]"), 16), "not a number of elements");
  ExpectRefused(File(Entry("a", "[4294967296,4294967296]", "[0,0]"), 0), "overflows");
  ExpectRefused(File(Entry("a", "[18446744073709551615]", "[0,16]"), 16),
                "not a number of elements");
  ExpectRefused(File(Entry("a", "[4]", "[18446744073709551600,18446744073709551616]"), 16),
                "two unsigned integers");
  ExpectRefused(File(Entry("a", "[4]", "[18446744073709551599,18446744073709551615]"), 16), "hole");
  ExpectRefused(File(Entry("a", "[1,1,1,1,4]", "[0,15]"), 15), "16 bytes, the size of F32 [1, 1");
  ExpectRefused(File(Entry("a", "[4]", "[0,16]", "I64"), 16), "32 bytes, the size of I64 [4]");
  ExpectRefused(File(Entry("a", "[3]", "[0,1]", "F4"), 1), "1 bytes and a part of one");
  ExpectRefused(File(Entry("a", "[0]", "[0,4]"), 4), "0 bytes, the size of F32 [0]");
  ExpectRefused(File(Entry("a", "[4]", "[0,16]", "INT"), 16),
                "tensor a: the format has no dtype INT");
  ExpectRefused(File(Entry("a", "[1]", "[0,2]", "F16") + "," + Entry("b", "[1]", "[2,6]"), 6),
                "not aligned");
}

TEST_F(CheckpointTest, TensorsThatNobodyAsksForMayBeOfAnyKind) {
  const std::string a = Entry("a", "[4]", "[0,16]");
  const auto with = [&](const std::string& shape, const std::string& dtype, int bytes) {
    const std::string end = std::to_string(16 + bytes);
    Write("model.safetensors", File(a + "," + Entry("x", shape, "[16," + end + "]", dtype),
                                    16 + static_cast<size_t>(bytes)));
    const auto checkpoint = Open();
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.error().message;
    return checkpoint.ok() ? *checkpoint : nullptr;
  };
  const std::pair<const char*, int> kDTypes[] = {
      {"BOOL", 12}, {"F4", 6},       {"F6_E2M3", 9},  {"F6_E3M2", 9},
      {"I8", 12},   {"F8_E5M2", 12}, {"F8_E4M3", 12}, {"F8_E8M0", 12},
      {"I16", 24},  {"U16", 24},     {"I32", 48},     {"U32", 48},
      {"C64", 96},  {"F64", 96},     {"I64", 96},     {"U64", 96}};
  for (const auto& [dtype, bytes] : kDTypes) {
    const auto checkpoint = with("[1,12]", dtype, bytes);
    ASSERT_NE(checkpoint, nullptr) << dtype;
    EXPECT_EQ(checkpoint->tensors().size(), 1u);
    EXPECT_TRUE(checkpoint->Get("a", {4}).ok());
    EXPECT_EQ(checkpoint->Find("x"), nullptr);
    EXPECT_TRUE(checkpoint->Has("x"));
    const auto asked = checkpoint->Get("x", {1, 12});
    ASSERT_FALSE(asked.ok());
    EXPECT_NE(asked.error().message.find("tensor x: expected F32, F16, BF16 or U8 [1, 12], found " +
                                         std::string(dtype) + " [1, 12]"),
              std::string::npos)
        << asked.error().message;
  }
  EXPECT_EQ(with("[1,1,1,1,4]", "F32", 16)->unreadable().at("x"), "F32 [1, 1, 1, 1, 4]");
  EXPECT_EQ(with("[0]", "F32", 0)->unreadable().at("x"), "F32 [0]");
  EXPECT_EQ(with("[4,0,2]", "I64", 0)->unreadable().at("x"), "I64 [4, 0, 2]");
  // One without elements may stand where another begins.
  Write("model.safetensors", File(a + "," + Entry("0", "[0]", "[0,0]"), 16));
  EXPECT_TRUE(Open().ok());
  // What the index says holds for them, too.
  std::filesystem::remove(directory_.path() / "model.safetensors");
  Write("one.safetensors", File(a, 16));
  Write("two.safetensors", File(Entry("x", "[1]", "[0,8]", "I64"), 8));
  const std::string index = "model.safetensors.index.json";
  Write(index, R"({"weight_map": {"a": "one.safetensors", "x": "two.safetensors"}})");
  ASSERT_TRUE(Open().ok());
  EXPECT_TRUE((*Open())->Has("x"));
  Write("two.safetensors", File(Entry("a", "[1]", "[0,8]", "I64"), 8));
  Write(index, R"({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})");
  ExpectRefused("", "tensor a is also in one.safetensors", "two.safetensors");
}

TEST_F(CheckpointTest, JoinsTheShardsOfAnIndex) {
  Write("one.safetensors", File(Entry("a", "[4]", "[0,16]"), 16));
  Write("two.safetensors", File(Entry("b", "[2]", "[0,8]"), 8));
  const std::string index = "model.safetensors.index.json";
  Write(index, R"({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})");
  const auto checkpoint = Open();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
  EXPECT_EQ((*checkpoint)->tensors().size(), 2u);

  Write(index, R"({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}})");
  ExpectRefused("", "tensor c is missing", "two.safetensors");
  Write(index, R"({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}})");
  ExpectRefused("", "tensor a is missing", "two.safetensors");
  Write(index, R"({"weight_map": {"a": "one.safetensors", "b": "three.safetensors"}})");
  ExpectRefused("", "No such file", "three.safetensors");
  Write("two.safetensors", File(Entry("a", "[2]", "[0,8]"), 8));
  Write(index, R"({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})");
  ExpectRefused("", "tensor a is also in one.safetensors", "two.safetensors");
}

TEST_F(CheckpointTest, RefusesIndicesThatLeaveTheirDirectory) {
  const std::string index = "model.safetensors.index.json";
  std::filesystem::create_directory(directory_.path() / "in");
  for (const char* name : {"../x.safetensors", "/etc/x.safetensors", "in/x.safetensors",
                           "in\\\\x.safetensors", "x.safetensors\\u0000", "x.bin", ".."}) {
    Write(index, std::string(R"({"weight_map": {"a": ")") + name + "\"}}");
    ExpectRefused("", "is not the name of a .safetensors file", index);
  }
  for (const char* text : {"{", "[]", "{}", R"({"weight_map": {}})", R"({"weight_map": [1]})"}) {
    Write(index, text);
    ExpectRefused("", "", index);
  }
  Write(index, R"({"weight_map": {"a": 1}})");
  ExpectRefused("", "tensor a", index);
}

TEST_F(CheckpointTest, NamesBothFilesWhenNeitherIsThere) {
  const auto checkpoint = Open();
  ASSERT_FALSE(checkpoint.ok());
  EXPECT_EQ(checkpoint.error().code, ErrorCode::kNotFound);
  EXPECT_NE(checkpoint.error().message.find("model.safetensors.index.json"), std::string::npos);
}

// The tiny model in other clothes: must be the same model.
class LlamaLoadTest : public testing::Test {
 protected:
  void SetUp() override {
    config_ = json::parse(ReadAll(TinyLlamaDirectory() / "config.json"));
    const auto checkpoint = Checkpoint::Open(TinyLlamaDirectory());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
    tensors_ = StoredTensors(**checkpoint);
    expected_ = Logits();
    ASSERT_EQ(expected_.size(), 3u);
  }

  StoredTensor& Tensor(const std::string& name) {
    const auto at = std::find_if(tensors_.begin(), tensors_.end(),
                                 [&](const StoredTensor& tensor) { return tensor.name == name; });
    EXPECT_NE(at, tensors_.end()) << name;
    return *at;
  }

  Result<std::unique_ptr<LlamaModel>> Load(std::function<bool(int64_t, int64_t)> progress = {}) {
    WriteAll(directory_.path() / "config.json", config_.dump());
    WriteAll(directory_.path() / "model.safetensors", Safetensors(tensors_));
    ASSIGN_OR_RETURN(auto checkpoint, Checkpoint::Open(directory_.path()));
    return LlamaModel::Load(checkpoint, backend_.get(), {8, 8, {}, std::move(progress)});
  }

  // Logits of three tokens; empty after a failure.
  std::vector<std::vector<float>> Logits() {
    const auto model = Load();
    EXPECT_TRUE(model.ok()) << model.error().message;
    if (!model.ok()) return {};
    const auto harness =
        StepHarness::Create(backend_.get(), UniformCacheSpec((*model)->config()), 32);
    return harness->Step(**model, {{0, {1, 70, 9}}});
  }

  void ExpectRefused(const std::string& part) {
    const auto model = Load();
    ASSERT_FALSE(model.ok()) << part;
    EXPECT_NE(model.error().message.find(part), std::string::npos) << model.error().message;
  }

  TemporaryDirectory directory_;
  std::unique_ptr<Backend> backend_ = CreateReferenceBackend();
  json config_;
  std::vector<StoredTensor> tensors_;
  std::vector<std::vector<float>> expected_;
};

TEST_F(LlamaLoadTest, ATiedMatrixMayBeStoredUnderEitherName) {
  Tensor("model.embed_tokens.weight").name = "lm_head.weight";
  EXPECT_EQ(Logits(), expected_);
}

TEST_F(LlamaLoadTest, AnUntiedModelReadsBothMatrices) {
  config_["tie_word_embeddings"] = false;
  ExpectRefused("tensor lm_head.weight: missing");
  StoredTensor head = Tensor("model.embed_tokens.weight");
  head.name = "lm_head.weight";
  tensors_.push_back(head);
  EXPECT_EQ(Logits(), expected_);
  std::fill(tensors_.back().bytes.begin(), tensors_.back().bytes.end(), '\0');
  EXPECT_EQ(Logits()[0], std::vector<float>(128, 0.0f));
}

TEST_F(LlamaLoadTest, RefusesTensorsThatConfigJsonDoesNotDescribe) {
  StoredTensor& query = Tensor("model.layers.1.self_attn.q_proj.weight");
  std::swap(query.shape[0], query.shape[1]);
  ExpectRefused(
      "tensor model.layers.1.self_attn.q_proj.weight: config.json asks for shape [256, 64], found "
      "[64, 256]");
  std::swap(query.shape[0], query.shape[1]);
  Tensor("model.layers.0.mlp.up_proj.bias").name = "something.else";
  ExpectRefused("tensor model.layers.0.mlp.up_proj.bias: missing");
  Tensor("something.else").name = "model.layers.0.mlp.up_proj.bias";
  config_["vocab_size"] = 129;
  ExpectRefused("tensor model.embed_tokens.weight: config.json asks for shape [129, 64]");
}

TEST_F(LlamaLoadTest, RefusesBiasesThatWouldGoUnused) {
  config_["mlp_bias"] = false;
  ExpectRefused("tensor model.layers.0.mlp.gate_proj.bias: config.json declares no bias");
  std::erase_if(tensors_, [](const StoredTensor& tensor) {
    return tensor.name.find("mlp") != std::string::npos && tensor.name.ends_with(".bias");
  });
  EXPECT_TRUE(Load().ok());
  StoredTensor stray = Tensor("model.norm.weight");
  stray.name = "model.layers.1.self_attn.rotary_emb.inv_freq";  // old checkpoints have it
  tensors_.push_back(stray);
  EXPECT_TRUE(Load().ok());
  config_["attention_bias"] = false;
  ExpectRefused("tensor model.layers.0.self_attn.q_proj.bias: config.json declares no bias");
}

TEST_F(LlamaLoadTest, TensorsOfOtherDTypesAreNoWeights) {
  tensors_.push_back({"model.position_ids", {1, 4}, std::string(32, '\0'), "I64"});
  EXPECT_EQ(Logits(), expected_);
  StoredTensor& norm = Tensor("model.norm.weight");
  norm.dtype = "I16";
  ExpectRefused("tensor model.norm.weight: expected F32, F16, BF16 or U8 [64], found I16 [64]");
  norm.dtype = "BF16";
  config_["mlp_bias"] = false;
  std::erase_if(tensors_, [](const StoredTensor& tensor) {
    return tensor.name.find("mlp") != std::string::npos && tensor.name.ends_with(".bias");
  });
  tensors_.push_back({"model.layers.0.mlp.up_proj.bias", {96}, std::string(192, '\0'), "I16"});
  ExpectRefused("tensor model.layers.0.mlp.up_proj.bias: config.json declares no bias");
}

TEST_F(LlamaLoadTest, AsksForTheMemoryOfAStepBeforeItReadsWeights) {
  const auto backend = CreateBackend({.device = "cpu", .threads = 1}).value();
  const auto checkpoint = Checkpoint::Open(TinyLlamaDirectory()).value();
  int64_t packed = 0;
  const auto note = [&](int64_t done, int64_t) {
    packed = done;
    return true;
  };
  const auto model = LlamaModel::Load(checkpoint, backend.get(), {int64_t{1} << 40, 8, {}, note});
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(model.error().code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(model.error().param, "scheduler.max_batch_tokens");
  EXPECT_EQ(packed, 0);
}

TEST_F(LlamaLoadTest, ReportsProgressUntilEveryTensorIsPacked) {
  std::vector<int64_t> done;
  int64_t total = 0;
  const auto model = Load([&](int64_t tensors, int64_t all) {
    done.push_back(tensors);
    total = all;
    return true;
  });
  ASSERT_TRUE(model.ok());
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
  EXPECT_EQ(done.back(), total);
  EXPECT_EQ(total, 21);  // 2 layers of 9, table, norm, head
  const auto stopped = Load([&](int64_t tensors, int64_t) { return tensors < 5; });
  ASSERT_FALSE(stopped.ok());
  EXPECT_EQ(stopped.error().code, ErrorCode::kCancelled);
}

TEST_F(LlamaLoadTest, ARandomModelIsAFunctionOfItsSeed) {
  ModelConfig config;
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.num_layers = 4;
  config.num_heads = 4;
  config.num_kv_heads = 1;
  config.head_dim = 16;
  config.vocab_size = 100;
  config.max_positions = 64;
  std::vector<std::vector<float>> logits;
  for (const uint64_t seed : {1, 1, 2}) {
    const auto model = LlamaModel::Random(config, WeightFormat::kBF16, seed, backend_.get(), 8, 8);
    ASSERT_TRUE(model.ok()) << model.error().message;
    const auto harness = StepHarness::Create(backend_.get(), UniformCacheSpec(config), 32);
    logits.push_back(harness->Step(**model, {{0, {5, 6, 7}}}).back());
  }
  EXPECT_EQ(logits[0], logits[1]);
  EXPECT_NE(logits[0], logits[2]);
  double squares = 0;
  for (const float x : logits[0]) squares += static_cast<double>(x) * x;
  // Unit rows times unit weights: each logit is about standard normal.
  EXPECT_GT(squares / 100, 0.5);
  EXPECT_LT(squares / 100, 2.0);
}

}  // namespace
}  // namespace innerq
