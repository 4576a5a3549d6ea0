#include "server/openai_response.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace innerq {
namespace {

using nlohmann::json;

json Logprobs(const TokenText& token, bool chat = false) {
  AnswerHead head;
  head.chat = chat;
  head.logprobs = true;
  const json answer = json::parse(AnswerJson(head, {{{"", {token}}, "stop"}}, {}));
  return answer["choices"][0]["logprobs"];
}

// Tokens of the same text: pieces "a" with ids 1, 2, 3, and their log-probabilities.
TEST(CompletionLogprobs, TokensOfTheSameTextDoNotHideEachOther) {
  const std::vector<TokenText::Alternative> top = {
      {1, "a", -0.5f}, {2, "a", -1.5f}, {3, "b", -2.5f}};
  json block = Logprobs({.id = 2, .bytes = "a", .logprob = -1.5f, .offset = 0, .top = top});
  EXPECT_EQ(block["token_logprobs"], json::parse("[-1.5]"));
  EXPECT_EQ(block["top_logprobs"][0], json::parse(R"({"token_id:1": -0.5, "a": -1.5, "b": -2.5})"));
  block = Logprobs({.id = 1, .bytes = "a", .logprob = -0.5f, .offset = 0, .top = top});
  EXPECT_EQ(block["top_logprobs"][0], json::parse(R"({"a": -0.5, "token_id:2": -1.5, "b": -2.5})"));
  // The chosen token is none of the best.
  block = Logprobs({.id = 9, .bytes = "b", .logprob = -7.0f, .offset = 0, .top = top});
  EXPECT_EQ(block["top_logprobs"][0],
            json::parse(R"({"a": -0.5, "token_id:2": -1.5, "token_id:3": -2.5, "b": -7.0})"));
}

TEST(CompletionLogprobs, PartsOfCharactersAreSpelledOut) {
  const json block = Logprobs({.id = 1,
                               .bytes = "\xC3",
                               .logprob = -0.25f,
                               .offset = 4,
                               .top = {{1, "\xC3", -0.25f}, {2, "\xA9", -2.0f}}});
  EXPECT_EQ(block["tokens"], json::parse(R"(["bytes:\\xc3"])"));
  EXPECT_EQ(block["text_offset"], json::parse("[4]"));
  EXPECT_EQ(block["top_logprobs"][0],
            json::parse(R"({"bytes:\\xc3": -0.25, "bytes:\\xa9": -2.0})"));
}

TEST(CompletionLogprobs, AFirstTokenHasNone) {
  const json block =
      Logprobs({.id = 1, .bytes = "<s>", .logprob = std::nullopt, .offset = 0, .top = {}});
  EXPECT_EQ(block, json::parse(R"({"tokens": ["<s>"], "token_logprobs": [null],
                                   "top_logprobs": [null], "text_offset": [0]})"));
}

TEST(ChatLogprobs, CarryBytesAndEveryAlternative) {
  const json block = Logprobs({.id = 2,
                               .bytes = "\xC3",
                               .logprob = -1.5f,
                               .offset = 0,
                               .top = {{1, "a", -0.5f}, {2, "\xC3", -1.5f}}},
                              /*chat=*/true);
  const json& entry = block["content"][0];
  EXPECT_EQ(entry["token"], "\xEF\xBF\xBD");
  EXPECT_EQ(entry["bytes"], json::parse("[195]"));
  EXPECT_EQ(entry["logprob"], -1.5);
  ASSERT_EQ(entry["top_logprobs"].size(), 2u);
  EXPECT_EQ(entry["top_logprobs"][0], json::parse(R"({"token": "a", "logprob": -0.5,
                                                      "bytes": [97]})"));
}

// One float, one text: what is printed is the float's own value.
TEST(CompletionLogprobs, TheSameFloatIsPrintedTheSame) {
  const float value = -3.3333333f;
  const json block =
      Logprobs({.id = 1, .bytes = "a", .logprob = value, .offset = 0, .top = {{1, "a", value}}});
  EXPECT_EQ(block["token_logprobs"][0].get<double>(), static_cast<double>(value));
  EXPECT_EQ(block["token_logprobs"][0], block["top_logprobs"][0]["a"]);
}

}  // namespace
}  // namespace innerq
