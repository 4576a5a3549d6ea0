#include "server/http_server.h"

// As the distribution's library was compiled: httplib::Request has a member only with TLS.
#define CPPHTTPLIB_OPENSSL_SUPPORT
#include <httplib.h>
#include <pthread.h>

#include <charconv>
#include <condition_variable>
#include <list>
#include <mutex>
#include <thread>

#include "server/http_socket.h"

namespace innerq {
namespace {

// Connections beyond the limit that are still told so with a 503; those beyond are closed.
constexpr int64_t kMaxRefusals = 64;
constexpr size_t kMaxPathBytes = 1024;

void SetError(httplib::Response& response, int status, std::string_view message,
              std::string_view code) {
  response.status = status;
  response.body =
      ErrorJson(message, status >= 500 ? "server_error" : "invalid_request_error", "", code);
  response.set_header("Content-Type", "application/json");
}

// Why a request's framing cannot be trusted: message, and status; {0, ""} if it can.
std::pair<int, const char*> CheckFraming(const httplib::Request& request) {
  const bool chunked = request.has_header("Transfer-Encoding");
  const size_t lengths = request.get_header_value_count("Content-Length");
  if (chunked && request.get_header_value("Transfer-Encoding") != "chunked") {
    return {501, "only the transfer encoding \"chunked\" is supported"};
  }
  if (lengths + chunked > 1) return {400, "the length of the body is given more than once"};
  if (lengths == 1) {
    const std::string text = request.get_header_value("Content-Length");
    uint64_t length = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), length);
    if (error != std::errc() || end != text.data() + text.size()) {
      return {400, "Content-Length is not a number"};
    }
  }
  if (request.method == "POST" && lengths + chunked == 0) {
    return {411, "a Content-Length is required"};
  }
  const std::string encoding = request.get_header_value("Content-Encoding");
  if (!encoding.empty() && encoding != "identity") {
    return {415, "compressed request bodies are not supported"};
  }
  if (request.is_multipart_form_data()) return {415, "expected a JSON body, not a form"};
  return {0, ""};
}

// Sends a stream's data as httplib frames it; false for ever after the first failure.
class SinkWriter : public HttpWriter {
 public:
  SinkWriter(httplib::DataSink* sink, const HttpSocket* socket) : sink_(sink), socket_(socket) {}
  bool Write(std::string_view data) override {
    // An empty write would end a chunked body.
    if (ok_ && !data.empty()) ok_ = sink_->write(data.data(), data.size());
    return ok_;
  }
  bool client_gone() const override { return !ok_ || socket_->peer_gone(); }
  bool ok() const { return ok_; }

 private:
  httplib::DataSink* sink_;
  const HttpSocket* socket_;
  bool ok_ = true;
};

// HttpSocket as httplib's stream.
class HttplibStream : public httplib::Stream {
 public:
  explicit HttplibStream(HttpSocket* socket) : socket_(socket) {}
  bool is_readable() const override { return true; }
  bool is_writable() const override { return !socket_->peer_gone(); }
  ssize_t read(char* data, size_t size) override { return socket_->Read(data, size); }
  ssize_t write(const char* data, size_t size) override {
    return socket_->Write({data, size}) ? static_cast<ssize_t>(size) : -1;
  }
  void get_remote_ip_and_port(std::string&, int&) const override {}
  void get_local_ip_and_port(std::string&, int&) const override {}
  // httplib asks only to refuse descriptors that select() cannot hold; nothing here selects.
  socket_t socket() const override { return 0; }

 private:
  HttpSocket* socket_;
};

// What all connections share.
struct Site {
  HttpServerOptions options;
  std::vector<HttpRoute> routes;
};

// The dialogue on one connection. httplib parses requests and writes answers, on a socket of ours:
// its own accept and keep-alive loops use select(), bound neither chunked bodies nor headers, and
// hide from a handler whether its client has gone.
class Dialogue : private httplib::Server {
 public:
  // `refuse`: answers 503 whatever is asked.
  Dialogue(const Site& site, HttpSocket* socket, bool refuse)
      : site_(site), socket_(socket), refuse_(refuse) {
    svr_sock_ = 0;  // any valid number means "not shutting down"
    set_payload_max_length(static_cast<size_t>(site.options.max_body_bytes));
    set_keep_alive_timeout(
        std::chrono::duration_cast<std::chrono::seconds>(site.options.keep_alive_timeout).count());
    set_keep_alive_max_count(1'000'000);  // only what the header promises; no such limit
    set_pre_routing_handler(
        [this](const auto& request, auto& response) { return BeforeBody(request, response); });
    Post(".*", [this](const auto& request, auto& response, const auto& reader) {
      WithBody(request, response, reader);
    });
    set_exception_handler([](const auto&, httplib::Response& response, std::exception_ptr) {
      SetError(response, 500, "The server failed to answer this request.", "internal_error");
    });
    // The type of set_error_handler's argument decides between two overloads.
    set_error_handler(httplib::Server::Handler(
        [this](const auto&, httplib::Response& response) { DescribeError(response); }));
    set_post_routing_handler([this](const auto& request, auto& response) {
      if (!response.has_header("X-Request-Id")) {
        response.set_header("X-Request-Id", RequestId(request.get_header_value("X-Request-Id")));
      }
      if (socket_->keep_alive()) return;
      response.headers.erase("Keep-Alive");
      response.headers.erase("Connection");
      response.set_header("Connection", "close");
    });
  }

  // Answers one request; false if there can be no other on this connection.
  bool Answer() {
    HttplibStream stream(socket_);
    bool closed = false;
    const auto simplify = [](httplib::Request& request) {
      request.ranges.clear();                    // no answer here has parts
      request.headers.erase("Accept-Encoding");  // compression is a proxy's business
    };
    return process_request(stream, false, closed, simplify) && !closed && socket_->keep_alive();
  }

 private:
  // Refuses what cannot be answered, answers GET; POST goes on to WithBody.
  HandlerResponse BeforeBody(const httplib::Request& request, httplib::Response& response) {
    socket_->HeadersDone();
    const std::string length = request.get_header_value("Content-Length", 0);
    const bool has_body =
        request.has_header("Transfer-Encoding") || (!length.empty() && length != "0");
    // Until its body is read, what follows must not be taken for the next request.
    const auto refuse = [&](int status, std::string_view message, std::string_view code) {
      if (has_body) socket_->CloseAfterAnswer();
      SetError(response, status, message, code);
      return HandlerResponse::Handled;
    };
    if (refuse_) {
      socket_->CloseAfterAnswer();
      response.set_header("Retry-After", "1");
      return refuse(503, "The server has too many connections.", "server_is_overloaded");
    }
    if (const auto [status, message] = CheckFraming(request); status != 0) {
      socket_->CloseAfterAnswer();
      return refuse(status, message, "bad_request");
    }
    if (std::strtoull(length.c_str(), nullptr, 10) >
        static_cast<uint64_t>(site_.options.max_body_bytes)) {
      return refuse(413, TooLarge(), "request_too_large");
    }
    const HttpRoute* route = Find(request, response);
    if (route == nullptr || route->method != "POST") {
      if (has_body) socket_->CloseAfterAnswer();
      if (route != nullptr) Handle(*route, request, "", response);
      return HandlerResponse::Handled;
    }
    return HandlerResponse::Unhandled;
  }

  void WithBody(const httplib::Request& request, httplib::Response& response,
                const httplib::ContentReader& reader) {
    const auto limit = static_cast<size_t>(site_.options.max_body_bytes);
    std::string body;
    const bool complete = reader([&](const char* data, size_t size) {
      body_too_large_ = size > limit - body.size();
      if (!body_too_large_) body.append(data, size);
      return !body_too_large_;
    });
    if (complete) {
      Handle(*Find(request, response), request, std::move(body), response);
    } else {
      response.status = 400;  // DescribeError finds out more
    }
  }

  // The route of a request; else null, and the response says 404, 405 or 414.
  const HttpRoute* Find(const httplib::Request& request, httplib::Response& response) const {
    if (request.path.size() > kMaxPathBytes) {
      SetError(response, 414, "The path is too long.", "bad_request");
      return nullptr;
    }
    std::string allowed;
    const std::string method = request.method == "HEAD" ? "GET" : request.method;
    for (const HttpRoute& route : site_.routes) {
      if (!route.Matches(request.path)) continue;
      if (route.method == method) return &route;
      allowed += (allowed.empty() ? "" : ", ") + route.method;
    }
    if (allowed.empty()) {
      SetError(response, 404, "Unknown path: " + request.path, "not_found");
    } else {
      SetError(response, 405,
               "Method " + request.method + " is not allowed here; allowed: " + allowed,
               "method_not_allowed");
      response.set_header("Allow", allowed);
    }
    return nullptr;
  }

  void Handle(const HttpRoute& route, const httplib::Request& request, std::string body,
              httplib::Response& response) {
    HttpRequest from{.method = request.method,
                     .path = request.path,
                     .parameter = "",
                     .body = std::move(body),
                     .id = RequestId(request.get_header_value("X-Request-Id")),
                     .authorization = request.get_header_value("Authorization"),
                     .api_key = request.get_header_value("X-Api-Key"),
                     .client_gone = [this] { return socket_->peer_gone(); }};
    if (route.path.ends_with('*')) from.parameter = request.path.substr(route.path.size() - 1);
    HttpResponse answer = route.handle(from);
    response.status = answer.status;
    response.set_header("X-Request-Id", from.id);
    for (const auto& [name, value] : answer.headers) response.set_header(name, value);
    if (!answer.stream) {
      response.set_content(answer.body, answer.content_type);
      return;
    }
    response.set_header("Cache-Control", "no-cache");
    const auto provide = [this, stream = std::move(answer.stream)](size_t,
                                                                   httplib::DataSink& sink) {
      SinkWriter writer(&sink, socket_);
      try {
        stream(writer);
      } catch (const std::exception&) {
        return false;  // the headers are out: a cut connection is all that can be said
      }
      if (writer.ok()) sink.done();
      return writer.ok();
    };
    if (request.version == "HTTP/1.0") {
      socket_->CloseAfterAnswer();  // its only way to say where the body ends
      response.set_content_provider(answer.content_type, provide);
    } else {
      response.set_chunked_content_provider(answer.content_type, provide);
    }
  }

  std::string TooLarge() const {
    return "The request body exceeds " + std::to_string(site_.options.max_body_bytes) + " bytes.";
  }

  // Gives an error that httplib or WithBody found its message. The request was not read to its end.
  void DescribeError(httplib::Response& response) {
    if (!response.body.empty() || response.content_provider_) return;
    socket_->CloseAfterAnswer();
    if (body_too_large_ || (socket_->limit_reached() && !socket_->reading_headers())) {
      SetError(response, 413, TooLarge(), "request_too_large");
    } else if (socket_->limit_reached()) {
      SetError(response, 431, "The request headers are too large.", "bad_request");
    } else if (socket_->timed_out()) {
      SetError(response, 408, "The request did not arrive in time.", "request_timeout");
    } else {
      SetError(response, response.status, "The request is not valid HTTP.", "bad_request");
    }
  }

  const Site& site_;
  HttpSocket* socket_;
  const bool refuse_;
  bool body_too_large_ = false;
};

// Accepts on one thread and gives every connection a thread.
class ThreadedHttpServer : public HttpServer {
 public:
  ThreadedHttpServer(Site site, ListenSocket listener)
      : site_(std::move(site)), listener_(std::move(listener)) {
    acceptor_ = std::jthread([this] { Accept(); });
  }

  ~ThreadedHttpServer() override {
    stopping_ = true;
    listener_.Stop();
    acceptor_.join();
    {
      const std::lock_guard lock(mutex_);
      for (Connection& connection : connections_) {
        if (connection.socket) connection.socket->Abort();
      }
    }
    connections_.clear();  // joins
  }

  int port() const override { return listener_.port(); }
  int64_t active_requests() const override {
    const std::lock_guard lock(mutex_);
    return active_;
  }

  bool WaitUntilIdle(std::chrono::milliseconds timeout) override {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, timeout, [this] { return active_ == 0; });
  }

 private:
  struct Connection {
    std::unique_ptr<HttpSocket> socket;  // null once closed
    std::jthread thread;                 // last: joined before the socket goes
  };

  void Accept() noexcept {
    pthread_setname_np(pthread_self(), "innerq-accept");
    const HttpServerOptions& options = site_.options;
    // Chunk sizes and line ends come on top of a body; twice its size is room enough.
    const HttpSocket::Limits limits{.body_bytes = 2 * options.max_body_bytes + (64 << 10),
                                    .header_timeout = options.header_timeout,
                                    .read_timeout = options.read_timeout,
                                    .write_timeout = options.write_timeout};
    while (!stopping_) {
      UniqueFd fd = listener_.Accept();
      Reap();
      if (fd.get() < 0 || open_ >= options.max_connections + kMaxRefusals) continue;
      const std::lock_guard lock(mutex_);
      Connection& connection = connections_.emplace_back();
      connection.socket = std::make_unique<HttpSocket>(std::move(fd), limits);
      const bool refuse = open_ >= options.max_connections;
      try {
        connection.thread =
            std::jthread([this, &connection, refuse] { Serve(connection, refuse); });
        ++open_;
      } catch (const std::system_error&) {
        connections_.pop_back();  // no more threads: the client sees a closed connection
      }
    }
  }

  // Joins the threads of closed connections.
  void Reap() {
    std::list<Connection> closed;  // joins when it goes; such threads have only to return
    const std::lock_guard lock(mutex_);
    for (auto it = connections_.begin(); it != connections_.end();) {
      const auto next = std::next(it);
      if (!it->socket) closed.splice(closed.end(), connections_, it);
      it = next;
    }
  }

  void Serve(Connection& connection, bool refuse) noexcept {
    pthread_setname_np(pthread_self(), "innerq-client");
    HttpSocket& socket = *connection.socket;
    Dialogue dialogue(site_, &socket, refuse);
    bool more = true;
    while (more && !stopping_ && socket.WaitForRequest(site_.options.keep_alive_timeout)) {
      CountActive(1);
      try {
        more = dialogue.Answer();
      } catch (const std::exception&) {
        more = false;  // handlers' exceptions are answered inside; this one came from httplib
      }
      CountActive(-1);
    }
    if (!socket.keep_alive() && !stopping_) socket.Linger();
    const std::lock_guard lock(mutex_);
    connection.socket.reset();
    --open_;
  }

  void CountActive(int64_t change) {
    const std::lock_guard lock(mutex_);
    active_ += change;
    if (active_ == 0) changed_.notify_all();
  }

  const Site site_;
  const ListenSocket listener_;
  std::atomic<bool> stopping_{false};
  std::atomic<int64_t> open_{0};  // connections with a socket
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int64_t active_ = 0;                 // guarded by mutex_
  std::list<Connection> connections_;  // guarded by mutex_; each entry's socket by its thread too
  std::jthread acceptor_;
};

}  // namespace

std::string ClientUrl(const std::string& host, int port) {
  std::string name = host;
  if (host == "0.0.0.0") name = "127.0.0.1";
  if (host == "::") name = "::1";
  if (name.find(':') != std::string::npos) name = "[" + name + "]";
  return "http://" + name + ":" + std::to_string(port);
}

Result<std::unique_ptr<HttpServer>> HttpServer::Start(const HttpServerOptions& options,
                                                      std::vector<HttpRoute> routes) {
  ASSIGN_OR_RETURN(ListenSocket listener, ListenSocket::Bind(options.host, options.port));
  return std::unique_ptr<HttpServer>(
      std::make_unique<ThreadedHttpServer>(Site{options, std::move(routes)}, std::move(listener)));
}

}  // namespace innerq
