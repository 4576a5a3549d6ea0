// Service: the routes of the server, and its life from loading to serving.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "server/access.h"
#include "server/http_server.h"
#include "server/metrics.h"
#include "server/openai_api.h"
#include "server/utility_api.h"

namespace innerq {

// Answers all routes. Until Open, whatever needs the model answers 503; so the port is taken, and
// the process seen alive, while weights load. Thread-safe.
class Service {
 public:
  // What a loaded model brings.
  struct Parts {
    ApiModel model;
    CacheInfo cache;
    std::unique_ptr<Engine> engine;
    ServerProps props = {};
  };

  // `access` must outlive the service.
  Service(std::string version, Access* access) : version_(std::move(version)), access_(*access) {}

  // Starts to answer with this model. Call once.
  void Open(Parts parts);
  // Null before Open.
  Engine* engine() const { return open_ ? engine_.get() : nullptr; }

  // The routes; the service must outlive their server.
  std::vector<HttpRoute> Routes();

 private:
  HttpResponse Ready() const;

  const std::string version_;
  Access& access_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<OpenAiApi> api_;
  std::unique_ptr<UtilityApi> utilities_;
  std::atomic<bool> open_{false};  // the four above are set, and stay as they are
};

// Writes the log's line about an answer, on the level that it deserves. For
// HttpServerOptions::on_answer.
void LogAnswer(const HttpExchange& exchange);

}  // namespace innerq
