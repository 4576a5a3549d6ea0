#include "server/openai_api.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <future>
#include <set>
#include <sstream>

#include "server/log.h"
#include "tests/server/api_test.h"

namespace innerq {
namespace {

TEST_F(ApiTest, ACompletionHasTheShapeOfOpenAis) {
  const json answer = Answer(false, {{"prompt", "a"}, {"max_tokens", 3}});
  EXPECT_EQ(answer.at("object"), "text_completion");
  EXPECT_TRUE(answer.at("id").get<std::string>().starts_with("cmpl-"));
  EXPECT_TRUE(answer.at("created").is_number_integer());
  EXPECT_EQ(answer.at("model"), "m");
  const json choice =
      json::parse(R"({"index": 0, "text": "bcd", "logprobs": null, "finish_reason": "length"})");
  EXPECT_EQ(answer.at("choices"), json::array({choice}));
  EXPECT_EQ(answer.at("usage"), json::parse(R"({"prompt_tokens": 2, "completion_tokens": 3,
      "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0}})"));
}

TEST_F(ApiTest, AChatAnswerHasTheShapeOfOpenAis) {
  const json answer = Answer(true, {{"messages", kUser}, {"max_tokens", 2}});
  EXPECT_EQ(answer.at("object"), "chat.completion");
  EXPECT_TRUE(answer.at("id").get<std::string>().starts_with("chatcmpl-"));
  EXPECT_EQ(answer.at("choices"), json::parse(R"([{"index": 0, "message": {"role": "assistant",
      "content": "ab", "refusal": null}, "logprobs": null, "finish_reason": "length"}])"));
  // <s>user:hi|assistant: are 1 + 8 + 10 tokens.
  EXPECT_EQ(answer.at("usage").at("prompt_tokens"), 19);
}

TEST_F(ApiTest, TheEndOfSequenceStopsUnlessIgnored) {
  const json answer = Answer(false, {{"prompt", " "}, {"max_tokens", 5}});
  EXPECT_EQ(answer["choices"][0]["text"], "!");
  EXPECT_EQ(answer["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(answer["usage"]["completion_tokens"], 2);
  const json more = Answer(false, {{"prompt", " "}, {"max_tokens", 5}, {"ignore_eos", true}});
  EXPECT_EQ(more["choices"][0]["text"], "!abc");
  EXPECT_EQ(more["choices"][0]["finish_reason"], "length");
}

TEST_F(ApiTest, AStopStringEndsTheAnswerAndTheRequest) {
  const json answer = Answer(false, {{"prompt", "a"}, {"max_tokens", 500}, {"stop", "efg"}});
  EXPECT_EQ(answer["choices"][0]["text"], "bcd");
  EXPECT_EQ(answer["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(Settled());
}

TEST_F(ApiTest, UsageTellsHowMuchOfThePromptWasCached) {
  const std::string prompt(150, 'p');
  const auto cached = [](const json& answer) {
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"].get<int>();
  };
  json body = {{"prompt", prompt}, {"max_tokens", 5}};
  EXPECT_EQ(cached(Answer(false, body)), 0);
  EXPECT_EQ(cached(Answer(false, body)), 128) << "whole pages of 151 tokens";
  body["n"] = 3;
  EXPECT_EQ(cached(Answer(false, body)), 128) << "as the prompt, counted once";
  body["n"] = 1;
  body["stop"] = "r";  // ends before the engine does
  EXPECT_EQ(cached(Answer(false, body)), 128);
  body["stream_options"] = {{"include_usage", true}, {"continuous_usage_stats", true}};
  const auto events = Stream(false, body);
  EXPECT_EQ(cached(events.front()), 128);
  EXPECT_EQ(cached(events.back()), 128);
  EXPECT_EQ(cached(Answer(false, {{"prompt", {prompt, prompt}}, {"max_tokens", 5}})), 2 * 128);
  EXPECT_EQ(cached(Answer(false, {{"prompt", prompt.substr(0, 60)}, {"max_tokens", 5}})), 32);
  body = {{"prompt", prompt}, {"max_tokens", 5}, {"cache_salt", "mine"}};
  EXPECT_EQ(cached(Answer(false, body)), 0);
  EXPECT_EQ(cached(Answer(false, body)), 128);
  body["cache_salt"] = "thine";
  EXPECT_EQ(cached(Answer(false, body)), 0);
  const json scored = {{"prompt", prompt}, {"max_tokens", 1}, {"echo", true}, {"logprobs", 0}};
  EXPECT_EQ(cached(Answer(false, scored)), 0) << "what scores must be computed";
}

TEST_F(ApiTest, CompletionLogprobsAlignWithTheText) {
  const json answer =
      Answer(false, {{"prompt", "a"}, {"max_tokens", 9}, {"logprobs", 2}, {"stop", "ef"}});
  const json& choice = answer["choices"][0];
  EXPECT_EQ(choice["text"], "bcd");
  const json& logprobs = choice["logprobs"];
  EXPECT_EQ(logprobs["tokens"], json::parse(R"(["b", "c", "d"])"));
  EXPECT_EQ(logprobs["text_offset"], json::parse("[0, 1, 2]"));
  ASSERT_EQ(logprobs["token_logprobs"].size(), 3u);
  ASSERT_EQ(logprobs["top_logprobs"].size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    const json& top = logprobs["top_logprobs"][i];
    EXPECT_EQ(top.size(), 2u);
    EXPECT_EQ(top.at(logprobs["tokens"][i]), logprobs["token_logprobs"][i]);
    EXPECT_LE(logprobs["token_logprobs"][i].get<double>(), 0.0);
    EXPECT_GT(logprobs["token_logprobs"][i].get<double>(), -1e-3);
  }
}

TEST_F(ApiTest, ChatLogprobsCarryBytesAndAlternatives) {
  const json answer = Answer(
      true, {{"messages", kUser}, {"max_tokens", 2}, {"logprobs", true}, {"top_logprobs", 3}});
  const json& content = answer["choices"][0]["logprobs"]["content"];
  ASSERT_EQ(content.size(), 2u);
  EXPECT_EQ(content[1]["token"], "b");
  EXPECT_EQ(content[1]["bytes"], json::parse("[98]"));
  ASSERT_EQ(content[1]["top_logprobs"].size(), 3u);
  EXPECT_EQ(content[1]["top_logprobs"][0]["token"], "b");
  EXPECT_EQ(content[1]["top_logprobs"][0]["logprob"], content[1]["logprob"]);
}

TEST_F(ApiTest, AChatStreamBeginsWithTheRoleAndEndsWithTheReason) {
  const auto events = Stream(
      true,
      {{"messages", kUser}, {"max_tokens", 3}, {"stream_options", {{"include_usage", true}}}});
  ASSERT_GE(events.size(), 4u);
  for (const json& event : events) {
    EXPECT_EQ(event.at("object"), "chat.completion.chunk");
    EXPECT_EQ(event.at("id"), events[0].at("id"));
    ASSERT_TRUE(event.contains("usage"));
  }
  EXPECT_EQ(events[0]["choices"][0]["delta"], json::parse(R"({"role": "assistant",
      "content": ""})"));
  std::string text;
  for (size_t i = 1; i + 2 < events.size(); ++i) {
    text += events[i]["choices"][0]["delta"]["content"].get<std::string>();
    EXPECT_TRUE(events[i]["choices"][0]["finish_reason"].is_null());
    EXPECT_TRUE(events[i]["usage"].is_null());
  }
  EXPECT_EQ(text, "abc");
  const json& end = events[events.size() - 2];
  EXPECT_EQ(end["choices"][0]["delta"], json::object());
  EXPECT_EQ(end["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(events.back()["choices"], json::array());
  EXPECT_EQ(events.back()["usage"]["completion_tokens"], 3);
}

TEST_F(ApiTest, ACompletionStreamSaysTheSameAsThePlainAnswer) {
  const json body = {{"prompt", "a"}, {"max_tokens", 40}, {"logprobs", 1}, {"stop", {"uvw"}}};
  const json answer = Answer(false, body);
  std::string text;
  json tokens = json::array(), offsets = json::array();
  std::string reason;
  for (const json& event : Stream(false, body)) {
    EXPECT_FALSE(event.contains("usage"));
    const json& choice = event["choices"][0];
    text += choice["text"].get<std::string>();
    if (choice["logprobs"].is_object()) {
      for (const json& token : choice["logprobs"]["tokens"]) tokens.push_back(token);
      for (const json& offset : choice["logprobs"]["text_offset"]) offsets.push_back(offset);
    }
    if (!choice["finish_reason"].is_null()) reason = choice["finish_reason"];
  }
  EXPECT_EQ(text, "bcdefghijklmnopqrst");
  EXPECT_EQ(text, answer["choices"][0]["text"]);
  EXPECT_EQ(tokens, answer["choices"][0]["logprobs"]["tokens"]);
  EXPECT_EQ(offsets, answer["choices"][0]["logprobs"]["text_offset"]);
  EXPECT_EQ(reason, "stop");
}

TEST_F(ApiTest, AnErrorBeforeTheFirstTokenIsAPlainAnswerWithoutInternals) {
  for (const bool stream : {false, true}) {
    const json error = Refusal(false, {{"prompt", "#"}, {"stream", stream}}, 500);
    EXPECT_EQ(error["type"], "server_error");
    EXPECT_EQ(error["message"].get<std::string>().find("secret_function"), std::string::npos);
  }
}

TEST_F(ApiTest, ALostDeviceIsAFailureAndThenTheServerIsUnavailable) {
  EXPECT_EQ(Refusal(false, {{"prompt", "$"}}, 500)["code"], "internal_error");
  EXPECT_EQ(Refusal(false, {{"prompt", "a"}}, 503)["code"], "server_is_overloaded");
}

TEST_F(ApiTest, TheCauseOfAFailureIsLoggedWithTheRequest) {
  ConfigureLog({.level = "error", .json = false});
  const std::string cause = "request test failed: scripted failure in secret_function()";
  testing::internal::CaptureStderr();
  Refusal(false, {{"prompt", "#"}}, 500);
  EXPECT_NE(testing::internal::GetCapturedStderr().find(cause), std::string::npos);
  testing::internal::CaptureStderr();
  Stream(false, {{"prompt", "\""}, {"max_tokens", 9}}, /*done=*/false);
  EXPECT_NE(testing::internal::GetCapturedStderr().find(cause), std::string::npos);
  testing::internal::CaptureStderr();
  Refusal(false, {{"prompt", "a"}, {"temperature", 3}}, 400);
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "") << "a client's mistake is no failure";
}

TEST_F(ApiTest, AnErrorAfterTheFirstTokenEndsTheStreamWithoutDone) {
  // '"' is followed by '#', on which the model fails.
  const auto failed = Stream(false, {{"prompt", "\""}, {"max_tokens", 9}}, /*done=*/false);
  ASSERT_EQ(failed.size(), 2u);
  EXPECT_EQ(failed[0]["choices"][0]["text"], "#");
  EXPECT_EQ(failed.back().at("error").at("type"), "server_error");
}

TEST_F(ApiTest, TooLongIsSaidInOpenAisWords) {
  const json error = Refusal(false, {{"prompt", "abc"}, {"max_tokens", 1021}}, 400);
  EXPECT_EQ(error["code"], "context_length_exceeded");
  EXPECT_EQ(
      error["message"],
      "This model's maximum context length is 1024 tokens. However, you requested 1025 tokens "
      "(4 in the messages, 1021 in the completion). Please reduce the length of the messages "
      "or completion.");
  EXPECT_EQ(error["n_prompt_tokens"], 4);
  EXPECT_EQ(error["n_ctx"], 1024);
  EXPECT_EQ(
      Answer(false, {{"prompt", "abc"}, {"max_tokens", 1020}, {"stop", "d"}})["choices"][0]["text"],
      "");
}

TEST_F(ApiTest, TheCountsOfAPromptThatAloneWouldFitAreExact) {
  const json error = Refusal(false, {{"prompt", "Hello"}, {"max_tokens", 99999}}, 400);
  EXPECT_EQ(error["code"], "context_length_exceeded");
  EXPECT_EQ(
      error["message"],
      "This model's maximum context length is 1024 tokens. However, you requested 100005 tokens "
      "(6 in the messages, 99999 in the completion). Please reduce the length of the messages or "
      "completion.");
  EXPECT_EQ(error["n_prompt_tokens"], 6);
  const json chat = Refusal(true, {{"messages", kUser}, {"max_tokens", 99999}}, 400);
  EXPECT_EQ(chat["n_prompt_tokens"], 19);
}

TEST_F(ApiTest, WhatCannotFitIsRefusedBeforeItIsEncoded) {
  const std::string text = "throw" + std::string(1020, 'a');
  const json error = Refusal(false, {{"prompt", text}, {"max_tokens", 15}}, 400);
  EXPECT_EQ(error["code"], "context_length_exceeded");
  EXPECT_EQ(
      error["message"],
      "This model's maximum context length is 1024 tokens. However, you requested at least 1040 "
      "tokens (at least 1025 in the messages, 15 in the completion). Please reduce the length of "
      "the messages or completion.");
  EXPECT_EQ(error["n_prompt_tokens"], 1025);
  EXPECT_EQ(error["param"], "prompt");
  EXPECT_THROW(Post(false, {{"prompt", text.substr(0, 1024)}}), std::runtime_error);
  const json messages = {{{"role", "user"}, {"content", std::string(1009, 'a')}}};
  const json chat = Refusal(true, {{"messages", messages}}, 400);  // the template adds 16 bytes
  EXPECT_EQ(chat["param"], "messages");
  EXPECT_EQ(chat["n_prompt_tokens"], 1025);
}

TEST_F(ApiTest, ATextSpellsSpecialTokensIfItMay) {
  const auto tokens = [this](const char* prompt, json more) {
    more["prompt"] = prompt;
    return Answer(false, more)["usage"]["prompt_tokens"].get<int>();
  };
  const json spelled = {{"parse_special", true}};
  EXPECT_EQ(tokens("a</s>", json::object()), 1 + 5);
  EXPECT_EQ(tokens("a</s>", spelled), 1 + 2);
  EXPECT_EQ(tokens("<s>a", json::object()), 1 + 4);
  EXPECT_EQ(tokens("<s>a", spelled), 2) << "one BOS, whoever writes it";
  EXPECT_EQ(tokens("<s>a", {{"parse_special", true}, {"add_special_tokens", false}}), 2);
  const auto echo = [this](const char* prompt) {
    return Answer(false, {{"prompt", prompt},
                          {"parse_special", true},
                          {"echo", true},
                          {"logprobs", 0},
                          {"max_tokens", 0}})["choices"][0];
  };
  const json added = echo("a</s>b"), written = echo("<s>a</s>b");
  EXPECT_EQ(added["text"], "a</s>b");
  EXPECT_EQ(added["logprobs"]["tokens"], json::parse(R"(["<s>", "a", "</s>", "b"])"));
  EXPECT_EQ(added["logprobs"]["text_offset"], json::parse("[0, 0, 1, 5]"));
  EXPECT_EQ(written["text"], "<s>a</s>b");
  EXPECT_EQ(written["logprobs"]["tokens"], added["logprobs"]["tokens"]);
  EXPECT_EQ(written["logprobs"]["text_offset"], json::parse("[0, 3, 4, 8]"));
}

TEST_F(ApiTest, RequestsAreReadInASlotThatTheirAnswersDoNotHold) {
  Start(ScriptedEngine(milliseconds(1)));
  auto slot = std::make_unique<WorkSlots::Slot>(*text_slots_, 1);
  HttpRequest request = Http({});
  request.body = "{";
  auto refused =
      std::async(std::launch::async, [&] { return api_->Complete(request, false).status; });
  EXPECT_EQ(refused.wait_for(milliseconds(20)), std::future_status::timeout);
  slot.reset();
  EXPECT_EQ(refused.get(), 400);
  auto answer = std::async(std::launch::async, [&] {
    return Answer(false, {{"prompt", "a"}, {"max_tokens", 500}, {"ignore_eos", true}});
  });
  while (engine_->Stats().accepted == 0) std::this_thread::yield();
  slot = std::make_unique<WorkSlots::Slot>(*text_slots_, 1);
  EXPECT_EQ(answer.wait_for(milliseconds(0)), std::future_status::timeout);
  EXPECT_EQ(answer.get()["usage"]["completion_tokens"], 500);
}

TEST_F(ApiTest, RangesOfSamplingAndTokenIdsAreChecked) {
  EXPECT_EQ(Refusal(false, {{"prompt", "a"}, {"temperature", 2.5}}, 400)["param"], "temperature");
  EXPECT_EQ(Refusal(false, {{"prompt", "a"}, {"temperature", 1e39}}, 400)["param"], "temperature");
  EXPECT_EQ(Refusal(false, {{"prompt", "a"}, {"top_p", -0.5}}, 400)["param"], "top_p");
  EXPECT_EQ(Refusal(false, {{"prompt", {1, 258}}}, 400)["param"], "prompt");
  EXPECT_EQ(Refusal(false, {{"prompt", "a"}, {"stop_token_ids", {258}}}, 400)["param"],
            "stop_token_ids");
  EXPECT_EQ(Refusal(false, {{"prompt", "a"}, {"logit_bias", {{"258", 1}}}}, 400)["param"],
            "logit_bias");
  EXPECT_EQ(Refusal(true, {{"messages", {{{"role", "bard"}, {"content", "x"}}}}}, 400)["param"],
            "messages[0].role");
}

TEST_F(ApiTest, AnUnknownModelIsNotFound) {
  const HttpResponse response = api_->Complete(Http({{"model", "x"}, {"prompt", "a"}}), false);
  EXPECT_EQ(response.status, 404);
  const json error = json::parse(response.body)["error"];
  EXPECT_EQ(error["code"], "model_not_found");
  EXPECT_EQ(error["param"], "model");
  EXPECT_EQ(error["message"], "The model 'x' does not exist; this server has 'm'.");
  EXPECT_EQ(api_->GetModel("x").status, 404);
  EXPECT_EQ(json::parse(api_->GetModel("m").body)["id"], "m");
  EXPECT_EQ(json::parse(api_->ListModels().body)["data"][0]["object"], "model");
}

TEST_F(ApiTest, AFullQueueAndADrainingServerSayWhenToComeBack) {
  EngineOptions options{.max_sequences = 1, .max_queue = 1, .max_context = 1024};
  Start(ScriptedEngine(milliseconds(2), options));
  std::atomic<int> overloaded{0}, answered{0}, other{0};
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&] {
      const HttpResponse response = Post(false, {{"prompt", "a"}, {"max_tokens", 100}});
      const bool told = !response.headers.empty() && response.headers[0].first == "Retry-After" &&
                        std::stoi(response.headers[0].second) >= 1;
      (response.status == 200 ? answered : response.status == 503 && told ? overloaded : other)++;
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(other, 0);
  EXPECT_GE(answered, 1);
  EXPECT_GE(overloaded, 1);
  EXPECT_TRUE(engine_->Drain(milliseconds(5000)));
  const HttpResponse draining = Post(false, {{"prompt", "a"}});
  EXPECT_EQ(draining.status, 503);
  const json error = json::parse(draining.body)["error"];
  EXPECT_EQ(error["code"], "server_is_overloaded");
  EXPECT_EQ(error["message"], "The server is going out of service; try again later.");
  ASSERT_EQ(draining.headers.size(), 1u);
  EXPECT_EQ(draining.headers[0].second, "5");
}

TEST_F(ApiTest, AFullQueueIsWaitedForByPlacesNotAsAWhole) {
  EngineOptions options{.max_sequences = 1, .max_queue = 100, .max_context = 1024};
  Start(ScriptedEngine(milliseconds(10), options));
  for (int i = 0; i < 60; ++i) Answer(false, {{"prompt", "a"}, {"max_tokens", 1}});
  Request request;
  request.prompt = {'a'};
  request.max_tokens = 1000;
  const auto crowd = engine_->SubmitGroup(std::vector<Request>(97, request));
  ASSERT_TRUE(crowd.ok());
  for (const int n : {5, 60}) {
    const double before = engine_->Stats().finish_per_second;
    const HttpResponse refused = Post(false, {{"prompt", "a"}, {"n", n}});
    const double after = engine_->Stats().finish_per_second;  // less, if time has passed
    EXPECT_EQ(refused.status, 503);
    ASSERT_EQ(refused.headers.size(), 1u);
    const double wait = std::stod(refused.headers[0].second);
    EXPECT_GE(wait, std::ceil(std::clamp(n / before, 1.0, 60.0)));
    EXPECT_LE(wait, std::ceil(std::clamp(n / after, 1.0, 60.0)));
  }
}

TEST_F(ApiTest, AShortQueueSaysThatItLimitsTheChoices) {
  Start(ScriptedEngine(milliseconds(0), {.max_queue = 4, .max_context = 1024}));
  const json error = Refusal(false, {{"prompt", "a"}, {"n", 5}}, 400);
  EXPECT_EQ(error["param"], "n");
  EXPECT_EQ(error["message"],
            "Invalid value for 'n': more than 4 choices in all (scheduler.max_queue is 4).");
}

TEST_F(ApiTest, ErrorsQuoteNoMoreOfARequestThanASentenceNeeds) {
  const std::string much(5 << 20, 'x');
  const json cases[] = {{{"model", much}, {"prompt", "a"}},
                        {{"model", "m"}, {"prompt", "a"}, {much, 1}},
                        {{"model", "m"}, {"prompt", "a"}, {"logit_bias", {{much, 1}}}},
                        {{"model", "m"}, {"prompt", "a"}, {"stream_options", {{much, 1}}}}};
  for (const json& body : cases) {
    const HttpResponse response = api_->Complete(Http(body), false);
    EXPECT_GE(response.status, 400);
    EXPECT_LT(response.body.size(), 2000u);
  }
  HttpRequest twice = Http({});
  twice.body = "{\"" + much + "\": 1, \"" + much + "\": 2}";
  EXPECT_LT(api_->Complete(twice, false).body.size(), 2000u);
  const json message = {{{"role", much}, {"content", "a"}}};
  const HttpResponse role = api_->Complete(Http({{"model", "m"}, {"messages", message}}), true);
  EXPECT_EQ(role.status, 400);
  EXPECT_LT(role.body.size(), 2000u);
}

TEST_F(ApiTest, AClientThatLeavesCancelsItsRequestAlone) {
  Start(ScriptedEngine(milliseconds(1)));
  HttpResponse leaving =
      Post(false, {{"prompt", "a"}, {"max_tokens", 1000}, {"ignore_eos", true}, {"stream", true}});
  ASSERT_TRUE(leaving.stream);
  const json staying = {{"prompt", "a"}, {"max_tokens", 50}, {"ignore_eos", true}};
  std::thread neighbour(
      [&] { EXPECT_EQ(Answer(false, staying)["usage"]["completion_tokens"], 50); });
  Recorder recorder(3);
  leaving.stream(recorder);
  leaving = {};
  neighbour.join();

  HttpRequest request =
      Http({{"model", "m"}, {"prompt", "a"}, {"max_tokens", 1000}, {"ignore_eos", true}});
  request.client_gone = [] { return true; };
  EXPECT_EQ(api_->Complete(request, false).status, 499);
  EXPECT_TRUE(Settled());
  const EngineStats stats = engine_->Stats();
  EXPECT_EQ(stats.finished_by_reason.at(FinishReason::kCancelled), 2);
  EXPECT_LT(stats.generation_tokens, 1500);
}

TEST_F(ApiTest, AStreamThatIsNeverReadStillEnds) {
  { const HttpResponse unread = Post(false, {{"prompt", "a"}, {"stream", true}}); }
  EXPECT_TRUE(Settled());
}

TEST_F(ApiTest, AnswersWithoutSeedDifferAndWithSeedDoNot) {
  const auto text = [this](json body) {
    body.update({{"prompt", "a"}, {"max_tokens", 20}, {"temperature", 2}, {"ignore_eos", true}});
    body["logit_bias"] = json::object();
    for (int i = 'a'; i <= 'p'; ++i) body["logit_bias"][std::to_string(i)] = 60;
    return Answer(false, body)["choices"][0]["text"].get<std::string>();
  };
  EXPECT_EQ(text({{"seed", 5}}), text({{"seed", 5}}));
  EXPECT_NE(text({{"seed", 5}}), text({{"seed", 6}}));
  std::set<std::string> texts;  // two of them are equal now and then
  for (int i = 0; i < 20; ++i) texts.insert(text({}));
  EXPECT_GT(texts.size(), 1u);
}

TEST_F(ApiTest, MetricsCountWhatHappened) {
  Answer(false, {{"prompt", "a"}, {"max_tokens", 3}});
  Answer(false, {{"prompt", " "}});
  Refusal(false, {{"prompt", "#"}}, 500);
  ASSERT_TRUE(Settled());
  const std::string text = metrics_->Render(engine_->Stats());
  const auto has = [&](const std::string& line) {
    return text.find("\n" + line + "\n") != std::string::npos;
  };
  EXPECT_TRUE(has(R"(vllm:num_requests_running{model_name="m"} 0)")) << text;
  EXPECT_TRUE(has(R"(vllm:generation_tokens_total{model_name="m"} 5)")) << text;
  EXPECT_TRUE(has(R"(vllm:request_success_total{model_name="m",finished_reason="length"} 1)"));
  EXPECT_TRUE(has(R"(vllm:request_success_total{model_name="m",finished_reason="stop"} 1)"));
  EXPECT_TRUE(has(R"(vllm:request_success_total{model_name="m",finished_reason="error"} 1)"));
  EXPECT_TRUE(has(R"(vllm:time_to_first_token_seconds_count{model_name="m"} 2)"));
  EXPECT_TRUE(has(R"(vllm:inter_token_latency_seconds_bucket{model_name="m",le="+Inf"} 3)"))
      << text;
  EXPECT_TRUE(has(R"(innerq:requests_accepted_total{model_name="m"} 3)"));
  EXPECT_TRUE(has(R"(innerq:requests_finished_total{model_name="m"} 3)"));
}

TEST_F(ApiTest, TheEndOfAChoiceIsMeasuredWhenItComes) {
  const HttpResponse response =
      Post(false, {{"prompt", {"a", "b"}}, {"max_tokens", 3}, {"stream", true}});
  ASSERT_TRUE(response.stream);
  Recorder recorder;
  response.stream(recorder);
  // The answer is still held.
  const std::string text = metrics_->Render(engine_->Stats());
  EXPECT_NE(text.find(R"(vllm:request_success_total{model_name="m",finished_reason="length"} 2)"),
            std::string::npos)
      << text;
}

}  // namespace
}  // namespace innerq
