// OpenAiApi: the OpenAI endpoints over one engine and one model.
#pragma once

#include <cstdint>
#include <ctime>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "models/chat_template.h"
#include "models/tokenizer.h"
#include "server/generation.h"
#include "server/http_server.h"
#include "server/metrics.h"
#include "server/openai_request.h"

namespace innerq {

// What the API serves. The model's own stop tokens are `stop_token_ids`.
struct ApiModel {
  std::string id;
  int64_t created = 0;  // seconds since 1970
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;  // null: the model cannot chat
  std::vector<int32_t> stop_token_ids;
};

// The local time, for chat templates that write the date.
std::tm LocalTime();

// Turns a conversation into prompt ids, for an answer given now. Errors: invalid argument as of
// ChatTemplate::Render.
Result<std::vector<int32_t>> EncodeChat(const std::vector<ChatMessage>& messages,
                                        const Tokenizer& tokenizer,
                                        const ChatTemplate& chat_template);

// Answers requests. Thread-safe; `engine` and `metrics` must outlive it and all its answers.
class OpenAiApi {
 public:
  OpenAiApi(ApiModel model, std::vector<std::string> api_keys, Engine* engine, Metrics* metrics);

  // POST /v1/completions and /v1/chat/completions.
  HttpResponse Complete(const HttpRequest& http, bool chat);
  // GET /v1/models and /v1/models/{id}.
  HttpResponse ListModels() const;
  HttpResponse GetModel(const std::string& id) const;

 private:
  bool Authorized(const HttpRequest& http) const;
  // Checks what the engine does not, and fills what the client left open.
  std::variant<Request, ApiError> ToEngineRequest(const ApiRequest& api);
  uint64_t RandomSeed();
  // What an error of the engine is to a client.
  ApiError ToApiError(const Error& error) const;
  // The same for an answer that broke off, whose cause goes to the log.
  ApiError ReportFailure(const Error& error, const std::string& request_id) const;

  const ApiModel model_;
  const std::vector<std::string> api_keys_;
  Engine* engine_;
  Metrics* metrics_;
  std::mutex random_mutex_;
  std::mt19937_64 random_;  // guarded by random_mutex_
};

// An error as an HTTP answer.
HttpResponse ErrorResponse(const ApiError& error);

}  // namespace innerq
