#include <malloc.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <cstdio>
#include <memory>

#include "server/access.h"
#include "server/commands.h"
#include "server/log.h"
#include "server/model_setup.h"
#include "server/self_check.h"
#include "server/service.h"
#include "server/signals.h"

namespace innerq {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kTrimInterval{1000};

// Gives back the memory that a crowd of connections took, once the crowd has gone. By itself glibc
// returns only the ends of its heaps, and what a small long-lived thing pins there creeps up.
class MemoryTrimmer {
 public:
  // To be called now and then: does nothing while requests are answered, or if none were.
  void TrimIfQuiet(const HttpServer& http) {
    const int64_t ended = http.ended_requests();
    if (ended == ended_ || http.active_requests() > 0) return;
    ended_ = ended;
    malloc_trim(0);
  }

 private:
  int64_t ended_ = 0;  // requests at the last time
};

// Lets accepted requests finish and their answers go out, up to the limit. Meanwhile new ones are
// told that the server goes away, and /health, /ready and /metrics go on to tell how it does.
void Drain(Engine& engine, HttpServer& http, std::chrono::seconds limit) {
  spdlog::info("draining for up to {} s; {} requests are being answered", limit.count(),
               http.active_requests());
  const auto deadline = steady_clock::now() + limit;
  http.BeginToClose();
  const bool finished = engine.Drain(limit);
  http.StopReading();  // whoever is still sending a request would only be refused
  // Ended answers still have to be written, also those that the engine just cut short.
  const auto left = std::chrono::ceil<milliseconds>(deadline - steady_clock::now());
  const bool idle = http.WaitUntilIdle(std::max(left, milliseconds(1000)));
  if (finished && idle) {
    spdlog::info("drained");
  } else {
    spdlog::warn("the time to drain is over: the remaining requests were cut short");
  }
}

HttpServerOptions ToHttpOptions(const ServerOptions& server) {
  HttpOriginPolicy origins{.cors_origins = server.cors_origins,
                           .allowed_hosts = server.allowed_hosts};
  // Behind a loopback address nobody expects visitors; a list that is not empty keeps them out.
  if (IsLoopback(server.host) || !origins.allowed_hosts.empty()) {
    origins.allowed_hosts.push_back(server.host);
  }
  return {.host = server.host,
          .port = server.port,
          .max_connections = server.max_connections,
          .max_body_bytes = server.max_body_bytes,
          .max_header_bytes = server.max_header_bytes,
          .header_timeout = server.header_timeout,
          .read_timeout = server.read_timeout,
          .write_timeout = server.write_timeout,
          .keep_alive_timeout = server.keep_alive_timeout,
          .origins = std::move(origins),
          .on_answer = LogAnswer};
}

// Tells on standard output, for people and for scripts that wait for the line, where the server is
// and how to talk to it.
void PrintExample(const std::string& url, const std::string& model) {
  std::printf(
      "ready: %s/v1\n\n"
      "  curl %s/v1/completions -H 'Content-Type: application/json' \\\n"
      "    -d '{\"model\": \"%s\", \"prompt\": \"Hello\", \"max_tokens\": 32}'\n\n",
      url.c_str(), url.c_str(), model.c_str());
  std::fflush(stdout);
}

}  // namespace

int ServeCommand(const ConfigSource& source, const std::string& version) {
  Signals signals;
  auto options = LoadOptions(source.file, source.overrides);
  if (!options) return ReportError(options.error());
  ConfigureLog(options->log);
  options->runner.backend.warn = [](std::string_view text) { spdlog::warn("{}", text); };

  const ServerOptions& server = options->server;
  const auto keys = LoadApiKeys(server);
  if (!keys) return ReportError(keys.error());
  Access access(*keys, server.key_limits);
  Service service(version, &access);
  auto http = HttpServer::Start(ToHttpOptions(server), service.Routes());
  if (!http) return ReportError(http.error());

  spdlog::info("innerq {} listens on {} port {} and loads {}", version, server.host,
               (*http)->port(), options->model.path.string());
  auto parts = LoadParts(*options);
  if (!parts) return ReportError(parts.error());
  CheckLoadedModel(*options, *parts);
  auto model = StartModel(std::move(parts).value());
  if (!model) return ReportError(model.error());
  for (const std::string& line : DescribeModel(*options, model->config, model->report)) {
    spdlog::info("{}", line);
  }
  if (!model->chat_template) {
    spdlog::warn("the model has no chat template: /v1/chat/completions will refuse requests");
  }
  service.Open({.model = {.id = options->model.alias,
                          .created = std::chrono::duration_cast<std::chrono::seconds>(
                                         std::chrono::system_clock::now().time_since_epoch())
                                         .count(),
                          .tokenizer = model->tokenizer,
                          .chat_template = model->chat_template,
                          .stop_token_ids = model->stop_token_ids},
                .cache = model->cache,
                .engine = std::move(model->engine),
                .props = {.version = version,
                          .model_path = options->model.path.string(),
                          .backend = model->report.backend,
                          .kv_cache = options->kv_cache_json}});
  signals.Catch();
  spdlog::info("innerq {} ready on {} port {}", version, server.host, (*http)->port());
  PrintExample(ClientUrl(server.host, (*http)->port()), options->model.alias);

  MemoryTrimmer trimmer;
  while (!signals.Wait(kTrimInterval)) trimmer.TrimIfQuiet(**http);
  Drain(*service.engine(), **http, server.drain_timeout);
  return 0;
}

}  // namespace innerq
