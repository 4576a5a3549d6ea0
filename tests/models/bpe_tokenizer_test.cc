#include "models/bpe_tokenizer.h"

#include <gtest/gtest.h>
#include <sentencepiece_processor.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "models/pretokenizer.h"
#include "tests/models/test_files.h"
#include "tests/models/test_time.h"
#include "tests/models/tokenizer_test_util.h"

namespace innerq {
namespace {

using nlohmann::json;

const std::string kMark = "\xe2\x96\x81";  // U+2581

std::filesystem::path Llama3() { return SharedPath("assets/tokenizers/llama3-hf"); }
std::filesystem::path Vectors() { return SharedPath("assets/tokenizer_vectors"); }

// The tokenizer of a directory with this tokenizer.json and, unless null, tokenizer_config.json.
Result<std::shared_ptr<const Tokenizer>> LoadText(const std::string& file, const json& config) {
  TemporaryDirectory directory;
  WriteAll(directory.path() / "tokenizer.json", file);
  if (!config.is_null()) WriteAll(directory.path() / "tokenizer_config.json", config.dump());
  return Tokenizer::Load(directory.path());
}

std::shared_ptr<const Tokenizer> Make(const json& file, const json& config = nullptr) {
  const auto tokenizer = LoadText(file.dump(), config);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.error().message;
  return tokenizer.ok() ? *tokenizer : nullptr;
}

json Added(int32_t id, const std::string& content, bool special) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", special}};
}

json Split(const json& pattern, const std::string& behavior, bool invert = false) {
  return {{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}, {"invert", invert}};
}

json Template(const std::string& token, int32_t id) {
  return {{"type", "TemplateProcessing"},
          {"single",
           {{{"SpecialToken", {{"id", token}, {"type_id", 0}}}},
            {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
          {"pair", json::array()},
          {"special_tokens", {{token, {{"id", token}, {"ids", {id}}, {"tokens", {token}}}}}}};
}

// A byte-level model: ids 0 to 255 are the bytes, then "ab" 256, "abc" 257, "aa" 258, <s> 300,
// <t> 301 (not special).
json ByteLevelFile() {
  json vocabulary = {{"ab", 256}, {"abc", 257}, {"aa", 258}};
  const std::array<std::string, 256> alphabet = ByteAlphabet();
  for (int byte = 0; byte < 256; ++byte) vocabulary[alphabet[static_cast<size_t>(byte)]] = byte;
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", {Added(300, "<s>", true), Added(301, "<t>", false)}},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "ByteLevel"},
            {"add_prefix_space", false},
            {"trim_offsets", true},
            {"use_regex", true}}},
          {"post_processor", Template("<s>", 300)},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", vocabulary},
            {"merges", {"a b", "ab c", "a a"}}}}};
}

// A byte-fallback model in the form of Llama-2's, with this vocabulary and these merges.
json ByteFallbackFile(const json& vocabulary, const json& merges) {
  json file = ByteLevelFile();
  file["added_tokens"] = {Added(0, "<unk>", true), Added(1, "<s>", true), Added(2, "</s>", true)};
  file["normalizer"] = {
      {"type", "Sequence"},
      {"normalizers",
       {{{"type", "Prepend"}, {"prepend", kMark}},
        {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", kMark}}}}};
  file["pre_tokenizer"] = nullptr;
  file["post_processor"] = Template("<s>", 1);
  file["decoder"] = {{"type", "Sequence"},
                     {"decoders",
                      {{{"type", "Replace"}, {"pattern", {{"String", kMark}}}, {"content", " "}},
                       {{"type", "ByteFallback"}},
                       {{"type", "Fuse"}},
                       {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}};
  file["model"].update({{"unk_token", "<unk>"},
                        {"byte_fallback", true},
                        {"fuse_unk", true},
                        {"vocab", vocabulary},
                        {"merges", merges}});
  return file;
}

// <unk>, <s>, </s>, the bytes from 3, the mark 259, "a" 260, "b" 261, "_a" 262, "__" 263.
json SmallByteFallbackFile() {
  json vocabulary = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}, {kMark, 259}, {"a", 260}, {"b", 261}};
  vocabulary[kMark + "a"] = 262;
  vocabulary[kMark + kMark] = 263;
  for (int byte = 0; byte < 256; ++byte) {
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    const auto high = static_cast<size_t>(byte / 16), low = static_cast<size_t>(byte % 16);
    vocabulary[std::string("<0x") + kDigits[high] + kDigits[low] + ">"] = 3 + byte;
  }
  return ByteFallbackFile(vocabulary, {kMark + " " + kMark, kMark + " a"});
}

// Llama-2's tokenizer.model as the tokenizer.json that transformers makes of it
// (SentencePieceExtractor): merges are all ways to cut a piece in two, best score first.
json Llama2File() {
  sentencepiece::SentencePieceProcessor model;
  EXPECT_TRUE(model.Load((Llama2() / "tokenizer.model").string()).ok());
  json vocabulary;
  std::unordered_map<std::string, int> ids;
  for (int id = 0; id < model.GetPieceSize(); ++id) {
    vocabulary[model.IdToPiece(id)] = id;
    ids[model.IdToPiece(id)] = id;
  }
  struct Merge {
    float score;
    std::string left, right;
  };
  std::vector<Merge> merges;
  for (int id = 0; id < model.GetPieceSize(); ++id) {
    const std::string& piece = model.IdToPiece(id);
    for (size_t cut = 1; cut < piece.size(); ++cut) {
      const std::string left = piece.substr(0, cut), right = piece.substr(cut);
      if (ids.contains(left) && ids.contains(right)) {
        merges.push_back({model.GetScore(id), left, right});
      }
    }
  }
  std::stable_sort(merges.begin(), merges.end(),
                   [](const Merge& a, const Merge& b) { return a.score > b.score; });
  json list = json::array();
  for (const Merge& merge : merges) list.push_back(merge.left + " " + merge.right);
  return ByteFallbackFile(vocabulary, list);
}

void ExpectLlamaCppVectors(const Tokenizer& tokenizer, const std::string& name) {
  std::string inputs = ReadAll(Vectors() / (name + ".inp"));
  std::istringstream outputs(ReadAll(Vectors() / (name + ".out")));
  const std::string mark = "\n__ggml_vocab_test__\n";
  int count = 0;
  for (size_t at; (at = inputs.find(mark)) != inputs.npos; inputs.erase(0, at + mark.size())) {
    const std::string text = inputs.substr(0, at);
    std::string line;
    ASSERT_TRUE(std::getline(outputs, line));
    std::istringstream numbers(line);
    const Ids expected{std::istream_iterator<int32_t>(numbers), {}};
    EXPECT_EQ(tokenizer.Encode(text, kPlain), expected) << "case " << count << ": " << text;
    EXPECT_EQ(tokenizer.Decode(expected, false), text) << "case " << count;
    ++count;
  }
  EXPECT_EQ(count, 46);
}

// What transformers does to decoded English text if clean_up_tokenization_spaces is true, which we
// leave to whoever shows the text (tokenization_utils_base.py, clean_up_tokenization).
std::string CleanUp(std::string text) {
  for (const std::string spaced : {" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're"}) {
    for (size_t at; (at = text.find(spaced)) != text.npos;) text.erase(at, 1);
  }
  return text;
}

// `cleaned`: the decoded texts have been cleaned up.
void ExpectTransformersVectors(const Tokenizer& tokenizer, const std::string& name, bool cleaned) {
  const auto decode = [&](const Ids& ids, bool special) {
    const std::string text = tokenizer.Decode(ids, special);
    return cleaned ? CleanUp(text) : text;
  };
  const json all = json::parse(ReadAll(Vectors() / "hf_tokenizer_tests.json"));
  EXPECT_EQ(all[name].size(), 18u);
  for (const json& test : all[name]) {
    const Ids ids = tokenizer.Encode(test["input"].get<std::string>(), {});
    EXPECT_EQ(ids, test["encoded"]["input_ids"].get<Ids>()) << test["input"];
    EXPECT_EQ(decode(ids, true), test["decoded_with_special"]);
    EXPECT_EQ(decode(ids, false), test["decoded_without_special"]);
  }
}

TEST(BpeTokenizerTest, EncodesTheLlama3Vectors) {
  SKIP_WITHOUT(Llama3());
  const auto tokenizer = Tokenizer::Load(Llama3());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.error().message;
  ExpectLlamaCppVectors(**tokenizer, "ggml-vocab-llama-bpe.gguf");
  ExpectTransformersVectors(**tokenizer, "pcuenq/Llama-3.2-1B-Instruct-tokenizer", true);
  EXPECT_EQ((*tokenizer)->vocab_size(), 128256);
  EXPECT_EQ((*tokenizer)->bos_id(), 128000);
  EXPECT_EQ((*tokenizer)->eos_id(), 128009);
  EXPECT_EQ((*tokenizer)->TokenId("<|eot_id|>"), 128009);
}

TEST(BpeTokenizerTest, EncodesTheLlama2Vectors) {
  SKIP_WITHOUT(Llama2());
  const auto tokenizer = Make(Llama2File());
  ASSERT_NE(tokenizer, nullptr);
  ExpectLlamaCppVectors(*tokenizer, "ggml-vocab-llama-spm.gguf");
  ExpectTransformersVectors(*tokenizer, "coreml-projects/Llama-2-7b-chat-coreml", false);
  const json encoded = json::parse(ReadAll(Vectors() / "hf_llama_encoded.json"));
  const Ids ids = tokenizer->Encode(encoded["text"].get<std::string>(), {});
  EXPECT_EQ(ids, encoded["token_ids"].get<Ids>());
  EXPECT_EQ(tokenizer->Decode(ids, true), encoded["decoded_text"]);
}

TEST(BpeTokenizerTest, ReadsLlama2AsTheSentencePieceLibraryDoes) {
  SKIP_WITHOUT(Llama2());
  const auto pieces = Tokenizer::Load(Llama2());
  ASSERT_TRUE(pieces.ok());
  const auto tokenizer = Make(Llama2File());
  ASSERT_NE(tokenizer, nullptr);
  for (int32_t id = 0; id < 32000; ++id) {
    for (const bool first : {false, true}) {
      for (const bool special : {false, true}) {
        EXPECT_EQ(tokenizer->TokenBytes(id, first, special),
                  (*pieces)->TokenBytes(id, first, special));
      }
    }
    EXPECT_EQ(tokenizer->IsSpecial(id), (*pieces)->IsSpecial(id));
  }
  const std::string text = "  Hello </s>" + kMark + "x\xff caf\xc3\xa9 \xf0\x9f\xa6\x99\n";
  EXPECT_EQ(tokenizer->Encode(text, kSpecial), (*pieces)->Encode(text, kSpecial));
  EXPECT_EQ(tokenizer->Encode(text, kPlain), (*pieces)->Encode(text, kPlain));
}

TEST(BpeTokenizerTest, MergesByRankThenFromTheLeft) {
  const auto tokenizer = Make(ByteLevelFile());
  EXPECT_EQ(tokenizer->Encode("abc", {}), (Ids{300, 257}));
  EXPECT_EQ(tokenizer->Encode("aab", kPlain), (Ids{'a', 256}));  // "a b" ranks before "a a"
  EXPECT_EQ(tokenizer->Encode("aaa", kPlain), (Ids{258, 'a'}));
  EXPECT_EQ(tokenizer->Encode("aaaa", kPlain), (Ids{258, 258}));
  json file = ByteLevelFile();
  file["model"]["merges"] = json::parse(R"([["a", "a"], ["a", "b"], ["ab", "c"]])");
  EXPECT_EQ(Make(file)->Encode("aab", kPlain), (Ids{258, 'b'}));
}

TEST(BpeTokenizerTest, TruncationAndPaddingOfATrainingRunChangeNothing) {
  json file = ByteLevelFile();
  file["truncation"] = {{"direction", "Right"}, {"max_length", 2}, {"stride", 0}};
  file["padding"] = {{"strategy", {{"Fixed", 8}}}, {"pad_id", 0}, {"pad_token", "<s>"}};
  EXPECT_EQ(Make(file)->Encode("aaaaabc", {}), Make(ByteLevelFile())->Encode("aaaaabc", {}));
}

TEST(BpeTokenizerTest, IgnoreMergesTakesWholePieces) {
  json file = ByteLevelFile();
  file["model"]["vocab"]["xyz"] = 299;
  EXPECT_EQ(Make(file)->Encode("xyz", kPlain), (Ids{'x', 'y', 'z'}));
  file["model"]["ignore_merges"] = true;
  EXPECT_EQ(Make(file)->Encode("xyz", kPlain), Ids{299});
  EXPECT_EQ(Make(file)->Encode("xyzx", kPlain), (Ids{'x', 'y', 'z', 'x'}));
}

TEST(BpeTokenizerTest, PlainTextNeverMakesAddedTokens) {
  json file = ByteLevelFile();
  file["model"]["ignore_merges"] = true;
  file["pre_tokenizer"]["use_regex"] = false;
  file["model"]["vocab"].update({{"<s", 298}, {"<s>", 300}});
  file["model"]["merges"] = {"< s", "<s >"};
  const auto tokenizer = Make(file);
  EXPECT_EQ(tokenizer->Encode("<s>", kSpecial), Ids{300});
  EXPECT_EQ(tokenizer->Encode("<s>", kPlain), (Ids{298, '>'}));  // neither whole nor merged
  EXPECT_EQ(tokenizer->Encode("<t><s>", kSpecial), (Ids{301, 300}));
  const std::vector<TextSegment> forged = {{"<s>", true}, {"<s><t>", false}, {"<t>", true}};
  EXPECT_EQ(tokenizer->EncodeSegments(forged, true), (Ids{300, 300, 298, '>', '<', 't', '>', 301}));
  const std::vector<TextSegment> cut = {{"<", true}, {"s>", false}};
  EXPECT_EQ(tokenizer->EncodeSegments(cut, false), tokenizer->Encode("<s>", kPlain));
  EXPECT_TRUE(tokenizer->IsSpecial(300));
  EXPECT_FALSE(tokenizer->IsSpecial(301));
  EXPECT_EQ(tokenizer->Decode({300, 'a', 301, 299}, false), "a<t>");
  EXPECT_EQ(tokenizer->Decode({300, 'a', 301, 299}, true), "<s>a<t>");
  EXPECT_EQ(tokenizer->TokenBytes(9999, false, true), "");
}

TEST(BpeTokenizerTest, AddedTokensTakeSpacesAsTheirFlagsSay) {
  json file = ByteLevelFile();
  file["added_tokens"] = {Added(300, "<s>", true), Added(301, "<s>x", true),
                          Added(302, "   ", false)};
  file["added_tokens"][0]["lstrip"] = true;
  file["added_tokens"][1]["rstrip"] = true;
  const auto tokenizer = Make(file);
  EXPECT_EQ(tokenizer->Encode("a \n <s> b", kSpecial), (Ids{'a', 300, ' ', 'b'}));
  EXPECT_EQ(tokenizer->Encode("a <s>x\xe3\x80\x80 b", kSpecial), (Ids{'a', ' ', 301, 'b'}));
  EXPECT_EQ(tokenizer->Encode("<s><s>x<s", kSpecial), (Ids{300, 301, '<', 's'}));
  // White space cannot forge anything: it is found in plain text, too.
  EXPECT_EQ(tokenizer->Encode("a   b", kPlain), (Ids{'a', 302, 'b'}));
  EXPECT_EQ(tokenizer->Encode("    ", kPlain), (Ids{302, ' '}));
  // Normalized tokens come after the others and what those take.
  EXPECT_EQ(tokenizer->Encode("a   <s>", kSpecial), (Ids{'a', 302, 300}));
  file["added_tokens"][2]["normalized"] = true;
  EXPECT_EQ(Make(file)->Encode("a   <s>   b", kSpecial), (Ids{'a', 300, 302, 'b'}));
  EXPECT_EQ(Make(file)->Encode("a   b", kPlain), (Ids{'a', 302, 'b'}));
}

TEST(BpeTokenizerTest, KnowsHowManyTokensATextHasAtLeast) {
  const auto least = [](const json& file, const std::string& text) {
    const TextSegment segment{.text = text, .trusted = true};
    return Make(file)->MinTokens({&segment, 1});
  };
  json file =
      ByteLevelFile();  // the longest tokens are "abc", <s> and <t>; 4 bytes are a character
  EXPECT_EQ(least(file, ""), 0);
  EXPECT_EQ(least(file, std::string(9, ' ')), 3);
  file["added_tokens"].push_back(Added(302, "<longer>", true));
  EXPECT_EQ(least(file, std::string(9, ' ')), 2);
  file["added_tokens"][0]["rstrip"] = true;  // may take any white space
  EXPECT_EQ(least(file, std::string(9, ' ')), 0);
  EXPECT_EQ(least(file, "a b c d e f g h i"), 2);

  file = SmallByteFallbackFile();
  EXPECT_GT(least(file, std::string(100, 'x')), 0);
  file["model"]["byte_fallback"] = false;  // unknown characters are one token together
  EXPECT_EQ(least(file, std::string(100, 'x')), 0);
  file = ByteLevelFile();
  file["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", "xx"}}}, {"content", "x"}};
  EXPECT_EQ(least(file, std::string(100, 'x')), 0);
}

TEST(BpeTokenizerTest, ByteFallbackSpellsWhatHasNoToken) {
  const auto tokenizer = Make(SmallByteFallbackFile());
  const int32_t byte = 3;
  EXPECT_EQ(tokenizer->Encode("a", {}), (Ids{1, 262}));
  EXPECT_EQ(tokenizer->Encode("  a", kPlain), (Ids{263, 262}));
  EXPECT_EQ(tokenizer->Encode("\xc3\xa9", kPlain), (Ids{259, byte + 0xc3, byte + 0xa9}));
  EXPECT_EQ(tokenizer->Encode("b\xff", kPlain), (Ids{259, 261, byte + 0xff}));
  EXPECT_EQ(tokenizer->Encode("\xff"
                              "a",
                              kPlain),
            (Ids{259, byte + 0xff, 260}));
  EXPECT_EQ(tokenizer->Encode("a</s>a", kSpecial), (Ids{262, 2, 262}));
  EXPECT_EQ(tokenizer->Encode(kMark, kPlain), (Ids{259, byte + 0xe2, byte + 0x96, byte + 0x81}));
  EXPECT_EQ(tokenizer->TokenBytes(262, true, false), "a");
  EXPECT_EQ(tokenizer->TokenBytes(262, false, false), " a");
  EXPECT_EQ(tokenizer->TokenBytes(byte + 0xc3, true, false), "\xc3");
  EXPECT_EQ(tokenizer->Decode({1, 262, 259, 261}, false), "a b");
}

TEST(BpeTokenizerTest, UnknownCharactersMakeTheUnknownToken) {
  json file = SmallByteFallbackFile();
  file["model"]["byte_fallback"] = false;
  EXPECT_EQ(Make(file)->Encode("a\xc3\xa9\xc3\xa9"
                               "b",
                               kPlain),
            (Ids{262, 0, 261}));
  file["model"]["fuse_unk"] = false;
  EXPECT_EQ(Make(file)->Encode("a\xc3\xa9\xc3\xa9"
                               "b",
                               kPlain),
            (Ids{262, 0, 0, 261}));
  EXPECT_EQ(Make(file)->Encode("a\xff", kPlain), (Ids{262, 0}));
}

// Where a text is cut: pieces that are tokens as a whole show it.
std::vector<std::string> Pieces(const std::vector<TextStep>& steps, const std::string& text) {
  const auto pretokenizer = Pretokenizer::Create(steps);
  EXPECT_TRUE(pretokenizer.ok()) << pretokenizer.error().message;
  std::vector<std::string> texts;
  for (const TextPiece& piece : pretokenizer->Split(text, true, "")) texts.push_back(piece.text);
  return texts;
}

TEST(BpeTokenizerTest, SplitsAsEachBehaviorSays) {
  // From the documentation of the tokenizers library, SplitDelimiterBehavior.
  const std::string text = "the-final--countdown";
  const std::map<SplitBehavior, std::vector<std::string>> expected = {
      {SplitBehavior::kRemoved, {"the", "final", "countdown"}},
      {SplitBehavior::kIsolated, {"the", "-", "final", "-", "-", "countdown"}},
      {SplitBehavior::kMergedWithPrevious, {"the-", "final-", "-", "countdown"}},
      {SplitBehavior::kMergedWithNext, {"the", "-final", "-", "-countdown"}},
      {SplitBehavior::kContiguous, {"the", "-", "final", "--", "countdown"}}};
  for (const auto& [behavior, pieces] : expected) {
    for (const bool regex : {false, true}) {
      EXPECT_EQ(Pieces({SplitStep{{"-", regex}, behavior}}, text), pieces);
      EXPECT_EQ(Pieces({SplitStep{{"[^-]", true}, SplitBehavior::kRemoved}}, text),
                (std::vector<std::string>{"-", "--"}));
    }
  }
  EXPECT_EQ(Pieces({SplitStep{{"-", false}, SplitBehavior::kRemoved, true}}, text),
            (std::vector<std::string>{"-", "-", "-"}));
}

TEST(BpeTokenizerTest, PatternsMeanWhatOnigurumaMeans) {
  using Texts = std::vector<std::string>;
  const auto split = [](const std::string& pattern, const std::string& text) {
    return Pieces({SplitStep{{pattern, true}, SplitBehavior::kIsolated}}, text);
  };
  const std::string vowel_separator = "\xe1\xa0\x8e";  // U+180E is no white space
  EXPECT_EQ(split("\\s", vowel_separator + "a b"), (Texts{vowel_separator + "a", " ", "b"}));
  EXPECT_EQ(split("[^\\s]+",
                  "a\xc2\x85"
                  "b"),
            (Texts{"a", "\xc2\x85", "b"}));
  const std::string stop = "\xe3\x80\x82";  // U+3002, of several scripts, is not Han
  EXPECT_EQ(split("\\p{Han}+", "\xe6\x97\xa5" + stop), (Texts{"\xe6\x97\xa5", stop}));
  EXPECT_EQ(split("(?i:'s)", "a'\xc5\xbf"), (Texts{"a", "'\xc5\xbf"}));  // long s
  EXPECT_EQ(split("x*", "axxb"), (Texts{"a", "xx", "b"}));
  EXPECT_EQ(split("^", "a\nb"), (Texts{"a\n", "b"}));
  EXPECT_EQ(Pieces({SplitStep{{"a+", true}}},
                   "aa\xff"
                   "aab"),
            (Texts{"aa", "\xff", "aa", "b"}));
}

TEST(BpeTokenizerTest, MetaspaceMarksAndPrefixesAsItsSchemeSays) {
  json file = SmallByteFallbackFile();
  file["normalizer"] = nullptr;
  const auto with = [&file](const json& options) {
    json meta = {{"type", "Metaspace"}, {"replacement", kMark}};
    meta.update(options);
    json changed = file;
    changed["pre_tokenizer"] = meta;
    changed["decoder"]["decoders"][0] = meta;
    changed["decoder"]["decoders"].erase(3);
    return Make(changed);
  };
  const auto always = with({{"prepend_scheme", "always"}, {"split", false}});
  EXPECT_EQ(always->Encode("a</s>a", kSpecial), (Ids{262, 2, 262}));
  EXPECT_EQ(always->Encode("a  a", kPlain), (Ids{262, 263, 260}));
  EXPECT_EQ(always->Decode({262, 262}, false), "a a");
  const auto first = with({{"prepend_scheme", "first"}});
  EXPECT_EQ(first->Encode("a</s>a", kSpecial), (Ids{262, 2, 260}));
  EXPECT_EQ(first->Encode(" a", kPlain), Ids{262});                // has its space already
  EXPECT_EQ(first->Encode("a  a", kPlain), (Ids{262, 259, 262}));  // split before each mark
  const auto never = with({{"add_prefix_space", false}});
  EXPECT_EQ(never->Encode("a", kPlain), Ids{260});
  EXPECT_EQ(never->Decode({262}, false), " a");
}

TEST(BpeTokenizerTest, PreTokenizersRunInOrder) {
  json file = ByteLevelFile();
  file["model"]["ignore_merges"] = true;
  file["model"]["vocab"].update({{"12", 290}, {"1", '1'}, {"\xc4\xa0x", 291}});
  file["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", true}};
  EXPECT_EQ(Make(file)->Encode("x x", kPlain), (Ids{291, 291}));
  file["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {{{"type", "Digits"}, {"individual_digits", false}},
        {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
  EXPECT_EQ(Make(file)->Encode("a12b", kPlain), (Ids{'a', 290, 'b'}));
  file["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = true;
  EXPECT_EQ(Make(file)->Encode("12", kPlain), (Ids{'1', '2'}));
  file["pre_tokenizer"]["pretokenizers"][0] = Split({{"String", "b"}}, "Removed");
  EXPECT_EQ(Make(file)->Encode("abc", kPlain), (Ids{'a', 'c'}));
  file["normalizer"] = {{"type", "Replace"}, {"pattern", {{"Regex", "\\d+"}}}, {"content", "x"}};
  EXPECT_EQ(Make(file)->Encode("a123", kPlain), (Ids{'a', 'x'}));
}

TEST(BpeTokenizerTest, PunctuationIsSplitOff) {
  json file = ByteLevelFile();
  // Merges that hold across what is not split.
  file["model"]["vocab"].update({{"a+", 290}, {"!!", 292}, {"ab-", 293}});
  file["model"]["merges"] = {"a b", "a +", "! !", "ab -"};
  file["model"]["ignore_merges"] = true;
  json punctuation = {{"type", "Punctuation"}};
  const auto with = [&] {
    file["pre_tokenizer"] = {
        {"type", "Sequence"},
        {"pretokenizers",
         {punctuation,
          {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
    return Make(file);
  };
  // ASCII's has symbols in it, the Unicode category has none.
  for (int byte = '!'; byte <= '~'; ++byte) {
    const char c = static_cast<char>(byte);
    const bool is_word = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
    const std::string text = std::string("x") + c + "x";
    file["model"]["vocab"][text] = 299;
    EXPECT_EQ(with()->Encode(text, kPlain),
              is_word ? Ids{299} : (Ids{'x', static_cast<uint8_t>(c), 'x'}))
        << c;
    file["model"]["vocab"].erase(text);
  }
  EXPECT_EQ(with()->Encode("a+ab-!!", kPlain), (Ids{'a', '+', 256, '-', '!', '!'}));
  punctuation["behavior"] = "Contiguous";
  EXPECT_EQ(with()->Encode("ab!!", kPlain), (Ids{256, 292}));
  punctuation["behavior"] = "Removed";
  EXPECT_EQ(with()->Encode("a!!+b", kPlain), (Ids{'a', 'b'}));
  punctuation["behavior"] = "Isolated";
  const std::array<std::string, 256> alphabet = ByteAlphabet();
  const auto spell = [&](const std::string& text) {
    std::string out;
    for (const char byte : text) out += alphabet[static_cast<uint8_t>(byte)];
    return out;
  };
  const std::string stop = "\xe3\x80\x82", euro = "\xe2\x82\xac";  // U+3002 Po, U+20AC Sc
  file["model"]["vocab"].update({{spell("a" + stop), 294}, {spell("a" + euro), 295}});
  EXPECT_EQ(with()->Encode("a" + stop, kPlain), (Ids{'a', 0xe3, 0x80, 0x82}));
  EXPECT_EQ(with()->Encode("a" + euro, kPlain), Ids{295});
  punctuation["behavior"] = "Some";
  file["pre_tokenizer"] = punctuation;
  EXPECT_FALSE(LoadText(file.dump(), nullptr).ok());
}

TEST(BpeTokenizerTest, TokenizerConfigAddsTokensAndNamesTheEnds) {
  const json config = {{"add_bos_token", false},
                       {"bos_token", "<s>"},
                       {"eos_token", "<e>"},
                       {"added_tokens_decoder",
                        {{"300", {{"content", "<s>"}, {"special", true}}},
                         {"301", {{"content", "<t>"}, {"special", true}}},
                         {"400", {{"content", "<e>"}, {"special", true}}}}}};
  const auto tokenizer = Make(ByteLevelFile(), config);
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->Encode("a", {}), Ids{'a'});
  EXPECT_EQ(tokenizer->Encode("<e>", kSpecial), Ids{400});
  EXPECT_EQ(tokenizer->vocab_size(), 401);
  EXPECT_EQ(tokenizer->bos_id(), 300);
  EXPECT_EQ(tokenizer->eos_id(), 400);
  EXPECT_TRUE(tokenizer->IsSpecial(301));
  EXPECT_EQ(Make(ByteLevelFile())->bos_id(), 300);  // from the template
  EXPECT_EQ(Make(ByteLevelFile())->eos_id(), std::nullopt);
}

TEST(BpeTokenizerTest, OlderFilesNameAddedAndSpecialTokens) {
  TemporaryDirectory directory;
  WriteAll(directory.path() / "tokenizer.json", ByteLevelFile().dump());
  WriteAll(directory.path() / "added_tokens.json", R"({"<t>": 301, "<|im_end|>": 400})");
  WriteAll(directory.path() / "special_tokens_map.json", R"({"eos_token": "<|im_end|>"})");
  const auto tokenizer = Tokenizer::Load(directory.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.error().message;
  EXPECT_EQ((*tokenizer)->Encode("<|im_end|><t>", kSpecial), (Ids{400, 301}));
  EXPECT_TRUE((*tokenizer)->IsSpecial(400));
  EXPECT_FALSE((*tokenizer)->IsSpecial(301));
  EXPECT_EQ((*tokenizer)->eos_id(), 400);
}

TEST(BpeTokenizerTest, TokenizerConfigSaysWhetherTextsBeginWithBos) {
  json with = ByteLevelFile();  // a post-processor that puts <s> first
  json without = ByteLevelFile();
  without["post_processor"] = nullptr;
  const auto config = [](const json& more) {
    json out = {{"bos_token", "<t>"}};
    out.update(more);
    return out;
  };
  const std::string llama = "LlamaTokenizerFast", other = "PreTrainedTokenizerFast";
  // add_bos_token, if it is there, decides where no class or Llama's is named.
  EXPECT_EQ(Make(with, config({{"add_bos_token", true}}))->Encode("a", {}), (Ids{300, 'a'}));
  EXPECT_EQ(Make(without, config({{"add_bos_token", true}}))->Encode("a", {}), (Ids{301, 'a'}));
  EXPECT_EQ(Make(with, config({{"add_bos_token", false}}))->Encode("a", {}), Ids{'a'});
  EXPECT_EQ(
      Make(with, config({{"add_bos_token", false}, {"tokenizer_class", llama}}))->Encode("a", {}),
      Ids{'a'});
  for (const std::string name :
       {"LlamaTokenizer", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"}) {
    const json named = config({{"add_bos_token", true}, {"tokenizer_class", name}});
    EXPECT_EQ(Make(without, named)->Encode("a", {}), (Ids{301, 'a'})) << name;
  }
  // Others do not look at it.
  for (const bool add : {false, true}) {
    const json named =
        config({{"add_bos_token", add}, {"add_eos_token", add}, {"tokenizer_class", other}});
    EXPECT_EQ(Make(with, named)->Encode("a", {}), (Ids{300, 'a'}));
    EXPECT_EQ(Make(without, named)->Encode("a", {}), Ids{'a'});
  }
  // Llama's do not ask the post-processor, so that may put something after a text.
  json around = with;
  around["post_processor"]["single"].push_back({{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}});
  EXPECT_EQ(Make(around, config({{"tokenizer_class", llama}}))->Encode("a", {}), (Ids{300, 'a'}));
  EXPECT_FALSE(LoadText(around.dump(), config({{"tokenizer_class", other}})).ok());
  json twice = with;
  twice["post_processor"]["single"].push_back({{"Sequence", {{"id", "A"}}}});
  EXPECT_FALSE(LoadText(twice.dump(), config({{"tokenizer_class", llama}})).ok());
  // Then the class, which may add it by itself, then tokenizer.json.
  EXPECT_EQ(Make(without, config({{"tokenizer_class", llama}}))->Encode("a", {}), (Ids{301, 'a'}));
  EXPECT_EQ(Make(without, config({{"tokenizer_class", other}}))->Encode("a", {}), Ids{'a'});
  EXPECT_EQ(Make(with, config({{"tokenizer_class", other}}))->Encode("a", {}), (Ids{300, 'a'}));
  EXPECT_EQ(Make(without, config({{"add_bos_token", nullptr}}))->Encode("a", {}), Ids{'a'});
  const auto refuse = [](const json& file, const json& values, const std::string& message) {
    const auto tokenizer = LoadText(file.dump(), values);
    ASSERT_FALSE(tokenizer.ok());
    EXPECT_EQ(tokenizer.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(tokenizer.error().message.find("tokenizer_config.json: " + message),
              std::string::npos)
        << tokenizer.error().message;
  };
  refuse(without, {{"add_bos_token", true}}, "bos_token: expected a token");
  refuse(with, {{"add_eos_token", true}}, "add_eos_token: expected false");
}

// Texts for round trips: half of arbitrary bytes, half of what patterns and merges look at.
std::string RandomText(std::mt19937& random) {
  static const std::vector<std::string> kParts = {" ",
                                                  "  ",
                                                  "\n",
                                                  "\r\n",
                                                  "\t",
                                                  "a",
                                                  "The",
                                                  "'s",
                                                  "12",
                                                  "\xc3\xa9",
                                                  "e\xcc\x81",
                                                  "\xe6\x97\xa5",
                                                  kMark,
                                                  "\xf0\x9f\xa6\x99",
                                                  "<s>",
                                                  "</s>",
                                                  "<0x0A>",
                                                  "\xe3\x80\x80",
                                                  "\xff",
                                                  "\xed\xa0",
                                                  "<|eot_id|>",
                                                  "\xc2",
                                                  "!?",
                                                  "_",
                                                  "\xe2\x80\x8d",
                                                  std::string(1, '\0')};
  std::string text;
  const bool bytes = random() % 2 == 0;
  for (size_t count = random() % 24; count > 0; --count) {
    text += bytes ? std::string(1, static_cast<char>(random() % 256))
                  : kParts[random() % kParts.size()];
  }
  return text;
}

void ExpectLossless(const Tokenizer& tokenizer, uint32_t seed, int count) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  for (int i = 0; i < count; ++i) {
    const std::string text = RandomText(random);
    const Ids ids = tokenizer.Encode(text, kPlain);
    ASSERT_EQ(tokenizer.Decode(ids, false), text) << "text " << i;
    for (const int32_t id : ids) ASSERT_FALSE(tokenizer.IsSpecial(id)) << "text " << i;
    const TextSegment segment{.text = text, .trusted = true};
    ASSERT_LE(tokenizer.MinTokens({&segment, 1}), std::ssize(tokenizer.Encode(text, kSpecial)));
    ASSERT_LE(tokenizer.MinTokens({&segment, 1}), std::ssize(ids));
  }
}

TEST(BpeTokenizerTest, DecodeUndoesEncodeForArbitraryBytes) {
#if defined(INNERQ_SANITIZED)
  constexpr int kTexts = 500;
#else
  constexpr int kTexts = 3000;
#endif
  ExpectLossless(*Make(ByteLevelFile()), 20261125, kTexts);
  ExpectLossless(*Make(SmallByteFallbackFile()), 20261126, kTexts);
  SKIP_WITHOUT(Llama3());
  ExpectLossless(**Tokenizer::Load(Llama3()), 20261127, kTexts);
  ExpectLossless(*Make(Llama2File()), 20261128, kTexts);
}

std::string Repeat(const std::string& unit, size_t bytes) {
  std::string text;
  while (text.size() < bytes) text += unit;
  return text;
}

// What the specification allows for a megabyte.
constexpr double kMostSeconds = 1 * kSlowdown;

// Encodes a megabyte of every kind that patterns, merges or searches could choke on; under
// sanitizers a small part.
void ExpectMegabytes(const Tokenizer& tokenizer) {
#if defined(INNERQ_SANITIZED)
  constexpr int64_t kBytes = 30'000;
#else
  constexpr int64_t kBytes = 1'000'000;
#endif
  for (const std::string unit : {"a", "ab", "Z", " ", "\n", " \n", "7", "!", "\xf0\x9f\xa6\x99",
                                 "\xf0\x9f\x98\x80", "\xe6\x97\xa5", "e\xcc\x81", "\xff", "a\xff",
                                 "'s", "\xe2\x96\x81", "<", "<|reserved_special_token_"}) {
    const std::string text = Repeat(unit, static_cast<size_t>(kBytes)) + (unit == " " ? "a" : "");
    const double begin = ThreadSeconds();
    const Ids ids = tokenizer.Encode(text, kSpecial);
    const double seconds = ThreadSeconds() - begin;
    EXPECT_TRUE(seconds <= kMostSeconds) << "of " << unit << ": " << seconds << " s";
    EXPECT_TRUE(tokenizer.Decode(ids, false) == text) << "of " << unit;
    const TextSegment segment{.text = text, .trusted = true};
    const int64_t least = tokenizer.MinTokens({&segment, 1});
    EXPECT_LE(least, std::ssize(ids)) << "of " << unit;
    EXPECT_GT(least, kBytes / 200) << "of " << unit;
  }
}

TEST(BpeTokenizerTest, MegabytesOfOneKindComeBackWhole) {
  ExpectMegabytes(*Make(ByteLevelFile()));
  ExpectMegabytes(*Make(SmallByteFallbackFile()));
  SKIP_WITHOUT(Llama3());
  ExpectMegabytes(**Tokenizer::Load(Llama3()));
  ExpectMegabytes(*Make(Llama2File()));
}

TEST(BpeTokenizerTest, PatternsThatRunAwayAreStopped) {
  // A match takes exponential time, or each one of the text takes a million tries.
  for (const char* pattern : {"(?:(?:a|aa)+)+[bc]", "(?:a|aa){20}b|.", "(?:|){30}b|a"}) {
    json file = ByteLevelFile();
    file["pre_tokenizer"] = {
        {"type", "Sequence"},
        {"pretokenizers",
         {Split({{"Regex", pattern}}, "Isolated"),
          {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
    const std::string text = "bb" + Repeat("a", 100'000);
    const auto tokenizer = Make(file);
    const double begin = ThreadSeconds();
    const Ids ids = tokenizer->Encode(text, kPlain);
    const double seconds = ThreadSeconds() - begin;
    EXPECT_TRUE(seconds <= kMostSeconds) << pattern << ": " << seconds << " s";
    EXPECT_TRUE(tokenizer->Decode(ids, false) == text) << pattern;
  }
}

void ExpectRefused(const std::string& file, const json& config, ErrorCode code,
                   const std::string& part) {
  const auto tokenizer = LoadText(file, config);
  ASSERT_FALSE(tokenizer.ok()) << part;
  EXPECT_EQ(tokenizer.error().code, code) << tokenizer.error().message;
  EXPECT_NE(tokenizer.error().message.find(part), std::string::npos)
      << tokenizer.error().message << "\nexpected: " << part;
}

// A change of one place of a file, and what is said of it.
struct Refusal {
  std::string place;  // JSON pointer
  json value;
  std::string message;
};

TEST(BpeTokenizerTest, RefusesWhatItDoesNotSupportByName) {
  const json decoders = json::parse(R"([{"type": "Fuse"}, {"type": "ByteFallback"}])");
  const json strip = {{"type", "Strip"}, {"content", " "}, {"start", 2}, {"stop", 0}};
  const json late = {{"type", "Strip"}, {"content", " "}, {"start", 0}, {"stop", 1}};
  const json regex = {{"type", "Replace"}, {"pattern", {{"Regex", "x"}}}, {"content", ""}};
  const json ending = {{{"Sequence", {{"id", "A"}}}}, {{"SpecialToken", {{"id", "<s>"}}}}};
  const json pair = {{{"Sequence", {{"id", "B"}}}}};
  const json no_text = {{{"SpecialToken", {{"id", "<s>"}}}}};
  const std::vector<Refusal> refusals = {
      {"/extra", 1, "tokenizer.json: extra: this key is not supported; expected only version"},
      {"/version", "2.0", "version: expected \"1.0\", found \"2.0\""},
      {"/model/type", "Unigram", "expected model.type \"BPE\", found \"Unigram\""},
      {"/model/dropout", 0.1, "model.dropout: expected null, found 0.1"},
      {"/model/continuing_subword_prefix", "##", "model.continuing_subword_prefix: expected null"},
      {"/model/end_of_word_suffix", "</w>", "model.end_of_word_suffix: expected null"},
      {"/model/cache", 1, "model.cache: this key is not supported"},
      {"/model/byte_fallback", true, "decoder: expected a ByteFallback"},
      {"/added_tokens/0/single_word", true, "added_tokens[0].single_word: expected false"},
      {"/added_tokens/0/color", 1, "added_tokens[0].color: this key"},
      {"/normalizer", {{"type", "NFC"}}, "normalizer.type: expected Prepend, Replace or Sequence"},
      {"/normalizer",
       {{"type", "Sequence"}, {"normalizers", {{{"type", "Lowercase"}}}}},
       "normalizer.normalizers[0].type: expected Prepend, Replace or Sequence, found "
       "\"Lowercase\""},
      {"/normalizer", {{"type", "Prepend"}, {"x", 1}}, "normalizer.x: this key"},
      {"/pre_tokenizer", {{"type", "Whitespace"}}, "pre_tokenizer.type: expected ByteLevel"},
      {"/pre_tokenizer/mode", 1, "pre_tokenizer.mode: this key"},
      {"/pre_tokenizer", nullptr, "decoder: expected ByteLevel if and only if"},
      {"/pre_tokenizer", Split({{"String", "x"}}, "Random"), "pre_tokenizer.behavior: expected"},
      {"/pre_tokenizer",
       {{"type", "Metaspace"}, {"replacement", kMark}, {"prepend_scheme", "some"}},
       "pre_tokenizer.prepend_scheme: expected always, first or never, found \"some\""},
      {"/post_processor", {{"type", "BertProcessing"}}, "post_processor.type: expected ByteLevel"},
      {"/post_processor/single", ending, "post_processor.single[1]: expected nothing after"},
      {"/post_processor/single", pair, "post_processor.single[0].Sequence.id: expected \"A\""},
      {"/decoder", {{"type", "WordPiece"}}, "decoder.type: expected ByteFallback"},
      {"/decoder",
       {{"type", "Sequence"}, {"decoders", decoders}},
       "decoder.decoders[1].type: expected only Strip after a Fuse"},
      {"/decoder",
       {{"type", "Sequence"}, {"decoders", {decoders[0], strip}}},
       "decoder.decoders[1].start: expected 0 or 1 in all, after a Fuse, found 2"},
      {"/decoder",
       {{"type", "Sequence"}, {"decoders", {decoders[0], late}}},
       "decoder.decoders[1].stop: expected 0"},
      {"/decoder", regex, "decoder.pattern.Regex: expected a String"},
  };
  for (const Refusal& refusal : refusals) {
    json file = ByteLevelFile();
    file[json::json_pointer(refusal.place)] = refusal.value;
    ExpectRefused(file.dump(), nullptr, ErrorCode::kInvalidArgument, refusal.message);
  }
  json file = ByteLevelFile();
  file["model"]["vocab"].erase("b");
  file["model"]["merges"] = json::array();
  ExpectRefused(file.dump(), nullptr, ErrorCode::kInvalidArgument,
                "model.vocab: expected a token \"b\" for byte 98");
  file = ByteLevelFile();
  file["model"]["byte_fallback"] = true;
  file["decoder"] = {{"type", "Sequence"},
                     {"decoders", {{{"type", "ByteFallback"}}, {{"type", "ByteLevel"}}}}};
  ExpectRefused(file.dump(), nullptr, ErrorCode::kInvalidArgument, "model.byte_fallback: expected");
}

TEST(BpeTokenizerTest, RefusesPatternsThatPcre2WouldReadDifferently) {
  const std::vector<std::string> patterns = {"\\w",     "\\h",   "\\bx",   "[[:alpha:]]", "[a&&b]",
                                             "(?<n>x)", "(?m)x", "(*UTF)", "\\1",         "x{,3}",
                                             "x{2}+",   "\\pL",  "[]a]",   "\\Qx\\E",     "\\"};
  for (const std::string& pattern : patterns) {
    json file = ByteLevelFile();
    file["pre_tokenizer"] = Split({{"Regex", pattern}}, "Isolated");
    file["decoder"] = {{"type", "Fuse"}};
    file["model"]["unk_token"] = "a";
    ExpectRefused(file.dump(), nullptr, ErrorCode::kInvalidArgument,
                  "pre_tokenizer.pattern.Regex: expected");
  }
  for (const std::string pattern : {"(", "[a", "a)", "\\p{Nonsense}", "*"}) {
    json file = ByteLevelFile();
    file["pre_tokenizer"] = Split({{"Regex", pattern}}, "Isolated");
    file["decoder"] = {{"type", "Fuse"}};
    file["model"]["unk_token"] = "a";
    ExpectRefused(file.dump(), nullptr, ErrorCode::kInvalidArgument,
                  "pre_tokenizer.pattern.Regex: not a regular expression");
  }
}

TEST(BpeTokenizerTest, NamesWhatIsDamaged) {
  const json no_text = {{{"SpecialToken", {{"id", "<s>"}}}}};
  const std::vector<Refusal> refusals = {
      {"/truncation", true, "truncation: expected null or an object, found true"},
      {"/padding", 8, "padding: expected null or an object, found 8"},
      {"/model/vocab", 1, "model.vocab: expected an object, found 1"},
      {"/model/vocab/a", "x", "model.vocab[\"a\"]: expected an integer in [0, 1048575]"},
      {"/model/vocab/a", -1, "model.vocab[\"a\"]: expected an integer"},
      {"/model/vocab/a", 1.5, "model.vocab[\"a\"]: expected an integer"},
      {"/model/vocab/a", 1 << 20, "model.vocab[\"a\"]: expected an integer"},
      {"/model/vocab/a", ~uint64_t{0}, "model.vocab[\"a\"]: expected an integer"},
      {"/model/vocab/a", 98, "expected an id of its own, found 98"},
      {"/model/merges", "a b", "model.merges: expected an array"},
      {"/model/merges/1", "a", "model.merges[1]: expected two tokens"},
      {"/model/merges/1", "a b c", "model.merges[1]: expected two tokens"},
      {"/model/merges/1", {"a"}, "model.merges[1]: expected two tokens"},
      {"/model/merges/1", "a zz",
       "model.merges[1]: expected tokens of the vocabulary, found \"zz\""},
      {"/model/merges/1", "b b",
       "model.merges[1]: expected tokens of the vocabulary, found \"bb\""},
      {"/model/unk_token", "nope", "model.unk_token: expected a token of the vocabulary"},
      {"/model/unk_token", 1, "model.unk_token: expected a string"},
      {"/model/fuse_unk", 1, "model.fuse_unk: expected true or false, found 1"},
      {"/added_tokens", 1, "added_tokens: expected an array"},
      {"/added_tokens/0", 1, "added_tokens[0]: expected an object"},
      {"/added_tokens/0/id", 1 << 20, "added_tokens[0].id: expected an integer"},
      {"/added_tokens/0/id", 97, "added token \"<s>\": expected id 97"},
      {"/added_tokens/0/content", "a", "added token \"a\": expected id 300"},
      {"/added_tokens/0/content", "", "added_tokens[0].content: expected a string that is not"},
      {"/added_tokens/0/content", std::string(1001, 'x'),
       "added_tokens[0].content: expected at most"},
      {"/added_tokens/1/id", 300, "added_tokens[1].id: expected an id of its own"},
      {"/added_tokens/1/content", "<s>", "added_tokens[1].content: expected a text of its own"},
      {"/normalizer", 1, "normalizer: expected an object"},
      {"/normalizer", {{"type", "Prepend"}, {"prepend", ""}}, "normalizer.prepend: expected"},
      {"/normalizer", {{"type", "Sequence"}}, "normalizer.normalizers: expected an array"},
      {"/pre_tokenizer", json::object(), "pre_tokenizer.type: expected a string, found null"},
      {"/pre_tokenizer", Split({{"String", ""}}, "Isolated"),
       "pre_tokenizer.pattern.String: expected a string that is not empty"},
      {"/pre_tokenizer", Split(json::object(), "Isolated"), "expected one of String and Regex"},
      {"/pre_tokenizer/use_regex", 1, "pre_tokenizer.use_regex: expected true or false"},
      {"/post_processor/single", no_text, "post_processor.single: expected a Sequence"},
      {"/post_processor/special_tokens", json::object(),
       "post_processor.special_tokens.<s>.ids: expected an array"},
      {"/post_processor/special_tokens/<s>/ids/0", 299,
       "post_processor: expected ids of tokens, found 299"},
      {"/decoder", nullptr, "decoder: expected an object, found null"},
      {"/decoder", "ByteLevel", "decoder: expected an object"},
  };
  for (const Refusal& refusal : refusals) {
    json file = ByteLevelFile();
    file[json::json_pointer(refusal.place)] = refusal.value;
    ExpectRefused(file.dump(), nullptr, ErrorCode::kDataLoss, refusal.message);
  }
  json file = SmallByteFallbackFile();
  file["added_tokens"].push_back(Added(13, "<0x0A>", true));
  ExpectRefused(file.dump(), nullptr, ErrorCode::kDataLoss, "a byte token not to be special");
}

TEST(BpeTokenizerTest, HostileFilesAreErrors) {
  const auto refused = [](const std::string& file, const std::string& part) {
    ExpectRefused(file, nullptr, ErrorCode::kDataLoss, part);
  };
  refused("{", "tokenizer.json: not JSON");
  refused("", "tokenizer.json");
  refused("[]", "tokenizer.json: not a JSON object");
  refused("{\"model\": \"\xff\"}", "tokenizer.json: not JSON");
  refused(DeepJson(), "expected at most 32 levels");
  refused("{\"model\": " + DeepJson() + "}", "expected at most 32 levels");
  refused("{\"model\": \"\\\"" + std::string(100, '[') + "\"" + std::string(100, '['),
          "expected at most 32 levels");
  refused("[" + Repeat("0,", 10'000'000) + "0]", "4000000 values");
  refused(std::string(100'000'001, ' '), "more than the 100000000 bytes");
  const std::string good = ByteLevelFile().dump();
  for (size_t size = 1; size < good.size(); size += good.size() / 97) {
    refused(good.substr(0, size), "tokenizer.json: not JSON");
  }
  ExpectRefused(good, {{"eos_token", "<e>"}}, ErrorCode::kDataLoss,
                "tokenizer_config.json: eos_token: \"<e>\" is not in the vocabulary");
  ExpectRefused(good, {{"bos_token", "<b>"}}, ErrorCode::kDataLoss, "bos_token: \"<b>\"");
  ExpectRefused(good, {{"added_tokens_decoder", {{"97", {{"content", "<e>"}}}}}},
                ErrorCode::kDataLoss, "added token \"<e>\": expected id 97");
}

// Changes of single bytes: whatever the outcome, nothing may crash.
TEST(BpeTokenizerTest, DamagedBytesDoNotCrash) {
  constexpr uint32_t kSeed = 20261129;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  for (const std::string& good : {ByteLevelFile().dump(), SmallByteFallbackFile().dump()}) {
    for (int i = 0; i < 300; ++i) {
      std::string file = good;
      for (int k = 0; k < 3; ++k) {
        file[random() % file.size()] = "0129{}[],:\"ax \\"[random() % 15];
      }
      const auto tokenizer = LoadText(file, nullptr);
      if (tokenizer.ok()) (*tokenizer)->Encode(RandomText(random), kSpecial);
    }
  }
}

}  // namespace
}  // namespace innerq
