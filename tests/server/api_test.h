// ApiTest: the OpenAI API over the scripted model, called as the HTTP server calls it.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "server/openai_api.h"
#include "tests/server/fake_model.h"

namespace innerq {

using nlohmann::json;
using std::chrono::milliseconds;

// Collects a stream; from `leave_after` writes on, the client is gone.
class Recorder : public HttpWriter {
 public:
  explicit Recorder(int leave_after = 1 << 30) : leave_after_(leave_after) {}
  bool Write(std::string_view data) override {
    if (client_gone()) return false;
    text += data;
    ++writes_;
    return true;
  }
  bool client_gone() const override { return writes_ >= leave_after_; }
  std::string text;

 private:
  const int leave_after_;
  int writes_ = 0;
};

class ApiTest : public testing::Test {
 protected:
  void SetUp() override { Start(ScriptedEngine()); }

  void Start(std::unique_ptr<Engine> engine) {
    engine_ = std::move(engine);
    metrics_ = std::make_unique<Metrics>("m", CacheInfo{});
    api_ = std::make_unique<OpenAiApi>(ApiModel{.id = "m",
                                                .created = 1,
                                                .tokenizer = std::make_shared<ByteTokenizer>(),
                                                .chat_template = std::make_shared<PlainTemplate>(),
                                                .stop_token_ids = {kFakeEos},
                                                .text_slots = text_slots_},
                                       engine_.get(), metrics_.get());
  }

  static HttpRequest Http(const json& body) {
    return {.method = "POST",
            .path = "",
            .parameter = "",
            .body = body.dump(),
            .id = "test",
            .authorization = "",
            .api_key = "",
            .client_gone = [] { return false; }};
  }
  HttpResponse Post(bool chat, json body) {
    body["model"] = "m";
    if (!body.contains("temperature")) body["temperature"] = 0;
    return api_->Complete(Http(body), chat);
  }
  json Answer(bool chat, const json& body) {
    const HttpResponse response = Post(chat, body);
    EXPECT_EQ(response.status, 200) << response.body;
    return json::parse(response.body);
  }
  json Refusal(bool chat, const json& body, int status) {
    const HttpResponse response = Post(chat, body);
    EXPECT_EQ(response.status, status) << response.body;
    const json error = json::parse(response.body).at("error");
    for (const char* field : {"message", "type", "param", "code"}) {
      EXPECT_TRUE(error.contains(field)) << field;
    }
    return error;
  }
  // The JSON objects of a streamed answer; checks that it ends with [DONE] if it should.
  std::vector<json> Stream(bool chat, json body, bool done = true) {
    body["stream"] = true;
    const HttpResponse response = Post(chat, body);
    EXPECT_EQ(response.status, 200) << response.body;
    EXPECT_EQ(response.content_type, "text/event-stream");
    if (!response.stream) return {};
    Recorder recorder;
    response.stream(recorder);
    std::vector<json> events;
    std::string rest = recorder.text;
    bool finished = false;
    while (!rest.empty()) {
      const size_t end = rest.find("\n\n");
      EXPECT_TRUE(rest.starts_with("data: ") && end != std::string::npos) << rest;
      if (end == std::string::npos) break;
      const std::string line = rest.substr(6, end - 6);
      rest.erase(0, end + 2);
      EXPECT_FALSE(finished);
      finished = line == "[DONE]";
      if (!finished) events.push_back(json::parse(line));
    }
    EXPECT_EQ(finished, done);
    return events;
  }
  // Waits until the engine holds no request.
  bool Settled() {
    for (int i = 0; i < 500; ++i) {
      const EngineStats stats = engine_->Stats();
      if (stats.accepted > 0 && stats.accepted == stats.finished) return true;
      std::this_thread::sleep_for(milliseconds(10));
    }
    return false;
  }

  const std::shared_ptr<WorkSlots> text_slots_ = std::make_shared<WorkSlots>(1, kMaxTextBytes);
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<OpenAiApi> api_;
};

inline const json kUser = json::parse(R"([{"role": "user", "content": "hi"}])");

}  // namespace innerq
