#include "server/openai_request.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace innerq {
namespace {

using nlohmann::json;

json Minimal(bool chat) {
  if (chat) return {{"model", "m"}, {"messages", {{{"role", "user"}, {"content", "hi"}}}}};
  return {{"model", "m"}, {"prompt", "hi"}};
}

std::variant<ApiRequest, ApiError> With(bool chat, const std::string& name, const json& value) {
  json body = Minimal(chat);
  body[name] = value;
  return ParseApiRequest(body.dump(), chat);
}

void ExpectRefused(const std::variant<ApiRequest, ApiError>& result, const std::string& param,
                   const std::string& code) {
  ASSERT_TRUE(std::holds_alternative<ApiError>(result)) << param << ": accepted";
  const ApiError& error = std::get<ApiError>(result);
  EXPECT_EQ(error.status, 400);
  EXPECT_EQ(error.type, "invalid_request_error");
  EXPECT_EQ(error.param, param);
  EXPECT_EQ(error.code, code) << param << ": " << error.message;
  EXPECT_NE(error.message.find(param), std::string::npos);
}

TEST(ApiRequest, EveryHonouredParameterArrives) {
  json body = Minimal(true);
  body.update(json::parse(R"({"max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.25,
      "top_k": 40, "min_p": 0.125, "seed": -3, "repetition_penalty": 1.5, "presence_penalty": -1,
      "frequency_penalty": 2, "logit_bias": {"17": -100, "3": 0.5}, "logprobs": true,
      "top_logprobs": 4, "stop": ["a", "b"], "stop_token_ids": [1, 2], "ignore_eos": true,
      "min_tokens": 2, "stream": true, "stream_options": {"include_usage": true},
      "cache_salt": "tenant", "user": "someone"})"));
  const auto result = ParseApiRequest(body.dump(), true);
  ASSERT_TRUE(std::holds_alternative<ApiRequest>(result)) << std::get<ApiError>(result).message;
  const ApiRequest& request = std::get<ApiRequest>(result);
  EXPECT_EQ(request.max_tokens, 9);
  EXPECT_EQ(request.sampling.temperature, 0.5f);
  EXPECT_EQ(request.sampling.top_p, 0.25f);
  EXPECT_EQ(request.sampling.top_k, 40);
  EXPECT_EQ(request.sampling.min_p, 0.125f);
  EXPECT_TRUE(request.has_seed);
  EXPECT_EQ(request.sampling.seed, static_cast<uint64_t>(-3));
  EXPECT_EQ(request.sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(request.sampling.presence_penalty, -1.0f);
  EXPECT_EQ(request.sampling.frequency_penalty, 2.0f);
  EXPECT_EQ(request.sampling.logit_bias, (std::map<int32_t, float>{{3, 0.5f}, {17, -100.0f}}));
  EXPECT_EQ(request.sampling.num_logprobs, 4);
  EXPECT_EQ(request.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(request.stop_token_ids, (std::vector<int32_t>{1, 2}));
  EXPECT_TRUE(request.ignore_eos);
  EXPECT_EQ(request.min_tokens, 2);
  EXPECT_EQ(request.cache_salt, "tenant");
  EXPECT_TRUE(request.stream);
  EXPECT_TRUE(request.include_usage);
}

TEST(ApiRequest, UnknownAndUnsupportedParametersAreRefusedByName) {
  for (const char* name :
       {"tools", "tool_choice", "functions", "suffix", "temprature", "audio", "metadata",
        "reasoning_effort", "best_off", "prompt", "echo", "best_of", "add_special_tokens"}) {
    ExpectRefused(With(true, name, {1}), name, "unsupported_parameter");
  }
  ExpectRefused(With(true, "tool_choice", "auto"), "tool_choice", "unsupported_parameter");
  ExpectRefused(With(true, "service_tier", "flex"), "service_tier", "unsupported_parameter");
  ExpectRefused(With(true, "metadata", {{"a", "b"}}), "metadata", "unsupported_parameter");
  ExpectRefused(With(true, "metadata", json::array()), "metadata", "unsupported_parameter");
  ExpectRefused(With(true, "tools", {{{"type", "function"}}}), "tools", "unsupported_parameter");
  ExpectRefused(With(false, "suffix", "."), "suffix", "unsupported_parameter");
  for (const char* name : {"messages", "top_logprobs", "max_completion_tokens", "suffix"}) {
    ExpectRefused(With(false, name, 1), name, "unsupported_parameter");
  }
  ExpectRefused(With(true, "store", true), "store", "unsupported_parameter");
  ExpectRefused(With(true, "response_format", {{"type", "json_object"}}), "response_format",
                "unsupported_parameter");
}

TEST(ApiRequest, ParametersOfCompletionsAloneArrive) {
  json body = Minimal(false);
  body.update(json::parse(R"({"n": 2, "best_of": 3, "echo": true, "logprobs": 5, "max_tokens": 0,
      "add_special_tokens": false, "parse_special": true, "skip_special_tokens": false,
      "include_stop_str_in_output": true})"));
  const auto result = ParseApiRequest(body.dump(), false);
  ASSERT_TRUE(std::holds_alternative<ApiRequest>(result)) << std::get<ApiError>(result).message;
  const ApiRequest& request = std::get<ApiRequest>(result);
  EXPECT_EQ(request.n, 2);
  EXPECT_EQ(request.best_of, 3);
  EXPECT_TRUE(request.echo);
  EXPECT_EQ(request.sampling.num_logprobs, 5);
  EXPECT_EQ(request.max_tokens, 0);
  EXPECT_FALSE(request.add_special_tokens);
  EXPECT_TRUE(request.parse_special);
  EXPECT_FALSE(request.skip_special_tokens);
  EXPECT_TRUE(request.include_stop);
}

TEST(ApiRequest, TheNumberOfChoicesIsBounded) {
  const auto parse = [](const json& more) {
    json body = Minimal(false);
    body.update(more);
    return ParseApiRequest(body.dump(), false);
  };
  const auto best_of = [&](const json& more) { return std::get<ApiRequest>(parse(more)).best_of; };
  EXPECT_EQ(best_of({{"n", 128}}), 128) << "n choices of as many";
  EXPECT_EQ(best_of({{"n", 2}, {"best_of", 2}, {"stream", true}}), 2);
  ExpectRefused(parse({{"n", 3}, {"best_of", 2}}), "best_of", "invalid_value");
  ExpectRefused(parse({{"n", 1}, {"best_of", 2}, {"stream", true}}), "best_of", "invalid_value");
  const json two = {"a", "b"};
  EXPECT_EQ(best_of({{"n", 64}, {"prompt", two}}), 64);
  ExpectRefused(parse({{"n", 65}, {"prompt", two}}), "n", "invalid_value");
  ExpectRefused(parse({{"best_of", 65}, {"prompt", two}}), "best_of", "invalid_value");
  const json many = std::vector<std::string>(129, "a");
  ExpectRefused(parse({{"prompt", many}}), "prompt", "invalid_value");
  const json lists(129, json::parse(R"(["not an id"])"));
  ExpectRefused(parse({{"prompt", lists}}), "prompt", "invalid_value");  // none of them is read
  EXPECT_EQ(std::get<ApiRequest>(With(true, "n", 3)).best_of, 3) << "of chats, too";
}

TEST(ApiRequest, NoTokensAreAnAnswerOnlyAfterAnEcho) {
  ExpectRefused(With(false, "max_tokens", 0), "max_tokens", "invalid_value");
  ExpectRefused(With(true, "max_completion_tokens", 0), "max_completion_tokens", "invalid_value");
  json body = Minimal(false);
  body.update({{"max_tokens", 0}, {"echo", true}});
  EXPECT_TRUE(std::holds_alternative<ApiRequest>(ParseApiRequest(body.dump(), false)));
  body["min_tokens"] = 1;
  ExpectRefused(ParseApiRequest(body.dump(), false), "min_tokens", "invalid_value");
}

TEST(ApiRequest, ContinuousUsageNeedsUsage) {
  json body = Minimal(true);
  body["stream"] = true;
  body["stream_options"] = {{"include_usage", true}, {"continuous_usage_stats", true}};
  EXPECT_TRUE(std::get<ApiRequest>(ParseApiRequest(body.dump(), true)).continuous_usage);
  body["stream_options"].erase("include_usage");
  ExpectRefused(ParseApiRequest(body.dump(), true), "stream_options.continuous_usage_stats",
                "invalid_value");
}

TEST(ApiRequest, ObfuscationMayBeDeclinedAndNotHad) {
  json body = Minimal(true);
  body["stream"] = true;
  for (const json& declined : {json(false), json(nullptr)}) {
    body["stream_options"] = {{"include_obfuscation", declined}};
    EXPECT_TRUE(std::holds_alternative<ApiRequest>(ParseApiRequest(body.dump(), true)));
  }
  for (const json& wanted : {json(true), json(0), json("false")}) {
    body["stream_options"] = {{"include_obfuscation", wanted}};
    ExpectRefused(ParseApiRequest(body.dump(), true), "stream_options.include_obfuscation",
                  "unsupported_parameter");
  }
}

TEST(ApiRequest, TheNumberOfMessagesIsBounded) {
  ExpectRefused(With(true, "messages", json(65536, json::object())), "messages[0].role",
                "missing_required_parameter");
  ExpectRefused(With(true, "messages", json(65537, json::object())), "messages", "invalid_value");
}

TEST(ApiRequest, AnUnknownNameIsRefusedEvenWithoutAValue) {
  for (const bool chat : {false, true}) {
    ExpectRefused(With(chat, "temprature", nullptr), "temprature", "unsupported_parameter");
    ExpectRefused(With(chat, chat ? "suffix" : "tools", nullptr), chat ? "suffix" : "tools",
                  "unsupported_parameter");
    ExpectRefused(With(chat, "stream_options", {{"x", nullptr}}), "stream_options.x",
                  "unsupported_parameter");
  }
  const auto message = json::parse(R"([{"role": "user", "content": "a", "nam": null}])");
  ExpectRefused(With(true, "messages", message), "messages[0].nam", "unsupported_parameter");
}

TEST(ApiRequest, ParametersThatAskForNothingPass) {
  const auto accepted = [](const std::variant<ApiRequest, ApiError>& result) {
    return std::holds_alternative<ApiRequest>(result);
  };
  EXPECT_TRUE(accepted(With(true, "store", false)));
  EXPECT_TRUE(accepted(With(true, "response_format", {{"type", "text"}})));
  EXPECT_TRUE(accepted(With(true, "tools", nullptr)));
  EXPECT_TRUE(accepted(With(true, "tools", json::array())));
  EXPECT_TRUE(accepted(With(true, "tool_choice", "none")));
  EXPECT_TRUE(accepted(With(true, "metadata", json::object())));
  EXPECT_TRUE(accepted(With(true, "service_tier", "auto")));
  EXPECT_TRUE(accepted(With(true, "service_tier", "default")));
  EXPECT_TRUE(accepted(With(true, "top_logprobs", 0)));
  EXPECT_TRUE(accepted(With(false, "suffix", "")));
  EXPECT_TRUE(accepted(With(true, "temperature", nullptr)));
  EXPECT_TRUE(accepted(With(false, "suffix", nullptr)));
  EXPECT_TRUE(accepted(With(true, "top_k", -1)));
  EXPECT_TRUE(accepted(With(true, "stream_options", nullptr)));
  for (const char* name : {"audio", "function_call", "functions", "metadata", "modalities", "n",
                           "parallel_tool_calls", "reasoning_effort", "service_tier"}) {
    EXPECT_TRUE(accepted(With(true, name, nullptr))) << name;
  }
  const auto message = json::parse(R"([{"role": "assistant", "content": "a", "refusal": null,
      "annotations": null, "audio": null, "function_call": null, "tool_calls": null, "name": null,
      "tool_call_id": null}])");
  EXPECT_TRUE(accepted(With(true, "messages", message)));
}

TEST(ApiRequest, AnswersOfOtherServersPassAsHistory) {
  const auto history = [](const char* name, const json& value) {
    json message = {{"role", "assistant"}, {"content", "a"}};
    message[name] = value;
    return With(true, "messages", json::array({message}));
  };
  for (const char* name : {"annotations", "tool_calls"}) {
    EXPECT_TRUE(std::holds_alternative<ApiRequest>(history(name, json::array()))) << name;
  }
  for (const char* name : {"reasoning", "reasoning_content"}) {
    EXPECT_TRUE(std::holds_alternative<ApiRequest>(history(name, nullptr))) << name;
    EXPECT_TRUE(std::holds_alternative<ApiRequest>(history(name, ""))) << name;
    ExpectRefused(history(name, "so"), "messages[0]." + std::string(name), "unsupported_parameter");
  }
  ExpectRefused(history("tool_calls", {{{"type", "function"}}}), "messages[0].tool_calls",
                "unsupported_parameter");
  ExpectRefused(history("annotations", {1}), "messages[0].annotations", "unsupported_parameter");
}

TEST(ApiRequest, WrongTypesAndValuesAreRefusedByName) {
  const std::tuple<const char*, json, const char*> cases[] = {
      {"model", 3, "invalid_type"},
      {"temperature", "hot", "invalid_type"},
      {"temperature", true, "invalid_type"},
      {"top_p", json::array(), "invalid_type"},
      {"top_k", 1.5, "invalid_type"},
      {"top_k", -2, "invalid_value"},
      {"max_tokens", 0, "invalid_value"},
      {"max_tokens", -1, "invalid_value"},
      {"max_tokens", 1e30, "invalid_type"},
      {"max_tokens", uint64_t{18446744073709551615u}, "invalid_value"},
      {"seed", uint64_t{18446744073709551615u}, "invalid_value"},
      {"seed", "1", "invalid_type"},
      {"min_tokens", -1, "invalid_value"},
      {"logit_bias", json::array(), "invalid_type"},
      {"logit_bias", {{"x", 1}}, "invalid_value"},
      {"logit_bias", {{"-1", 1}}, "invalid_value"},
      {"logit_bias", {{"5", 100}, {"05", -100}}, "invalid_value"},
      {"logit_bias", {{"-0", 1}}, "invalid_value"},
      {"logit_bias", {{"1", "x"}}, "invalid_type"},
      {"stop", 3, "invalid_type"},
      {"stop", {"a", 3}, "invalid_type"},
      {"stop", "", "invalid_value"},
      {"stop", json(std::vector<std::string>(17, "a")), "invalid_value"},
      {"stop_token_ids", {-1}, "invalid_value"},
      {"stop_token_ids", 1, "invalid_type"},
      {"stop_token_ids", json(std::vector<int>(129, 7)), "invalid_value"},
      {"ignore_eos", 1, "invalid_type"},
      {"include_stop_str_in_output", 1, "invalid_type"},
      {"skip_special_tokens", "yes", "invalid_type"},
      {"n", 0, "invalid_value"},
      {"n", 129, "invalid_value"},
      {"n", 1.5, "invalid_type"},
      {"n", uint64_t{18446744073709551615u}, "invalid_value"},
      {"stream", "true", "invalid_type"},
      {"stream_options", {{"include_usage", true}}, "invalid_value"},  // without stream
      {"user", 3, "invalid_type"},
      {"cache_salt", 3, "invalid_type"},
      {"cache_salt", "", "invalid_value"},
      {"cache_salt", std::string(257, 's'), "invalid_value"},
  };
  for (const auto& [name, value, code] : cases) {
    for (const bool chat : {false, true}) ExpectRefused(With(chat, name, value), name, code);
  }
  ExpectRefused(With(true, "logprobs", 3), "logprobs", "invalid_type");
  ExpectRefused(With(true, "top_logprobs", 3), "top_logprobs", "invalid_value");  // no logprobs
  ExpectRefused(With(false, "logprobs", true), "logprobs", "invalid_type");
  ExpectRefused(With(false, "logprobs", 21), "logprobs", "invalid_value");
  ExpectRefused(With(false, "prompt", {1, "a"}), "prompt", "invalid_type");
  ExpectRefused(With(false, "prompt", json::array()), "prompt", "invalid_type");
  ExpectRefused(With(false, "prompt", json::array({json::array()})), "prompt", "invalid_value");
  ExpectRefused(With(false, "prompt", json::array({"a", {1}})), "prompt", "invalid_type");
  ExpectRefused(With(false, "prompt", json::array({{1}, "a"})), "prompt", "invalid_type");
  ExpectRefused(With(false, "prompt", json::array({{1}, {-1}})), "prompt", "invalid_value");
  ExpectRefused(With(false, "prompt", 3), "prompt", "invalid_type");
  const auto list = With(false, "prompt", json::array({true}));
  ExpectRefused(list, "prompt", "invalid_type");
  EXPECT_EQ(std::get<ApiError>(list).message,
            "Invalid type for 'prompt': expected a string, token ids, or a list of either.");
  ExpectRefused(With(false, "best_of", 0), "best_of", "invalid_value");
  ExpectRefused(With(false, "best_of", 129), "best_of", "invalid_value");
  ExpectRefused(With(false, "echo", 1), "echo", "invalid_type");
  ExpectRefused(With(false, "add_special_tokens", 1), "add_special_tokens", "invalid_type");
}

TEST(ApiRequest, MissingParametersAreNamed) {
  ExpectRefused(ParseApiRequest(R"({"prompt": "a"})", false), "model",
                "missing_required_parameter");
  ExpectRefused(ParseApiRequest(R"({"model": "a"})", false), "prompt",
                "missing_required_parameter");
  ExpectRefused(ParseApiRequest(R"({"model": "a", "messages": null})", true), "messages",
                "missing_required_parameter");
  ExpectRefused(ParseApiRequest(R"({"model": "a", "messages": []})", true), "messages",
                "invalid_value");
}

TEST(ApiRequest, WhatIsNotAnObjectOfJsonIsRefused) {
  for (const char* body : {"", "{", "[]", "null", "3", "{\"model\": \"m\",}", "{\"a\": NaN}",
                           "{\"temperature\": 1e999}", "{\"model\": \"\xFF\"}"}) {
    ExpectRefused(ParseApiRequest(body, false), "", "invalid_json");
  }
}

// Copying, comparing or printing such a tree recurses once per level: it must never come to be.
TEST(ApiRequest, DeepNestingIsRefusedWhereverItIs) {
  const auto nested = [](int depth) {
    const auto n = static_cast<size_t>(depth);
    return std::string(n, '[') + std::string(n, ']');
  };
  const std::string deep = nested(200'000);
  std::string objects;
  for (int i = 0; i < 200'000; ++i) objects += R"({"a":)";
  objects += "1" + std::string(200'000, '}');
  for (const std::string& body :
       {deep, objects, std::string(200'000, '['), R"({"model": "m", "stop": )" + deep + "}",
        R"({"messages": [{"role": "user", "content": [{"type": )" + deep + "}]}]}",
        R"({"messages": [{"role": "user", "content": [{"type": "text", "text": )" + deep + "}]}]}",
        R"({"messages": [{"role": "user", "content": )" + objects + "}]}",
        R"({"logit_bias": )" + deep + "}", R"({"logit_bias": {"1": )" + deep + "}}",
        R"({"prompt": )" + deep + "}", R"({"prompt": [)" + deep + "]}",
        R"({"unknown": )" + deep + "}", R"({"response_format": )" + objects + "}"}) {
    for (const bool chat : {false, true}) {
      const auto result = ParseApiRequest(body, chat);
      ExpectRefused(result, "", "invalid_json");
      EXPECT_NE(std::get<ApiError>(result).message.find("64 levels"), std::string::npos);
    }
  }
  ExpectRefused(ParseApiRequest(R"({"stop": )" + nested(63) + "}", false), "stop", "invalid_type");
  ExpectRefused(ParseApiRequest(R"({"stop": )" + nested(64) + "}", false), "", "invalid_json");
}

TEST(ApiRequest, AKeyThatStandsTwiceIsRefusedByItsPath) {
  ExpectRefused(ParseApiRequest(R"({"model": "m", "prompt": "a", "\u0070rompt": "b"})", false),
                "prompt", "duplicate_parameter");
  ExpectRefused(ParseApiRequest(R"({"messages": [{"role": "user", "content": "a"},
      {"role": "user", "content": [{"type": "text", "text": "a"},
                                   {"type": "text", "text": "a", "text": "b"}]}]})",
                                true),
                "messages[1].content[1].text", "duplicate_parameter");
  ExpectRefused(ParseApiRequest(R"({"logit_bias": {"1": 2, "1": 3}})", true), "logit_bias.1",
                "duplicate_parameter");
}

TEST(ApiRequest, MessagesTakeTextAndListsOfTextParts) {
  const auto parse = [](const char* messages) {
    return ParseApiRequest(std::string(R"({"model": "m", "messages": )") + messages + "}", true);
  };
  const auto result = parse(R"([{"role": "developer", "content": "be nice"},
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
      {"role": "assistant", "content": "c", "refusal": null, "tool_calls": null}])");
  ASSERT_TRUE(std::holds_alternative<ApiRequest>(result));
  const auto& messages = std::get<ApiRequest>(result).messages;
  ASSERT_EQ(messages.size(), 3u);
  EXPECT_EQ(messages[0].role, "system");
  EXPECT_EQ(messages[1].content, "a\nb");

  ExpectRefused(parse(R"([{"role": "user", "content": "a", "name": "x"}])"), "messages[0].name",
                "unsupported_parameter");
  ExpectRefused(parse(R"([{"role": "user", "content": [{"type": "image_url"}]}])"),
                "messages[0].content[0].type", "unsupported_parameter");
  ExpectRefused(parse(R"([{"role": "user", "content": [{"text": "a"}]}])"),
                "messages[0].content[0].type", "missing_required_parameter");
  ExpectRefused(parse(R"([{"role": "user", "content": [{"type": "text", "text": 1}]}])"),
                "messages[0].content[0].text", "invalid_type");
  ExpectRefused(parse(R"([{"role": "user"}])"), "messages[0].content",
                "missing_required_parameter");
  ExpectRefused(parse(R"([{"content": "a"}])"), "messages[0].role", "missing_required_parameter");
  ExpectRefused(parse(R"(["a"])"), "messages[0]", "invalid_type");
  ExpectRefused(parse(R"("a")"), "messages", "invalid_type");
}

TEST(ApiRequest, APromptMayBeTextIdsOrAListOfEither) {
  using Prompts = std::vector<ApiPrompt>;
  using Ids = std::vector<int32_t>;
  const auto prompts = [](const json& value) {
    return std::get<ApiRequest>(With(false, "prompt", value)).prompts;
  };
  EXPECT_EQ(prompts({1, 2}), Prompts{(Ids{1, 2})});
  EXPECT_EQ(prompts(json::array({{1, 2}})), Prompts{(Ids{1, 2})});
  EXPECT_EQ(prompts(json::array({{1, 2}, {3}})), (Prompts{Ids{1, 2}, Ids{3}}));
  EXPECT_EQ(prompts("x"), Prompts{"x"});
  EXPECT_EQ(prompts(""), Prompts{""});
  EXPECT_EQ(prompts(json::array({"x", "", "y"})), (Prompts{"x", "", "y"}));
}

TEST(ApiRequest, IntegersAreThoseOfJson) {
  const auto max_tokens = [](const std::string& number) {
    const auto result =
        ParseApiRequest(R"({"model": "m", "prompt": "hi", "max_tokens": )" + number + "}", false);
    const auto* request = std::get_if<ApiRequest>(&result);
    return request != nullptr ? request->max_tokens : std::nullopt;
  };
  EXPECT_EQ(max_tokens("20"), 20);
  EXPECT_EQ(max_tokens("20.0"), 20);
  EXPECT_EQ(max_tokens("2e1"), 20);
  EXPECT_EQ(max_tokens("20.5"), std::nullopt);
  EXPECT_EQ(max_tokens("1e16"), std::nullopt);
  EXPECT_EQ(max_tokens("-1e300"), std::nullopt);
}

}  // namespace
}  // namespace innerq
