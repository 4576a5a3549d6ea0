#include "server/text_stream.h"

#include <gtest/gtest.h>

#include <random>

#include "tests/server/fake_model.h"

namespace innerq {
namespace {

constexpr const char* kReplacement = "\xEF\xBF\xBD";

// All pieces that leave while the bytes of `text` come one by one, joined by '/', the flush last.
std::string Pieces(const std::string& text, std::vector<std::string> stops,
                   bool include_stop = false) {
  const ByteTokenizer tokenizer;
  TextStream stream(&tokenizer, {.stops = std::move(stops), .include_stop = include_stop});
  std::string pieces;
  for (const char c : text) {
    pieces += stream.Push(static_cast<uint8_t>(c)) + "/";
    if (stream.stopped()) return pieces + "STOP";
  }
  return pieces + stream.Flush();
}

std::string Repeat(const std::string& text, int count) {
  std::string result;
  for (int i = 0; i < count; ++i) result += text;
  return result;
}

TEST(Utf8, IllFormedPartsAreReplacedAsPythonDoes) {
  // Expected counts of U+FFFD: Python's bytes.decode("utf-8", errors="replace").
  const std::pair<std::string, std::string> cases[] = {
      {"plain", "plain"},
      {"\xC3\xA9", "\xC3\xA9"},
      {"\xF0\x9F\x98\x80", "\xF0\x9F\x98\x80"},
      {"\xF0\x9F\x98", kReplacement},
      {"\xF0\x9F\x98z", std::string(kReplacement) + "z"},
      {"\x80\x80", Repeat(kReplacement, 2)},
      {"\xC0\xAF", Repeat(kReplacement, 2)},          // overlong
      {"\xE0\x80\x80", Repeat(kReplacement, 3)},      // overlong
      {"\xED\xA0\x80", Repeat(kReplacement, 3)},      // surrogate
      {"\xF4\x90\x80\x80", Repeat(kReplacement, 4)},  // beyond U+10FFFF
      {"\xF5\xFF", Repeat(kReplacement, 2)},
      {"\xE2\x82\xE2\x82\xAC", std::string(kReplacement) + "\xE2\x82\xAC"},
  };
  for (const auto& [bytes, expected] : cases) {
    EXPECT_EQ(ReplaceInvalidUtf8(bytes), expected) << testing::PrintToString(bytes);
    Utf8Decoder decoder;
    std::string one_by_one;
    for (const char c : bytes) one_by_one += decoder.Push({&c, 1});
    EXPECT_EQ(one_by_one + decoder.Flush(), expected) << testing::PrintToString(bytes);
  }
}

TEST(Utf8, ShortTextsStayAndLongOnesEndWithAWholeCharacter) {
  EXPECT_EQ(ShortenUtf8("", 3), "");
  EXPECT_EQ(ShortenUtf8("abc", 3), "abc");
  EXPECT_EQ(ShortenUtf8("abcd", 3), "abc...");
  EXPECT_EQ(ShortenUtf8("a\u00e9\u00e9", 3), "a\u00e9...");
  EXPECT_EQ(ShortenUtf8("a\u00e9\u00e9", 4), "a\u00e9...");
  EXPECT_EQ(ShortenUtf8("\U0001f600", 3), "...");
}

TEST(Utf8, JsonStringsEscapeWhatJsonForbids) {
  EXPECT_EQ(QuoteJson("a\"b\\c\n\x01\x7f\xFF"), "\"a\\\"b\\\\c\\n\\u0001\x7f\xEF\xBF\xBD\"");
}

TEST(TextStream, OnlyCompleteCharactersLeave) {
  EXPECT_EQ(Pieces("a\xF0\x9F\x98\x80z", {}), "a////\xF0\x9F\x98\x80/z/");
  EXPECT_EQ(Pieces("a\xF0\x9F", {}), std::string("a///") + kReplacement);
}

TEST(TextStream, TextThatMayBeginAStopStringIsHeldBack) {
  EXPECT_EQ(Pieces("xENDy", {"END"}), "x////STOP");
  EXPECT_EQ(Pieces("xENxEND", {"END"}), "x///ENx////STOP");
  EXPECT_EQ(Pieces("xEN", {"END"}), "x///EN");
  EXPECT_EQ(Pieces("EENEND", {"END"}), "/E//EN///STOP");
}

TEST(TextStream, OverlappingStopStringsEndAtTheFirstThatStarts) {
  EXPECT_EQ(Pieces("abcd", {"bcd", "c"}), "a//b/STOP");  // "c" completes first
  EXPECT_EQ(Pieces("aab", {"aab", "ab"}), "///STOP");
  EXPECT_EQ(Pieces("\n\n", {"\n\n", "\n"}), "/STOP");
}

TEST(TextStream, AStopStringMayBePartOfTheText) {
  EXPECT_EQ(Pieces("xENDy", {"END"}, true), "x///END/STOP");
  EXPECT_EQ(Pieces("abcd", {"bcd", "c"}, true), "a//bc/STOP");
  // A token of two stop strings: the shorter one was complete first.
  class Words : public ByteTokenizer {
    std::string TokenBytes(int32_t, bool, bool) const override { return "xENDINGy"; }
  };
  const Words tokenizer;
  TextStream stream(&tokenizer, {.stops = {"ENDING", "END"}, .include_stop = true});
  EXPECT_EQ(stream.Push(1), "xEND");
  EXPECT_TRUE(stream.stopped());
  EXPECT_EQ(stream.released_characters(), 4);
  EXPECT_EQ(stream.Flush(), "");
}

TEST(TextStream, WhatComesTooEarlyDoesNotStop) {
  const ByteTokenizer tokenizer;
  TextStream stream(&tokenizer, {.stops = {"ab"}});
  EXPECT_EQ(stream.Push('a', /*may_stop=*/false), "a");
  EXPECT_EQ(stream.Push('b', /*may_stop=*/false), "b");
  EXPECT_EQ(stream.Push('a'), "");
  EXPECT_EQ(stream.Push('b'), "");
  EXPECT_TRUE(stream.stopped());
}

TEST(TextStream, SpecialTokensGiveTheirTextIfAsked) {
  const ByteTokenizer tokenizer;
  TextStream stream(&tokenizer, {.stops = {}, .special = true});
  EXPECT_EQ(stream.Push('a') + stream.Push(kFakeEos) + stream.Flush(), "a</s>");
}

std::vector<int64_t> OffsetsOf(const PromptEcho& echo) {
  std::vector<int64_t> offsets;
  for (const PromptEcho::Token& token : echo.tokens) offsets.push_back(token.offset);
  return offsets;
}

TEST(EchoPrompt, IsTheTextOfTheIdsOrTheTextThatWasSent) {
  const ByteTokenizer tokenizer;
  const std::vector<int32_t> ids = {kFakeBos, 'a', 0xC3, 0xA9, 'b', 0xC3};
  PromptEcho echo = EchoPrompt(tokenizer, ids, std::nullopt, /*special=*/false);
  EXPECT_EQ(echo.text, std::string("a\xC3\xA9"
                                   "b") +
                           kReplacement);
  EXPECT_EQ(OffsetsOf(echo), (std::vector<int64_t>{0, 0, 1, 1, 2, 3}));
  EXPECT_TRUE(echo.tokens[1].first) << "a special token that gives nothing begins no text";
  EXPECT_FALSE(echo.tokens[2].first);

  echo = EchoPrompt(tokenizer, ids, std::nullopt, /*special=*/true);
  EXPECT_EQ(echo.text, std::string("<s>a\xC3\xA9"
                                   "b") +
                           kReplacement);
  EXPECT_EQ(OffsetsOf(echo), (std::vector<int64_t>{0, 3, 4, 4, 5, 6}));
  EXPECT_FALSE(echo.tokens[1].first);

  for (const bool special : {false, true}) {
    echo = EchoPrompt(tokenizer, ids, "a\xC3\xA9", special);
    EXPECT_EQ(echo.text, "a\xC3\xA9");
    EXPECT_EQ(OffsetsOf(echo), (std::vector<int64_t>{0, 0, 1, 1, 2, 2})) << "never beyond the text";
  }
}

TEST(TextStream, AStopStringInsideAMultiByteCharacterDoesNotMatch) {
  // U+00E9 is C3 A9; the stop string is U+00A9 (C2 A9).
  EXPECT_EQ(Pieces("\xC3\xA9", {"\xC2\xA9"}), "/\xC3\xA9/");
}

TEST(TextStream, StreamedTextEqualsTheTextCutAtTheFirstStopString) {
  std::mt19937 random(7);
  int stopped = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string text;
    for (int i = 0; i < 30; ++i) text += "ab"[random() % 2];
    const std::vector<std::string> stops = {"aabab", "bbbab", "babaabb"};
    // The stop string that is complete first, and of those the one that starts first.
    size_t cut = std::string::npos;
    for (size_t end = 1; end <= text.size() && cut == std::string::npos; ++end) {
      for (const std::string& stop : stops) cut = std::min(cut, text.substr(0, end).find(stop));
    }
    std::string joined = Pieces(text, stops);
    const bool stop = joined.ends_with("STOP");
    if (stop) joined.resize(joined.size() - 4);
    std::erase(joined, '/');
    EXPECT_EQ(stop, cut != std::string::npos);
    EXPECT_EQ(joined, text.substr(0, cut));
    stopped += stop;
  }
  EXPECT_GT(stopped, 500);
  EXPECT_LT(stopped, 2900);
}

TEST(TextStream, OffsetsCountCharactersAndSpecialTokensAddNothing) {
  const ByteTokenizer tokenizer;
  TextStream stream(&tokenizer, {});
  std::vector<int64_t> offsets;
  for (const int32_t id : {0xC3, 0xA9, int{'a'}, int{kFakeEos}, int{'b'}}) {
    offsets.push_back(stream.next_offset());
    stream.Push(id);
  }
  EXPECT_EQ(offsets, (std::vector<int64_t>{0, 0, 1, 2, 2}));
  EXPECT_EQ(stream.released_characters(), 3);
}

}  // namespace
}  // namespace innerq
