// Answers of several choices, to several prompts, and of prompts themselves.
#include <algorithm>
#include <numeric>
#include <set>

#include "tests/server/api_test.h"

namespace innerq {
namespace {

// Random answers, some tokens of which are what the model expects and some are not: every other
// letter is made as likely as the one that follows in the alphabet.
json RandomBody(int max_tokens = 12) {
  json body = {{"prompt", "a"}, {"max_tokens", max_tokens}, {"temperature", 2}, {"seed", 5}};
  for (int i = 'a'; i <= 'o'; i += 2) body["logit_bias"][std::to_string(i)] = 20;
  return body;
}

json With(json body, const json& more) {
  body.update(more);
  return body;
}

std::vector<std::string> Texts(const json& answer) {
  std::vector<std::string> texts;
  for (const json& choice : answer["choices"]) {
    EXPECT_EQ(choice["index"], texts.size());
    texts.push_back(choice.contains("text") ? choice["text"] : choice["message"]["content"]);
  }
  return texts;
}

TEST_F(ApiTest, ChoicesDifferAndDoNotDependOnTheirNumber) {
  const json answer = Answer(false, With(RandomBody(), {{"n", 8}}));
  const std::vector<std::string> eight = Texts(answer);
  ASSERT_EQ(eight.size(), 8u);
  EXPECT_EQ(std::set<std::string>(eight.begin(), eight.end()).size(), 8u);
  EXPECT_EQ(answer["usage"]["prompt_tokens"], 2) << "counted once";
  EXPECT_EQ(answer["usage"]["completion_tokens"], 8 * 12);
  EXPECT_EQ(answer["usage"]["total_tokens"], 2 + 8 * 12);
  for (const size_t n : {1, 3}) {
    const auto fewer = Texts(Answer(false, With(RandomBody(), {{"n", n}})));
    EXPECT_EQ(fewer, std::vector<std::string>(eight.begin(), eight.begin() + n));
  }
  EXPECT_NE(Texts(Answer(false, With(RandomBody(), {{"n", 8}, {"seed", 6}}))), eight);
  json chat = RandomBody();
  chat.erase("prompt");
  EXPECT_EQ(Texts(Answer(true, With(chat, {{"n", 4}, {"messages", kUser}}))).size(), 4u);
}

TEST_F(ApiTest, APromptInAListIsAnsweredAsAlone) {
  const json answer = Answer(false, With(RandomBody(), {{"prompt", {"a", "bcd", "a"}}, {"n", 2}}));
  const std::vector<std::string> texts = Texts(answer);
  ASSERT_EQ(texts.size(), 6u);
  EXPECT_EQ(answer["usage"]["prompt_tokens"], 2 + 4 + 2);
  EXPECT_EQ(answer["usage"]["completion_tokens"], 6 * 12);
  for (size_t i = 0; i < 3; ++i) {
    const char* prompt = i == 1 ? "bcd" : "a";
    const auto alone = Texts(Answer(false, With(RandomBody(), {{"prompt", prompt}, {"n", 2}})));
    EXPECT_EQ(alone, std::vector<std::string>(texts.begin() + 2 * i, texts.begin() + 2 * i + 2));
  }
  // Without a seed, equal prompts need not have equal answers.
  json unseeded = With(RandomBody(), {{"prompt", std::vector<std::string>(9, "a")}});
  unseeded.erase("seed");
  const std::vector<std::string> free = Texts(Answer(false, unseeded));
  EXPECT_GT(std::set<std::string>(free.begin(), free.end()).size(), 1u);

  const json ids = json::parse("[[97], [98, 99]]");
  EXPECT_EQ(Texts(Answer(false, {{"prompt", ids}, {"max_tokens", 2}})),
            (std::vector<std::string>{"bc", "de"}));
}

TEST_F(ApiTest, TheBestAreThoseOfTheHighestMeanLogprob) {
  int reordered = 0;
  for (int seed = 0; seed < 8; ++seed) {
    const json body = With(RandomBody(), {{"seed", seed}});
    const json all = Answer(false, With(body, {{"n", 6}, {"logprobs", 0}}));
    std::vector<double> means;
    for (const json& choice : all["choices"]) {
      const auto values = choice["logprobs"]["token_logprobs"].get<std::vector<double>>();
      means.push_back(std::accumulate(values.begin(), values.end(), 0.0) /
                      static_cast<double>(values.size()));
    }
    std::vector<size_t> order(means.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return means[a] > means[b]; });
    reordered += order[0] != 0 ? 1 : 0;
    const json best = Answer(false, With(body, {{"n", 2}, {"best_of", 6}}));
    const std::vector<std::string> texts = Texts(all);
    EXPECT_EQ(Texts(best), (std::vector<std::string>{texts[order[0]], texts[order[1]]}));
    EXPECT_TRUE(best["choices"][0]["logprobs"].is_null()) << "not asked for";
    EXPECT_EQ(best["usage"], all["usage"]) << "that of all candidates";
  }
  EXPECT_GT(reordered, 2);
}

TEST_F(ApiTest, AnEchoedPromptIsScoredFromTheSecondTokenOn) {
  const json answer =
      Answer(false, {{"prompt", "abcx"}, {"max_tokens", 2}, {"echo", true}, {"logprobs", 2}});
  const json& choice = answer["choices"][0];
  EXPECT_EQ(choice["text"], "abcxyz");
  EXPECT_EQ(answer["usage"]["prompt_tokens"], 5);
  EXPECT_EQ(answer["usage"]["completion_tokens"], 2);
  const json& logprobs = choice["logprobs"];
  EXPECT_EQ(logprobs["tokens"], json::parse(R"(["<s>", "a", "b", "c", "x", "y", "z"])"));
  EXPECT_EQ(logprobs["text_offset"], json::parse("[0, 0, 1, 2, 3, 4, 5]"));
  const json& values = logprobs["token_logprobs"];
  const json& tops = logprobs["top_logprobs"];
  ASSERT_EQ(values.size(), 7u);
  ASSERT_EQ(tops.size(), 7u);
  EXPECT_TRUE(values[0].is_null());
  EXPECT_TRUE(tops[0].is_null());
  for (size_t i = 1; i < 7; ++i) {
    const bool likely = i != 4;  // 'c' is followed by 'd'
    EXPECT_EQ(values[i].get<double>() > -1e-3, likely) << i;
    EXPECT_EQ(tops[i].at(logprobs["tokens"][i]), values[i]);
    double best = -1e9;
    for (const json& value : tops[i]) best = std::max(best, value.get<double>());
    EXPECT_EQ(values[i] == best, likely);
  }
  EXPECT_NEAR(values[4].get<double>(), -20, 1e-3);
  EXPECT_EQ(tops[4].size(), 3u) << "the two best, and the one there is";
  // Without logprobs an echo is text alone.
  const json plain = Answer(false, {{"prompt", "abcx"}, {"max_tokens", 2}, {"echo", true}});
  EXPECT_EQ(plain["choices"][0]["text"], "abcxyz");
  EXPECT_TRUE(plain["choices"][0]["logprobs"].is_null());
}

TEST_F(ApiTest, AnEchoWithoutAnAnswerIsThePromptAlone) {
  const json body = {{"prompt", "abc"}, {"max_tokens", 0}, {"echo", true}, {"logprobs", 1}};
  const json with = Answer(false, With(body, {{"max_tokens", 3}}))["choices"][0]["logprobs"];
  for (const json& prompt : {json("abc"), json::parse("[256, 97, 98, 99]")}) {
    const json answer = Answer(false, With(body, {{"prompt", prompt}}));
    const json& choice = answer["choices"][0];
    EXPECT_EQ(choice["text"], "abc");
    EXPECT_EQ(choice["finish_reason"], "length");
    EXPECT_EQ(answer["usage"]["completion_tokens"], 0);
    EXPECT_EQ(choice["logprobs"]["tokens"], json::parse(R"(["<s>", "a", "b", "c"])"));
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(choice["logprobs"]["token_logprobs"][i], with["token_logprobs"][i]);
      EXPECT_EQ(choice["logprobs"]["top_logprobs"][i], with["top_logprobs"][i]);
    }
  }
  EXPECT_EQ(Answer(false, {{"prompt", "abc"}, {"max_tokens", 0}, {"echo", true}})["choices"][0],
            json::parse(R"({"index": 0, "text": "abc", "logprobs": null,
                            "finish_reason": "length"})"));
  const auto events = Stream(false, body);
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0]["choices"][0]["text"], "abc");
  EXPECT_EQ(events[0]["choices"][0]["logprobs"]["tokens"].size(), 4u);
  EXPECT_EQ(events[1]["choices"][0]["finish_reason"], "length");
}

// What lm-evaluation-harness (local-completions) sends and reads: prompts of ids, one token
// generated, whose entry it drops, so every other entry must be one of the prompt's.
TEST_F(ApiTest, LikelihoodsAreReadAsTheEvaluationHarnessReadsThem) {
  const json prompts = json::parse("[[256, 97, 98, 99], [97, 98, 98, 32, 33]]");
  const json answer = Answer(false, {{"prompt", prompts},
                                     {"temperature", 0},
                                     {"max_tokens", 1},
                                     {"logprobs", 1},
                                     {"seed", 1234},
                                     {"echo", true}});
  const auto greedy = [&](size_t index, size_t context) {
    const json& logprobs = answer["choices"][index]["logprobs"];
    EXPECT_EQ(logprobs["token_logprobs"].size(), prompts[index].size() + 1) << "'!' ends an answer";
    bool all = true;
    for (size_t i = context; i < prompts[index].size(); ++i) {
      double best = -1e9;
      for (const json& value : logprobs["top_logprobs"][i]) {
        best = std::max(best, value.get<double>());
      }
      all &= logprobs["token_logprobs"][i] == best;
    }
    return all;
  };
  EXPECT_TRUE(greedy(0, 1));
  EXPECT_FALSE(greedy(1, 1)) << "'b' does not follow 'b'";
  EXPECT_FALSE(greedy(1, 3)) << "nor does ' '";
  EXPECT_TRUE(greedy(1, 4));
}

TEST_F(ApiTest, ATokenThatStopsIsInTheTextIfAsked) {
  const auto text = [this](const json& more) {
    const json choice =
        Answer(false, With({{"prompt", "a"}, {"max_tokens", 9}}, more))["choices"][0];
    EXPECT_EQ(choice["finish_reason"], "stop");
    return choice["text"].get<std::string>();
  };
  EXPECT_EQ(text({{"stop_token_ids", {'d'}}}), "bc");
  EXPECT_EQ(text({{"stop_token_ids", {'d'}}, {"include_stop_str_in_output", true}}), "bcd");
  EXPECT_EQ(text({{"stop", "cd"}, {"include_stop_str_in_output", true}}), "bcd");
  EXPECT_EQ(text({{"stop", {"c", "g"}}, {"min_tokens", 3}}), "bcdef");
  const json end = {{"prompt", " "}};
  EXPECT_EQ(text(end), "!");
  EXPECT_EQ(text(With(end, {{"include_stop_str_in_output", true}})), "!");
  EXPECT_EQ(text(With(end, {{"include_stop_str_in_output", true}, {"skip_special_tokens", false}})),
            "!</s>");
  EXPECT_EQ(text(With(end, {{"skip_special_tokens", false}})), "!");
}

TEST_F(ApiTest, ATokenThatStopsHasALogprobInCompletionsOnly) {
  const json completion = Answer(false, {{"prompt", " "}, {"logprobs", 0}});
  const json& logprobs = completion["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs["tokens"], json::parse(R"(["!", "</s>"])"));
  EXPECT_EQ(logprobs["text_offset"], json::parse("[0, 1]"));
  const json chat =
      Answer(true, {{"messages", kUser}, {"logprobs", true}, {"stop_token_ids", {'c'}}});
  EXPECT_EQ(chat["choices"][0]["message"]["content"], "ab");
  EXPECT_EQ(chat["choices"][0]["logprobs"]["content"].size(), 2u) << "the content's tokens";
}

TEST_F(ApiTest, AStreamInterleavesItsChoices) {
  Start(ScriptedEngine(milliseconds(1)));
  json body = With(RandomBody(30), {{"n", 3}, {"messages", kUser}});
  body.erase("prompt");
  const std::vector<std::string> expected = Texts(Answer(true, body));
  body["stream_options"] = {{"include_usage", true}, {"continuous_usage_stats", true}};
  const auto events = Stream(true, body);
  std::vector<std::string> texts(3), log(3);
  std::vector<int> order;
  int64_t tokens = 0;
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    ASSERT_EQ(events[i]["choices"].size(), 1u);
    const json& choice = events[i]["choices"][0];
    const auto index = choice["index"].get<size_t>();
    const json& delta = choice["delta"];
    log[index] += delta.contains("role") ? 'R' : choice["finish_reason"].is_null() ? '.' : 'E';
    if (delta.contains("content")) texts[index] += delta["content"].get<std::string>();
    order.push_back(static_cast<int>(index));
    const json& usage = events[i]["usage"];
    EXPECT_EQ(usage["prompt_tokens"], 19);
    EXPECT_GE(usage["completion_tokens"].get<int64_t>(), tokens);
    tokens = usage["completion_tokens"];
  }
  EXPECT_EQ(texts, expected);
  for (const std::string& kinds : log) {
    EXPECT_EQ(kinds, "R" + std::string(kinds.size() - 2, '.') + "E");
    EXPECT_GT(kinds.size(), 3u);
  }
  EXPECT_FALSE(std::is_sorted(order.begin() + 3, order.end())) << "one choice after another";
  EXPECT_EQ(events.back()["choices"], json::array());
  EXPECT_EQ(events.back()["usage"]["completion_tokens"], 90);
}

TEST_F(ApiTest, AStreamOfAnEchoSaysTheSameAsThePlainAnswer) {
  const json body = {{"prompt", {"abc", "x"}}, {"max_tokens", 5}, {"echo", true}, {"logprobs", 1}};
  const json answer = Answer(false, body);
  std::vector<json> tokens(2, json::array()), values = tokens, offsets = tokens, tops = tokens;
  std::vector<std::string> texts(2);
  for (const json& event : Stream(false, body)) {
    const json& choice = event["choices"][0];
    const auto index = choice["index"].get<size_t>();
    texts[index] += choice["text"].get<std::string>();
    const json& logprobs = choice["logprobs"];
    if (logprobs.is_null()) continue;
    for (const json& item : logprobs["tokens"]) tokens[index].push_back(item);
    for (const json& item : logprobs["token_logprobs"]) values[index].push_back(item);
    for (const json& item : logprobs["top_logprobs"]) tops[index].push_back(item);
    for (const json& item : logprobs["text_offset"]) offsets[index].push_back(item);
  }
  EXPECT_EQ(texts, Texts(answer));
  for (size_t i = 0; i < 2; ++i) {
    const json& logprobs = answer["choices"][i]["logprobs"];
    EXPECT_EQ(tokens[i], logprobs["tokens"]);
    EXPECT_EQ(values[i], logprobs["token_logprobs"]);
    EXPECT_EQ(tops[i], logprobs["top_logprobs"]);
    EXPECT_EQ(offsets[i], logprobs["text_offset"]);
  }
}

TEST_F(ApiTest, AnEmptyPromptIsTheBeginningOfASequenceOrRefused) {
  EXPECT_EQ(Texts(Answer(false, {{"prompt", ""}, {"max_tokens", 2}})).front(), "ab");
  EXPECT_EQ(Texts(Answer(false, {{"prompt", {"", "x"}}, {"max_tokens", 1}})),
            (std::vector<std::string>{"a", "y"}));
  const json bare = {{"prompt", ""}, {"add_special_tokens", false}};
  EXPECT_EQ(Refusal(false, bare, 400)["param"], "prompt");
  EXPECT_EQ(Answer(false, With(bare, {{"prompt", "ab"}}))["usage"]["prompt_tokens"], 2);
}

TEST_F(ApiTest, OneBadPromptRefusesAll) {
  const std::string big(1020, 'a');
  const json error = Refusal(false, {{"prompt", {"a", big}}, {"max_tokens", 4}}, 400);
  EXPECT_EQ(error["code"], "context_length_exceeded");
  EXPECT_EQ(error["param"], "prompt");
  EXPECT_EQ(error["n_prompt_tokens"], 1021);
  EXPECT_EQ(Refusal(false, {{"prompt", json::parse("[[97], [258]]")}}, 400)["param"], "prompt");
  // Every prompt token has 21 log-probabilities: 128 times 400 tokens have more than 2^20.
  const json many = {{"prompt", std::string(399, 'a')},
                     {"n", 128},
                     {"max_tokens", 0},
                     {"echo", true},
                     {"logprobs", 20}};
  EXPECT_EQ(Refusal(false, many, 400)["param"], "logprobs");
  EXPECT_EQ(engine_->Stats().accepted, 0);
  EXPECT_EQ(Refusal(false, {{"prompt", {"a", "#"}}}, 500)["type"], "server_error");
  Start(ScriptedEngine(milliseconds(0), {.max_queue = 3, .max_context = 1024}));
  EXPECT_EQ(Refusal(false, {{"prompt", "a"}, {"n", 4}}, 400)["param"], "n") << "can never fit";
  EXPECT_EQ(Refusal(false, {{"prompt", "a"}, {"best_of", 4}}, 400)["param"], "best_of");
  EXPECT_EQ(Refusal(false, {{"prompt", {"a", "b", "c", "d"}}}, 400)["param"], "prompt");
  EXPECT_EQ(Refusal(true, {{"messages", kUser}, {"n", 4}}, 400)["param"], "n");
  EXPECT_EQ(Texts(Answer(false, {{"prompt", "a"}, {"n", 3}})).size(), 3u);
}

TEST_F(ApiTest, LogprobsThatAreHeldAreBounded) {
  // The first choices end soon, but might not: 128 times 400 tokens with 21 are more than 2^20.
  json many = {{"prompt", " "}, {"n", 128}, {"max_tokens", 400}, {"logprobs", 20}};
  const json error = Refusal(false, many, 400);
  EXPECT_EQ(error["param"], "logprobs");
  EXPECT_EQ(error["code"], "invalid_value");
  // A client may read a stream more slowly than it is made.
  EXPECT_EQ(Refusal(false, With(many, {{"stream", true}}), 400)["param"], "logprobs");
  many["n"] = 124;  // 124 * 400 * 21 are fewer
  EXPECT_EQ(Answer(false, many)["choices"].size(), 124u);
  EXPECT_FALSE(Stream(false, many).empty());
  // A chat that leaves its length open is bounded, not refused: 128 times 1005 tokens would be
  // more.
  const json chat = {
      {"messages", kUser}, {"n", 128}, {"stop", "b"}, {"logprobs", true}, {"top_logprobs", 20}};
  EXPECT_EQ(Answer(true, chat)["choices"].size(), 128u);
  EXPECT_FALSE(Stream(true, chat).empty());
}

TEST_F(ApiTest, AClientThatLeavesCancelsAllItsChoices) {
  Start(ScriptedEngine(milliseconds(1)));
  const json body = {{"prompt", {"a", "b"}}, {"n", 3}, {"max_tokens", 1000}, {"ignore_eos", true}};
  {
    const HttpResponse leaving = Post(false, With(body, {{"stream", true}}));
    ASSERT_TRUE(leaving.stream);
    Recorder recorder(8);
    leaving.stream(recorder);
  }
  HttpRequest request = Http(With(body, {{"model", "m"}}));
  request.client_gone = [] { return true; };
  EXPECT_EQ(api_->Complete(request, false).status, 499);
  EXPECT_TRUE(Settled());
  EXPECT_EQ(engine_->Stats().finished_by_reason.at(FinishReason::kCancelled), 12);
}

}  // namespace
}  // namespace innerq
