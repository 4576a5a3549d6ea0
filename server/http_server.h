// HttpServer: HTTP/1.1 over TCP, one thread per connection; knows nothing of models.
//
// A client that ends its sending side while its answer is being made looks like one that has left:
// TCP tells the two apart only when data comes back. Handlers that take long see it as gone; what
// is answered at once reaches it whole.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/result.h"
#include "server/http_messages.h"
#include "server/http_origin.h"

namespace innerq {

// The URL at which a client on this machine reaches a server bound to `host`.
std::string ClientUrl(const std::string& host, int port);

// A request that has been answered, for the log.
struct HttpExchange {
  std::string id;
  std::string method;  // empty, like the path, if the request was not understood
  std::string path;
  int status = 0;
  std::chrono::steady_clock::duration duration{};  // from its first byte to the answer's last
  AnswerNotes notes = {};
};

struct HttpServerOptions {
  std::string host = "127.0.0.1";
  int port = 0;  // 0: any free one
  int64_t max_connections = 1024;
  int64_t max_body_bytes = int64_t{8} << 20;
  int64_t max_header_bytes = int64_t{64} << 10;      // request line and headers
  std::chrono::milliseconds header_timeout{10'000};  // from a request's first byte to its headers
  std::chrono::milliseconds read_timeout{30'000};    // without a byte of the body
  std::chrono::milliseconds write_timeout{30'000};   // without a byte taken by the client
  std::chrono::milliseconds keep_alive_timeout{75'000};  // between requests
  HttpOriginPolicy origins = {};
  // If set, called by a connection's thread after each answer.
  std::function<void(const HttpExchange&)> on_answer = {};
};

// Serves routes from construction to destruction. Errors of its own (malformed requests, unknown
// paths and methods, too large bodies, too many connections) are answered with OpenAI's error JSON.
class HttpServer {
 public:
  // Binds, listens and starts to accept. Errors: unavailable if the address cannot be bound.
  static Result<std::unique_ptr<HttpServer>> Start(const HttpServerOptions& options,
                                                   std::vector<HttpRoute> routes);
  // Closes all connections and waits for their threads; handlers see a client that is gone.
  virtual ~HttpServer() = default;

  virtual int port() const = 0;
  // Requests being read or answered right now.
  virtual int64_t active_requests() const = 0;
  // Requests answered or given up since the start.
  virtual int64_t ended_requests() const = 0;
  // From now on every answer ends its connection, so that the client looks for another server.
  // Requests are answered as before, also those of new connections.
  virtual void BeginToClose() = 0;
  // Accepts and waits for nothing more: idle connections end, requests that have not arrived whole
  // are answered 503. What has arrived is answered.
  virtual void StopReading() = 0;
  // Waits until no request is being read or answered and, after StopReading, until all connections
  // have ended, as their threads may still find what had arrived; false if `timeout` was too short.
  virtual bool WaitUntilIdle(std::chrono::milliseconds timeout) = 0;
};

}  // namespace innerq
