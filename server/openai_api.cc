#include "server/openai_api.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cmath>

#include "engine/sampler.h"
#include "server/openai_response.h"

namespace innerq {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// How often a waiting answer looks whether its client is still there.
constexpr milliseconds kPatience{200};
// Silence after which a stream says that it is alive, so that proxies do not cut it.
constexpr std::chrono::seconds kPingInterval{10};
constexpr int64_t kRetryAfter = 5;            // seconds, where nothing tells how many
constexpr int64_t kCompletionMaxTokens = 16;  // OpenAI's default; chat answers may fill the context
// A client that went away (nginx's code); nobody reads the answer.
constexpr int kClientClosed = 499;

// The log-probabilities of a token whose `k` best are asked for; -1: none are.
int64_t LogprobsPerToken(int32_t k) { return int64_t{k} + 1; }

int64_t Index(size_t i) { return static_cast<int64_t>(i); }

bool SendEvent(HttpWriter& out, const std::string& json) {
  return out.Write("data: " + json + "\n\n");
}

// Streams an answer that has begun or ended.
void Stream(const AnswerHead& head, Answer& answer,
            const std::function<ApiError(const Error&)>& describe, HttpWriter& out) {
  for (size_t i = 0; head.chat && i < answer.size(); ++i) {
    if (!SendEvent(out, RoleChunkJson(head, Index(i), answer.usage()))) return;
  }
  std::vector<bool> closed(answer.size());
  auto last_sent = steady_clock::now();
  const auto send = [&](const std::string& json) {
    last_sent = steady_clock::now();
    return SendEvent(out, json);
  };
  for (;; answer.Read(kPatience)) {
    for (size_t i = 0; i < answer.size(); ++i) {
      Generation& choice = answer.choice(i);
      const AnswerPiece piece = choice.TakePiece();
      if (!piece.empty() && !send(TextChunkJson(head, Index(i), piece, answer.usage()))) return;
      if (closed[i] || !choice.ended() || choice.error()) continue;
      closed[i] = true;
      if (!send(EndChunkJson(head, Index(i), choice.finish_reason(), answer.usage()))) return;
    }
    if (answer.ended()) break;
    if (out.client_gone()) return;
    if (steady_clock::now() - last_sent >= kPingInterval) {
      if (!out.Write(": ping\n\n")) return;
      last_sent = steady_clock::now();
    }
  }
  if (const auto error = answer.error()) {
    SendEvent(out, ErrorResponse(describe(*error)).body);
    return;
  }
  if (head.include_usage && !SendEvent(out, UsageChunkJson(head, answer.usage()))) return;
  SendEvent(out, "[DONE]");
}

// An answer that has ended well: of each prompt's candidates the best, or all as they are.
std::string PlainAnswer(const AnswerHead& head, Answer& answer, const ApiRequest& api) {
  const auto best_of = static_cast<size_t>(api.best_of), n = static_cast<size_t>(api.n);
  std::vector<AnswerChoice> choices;
  for (size_t begin = 0; begin < answer.size(); begin += best_of) {
    for (const size_t i : answer.Best(begin, best_of, n)) {
      Generation& choice = answer.choice(i);
      choices.push_back({choice.TakePiece(), choice.finish_reason()});
    }
  }
  return AnswerJson(head, choices, answer.usage());
}

}  // namespace

std::tm LocalTime() {
  const std::time_t seconds = std::time(nullptr);
  std::tm now{};
  localtime_r(&seconds, &now);
  return now;
}

Result<std::vector<int32_t>> EncodeChat(const std::vector<ChatMessage>& messages,
                                        const Tokenizer& tokenizer,
                                        const ChatTemplate& chat_template) {
  ASSIGN_OR_RETURN(const auto segments, chat_template.Render(messages, {.now = LocalTime()}));
  return EncodePrompt(segments, tokenizer);
}

HttpResponse ErrorResponse(const ApiError& error) {
  HttpResponse response{
      .status = error.status,
      .body = ErrorJson(error.message, error.type, error.param, error.code, error.extra)};
  if (error.retry_after > 0) {
    response.headers.emplace_back("Retry-After", std::to_string(error.retry_after));
  }
  return response;
}

ApiError UnknownModelError(const std::string& id, const ApiModel& model) {
  return {.status = 404,
          .message = "The model '" + Quotable(id) + "' does not exist; this server has '" +
                     model.id + "'.",
          .param = "model",
          .code = "model_not_found"};
}

ApiError NoChatTemplateError(const ApiModel& model) {
  return {.message = "The model '" + model.id + "' has no chat template.",
          .param = "messages",
          .code = "unsupported_parameter"};
}

OpenAiApi::OpenAiApi(ApiModel model, Engine* engine, Metrics* metrics)
    : model_(std::move(model)), engine_(engine), metrics_(metrics) {}

HttpResponse OpenAiApi::ListModels() const {
  return {.body = ModelListJson(model_.id, model_.created, engine_->options().max_context)};
}

HttpResponse OpenAiApi::GetModel(const std::string& id) const {
  if (id != model_.id) return ErrorResponse(UnknownModelError(id, model_));
  return {.body = ModelJson(model_.id, model_.created, engine_->options().max_context)};
}

uint64_t OpenAiApi::RandomSeed() {
  const std::lock_guard lock(random_mutex_);
  const uint64_t high = random_();
  return high << 32 | random_();
}

ApiError OpenAiApi::ToApiError(const Error& error, int64_t num_choices) const {
  switch (error.code) {
    case ErrorCode::kInvalidArgument:
      return InvalidArgumentError(error);
    case ErrorCode::kResourceExhausted: {
      // When the queue, as fast as it moved lately, will have that many places.
      const double rate = engine_->Stats().finish_per_second;
      const double wait = rate > 0 ? static_cast<double>(num_choices) / rate : kRetryAfter;
      return {.status = 503,
              .message = "The server is overloaded; try again later.",
              .type = "server_error",
              .code = "server_is_overloaded",
              .retry_after = static_cast<int64_t>(std::ceil(std::clamp(wait, 1.0, 60.0)))};
    }
    case ErrorCode::kUnavailable:  // drains, or has lost its device
      return {.status = 503,
              .message = "The server is going out of service; try again later.",
              .type = "server_error",
              .code = "server_is_overloaded",
              .retry_after = kRetryAfter};
    case ErrorCode::kNotFound:
    case ErrorCode::kCancelled:
    case ErrorCode::kDataLoss:
    case ErrorCode::kInternal:
      break;
  }
  return {.status = 500,
          .message = "The server failed to answer this request.",
          .type = "server_error",
          .code = "internal_error"};
}

ApiError OpenAiApi::ReportFailure(const Error& error, const std::string& request_id) const {
  spdlog::error("request {} failed: {}", request_id, error.message);
  return ToApiError(error);
}

std::variant<std::vector<int32_t>, ApiError> OpenAiApi::Encode(const ApiRequest& api,
                                                               const ApiPrompt* prompt) const {
  std::vector<TextSegment> segments;
  if (prompt == nullptr) {
    if (!model_.chat_template) return NoChatTemplateError(model_);
    auto rendered = model_.chat_template->Render(api.messages, {.now = LocalTime()});
    if (!rendered) return ToApiError(rendered.error());
    segments = std::move(rendered).value();
  } else if (const auto* text = std::get_if<std::string>(prompt)) {
    segments.push_back({.text = *text, .trusted = api.parse_special});
  } else {
    return std::get<std::vector<int32_t>>(*prompt);
  }
  // Whatever the answer's length, for which counts are exact: encoding what could fit is cheap.
  const int64_t least = model_.tokenizer->MinTokens(segments);
  if (least > engine_->options().max_context) return TooLongError(api, least, /*at_least=*/true);
  return EncodePrompt(segments, *model_.tokenizer, api.add_special_tokens);
}

int64_t OpenAiApi::MaxTokens(const ApiRequest& api, int64_t prompt_tokens) const {
  if (api.max_tokens) return *api.max_tokens;
  if (!api.chat) return kCompletionMaxTokens;
  int64_t room = engine_->options().max_context - prompt_tokens;
  if (const int64_t logprobs = api.n * LogprobsPerToken(api.sampling.num_logprobs); logprobs > 0) {
    room = std::min(room, kMaxHeldLogprobs / logprobs);
  }
  return std::max<int64_t>(room, 1);
}

ApiError OpenAiApi::TooLongError(const ApiRequest& api, int64_t prompt_tokens,
                                 bool at_least) const {
  const int64_t context = engine_->options().max_context;
  const int64_t max_tokens = MaxTokens(api, prompt_tokens);
  const auto text = [](int64_t number) { return std::to_string(number); };
  const std::string least = at_least ? "at least " : "";
  return {
      .message = "This model's maximum context length is " + text(context) +
                 " tokens. However, you requested " + least + text(prompt_tokens + max_tokens) +
                 " tokens (" + least + text(prompt_tokens) + " in the messages, " +
                 text(max_tokens) +
                 " in the completion). Please reduce the length of the messages or completion.",
      .param = api.chat ? "messages" : "prompt",
      .code = "context_length_exceeded",
      .extra = ", \"n_prompt_tokens\": " + text(prompt_tokens) + ", \"n_ctx\": " + text(context)};
}

std::variant<Request, ApiError> OpenAiApi::ToEngineRequest(const ApiRequest& api,
                                                           std::vector<int32_t> prompt) const {
  Request request;
  request.prompt = std::move(prompt);
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  request.max_tokens = MaxTokens(api, prompt_tokens);
  if (prompt_tokens + request.max_tokens > engine_->options().max_context) {
    return TooLongError(api, prompt_tokens, /*at_least=*/false);
  }
  request.min_tokens = api.min_tokens;
  request.sampling = api.sampling;
  request.cache_salt = api.cache_salt;
  if (api.echo) request.prompt_logprobs = api.sampling.num_logprobs;
  if (api.best_of > api.n) {  // they are compared by them
    request.sampling.num_logprobs = std::max(request.sampling.num_logprobs, 0);
  }
  if (!api.ignore_eos) request.stop_token_ids = model_.stop_token_ids;
  request.stop_token_ids.insert(request.stop_token_ids.end(), api.stop_token_ids.begin(),
                                api.stop_token_ids.end());
  return request;
}

std::optional<ApiError> OpenAiApi::AddPrompt(const ApiRequest& api, const ApiPrompt* prompt,
                                             Choices* choices) {
  auto ids = Encode(api, prompt);
  if (const auto* error = std::get_if<ApiError>(&ids)) return *error;
  auto converted = ToEngineRequest(api, std::get<std::vector<int32_t>>(std::move(ids)));
  if (const auto* error = std::get_if<ApiError>(&converted)) return *error;
  Request& request = std::get<Request>(converted);
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  choices->logprobs +=
      api.best_of * (prompt_tokens * LogprobsPerToken(request.prompt_logprobs) +
                     request.max_tokens * LogprobsPerToken(api.sampling.num_logprobs));
  if (choices->logprobs > kMaxHeldLogprobs) {
    return ApiError{.message = "The choices and their alternatives may have more than " +
                               std::to_string(kMaxHeldLogprobs) +
                               " log-probabilities in all; ask for fewer choices, alternatives or "
                               "tokens (max_tokens).",
                    .param = "logprobs",
                    .code = "invalid_value"};
  }
  const uint64_t seed = api.has_seed ? api.sampling.seed : RandomSeed();
  const bool special = !api.skip_special_tokens;
  Generation::Options options{
      .text = {.stops = api.stop, .include_stop = api.include_stop, .special = special},
      .min_tokens = api.min_tokens,
      .logprobs = api.sampling.num_logprobs >= 0,
      .stop_logprobs = !api.chat,
      .prompt_tokens = prompt_tokens,
      .echo = nullptr,
      .arrival = choices->arrival,
      .notes = choices->notes};
  if (api.echo) {
    std::optional<std::string> text;
    if (const auto* given = std::get_if<std::string>(prompt)) text = *given;
    options.echo = std::make_shared<const PromptEcho>(
        EchoPrompt(*model_.tokenizer, request.prompt, text, text ? api.parse_special : special));
  }
  for (int64_t i = 0; i < api.best_of; ++i) {
    request.sampling.seed = SeedOfChoice(seed, i);
    choices->requests.push_back(request);
    choices->options.push_back(options);
    options.prompt_tokens = 0;  // counted once
  }
  return std::nullopt;
}

std::variant<ApiRequest, ApiError> OpenAiApi::Prepare(const HttpRequest& http, bool chat,
                                                      Choices* choices) {
  const WorkSlots::Slot slot(*model_.text_slots, http.body.size());
  auto parsed = ParseApiRequest(http.body, chat);
  const auto* api = std::get_if<ApiRequest>(&parsed);
  if (api == nullptr) return parsed;
  if (api->model != model_.id) return UnknownModelError(api->model, model_);
  const int64_t max_queue = engine_->options().max_queue;
  const std::string why = " (scheduler.max_queue is " + std::to_string(max_queue) + ")";
  if (auto refusal = CheckNumChoices(*api, max_queue, why)) return *refusal;
  std::optional<ApiError> refusal;
  if (chat) refusal = AddPrompt(*api, nullptr, choices);
  for (size_t i = 0; i < api->prompts.size() && !refusal; ++i) {
    refusal = AddPrompt(*api, &api->prompts[i], choices);
  }
  if (refusal) return *refusal;
  return parsed;
}

HttpResponse OpenAiApi::Complete(const HttpRequest& http, bool chat) {
  Choices choices{.arrival = steady_clock::now(), .notes = http.notes};
  const auto prepared = Prepare(http, chat, &choices);
  if (const auto* refusal = std::get_if<ApiError>(&prepared)) return ErrorResponse(*refusal);
  const ApiRequest& api = std::get<ApiRequest>(prepared);
  const int64_t num_choices = std::ssize(choices.requests);
  auto group = engine_->SubmitGroup(std::move(choices.requests));
  if (!group) return ErrorResponse(ToApiError(group.error(), num_choices));
  return Respond(http, api,
                 std::make_shared<Answer>(std::move(group).value(), model_.tokenizer.get(),
                                          metrics_, std::move(choices.options)));
}

HttpResponse OpenAiApi::Respond(const HttpRequest& http, const ApiRequest& api,
                                std::shared_ptr<Answer> answer) const {
  const AnswerHead head{.chat = api.chat,
                        .id = (api.chat ? "chatcmpl-" : "cmpl-") + http.id,
                        .created = std::chrono::duration_cast<std::chrono::seconds>(
                                       std::chrono::system_clock::now().time_since_epoch())
                                       .count(),
                        .model = model_.id,
                        .logprobs = api.sampling.num_logprobs >= 0,
                        .include_usage = api.include_usage,
                        .continuous_usage = api.continuous_usage};
  // A stream waits for its first token only: until then an error can still be a plain answer.
  while (!answer->ended() && !(api.stream && answer->started())) {
    answer->Read(kPatience);
    if (!answer->ended() && http.client_gone()) {
      return ErrorResponse({.status = kClientClosed, .message = "The client went away."});
    }
  }
  if (const auto error = answer->error(); error && !(api.stream && answer->started())) {
    return ErrorResponse(ReportFailure(*error, http.id));
  }
  if (api.stream) {
    return {.content_type = "text/event-stream",
            .stream = [this, head, answer, id = http.id](HttpWriter& out) {
              Stream(
                  head, *answer, [&](const Error& error) { return ReportFailure(error, id); }, out);
            }};
  }
  return {.body = PlainAnswer(head, *answer, api)};
}

}  // namespace innerq
