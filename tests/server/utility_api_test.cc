#include "server/utility_api.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <future>
#include <memory>
#include <nlohmann/json.hpp>

#include "server/options.h"
#include "tests/models/test_files.h"
#include "tests/server/fake_model.h"

namespace innerq {
namespace {

using nlohmann::json;

HttpRequest Http(const std::string& body) {
  return {.method = "POST",
          .path = "",
          .parameter = "",
          .body = body,
          .id = "test",
          .authorization = "",
          .api_key = "",
          .client_gone = [] { return false; }};
}

class UtilityTest : public testing::Test {
 protected:
  void SetUp() override {
    Serve(std::make_shared<ByteTokenizer>(), std::make_shared<PlainTemplate>());
  }
  void Serve(std::shared_ptr<const Tokenizer> tokenizer,
             std::shared_ptr<const ChatTemplate> chat_template, ServerProps props = {}) {
    model_ = {.id = "m",
              .created = 1,
              .tokenizer = std::move(tokenizer),
              .chat_template = std::move(chat_template),
              .stop_token_ids = {kFakeEos}};
    engine_ = ScriptedEngine();
    api_ = std::make_unique<UtilityApi>(model_, std::move(props),
                                        CacheInfo{.capacity_tokens = 5, .sealed_bits = 3.5},
                                        engine_.get());
  }
  // Serves a model directory's tokenizer and template.
  void Load(const std::filesystem::path& directory) {
    auto tokenizer = Tokenizer::Load(directory);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.error().message;
    auto chat_template = ChatTemplate::Load(directory, "auto", *tokenizer);
    ASSERT_TRUE(chat_template.ok()) << chat_template.error().message;
    Serve(*tokenizer, *chat_template);
  }

  static json Answered(const HttpResponse& response) {
    EXPECT_EQ(response.status, 200) << response.body;
    return json::parse(response.body);
  }
  json Tokenize(const json& body) { return Answered(api_->Tokenize(Http(body.dump()))); }
  json Ids(const json& body) { return Tokenize(body)["tokens"]; }
  std::string Detokenize(const json& tokens) {
    const json answer = Answered(api_->Detokenize(Http(json{{"tokens", tokens}}.dump())));
    EXPECT_EQ(answer["prompt"], answer["content"]);
    return answer["content"];
  }
  std::string Apply(const json& body) {
    return Answered(api_->ApplyTemplate(Http(body.dump())))["prompt"];
  }
  using Handler = HttpResponse (UtilityApi::*)(const HttpRequest&) const;
  void ExpectRefused(Handler handler, const std::string& body, const std::string& param,
                     const std::string& code, int status = 400) {
    const HttpResponse response = (api_.get()->*handler)(Http(body));
    EXPECT_EQ(response.status, status) << body << response.body;
    const json error = json::parse(response.body).at("error");
    EXPECT_EQ(error.at("param"), param.empty() ? json() : json(param)) << body;
    EXPECT_EQ(error.at("code"), code) << body;
  }

  ApiModel model_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<UtilityApi> api_;
};

const json kUser = json::parse(R"([{"role": "user", "content": "hi"}])");

TEST_F(UtilityTest, PromptAndContentHaveTheDefaultsOfTheirServers) {
  EXPECT_EQ(Tokenize({{"prompt", "ab"}}),
            json::parse(R"({"count": 3, "max_model_len": 1024, "tokens": [256, 97, 98]})"));
  EXPECT_EQ(Ids({{"content", "ab"}}), json::parse("[97, 98]"));
  EXPECT_EQ(Ids({{"prompt", "ab"}, {"add_special_tokens", false}}), json::parse("[97, 98]"));
  EXPECT_EQ(Ids({{"content", "ab"}, {"add_special", true}}), json::parse("[256, 97, 98]"));
  EXPECT_EQ(Ids({{"prompt", "ab"}, {"content", nullptr}, {"model", "m"}}),
            json::parse("[256, 97, 98]"));
  EXPECT_EQ(Ids({{"content", ""}}), json::array());
}

TEST_F(UtilityTest, MessagesGiveWhatTheChatEndpointReads) {
  const std::vector<ChatMessage> messages = {{.role = "user", .content = "hi"}};
  const auto ids = EncodeChat(messages, *model_.tokenizer, *model_.chat_template);
  EXPECT_EQ(Ids({{"messages", kUser}}), json(*ids));
  EXPECT_EQ(Ids({{"messages", kUser}, {"add_special_tokens", false}}), json(*ids));
  EXPECT_EQ(Ids({{"messages", kUser}, {"add_generation_prompt", false}}).size(),
            ids->size() - std::string("assistant:").size());
}

TEST_F(UtilityTest, TextsOfTokensComeInBothForms) {
  const json answer = Tokenize({{"content", "a\u00e9"},
                                {"add_special", true},
                                {"with_pieces", true},
                                {"return_token_strs", true}});
  EXPECT_EQ(answer["tokens"], json::parse(R"([{"id": 256, "piece": "<s>"}, {"id": 97, "piece": "a"},
                            {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}])"));
  EXPECT_EQ(answer["token_strs"], json::parse(R"(["<s>", "a", "\ufffd", "\ufffd"])"));
  EXPECT_EQ(answer["count"], 4);
}

TEST_F(UtilityTest, DetokenizingShowsSpecialTokensAndBrokenCharacters) {
  EXPECT_EQ(Detokenize({256, 104, 105, 257}), "<s>hi</s>");
  EXPECT_EQ(Detokenize({195, 169, 195}), "\u00e9\ufffd");
  EXPECT_EQ(Detokenize(json::array()), "");
  EXPECT_EQ(Detokenize({104.0, 1.05e2}), "hi");  // JSON's integers
}

TEST_F(UtilityTest, TemplatesAreAppliedWithoutBos) {
  EXPECT_EQ(Apply({{"messages", kUser}}), "user:hi|assistant:");
  EXPECT_EQ(Apply({{"messages", kUser}, {"add_generation_prompt", false}}), "user:hi|");
  EXPECT_EQ(Apply({{"messages",
                    {{{"role", "developer"}, {"content", {{{"type", "text"}, {"text", "x"}}}}}}}}),
            "system:x|assistant:");
}

// Writes BOS first, as many models' templates do.
class BosTemplate : public PlainTemplate {
 public:
  Result<std::vector<TextSegment>> Render(const std::vector<ChatMessage>& messages,
                                          const ChatOptions& options) const override {
    ASSIGN_OR_RETURN(auto segments, PlainTemplate::Render(messages, options));
    segments.front().text = "<s>" + segments.front().text;
    return segments;
  }
};

TEST_F(UtilityTest, ABosThatTheTemplateWritesIsLeftOut) {
  Serve(std::make_shared<ByteTokenizer>(), std::make_shared<BosTemplate>());
  EXPECT_EQ(Apply({{"messages", kUser}}), "user:hi|assistant:");
}

TEST_F(UtilityTest, WhatWouldNotBeHonouredIsRefusedByName) {
  const Handler tokenize = &UtilityApi::Tokenize;
  ExpectRefused(tokenize, "{", "", "invalid_json");
  ExpectRefused(tokenize, "[]", "", "invalid_json");
  ExpectRefused(tokenize, "{}", "prompt", "missing_required_parameter");
  ExpectRefused(tokenize, R"({"prompt": "a", "prompt": "b"})", "prompt", "duplicate_parameter");
  ExpectRefused(tokenize, R"({"prompt": "a", "content": "b"})", "prompt", "invalid_value");
  ExpectRefused(tokenize, R"({"prompt": [97]})", "prompt", "invalid_type");
  ExpectRefused(tokenize, R"({"prompt": "a", "with_pieces": 1})", "with_pieces", "invalid_type");
  ExpectRefused(tokenize, R"({"prompt": "a", "model": "x"})", "model", "model_not_found", 404);
  ExpectRefused(tokenize, R"({"prompt": "a", "chat_template": "x"})", "chat_template",
                "unsupported_parameter");
  ExpectRefused(tokenize, R"({"prompt": "a", "add_generation_prompt": true})",
                "add_generation_prompt", "invalid_value");
  ExpectRefused(tokenize, R"({"content": "a", "add_special": true, "add_special_tokens": false})",
                "add_special_tokens", "invalid_value");
  const std::string user = R"({"messages": [{"role": "user", "content": "hi"}], )";
  ExpectRefused(tokenize, user + R"("add_special": true})", "add_special", "invalid_value");
  ExpectRefused(tokenize, user + R"("parse_special": true})", "parse_special", "invalid_value");
  ExpectRefused(tokenize, user + R"("tokens": []})", "tokens", "unsupported_parameter");
  ExpectRefused(tokenize, R"({"messages": []})", "messages", "invalid_value");
  ExpectRefused(tokenize, R"({"messages": [{"role": "bard", "content": "hi"}]})",
                "messages[0].role", "invalid_value");

  const Handler detokenize = &UtilityApi::Detokenize;
  ExpectRefused(detokenize, "{}", "tokens", "missing_required_parameter");
  ExpectRefused(detokenize, R"({"tokens": "a"})", "tokens", "invalid_type");
  ExpectRefused(detokenize, R"({"tokens": [1.5]})", "tokens", "invalid_type");
  for (const char* id : {"-1", "258", "2147483648", "99999999999999999999"}) {
    const std::string code = std::string(id).size() > 19 ? "invalid_type" : "invalid_value";
    ExpectRefused(detokenize, R"({"tokens": [)" + std::string(id) + "]}", "tokens", code);
  }

  const Handler apply = &UtilityApi::ApplyTemplate;
  ExpectRefused(apply, "{}", "messages", "missing_required_parameter");
  ExpectRefused(apply, user + R"("tools": []})", "tools", "unsupported_parameter");
  ExpectRefused(apply, R"({"messages": [{"role": "user", "content": 1}]})", "messages[0].content",
                "invalid_type");
  Serve(std::make_shared<ByteTokenizer>(), nullptr);
  ExpectRefused(apply, user + R"("model": "m"})", "messages", "unsupported_parameter");
  ExpectRefused(tokenize, user + R"("model": "m"})", "messages", "unsupported_parameter");
}

TEST_F(UtilityTest, TextsWaitForASlot) {
  model_.utility_slots = std::make_shared<WorkSlots>(1, kMaxTextBytes);
  api_ = std::make_unique<UtilityApi>(model_, ServerProps{}, CacheInfo{}, engine_.get());
  const std::vector<std::function<void()>> requests = {
      [&] {
        EXPECT_EQ(Ids({{"content", "ab"}}), json::parse("[97, 98]"));
      },
      [&] {
        EXPECT_EQ(Detokenize({97, 98}), "ab");
      },
      [&] {
        EXPECT_EQ(Apply({{"messages", kUser}}), "user:hi|assistant:");
      },
      // To read what will be refused takes as much.
      [&] { ExpectRefused(&UtilityApi::Tokenize, "{", "", "invalid_json"); },
      [&] { ExpectRefused(&UtilityApi::Detokenize, "{", "", "invalid_json"); },
      [&] { ExpectRefused(&UtilityApi::ApplyTemplate, "{", "", "invalid_json"); }};
  for (const auto& request : requests) {
    auto slot = std::make_unique<WorkSlots::Slot>(*model_.utility_slots, 1);
    auto answered = std::async(std::launch::async, request);
    EXPECT_EQ(answered.wait_for(std::chrono::milliseconds(20)), std::future_status::timeout);
    slot.reset();
    answered.get();
  }
}

TEST_F(UtilityTest, CompletionsDoNotWaitForTextsOfUtilities) {
  model_.utility_slots = std::make_shared<WorkSlots>(1, kMaxTextBytes);
  Metrics metrics("m", CacheInfo{});
  OpenAiApi completions(model_, engine_.get(), &metrics);
  const WorkSlots::Slot busy(*model_.utility_slots, 1);
  const json body = {{"model", "m"}, {"prompt", "a"}, {"max_tokens", 2}};
  EXPECT_EQ(completions.Complete(Http(body.dump()), false).status, 200);
}

TEST_F(UtilityTest, TheTokenizerIsDescribed) {
  EXPECT_EQ(Answered(api_->TokenizerInfo()), json::parse(R"({"vocab_size": 258,
      "model_max_length": 1024, "add_bos_token": true, "bos_token": "<s>", "bos_token_id": 256,
      "eos_token": "</s>", "eos_token_id": 257, "stop_token_ids": [257],
      "chat_template": "{{ messages }}"})"));
}

TEST_F(UtilityTest, PropertiesTellTheConfigurationOfTheCache) {
  const auto options = ParseOptions(R"({"kv_cache": {"key": {"bits": 2}}})", {});
  ASSERT_TRUE(options.ok());
  Serve(model_.tokenizer, model_.chat_template,
        {.version = "1.2.3",
         .model_path = "/path",
         .backend = "cpu/scalar",
         .kv_cache = options->kv_cache_json});
  const json props = Answered(api_->Props());
  EXPECT_EQ(props["build_info"], "innerq 1.2.3");
  EXPECT_EQ(props["model_alias"], "m");
  EXPECT_EQ(props["model_path"], "/path");
  EXPECT_EQ(props["chat_template"], "{{ messages }}");
  EXPECT_EQ(props["total_slots"], engine_->options().max_sequences);
  EXPECT_EQ(props["default_generation_settings"]["n_ctx"], 1024);
  EXPECT_EQ(props["default_generation_settings"]["params"]["temperature"], 1.0);
  EXPECT_EQ(props["scheduler"]["max_queue"], engine_->options().max_queue);
  EXPECT_EQ(props["kv_cache"]["configuration"]["key"]["bits"], 2);
  EXPECT_EQ(props["kv_cache"]["configuration"]["value"]["bits"], 3);
  EXPECT_EQ(props["kv_cache"]["configuration"]["sink_tokens"], 32);
  EXPECT_EQ(props["kv_cache"]["capacity_tokens"], 5);
  EXPECT_EQ(props["kv_cache"]["bits_per_element"], 3.5);
}

TEST_F(UtilityTest, SlotsShowRunningRequestsWithoutTheirTexts) {
  engine_ = ScriptedEngine(std::chrono::milliseconds(2), {.max_sequences = 2, .max_context = 1024});
  api_ = std::make_unique<UtilityApi>(model_, ServerProps{}, CacheInfo{}, engine_.get());
  const auto idle = [](int id) {
    return json{{"id", id}, {"n_ctx", 1024}, {"speculative", false}, {"is_processing", false}};
  };
  EXPECT_EQ(Answered(api_->Slots()), json({idle(0), idle(1)}));
  Request request;
  request.prompt = {97, 98, 99};
  request.max_tokens = 1000;
  auto reader = engine_->Submit(std::move(request));
  ASSERT_TRUE(reader.ok());
  // Once the second token has come, the step of the first is published.
  for (size_t read = 0; read < 2;) {
    const auto events = (*reader)->NextBatch(std::chrono::seconds(60));
    ASSERT_FALSE(events.empty());
    read += events.size();
  }
  json slots = Answered(api_->Slots());
  ASSERT_EQ(slots.size(), 2u);
  EXPECT_EQ(slots[1], idle(1));
  json& slot = slots[0];
  const int64_t decoded = slot["next_token"]["n_decoded"].get<int64_t>();
  EXPECT_GE(decoded, 1);
  EXPECT_EQ(slot["n_cached_tokens"], 3 + decoded - 1);
  // What depends on the moment is taken out; nothing else may be there.
  slot["next_token"]["n_decoded"] = 0;
  slot["next_token"]["n_remain"] = slot["next_token"]["n_remain"].get<int64_t>() + decoded;
  slot["n_cached_tokens"] = 0;
  EXPECT_GE(slot["n_cache_pages"], 1);
  slot["n_cache_pages"] = 0;
  EXPECT_EQ(slot, json::parse(R"({"id": 0, "id_task": 1, "n_ctx": 1024, "speculative": false,
      "is_processing": true, "n_prompt_tokens": 3, "n_prompt_tokens_processed": 3,
      "n_cached_tokens": 0, "n_cache_pages": 0,
      "next_token": {"has_next_token": true, "n_remain": 1000, "n_decoded": 0}})"));
  (*reader)->Cancel();
  EXPECT_TRUE(engine_->Drain(std::chrono::seconds(60)));
  EXPECT_EQ(Answered(api_->Slots()), json({idle(0), idle(1)}));
}

// Texts of many kinds come back from their ids, and templates read the same in one step and in two.
class RoundTripTest : public UtilityTest {
 protected:
  void ExpectRoundTrips() {
    for (const char* const input :
         {"Hello, world!", "  two spaces", "a\n\n b\t", "caf\u00e9 \u4f60\u597d \U0001f600",
          "<s>not a token</s>", "1234567 + 89 = ?", ""}) {
      const std::string text = input;
      const json ids = Ids({{"prompt", text}, {"add_special_tokens", false}});
      EXPECT_EQ(Detokenize(ids), text);
      EXPECT_EQ(Tokenize({{"prompt", text}})["count"],
                Ids({{"content", text}, {"add_special", true}, {"parse_special", false}}).size());
      std::string pieces;
      for (const json& token :
           Ids({{"content", text}, {"parse_special", false}, {"with_pieces", true}})) {
        if (token["piece"].is_string()) {
          pieces += token["piece"].get<std::string>();
        } else {
          for (const json& byte : token["piece"]) pieces += static_cast<char>(byte.get<int>());
        }
      }
      EXPECT_EQ(pieces, text);
    }
    const json body = {{"messages", {{{"role", "user"}, {"content", "Hello there"}}}}};
    EXPECT_EQ(Ids({{"content", Apply(body)}, {"add_special", true}}), Ids(body));
    EXPECT_EQ(Ids({{"prompt", Apply(body)}, {"parse_special", true}}), Ids(body));
    const std::string bos = Answered(api_->TokenizerInfo())["bos_token"];
    EXPECT_EQ(Ids({{"prompt", bos + Apply(body)}, {"parse_special", true}}), Ids(body))
        << "one BOS, whoever writes it";
    const json open = Ids(body);
    json closed = body;
    closed["add_generation_prompt"] = false;
    const json shorter = Ids(closed);
    ASSERT_LT(shorter.size(), open.size());
    EXPECT_TRUE(std::equal(shorter.begin(), shorter.end(), open.begin()));
  }
};

TEST_F(RoundTripTest, OnTheDemoModel) {
  Load(std::filesystem::path(INNERQ_SOURCE_DIR) / "models" / "demo");
  ExpectRoundTrips();
  const json special = Ids({{"content", "<|im_end|>"}});
  EXPECT_EQ(special.size(), 1u);
  EXPECT_EQ(Detokenize(special), "<|im_end|>");
  EXPECT_GT(Ids({{"prompt", "<|im_end|>"}, {"add_special_tokens", false}}).size(), 1u);
}

TEST_F(RoundTripTest, OnLlama3) {
  const auto directory = SharedPath("assets/tokenizers/llama3-hf");
  SKIP_WITHOUT(directory);
  Load(directory);
  ExpectRoundTrips();
  EXPECT_EQ(Ids({{"content", "<|eot_id|>"}}), json::parse("[128009]"));
  EXPECT_EQ(Answered(api_->TokenizerInfo())["bos_token"], "<|begin_of_text|>");
}

}  // namespace
}  // namespace innerq
