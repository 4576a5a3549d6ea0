// UtilityApi: the endpoints beside generation, in the shapes of vLLM and llama.cpp.
#pragma once

#include <memory>
#include <string>

#include "engine/engine.h"
#include "server/http_messages.h"
#include "server/metrics.h"
#include "server/openai_api.h"
#include "server/utility_request.h"

namespace innerq {

// What clients may ask about a server beside what ApiModel says.
struct ServerProps {
  std::string version;
  std::string model_path;
  std::string backend;            // and its variant, as ModelReport says it
  std::string kv_cache = "null";  // the configuration's section, as JSON
};

// Answers requests. Thread-safe; `engine` must outlive it.
class UtilityApi {
 public:
  UtilityApi(ApiModel model, ServerProps props, const CacheInfo& cache, const Engine* engine);

  HttpResponse Tokenize(const HttpRequest& http) const;       // POST /tokenize
  HttpResponse Detokenize(const HttpRequest& http) const;     // POST /detokenize
  HttpResponse ApplyTemplate(const HttpRequest& http) const;  // POST /apply-template
  HttpResponse TokenizerInfo() const;                         // GET /tokenizer_info
  HttpResponse Props() const;                                 // GET /props
  HttpResponse Slots() const;                                 // GET /slots

 private:
  // The request of `http`, for the model that is served.
  std::variant<UtilityRequest, ApiError> Read(const HttpRequest& http,
                                              UtilityEndpoint endpoint) const;
  // The conversation of a request as text.
  std::variant<std::vector<TextSegment>, ApiError> Render(const UtilityRequest& request) const;

  const ApiModel model_;
  const ServerProps props_;
  const CacheInfo cache_;
  const Engine* engine_;
};

}  // namespace innerq
