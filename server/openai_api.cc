#include "server/openai_api.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cmath>

#include "server/openai_response.h"

namespace innerq {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// How often a waiting answer looks whether its client is still there.
constexpr milliseconds kPatience{200};
// Silence after which a stream says that it is alive, so that proxies do not cut it.
constexpr std::chrono::seconds kPingInterval{10};
constexpr int64_t kCompletionMaxTokens = 16;  // OpenAI's default; chat answers may fill the context
// A client that went away (nginx's code); nobody reads the answer.
constexpr int kClientClosed = 499;

// Time depends on the length of `given` alone, not on where it differs.
bool EqualsInConstantTime(std::string_view given, std::string_view key) {
  unsigned difference = given.size() != key.size();
  for (size_t i = 0; i < given.size(); ++i) {
    difference |= static_cast<unsigned char>(given[i]) ^
                  static_cast<unsigned char>(key.empty() ? 0 : key[i % key.size()]);
  }
  return difference == 0;
}

bool SendEvent(HttpWriter& out, const std::string& json) {
  return out.Write("data: " + json + "\n\n");
}

// Streams a generation that has begun or ended; `first` is its first piece.
void Stream(const AnswerHead& head, Generation& generation, Generation::Piece first,
            const std::function<ApiError(const Error&)>& describe, HttpWriter& out) {
  if (head.chat && !SendEvent(out, RoleChunkJson(head))) return;
  auto last_sent = steady_clock::now();
  for (Generation::Piece piece = std::move(first);; piece = generation.Next(kPatience)) {
    if (!piece.empty()) {
      if (!SendEvent(out, TextChunkJson(head, piece.text, piece.tokens))) return;
      last_sent = steady_clock::now();
    }
    if (generation.ended()) break;
    if (out.client_gone()) return;
    if (steady_clock::now() - last_sent >= kPingInterval) {
      if (!out.Write(": ping\n\n")) return;
      last_sent = steady_clock::now();
    }
  }
  if (generation.error()) {
    SendEvent(out, ErrorResponse(describe(*generation.error())).body);
    return;
  }
  if (!SendEvent(out, EndChunkJson(head, generation.finish_reason()))) return;
  if (head.include_usage && !SendEvent(out, UsageChunkJson(head, generation.usage()))) return;
  SendEvent(out, "[DONE]");
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
  if (error.status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  return response;
}

OpenAiApi::OpenAiApi(ApiModel model, std::vector<std::string> api_keys, Engine* engine,
                     Metrics* metrics)
    : model_(std::move(model)),
      api_keys_(std::move(api_keys)),
      engine_(engine),
      metrics_(metrics),
      random_(std::random_device{}()) {}

bool OpenAiApi::Authorized(const HttpRequest& http) const {
  constexpr std::string_view kBearer = "Bearer ";
  std::string_view given = http.api_key;
  if (given.empty() && http.authorization.starts_with(kBearer)) {
    given = std::string_view(http.authorization).substr(kBearer.size());
  }
  bool authorized = api_keys_.empty();
  for (const std::string& key : api_keys_) authorized |= EqualsInConstantTime(given, key);
  return authorized;
}

HttpResponse OpenAiApi::ListModels() const {
  return {.body = ModelListJson(model_.id, model_.created, engine_->options().max_context)};
}

HttpResponse OpenAiApi::GetModel(const std::string& id) const {
  if (id != model_.id) {
    return ErrorResponse({.status = 404,
                          .message = "The model '" + id + "' does not exist.",
                          .param = "model",
                          .code = "model_not_found"});
  }
  return {.body = ModelJson(model_.id, model_.created, engine_->options().max_context)};
}

uint64_t OpenAiApi::RandomSeed() {
  const std::lock_guard lock(random_mutex_);
  return random_();
}

ApiError OpenAiApi::ToApiError(const Error& error) const {
  switch (error.code) {
    case ErrorCode::kInvalidArgument:
      return {.message = error.message, .param = error.param, .code = "invalid_value"};
    case ErrorCode::kResourceExhausted:
    case ErrorCode::kUnavailable: {
      // When the queue will have moved on by one, as fast as it moved lately.
      const EngineStats stats = engine_->Stats();
      const double rate = stats.finish_per_second;
      const double wait = rate > 0 ? static_cast<double>(stats.waiting + 1) / rate : 5.0;
      return {.status = 503,
              .message = "The server is overloaded or shutting down; try again later.",
              .type = "server_error",
              .code = "server_is_overloaded",
              .retry_after = static_cast<int64_t>(std::ceil(std::clamp(wait, 1.0, 60.0)))};
    }
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

std::variant<Request, ApiError> OpenAiApi::ToEngineRequest(const ApiRequest& api) {
  Request request;
  if (api.chat) {
    if (!model_.chat_template) {
      return ApiError{.message = "The model '" + model_.id + "' has no chat template.",
                      .param = "messages",
                      .code = "unsupported_parameter"};
    }
    auto prompt = EncodeChat(api.messages, *model_.tokenizer, *model_.chat_template);
    if (!prompt) return ToApiError(prompt.error());
    request.prompt = std::move(prompt).value();
  } else {
    request.prompt =
        api.prompt_ids.empty() ? model_.tokenizer->Encode(api.prompt, {}) : api.prompt_ids;
  }
  const int64_t context = engine_->options().max_context;
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  request.max_tokens = api.max_tokens.value_or(
      api.chat ? std::max<int64_t>(context - prompt_tokens, 1) : kCompletionMaxTokens);
  if (prompt_tokens + request.max_tokens > context) {
    const auto text = [](int64_t number) { return std::to_string(number); };
    return ApiError{
        .message = "This model's maximum context length is " + text(context) +
                   " tokens. However, you requested " + text(prompt_tokens + request.max_tokens) +
                   " tokens (" + text(prompt_tokens) + " in the messages, " +
                   text(request.max_tokens) +
                   " in the completion). Please reduce the length of the messages or completion.",
        .param = api.chat ? "messages" : "prompt",
        .code = "context_length_exceeded",
        .extra = ", \"n_prompt_tokens\": " + text(prompt_tokens) + ", \"n_ctx\": " + text(context)};
  }
  request.min_tokens = api.min_tokens;
  request.sampling = api.sampling;
  if (!api.has_seed) request.sampling.seed = RandomSeed();
  if (!api.ignore_eos) request.stop_token_ids = model_.stop_token_ids;
  request.stop_token_ids.insert(request.stop_token_ids.end(), api.stop_token_ids.begin(),
                                api.stop_token_ids.end());
  return request;
}

HttpResponse OpenAiApi::Complete(const HttpRequest& http, bool chat) {
  const auto arrival = steady_clock::now();
  if (!Authorized(http)) {
    return ErrorResponse({.status = 401,
                          .message = "A valid API key is required.",
                          .type = "authentication_error",
                          .code = "invalid_api_key"});
  }
  auto parsed = ParseApiRequest(http.body, chat);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return ErrorResponse(*error);
  const ApiRequest& api = std::get<ApiRequest>(parsed);
  if (api.model != model_.id) return GetModel(api.model);
  auto converted = ToEngineRequest(api);
  if (const auto* error = std::get_if<ApiError>(&converted)) return ErrorResponse(*error);
  Request& request = std::get<Request>(converted);
  const Generation::Options options{.stops = api.stop,
                                    .logprobs = api.sampling.num_logprobs >= 0,
                                    .prompt_tokens = static_cast<int64_t>(request.prompt.size()),
                                    .arrival = arrival};
  auto reader = engine_->Submit(std::move(request));
  if (!reader) return ErrorResponse(ToApiError(reader.error()));
  const auto generation = std::make_shared<Generation>(std::move(reader).value(),
                                                       model_.tokenizer.get(), metrics_, options);

  const AnswerHead head{.chat = chat,
                        .id = (chat ? "chatcmpl-" : "cmpl-") + http.id,
                        .created = std::chrono::duration_cast<std::chrono::seconds>(
                                       std::chrono::system_clock::now().time_since_epoch())
                                       .count(),
                        .model = model_.id,
                        .logprobs = options.logprobs,
                        .include_usage = api.include_usage};
  // A stream waits for its first token only: until then an error can still be a plain answer.
  Generation::Piece answer;
  while (!generation->ended() && !(api.stream && generation->started())) {
    Generation::Piece piece = generation->Next(kPatience);
    answer.text += piece.text;
    std::move(piece.tokens.begin(), piece.tokens.end(), std::back_inserter(answer.tokens));
    if (!generation->ended() && http.client_gone()) {
      return ErrorResponse({.status = kClientClosed, .message = "The client went away."});
    }
  }
  if (generation->error() && !(api.stream && generation->started())) {
    return ErrorResponse(ReportFailure(*generation->error(), http.id));
  }
  if (api.stream) {
    return {.content_type = "text/event-stream",
            .stream = [this, head, generation, answer, id = http.id](HttpWriter& out) {
              Stream(
                  head, *generation, answer,
                  [&](const Error& error) { return ReportFailure(error, id); }, out);
            }};
  }
  return {.body = AnswerJson(head, answer.text, answer.tokens, generation->finish_reason(),
                             generation->usage())};
}

}  // namespace innerq
