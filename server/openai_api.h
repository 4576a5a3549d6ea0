// OpenAiApi: the OpenAI endpoints over one engine and one model.
#pragma once

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <variant>
#include <vector>

#include "engine/engine.h"
#include "kernels/cpu/host_threads.h"
#include "models/chat_template.h"
#include "models/tokenizer.h"
#include "server/answer.h"
#include "server/http_server.h"
#include "server/metrics.h"
#include "server/openai_request.h"
#include "server/work_slots.h"

namespace innerq {

// The most bytes of requests whose texts are worked on at once, of either kind; one larger request
// is worked on alone.
constexpr int64_t kMaxTextBytes = int64_t{8} << 20;

// What the API serves. The model's own stop tokens are `stop_token_ids`.
struct ApiModel {
  std::string id;
  int64_t created = 0;  // seconds since 1970
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;  // null: the model cannot chat
  std::vector<int32_t> stop_token_ids;
  // For requests with texts, read, rendered, encoded or decoded: that takes a core, and memory up
  // to 250 times theirs. Those that want no answer of the model (utility_slots) do not hold up the
  // others, and leave them cores. All copies share the slots.
  std::shared_ptr<WorkSlots> text_slots = std::make_shared<WorkSlots>(UsableCores(), kMaxTextBytes);
  std::shared_ptr<WorkSlots> utility_slots =
      std::make_shared<WorkSlots>(std::max(1, UsableCores() / 2), kMaxTextBytes);
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
  OpenAiApi(ApiModel model, Engine* engine, Metrics* metrics);

  // POST /v1/completions and /v1/chat/completions.
  HttpResponse Complete(const HttpRequest& http, bool chat);
  // GET /v1/models and /v1/models/{id}.
  HttpResponse ListModels() const;
  HttpResponse GetModel(const std::string& id) const;

 private:
  // What is to be generated for a request, prompt by prompt.
  struct Choices {
    std::chrono::steady_clock::time_point arrival{};
    AnswerNotes* notes = nullptr;
    std::vector<Request> requests{};
    std::vector<Generation::Options> options{};
    int64_t logprobs = 0;  // that may be held at once, alternatives included
  };

  // Reads a request and adds its choices. Holds a slot for texts, which the wait for an answer is
  // no part of.
  std::variant<ApiRequest, ApiError> Prepare(const HttpRequest& http, bool chat, Choices* choices);
  // The ids of a prompt, or of the messages if it is null. What cannot fit is not encoded.
  std::variant<std::vector<int32_t>, ApiError> Encode(const ApiRequest& api,
                                                      const ApiPrompt* prompt) const;
  // The most tokens of an answer to so many. Where the client leaves a chat's answer open: what
  // fits the context, and kMaxHeldLogprobs.
  int64_t MaxTokens(const ApiRequest& api, int64_t prompt_tokens) const;
  // The refusal of a prompt of so many tokens, or of `at_least` so many, that leaves the answer no
  // room.
  ApiError TooLongError(const ApiRequest& api, int64_t prompt_tokens, bool at_least) const;
  // Checks what the engine does not, and fills what the client left open, but for the seed.
  std::variant<Request, ApiError> ToEngineRequest(const ApiRequest& api,
                                                  std::vector<int32_t> prompt) const;
  // Adds the choices for a prompt, or for the messages if it is null.
  std::optional<ApiError> AddPrompt(const ApiRequest& api, const ApiPrompt* prompt,
                                    Choices* choices);
  // Waits for the answer, or for its first token if it is streamed.
  HttpResponse Respond(const HttpRequest& http, const ApiRequest& api,
                       std::shared_ptr<Answer> answer) const;
  uint64_t RandomSeed();
  // What an error of the engine is to a client who asked for so many choices.
  ApiError ToApiError(const Error& error, int64_t num_choices = 1) const;
  // The same for an answer that broke off, whose cause goes to the log.
  ApiError ReportFailure(const Error& error, const std::string& request_id) const;

  const ApiModel model_;
  Engine* engine_;
  Metrics* metrics_;
  std::mutex random_mutex_;
  std::random_device random_;  // guarded by random_mutex_
};

// An error as an HTTP answer.
HttpResponse ErrorResponse(const ApiError& error);

// Refusals that several endpoints give.
ApiError UnknownModelError(const std::string& id, const ApiModel& model);
ApiError NoChatTemplateError(const ApiModel& model);

}  // namespace innerq
