#include "models/tokenizer.h"

#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "tests/models/test_files.h"
#include "tests/models/tokenizer_test_util.h"

namespace innerq {
namespace {

using nlohmann::json;

std::filesystem::path Demo() { return std::filesystem::path(INNERQ_SOURCE_DIR) / "models/demo"; }

std::shared_ptr<const Tokenizer> Load(const std::filesystem::path& directory) {
  const auto tokenizer = Tokenizer::Load(directory);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.error().message;
  return tokenizer.ok() ? *tokenizer : nullptr;
}

// A directory with the Llama-2 model and a tokenizer_config.json.
std::shared_ptr<const Tokenizer> LoadWithConfig(const json& config) {
  TemporaryDirectory directory;
  std::filesystem::copy(Llama2() / "tokenizer.model", directory.path());
  WriteAll(directory.path() / "tokenizer_config.json", config.dump());
  return Load(directory.path());
}

TEST(TokenizerTest, EncodesTheLlama2VectorsOfLlamaCpp) {
  const auto vectors = SharedPath("assets/tokenizer_vectors/ggml-vocab-llama-spm.gguf");
  SKIP_WITHOUT(vectors);
  const auto tokenizer = Load(Llama2());
  ASSERT_NE(tokenizer, nullptr);
  std::string inputs = ReadAll(vectors.string() + ".inp");
  std::istringstream outputs(ReadAll(vectors.string() + ".out"));
  const std::string mark = "\n__ggml_vocab_test__\n";
  int count = 0;
  for (size_t at; (at = inputs.find(mark)) != inputs.npos; inputs.erase(0, at + mark.size())) {
    const std::string text = inputs.substr(0, at);
    std::string line;
    ASSERT_TRUE(std::getline(outputs, line));
    std::istringstream numbers(line);
    const Ids expected{std::istream_iterator<int32_t>(numbers), {}};
    EXPECT_EQ(tokenizer->Encode(text, kPlain), expected) << "case " << count << ": " << text;
    EXPECT_EQ(tokenizer->Decode(expected, false), text) << "case " << count;
    ++count;
  }
  EXPECT_EQ(count, 46);
}

TEST(TokenizerTest, EncodesAndDecodesTheLlama2VectorsOfTransformers) {
  const auto vectors = SharedPath("assets/tokenizer_vectors");
  SKIP_WITHOUT(vectors);
  const auto tokenizer = Load(Llama2());
  ASSERT_NE(tokenizer, nullptr);
  const json all = json::parse(ReadAll(vectors / "hf_tokenizer_tests.json"));
  const json& cases = all["coreml-projects/Llama-2-7b-chat-coreml"];
  EXPECT_EQ(cases.size(), 18u);
  for (const json& test : cases) {
    const Ids ids = tokenizer->Encode(test["input"].get<std::string>(), {});
    EXPECT_EQ(ids, test["encoded"]["input_ids"].get<Ids>()) << test["input"];
    EXPECT_EQ(tokenizer->Decode(ids, true), test["decoded_with_special"]);
    EXPECT_EQ(tokenizer->Decode(ids, false), test["decoded_without_special"]);
  }
  const json encoded = json::parse(ReadAll(vectors / "hf_llama_encoded.json"));
  const Ids ids = tokenizer->Encode(encoded["text"].get<std::string>(), {});
  EXPECT_EQ(ids, encoded["token_ids"].get<Ids>());
  EXPECT_EQ(tokenizer->Decode(ids, true), encoded["decoded_text"]);
}

// Strings that a text model is not asked for every day.
std::vector<std::string> OddTexts() {
  std::vector<std::string> texts = {"",
                                    " ",
                                    "  ",
                                    "   a  b  ",
                                    "\n",
                                    "\t\r\n ",
                                    "<s>",
                                    "</s><unk>",
                                    "<0x41>",
                                    "\xe2\x96\x81",
                                    " \xe2\x96\x81 \xe2\x96\x81x",
                                    std::string("a\0b\0", 4),
                                    std::string(1, '\0'),
                                    "\xf0\x9f\xa6\x99 caf\xc3\xa9 \xe6\x97\xa5\xe6\x9c\xac",
                                    "\xef\xbf\xbd",
                                    "\xef\xbb\xbf"
                                    "bom",
                                    "\xff",
                                    "a\xc3",
                                    "\xc3(",
                                    "\xed\xa0\x80",
                                    "\xf4\x90\x80\x80",
                                    "\xc0\xaf",
                                    "\x80\x80 x",
                                    "e\xcc\x81",
                                    std::string(300, ' ')};
  std::mt19937 random(20260223);
  constexpr std::string_view kLikely = " ae\xc3\xa9\xe2\x96\x81\xe6\x97\xa5<s>";
  for (int i = 0; i < 200; ++i) {
    std::string text;
    const size_t length = random() % 24;
    for (size_t k = 0; k < length; ++k) {
      // Half arbitrary bytes, half text that makes multi-byte characters and merges likely.
      text += i % 2 == 0 ? static_cast<char>(random() % 256) : kLikely[random() % kLikely.size()];
    }
    texts.push_back(text);
  }
  return texts;
}

class LosslessTest : public testing::TestWithParam<std::string> {};

TEST_P(LosslessTest, DecodeUndoesEncodeForArbitraryBytes) {
  const std::filesystem::path directory = GetParam();
  SKIP_WITHOUT(directory / "tokenizer.model");
  const auto tokenizer = Load(directory);
  ASSERT_NE(tokenizer, nullptr);
  for (const std::string& text : OddTexts()) {
    for (const bool add_bos : {false, true}) {
      const Ids ids = tokenizer->Encode(text, {.add_bos = add_bos, .parse_special = false});
      EXPECT_EQ(tokenizer->Decode(ids, false), text);
      const TextSegment segment{.text = text, .trusted = false};
      EXPECT_LE(tokenizer->MinTokens({&segment, 1}), std::ssize(ids) - add_bos);
      for (size_t i = add_bos; i < ids.size(); ++i) EXPECT_FALSE(tokenizer->IsSpecial(ids[i]));
    }
  }
}

std::string ModelName(const testing::TestParamInfo<std::string>& model) {
  constexpr std::array kNames = {"llama2", "stories260K", "demo"};
  return kNames[model.index];
}

// Two models with a dummy prefix, one without.
INSTANTIATE_TEST_SUITE_P(Models, LosslessTest,
                         testing::Values(Llama2().string(),
                                         SharedPath("assets/models/stories260K-hf").string(),
                                         Demo().string()),
                         ModelName);

TEST(TokenizerTest, PlainTextNeverMakesSpecialTokens) {
  SKIP_WITHOUT(Llama2());
  const auto tokenizer = Load(Llama2());
  EXPECT_EQ(tokenizer->Encode("<s>a</s>", kSpecial), (Ids{1, 263, 2}));
  for (const int32_t id : tokenizer->Encode("<s>a</s>", kPlain)) EXPECT_GT(id, 258);
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_EQ(tokenizer->eos_id(), 2);
  EXPECT_EQ(tokenizer->vocab_size(), 32000);
  EXPECT_EQ(tokenizer->TokenId("</s>"), 2);
  EXPECT_EQ(tokenizer->TokenId("no such token"), std::nullopt);
}

// One more piece for a SentencePiece model: protocol buffer field 1 of ModelProto, with the piece
// (1), a score of 0 (2) and the type USER_DEFINED (3).
std::string UserDefinedPiece(const std::string& text) {
  const std::string piece = "\x0a" + std::string(1, static_cast<char>(text.size())) + text +
                            std::string("\x15\0\0\0\0\x18\x04", 7);
  return "\x0a" + std::string(1, static_cast<char>(piece.size())) + piece;
}

TEST(TokenizerTest, PlainTextNeverMakesSpecialTokensThatSentencePieceMatches) {
  for (const auto& model : {Llama2(), SharedPath("assets/models/stories260K-hf"), Demo()}) {
    if (!std::filesystem::exists(model)) continue;
    const std::string proto = ReadAll(model / "tokenizer.model");
    const auto id = static_cast<int32_t>(Load(model)->vocab_size());
    TemporaryDirectory directory;
    WriteAll(directory.path() / "tokenizer.model",
             proto + UserDefinedPiece("<|turn|>") + UserDefinedPiece("<|plain|>"));
    // A piece of the vocabulary itself, too: " the" of all three models.
    const int32_t the = Load(model)->TokenId("\xe2\x96\x81the").value();
    const json special = {{std::to_string(id), {{"content", "<|turn|>"}, {"special", true}}},
                          {std::to_string(the), {{"content", "<|the|>"}, {"special", true}}}};
    WriteAll(directory.path() / "tokenizer_config.json",
             json{{"added_tokens_decoder", special}}.dump());
    const auto tokenizer = Load(directory.path());
    ASSERT_NE(tokenizer, nullptr);
    const std::string text = "a<|turn|>b<|plain|> the <|turn|><|turn|>the";
    const Ids ids = tokenizer->Encode(text, kPlain);
    for (const int32_t i : ids) EXPECT_FALSE(tokenizer->IsSpecial(i)) << model << " " << i;
    EXPECT_NE(std::find(ids.begin(), ids.end(), id + 1), ids.end()) << "hidden from SentencePiece";
    EXPECT_EQ(tokenizer->Decode(ids, false), text);
    const Ids trusted = tokenizer->Encode(text, kSpecial);
    EXPECT_EQ(std::count(trusted.begin(), trusted.end(), id), 3);
  }
}

TEST(TokenizerTest, SegmentsEncodeAsOneTextWhoseUntrustedPartsArePlain) {
  SKIP_WITHOUT(Llama2());
  const auto tokenizer = Load(Llama2());
  const std::vector<TextSegment> prompt = {{"[INST] ", true}, {"Hello", false}, {" [/INST]", true}};
  EXPECT_EQ(tokenizer->EncodeSegments(prompt, true), tokenizer->Encode("[INST] Hello [/INST]", {}));
  const std::vector<TextSegment> forged = {{"a", true}, {"</s>", false}, {"</s><s>b", true}};
  Ids expected = tokenizer->Encode("a</s>", kPlain);
  for (const int32_t id : {2, 1, 289}) expected.push_back(id);  // "b" has its own prefix (legacy)
  EXPECT_EQ(tokenizer->EncodeSegments(forged, false), expected);
  // The border between two segments does not complete a special token.
  const std::vector<TextSegment> split = {{"</", true}, {"s>", false}};
  EXPECT_EQ(tokenizer->EncodeSegments(split, false), tokenizer->Encode("</s>", kPlain));
}

TEST(TokenizerTest, LegacyDecidesWhetherRunsAfterSpecialTokensGetASpace) {
  SKIP_WITHOUT(Llama2());
  const int32_t a = 29874, space_a = 263;
  EXPECT_EQ(LoadWithConfig({{"legacy", true}})->Encode("a</s>a", kSpecial),
            (Ids{space_a, 2, space_a}));
  EXPECT_EQ(LoadWithConfig({{"legacy", false}})->Encode("a</s>a", kSpecial), (Ids{space_a, 2, a}));
  EXPECT_EQ(LoadWithConfig({{"legacy", false}})->Encode("</s>a", kSpecial), (Ids{2, a}));
  const auto bare = LoadWithConfig({{"legacy", false}, {"add_prefix_space", false}});
  EXPECT_EQ(bare->Encode("a", kSpecial), Ids{a});
  EXPECT_EQ(bare->Encode(" a", kSpecial), Ids{space_a});
  EXPECT_EQ(bare->Decode({space_a}, false), " a");  // no prefix was added: none is removed
}

TEST(TokenizerTest, AddedTokensExtendTheVocabulary) {
  SKIP_WITHOUT(Llama2());
  const auto tokenizer =
      LoadWithConfig({{"add_bos_token", false},
                      {"eos_token", {{"content", "<|im_end|>"}}},
                      {"added_tokens_decoder",
                       {{"32000", {{"content", "<|im"}, {"special", true}}},
                        {"32001", {{"content", "<|im_end|>"}, {"special", true}}},
                        {"32003", {{"content", "plain added"}, {"special", false}}}}}});
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->vocab_size(), 32004);
  EXPECT_EQ(tokenizer->eos_id(), 32001);
  EXPECT_EQ(tokenizer->Encode("", {}), Ids{});
  // The longest text wins, and 32002 has none.
  EXPECT_EQ(tokenizer->Encode("<|im_end|><|im", kSpecial), (Ids{32001, 32000}));
  EXPECT_EQ(tokenizer->Encode("plain added", kSpecial), Ids{32003});
  EXPECT_EQ(tokenizer->Decode({32001, 32002, 32003}, false), "plain added");
  EXPECT_EQ(tokenizer->Decode({32001, 32002, 32003}, true), "<|im_end|>plain added");
  EXPECT_TRUE(tokenizer->IsSpecial(32001));
  EXPECT_FALSE(tokenizer->IsSpecial(32003));
  EXPECT_EQ(tokenizer->TokenBytes(40000, false, true), "");
}

TEST(TokenizerTest, AddedTokensTakeSpacesAsTheirFlagsSay) {
  TemporaryDirectory directory;
  std::filesystem::copy(Demo() / "tokenizer.model", directory.path());
  const auto id = static_cast<int32_t>(Load(Demo())->vocab_size()) + 10;
  const json config = {
      {"added_tokens_decoder",
       {{std::to_string(id), {{"content", "<left>"}, {"lstrip", true}}},
        {std::to_string(id + 1), {{"content", "<right>"}, {"rstrip", true}, {"special", true}}},
        {std::to_string(id + 2), {{"content", "<none>"}}}}}};
  WriteAll(directory.path() / "tokenizer_config.json", config.dump());
  const auto tokenizer = Load(directory.path());
  ASSERT_NE(tokenizer, nullptr);
  const auto ids = [&](std::initializer_list<std::string> parts) {
    Ids out;
    for (const std::string& part : parts) {
      const Ids plain = tokenizer->Encode(part, kPlain);
      if (part.starts_with('<')) {
        out.push_back(tokenizer->TokenId(part).value());
      } else {
        out.insert(out.end(), plain.begin(), plain.end());
      }
    }
    return out;
  };
  EXPECT_EQ(tokenizer->Encode("a \n <left> b", kSpecial), ids({"a", "<left>", " b"}));
  EXPECT_EQ(tokenizer->Encode("a <right>\xe3\x80\x80 b", kSpecial), ids({"a ", "<right>", "b"}));
  EXPECT_EQ(tokenizer->Encode("a <none> b", kSpecial), ids({"a ", "<none>", " b"}));
  // Across segments, of whatever trust.
  const std::vector<TextSegment> segments = {
      {"a ", false}, {" <left><right>", true}, {" b", false}};
  EXPECT_EQ(tokenizer->EncodeSegments(segments, false), ids({"a", "<left>", "<right>", "b"}));
  const TextSegment spaces{.text = std::string(1000, ' ') + "<left>", .trusted = true};
  EXPECT_LE(tokenizer->MinTokens({&spaces, 1}), 1);
}

// Before autumn 2023, transformers wrote these instead of added_tokens_decoder.
TEST(TokenizerTest, OlderFilesNameAddedAndSpecialTokens) {
  TemporaryDirectory directory;
  std::filesystem::copy(Demo() / "tokenizer.model", directory.path());
  const auto id = static_cast<int32_t>(Load(Demo())->vocab_size()) + 10;
  const json added = {{"<|turn|>", id}, {"<|more|>", id + 1}, {"plain added", id + 2}, {"<s>", 1}};
  WriteAll(directory.path() / "added_tokens.json", added.dump());
  WriteAll(directory.path() / "special_tokens_map.json",
           R"({"eos_token": {"content": "<|turn|>", "lstrip": false}, "bos_token": "<s>",
               "additional_special_tokens": ["<|more|>"]})");
  auto tokenizer = Load(directory.path());
  ASSERT_NE(tokenizer, nullptr);
  const std::string text = "<|turn|><|more|>plain added";
  EXPECT_EQ(tokenizer->Encode(text, kSpecial), (Ids{id, id + 1, id + 2}));
  for (const int32_t one : tokenizer->Encode(text, kPlain)) EXPECT_LT(one, id);
  EXPECT_TRUE(tokenizer->IsSpecial(id) && tokenizer->IsSpecial(id + 1));
  EXPECT_FALSE(tokenizer->IsSpecial(id + 2));
  EXPECT_EQ(tokenizer->eos_id(), id);
  // Names that tokenizer_config.json has are kept, but the tokens are special all the same.
  const auto config_path = directory.path() / "tokenizer_config.json";
  WriteAll(config_path, R"({"eos_token": "</s>", "bos_token": null})");
  tokenizer = Load(directory.path());
  EXPECT_EQ(tokenizer->eos_id(), 2);
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_TRUE(tokenizer->IsSpecial(id));
  // Controls of the model stay what they are.
  std::filesystem::remove(directory.path() / "special_tokens_map.json");
  tokenizer = Load(directory.path());
  EXPECT_TRUE(tokenizer->IsSpecial(1));
  EXPECT_FALSE(tokenizer->IsSpecial(id));
  // With the newer key, nothing else is looked at.
  WriteAll(config_path, R"({"added_tokens_decoder": {}})");
  EXPECT_LT(Load(directory.path())->vocab_size(), id);
  WriteAll(config_path, "{}");
  for (const std::string& damaged :
       {std::string("[]"), std::string(R"({"a": -1})"), std::string(R"({"a": "1"})"),
        std::string(R"({"": 1})"), std::string(R"({"a": 1048576})"),
        "{\"a\": " + DeepJson() + "}"}) {
    WriteAll(directory.path() / "added_tokens.json", damaged);
    const auto refused = Tokenizer::Load(directory.path());
    ASSERT_FALSE(refused.ok()) << damaged.substr(0, 20);
    EXPECT_EQ(refused.error().code, ErrorCode::kDataLoss);
    EXPECT_NE(refused.error().message.find("added_tokens.json"), std::string::npos);
  }
}

TEST(TokenizerTest, BytePiecesGiveRawBytes) {
  SKIP_WITHOUT(Llama2());
  const auto tokenizer = Load(Llama2());
  for (int32_t byte = 0; byte < 256; ++byte) {
    EXPECT_EQ(tokenizer->TokenBytes(3 + byte, false, false),
              std::string(1, static_cast<char>(byte)));
  }
  EXPECT_EQ(tokenizer->TokenBytes(263, true, false), "a");
  EXPECT_EQ(tokenizer->TokenBytes(263, false, false), " a");
}

TEST(TokenizerTest, LongTextOfSpecialTokensGivesTheirIds) {
  SKIP_WITHOUT(Llama2());
  const auto tokenizer = Load(Llama2());
  std::string text;
  for (int i = 0; i < 200'000; ++i) text += "<s>";
  EXPECT_EQ(tokenizer->Encode(text, kSpecial), Ids(200'000, 1));
}

TEST(TokenizerTest, MegabytesOfOneKindComeBackWhole) {
  // A mebibyte should take a second at most, and SentencePiece alone takes about that on a machine
  // with nothing else to do. This limit is not that goal: it is for busy machines and sanitizers,
  // and finds what is not linear, which would take hours. A run of one letter cannot be cut into
  // shorter texts either: merges reach across all of it.
  constexpr double kSeconds = 20;
#if defined(INNERQ_SANITIZED)
  constexpr int64_t kBytes = int64_t{1} << 17;
#else
  constexpr int64_t kBytes = int64_t{1} << 20;
#endif
  for (const auto& model : {Llama2(), Demo()}) {
    if (!std::filesystem::exists(model)) continue;
    const auto tokenizer = Load(model);
    for (const std::string unit : {"a", " ", "\n", "7", "\xf0\x9f\x98\x80", "\xff", "<", "</s"}) {
      std::string text;
      while (std::ssize(text) < kBytes) text += unit;
      const auto begin = std::chrono::steady_clock::now();
      const Ids ids = tokenizer->Encode(text, kSpecial);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      EXPECT_TRUE(seconds.count() <= kSeconds) << "of " << unit << ": " << seconds.count() << " s";
      EXPECT_TRUE(tokenizer->Decode(ids, false) == text) << "of " << unit;
      const TextSegment segment{.text = text, .trusted = true};
      const int64_t least = tokenizer->MinTokens({&segment, 1});
      EXPECT_LE(least, std::ssize(ids)) << "of " << unit;
      EXPECT_GT(least, kBytes / 105) << "of " << unit;
    }
  }
}

TEST(TokenizerTest, NamesWhatIsMissingUnsupportedOrDamaged) {
  const auto expect_error = [](const std::filesystem::path& directory, ErrorCode code,
                               const std::string& part) {
    const auto tokenizer = Tokenizer::Load(directory);
    ASSERT_FALSE(tokenizer.ok()) << part;
    EXPECT_EQ(tokenizer.error().code, code) << tokenizer.error().message;
    EXPECT_NE(tokenizer.error().message.find(part), std::string::npos) << tokenizer.error().message;
  };
  TemporaryDirectory directory;
  expect_error(directory.path(), ErrorCode::kNotFound, "no tokenizer.json or tokenizer.model");
  WriteAll(directory.path() / "tokenizer.model", "IQ== 0\nIg== 1\n");
  expect_error(directory.path(), ErrorCode::kDataLoss, "tokenizer.model: not a SentencePiece");
  const std::string pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 2\n";
  WriteAll(directory.path() / "tokenizer.model", pointer);
  expect_error(directory.path(), ErrorCode::kDataLoss, "tokenizer.model: is a Git LFS pointer");
  WriteAll(directory.path() / "tokenizer.json", pointer);
  expect_error(directory.path(), ErrorCode::kDataLoss, "tokenizer.json: is a Git LFS pointer");
  WriteAll(directory.path() / "tokenizer.json", "{}");  // of both, this one is read
  expect_error(directory.path(), ErrorCode::kInvalidArgument, "tokenizer.json: this kind");
  std::filesystem::remove(directory.path() / "tokenizer.json");

  const auto stories = SharedPath("assets/models/stories260K-hf/tokenizer.model");
  SKIP_WITHOUT(stories);
  const std::string good = ReadAll(stories);
  for (size_t size = 1; size < good.size(); size += good.size() / 23) {
    WriteAll(directory.path() / "tokenizer.model", good.substr(0, size));
    const auto cut = Tokenizer::Load(directory.path());  // may be whole pieces: must not crash
    if (cut.ok()) (*cut)->Encode("Once upon a time", {});
  }
  WriteAll(directory.path() / "tokenizer.model", good);
  const std::vector<std::string> bad_configs = {
      "{",
      "[]",
      R"({"add_bos_token": "yes"})",
      R"({"bos_token": "<begin>"})",
      R"({"added_tokens_decoder": []})",
      R"({"added_tokens_decoder": {"-1": {"content": "a"}}})",
      R"({"added_tokens_decoder": {"99999999": {"content": "a"}}})",
      R"({"added_tokens_decoder": {"1x": {"content": "a"}}})",
      R"({"added_tokens_decoder": {"1": {"content": ""}}})",
      R"({"added_tokens_decoder": {"1": {"content": 1}}})",
      R"({"added_tokens_decoder": {"1": {"content": "a", "special": 1}}})",
      R"({"added_tokens_decoder": {"5": {"content": "a", "special": true}}})",  // was byte 2
      DeepJson(),
      "{\"legacy\": " + DeepJson() + "}",
      "{\"added_tokens_decoder\": " + DeepJson() + "}",
      "{\"added_tokens_decoder\": {\"1\": " + DeepJson() + "}}",
      "{\"added_tokens_decoder\": {\"1\": {\"content\": " + DeepJson() + "}}}"};
  for (const std::string& config : bad_configs) {
    WriteAll(directory.path() / "tokenizer_config.json", config);
    expect_error(directory.path(), ErrorCode::kDataLoss, "tokenizer_config.json");
  }
}

}  // namespace
}  // namespace innerq
