#include "server/service.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <chrono>

#include "server/openapi.h"
#include "server/utf8.h"

namespace innerq {
namespace {

constexpr const char* kLoading = "The model is still loading.";

HttpResponse JsonResponse(std::string body, int status = 200) {
  return {.status = status, .body = std::move(body)};
}

HttpResponse Unavailable(const std::string& message) {
  return ErrorResponse({.status = 503,
                        .message = message,
                        .type = "server_error",
                        .code = "server_is_overloaded",
                        .retry_after = 5});
}

// Runs a part of an answer; what it throws is logged here and answered by the HTTP server.
template <typename Part>
auto LogThrown(const std::string& request_id, Part part) {
  try {
    return part();
  } catch (const std::exception& error) {
    spdlog::error("request {} failed: exception: {}", request_id, error.what());
    throw;
  }
}

// Logs the beginning of a handler's work, and what it or its stream throws.
auto Logged(std::function<HttpResponse(const HttpRequest&)> handle) {
  return [handle = std::move(handle)](const HttpRequest& request) {
    spdlog::debug("request {} begins: {} {}, {} bytes", request.id, request.method, request.path,
                  request.body.size());
    HttpResponse response = LogThrown(request.id, [&] { return handle(request); });
    if (response.stream) {
      response.stream = [id = request.id, stream = std::move(response.stream)](HttpWriter& out) {
        LogThrown(id, [&] { stream(out); });
      };
    }
    return response;
  };
}

}  // namespace

void Service::Open(Parts parts) {
  CHECK(!open_, "a service opened twice");
  engine_ = std::move(parts.engine);
  metrics_ = std::make_unique<Metrics>(parts.model.id, parts.cache);
  utilities_ =
      std::make_unique<UtilityApi>(parts.model, std::move(parts.props), parts.cache, engine_.get());
  api_ = std::make_unique<OpenAiApi>(std::move(parts.model), engine_.get(), metrics_.get());
  open_ = true;
}

HttpResponse Service::Ready() const {
  if (!open_) return Unavailable(kLoading);
  if (!engine_->ready()) return Unavailable("The server takes no new requests.");
  return JsonResponse("{\"status\": \"ready\"}");
}

std::vector<HttpRoute> Service::Routes() {
  std::vector<HttpRoute> routes;
  const auto add = [&routes](std::string method, std::string path, auto handle) {
    routes.push_back({std::move(method), std::move(path), Logged(std::move(handle))});
  };
  // Handlers that need a model.
  const auto add_open = [this, &add](std::string method, std::string path, auto handle) {
    add(std::move(method), std::move(path), [this, handle](const HttpRequest& request) {
      return open_ ? handle(request) : Unavailable(kLoading);
    });
  };
  // Likewise, for those who may: keys and their limits are checked before the body is read. What
  // comes too early does not count.
  const auto add_keyed = [this, &routes, &add_open](std::string method, std::string path,
                                                    auto handle) {
    add_open(std::move(method), std::move(path), std::move(handle));
    routes.back().admit = [this](const HttpRequest& request) -> HttpAdmission {
      if (auto refusal = access_.CheckKey(request)) return {.refusal = std::move(refusal)};
      if (!open_) return {.refusal = Unavailable(kLoading)};
      return access_.Admit(request, std::chrono::steady_clock::now());
    };
  };
  add("GET", "/health", [](const HttpRequest&) { return JsonResponse("{\"status\": \"ok\"}"); });
  add("GET", "/ready", [this](const HttpRequest&) { return Ready(); });
  add("GET", "/version", [this](const HttpRequest&) {
    return JsonResponse("{\"version\": " + QuoteJson(version_) + "}");
  });
  add("GET", "/openapi.json", [](const HttpRequest&) { return JsonResponse(kOpenApi); });
  add_open("GET", "/metrics", [this](const HttpRequest&) {
    return HttpResponse{.content_type = "text/plain; version=0.0.4; charset=utf-8",
                        .body = metrics_->Render(engine_->Stats())};
  });
  add_open("GET", "/v1/models", [this](const HttpRequest&) { return api_->ListModels(); });
  add_open("GET", "/v1/models/*",
           [this](const HttpRequest& request) { return api_->GetModel(request.parameter); });
  add_keyed("POST", "/v1/completions",
            [this](const HttpRequest& request) { return api_->Complete(request, false); });
  add_keyed("POST", "/v1/chat/completions",
            [this](const HttpRequest& request) { return api_->Complete(request, true); });
  add_keyed("POST", "/tokenize",
            [this](const HttpRequest& request) { return utilities_->Tokenize(request); });
  add_keyed("POST", "/detokenize",
            [this](const HttpRequest& request) { return utilities_->Detokenize(request); });
  add_keyed("POST", "/apply-template",
            [this](const HttpRequest& request) { return utilities_->ApplyTemplate(request); });
  add_keyed("GET", "/tokenizer_info",
            [this](const HttpRequest&) { return utilities_->TokenizerInfo(); });
  add_keyed("GET", "/props", [this](const HttpRequest&) { return utilities_->Props(); });
  add_keyed("GET", "/slots", [this](const HttpRequest&) { return utilities_->Slots(); });
  return routes;
}

void LogAnswer(const HttpExchange& exchange) {
  const AnswerNotes& notes = exchange.notes;
  const bool used_model = notes.prompt_tokens > 0;
  const auto level = exchange.status == 500                 ? spdlog::level::warn
                     : used_model || exchange.status >= 400 ? spdlog::level::info
                                                            : spdlog::level::debug;
  const std::chrono::duration<double, std::milli> elapsed = exchange.duration;
  std::string line = fmt::format("request {}: {} {} {} in {:.1f} ms", exchange.id, exchange.method,
                                 exchange.path, exchange.status, elapsed.count());
  if (used_model) {
    line += fmt::format(", {} prompt and {} completion tokens, {}", notes.prompt_tokens,
                        notes.completion_tokens,
                        notes.finish_reason.empty() ? "abort" : notes.finish_reason);
  }
  spdlog::log(level, "{}", line);
}

}  // namespace innerq
