#include "server/http_server.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <list>
#include <mutex>
#include <thread>

#include "server/http_connection.h"
#include "server/http_socket.h"

namespace innerq {
namespace {

// Connections beyond the limit that are still told so with a 503; those beyond are closed.
constexpr int64_t kMaxRefusals = 64;

// Accepts on one thread and gives every connection a thread.
class ThreadedHttpServer : public HttpServer {
 public:
  ThreadedHttpServer(const HttpServerOptions& options, std::vector<HttpRoute> routes,
                     ListenSocket listener, ReadStop stop)
      : site_{options, std::move(routes)},
        listener_(std::move(listener)),
        stop_reading_(std::move(stop)) {
    acceptor_ = std::jthread([this] { Accept(); });
  }

  ~ThreadedHttpServer() override {
    StopReading();
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

  int64_t ended_requests() const override {
    const std::lock_guard lock(mutex_);
    return ended_;
  }

  void BeginToClose() override { site_.closing = true; }

  void StopReading() override {
    BeginToClose();
    stopping_ = true;
    listener_.Stop();
    stop_reading_.Set();
  }

  bool WaitUntilIdle(std::chrono::milliseconds timeout) override {
    std::unique_lock lock(mutex_);
    return idle_.wait_for(lock, timeout,
                          [this] { return active_ == 0 && (!stopping_ || open_ == 0); });
  }

 private:
  struct Connection {
    std::unique_ptr<HttpSocket> socket;  // null once closed
    std::jthread thread;                 // last: joined before the socket goes
  };

  void Accept() noexcept {
    pthread_setname_np(pthread_self(), "innerq-accept");
    while (!stopping_) {
      UniqueFd fd = listener_.Accept();
      Reap();
      if (fd.get() < 0 || open_ >= site_.options.max_connections + kMaxRefusals) continue;
      try {
        Open(std::move(fd));
      } catch (const std::exception&) {
        // No memory or thread for it: the client sees a closed connection.
      }
    }
  }

  // Gives a connection its thread.
  void Open(UniqueFd fd) {
    const HttpServerOptions& options = site_.options;
    const HttpSocket::Limits limits{.head_bytes = options.max_header_bytes,
                                    .header_timeout = options.header_timeout,
                                    .read_timeout = options.read_timeout,
                                    .write_timeout = options.write_timeout};
    std::list<Connection> opened(1);
    Connection& connection = opened.front();
    connection.socket = std::make_unique<HttpSocket>(std::move(fd), limits, &stop_reading_);
    const std::lock_guard lock(mutex_);
    const bool refuse = open_ >= options.max_connections;
    connection.thread = std::jthread([this, &connection, refuse] { Serve(connection, refuse); });
    ++open_;
    connections_.splice(connections_.end(), opened);
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
    HttpConnection dialogue(site_, &socket, refuse);
    bool more = true;
    while (more && socket.WaitForRequest(site_.options.keep_alive_timeout)) {
      BeginRequest();
      try {
        more = dialogue.AnswerOne();
      } catch (const std::exception&) {
        more = false;  // handlers' exceptions are answered inside: out of memory, most likely
      }
      EndRequest();
    }
    if (dialogue.must_linger()) socket.Linger();
    const std::lock_guard lock(mutex_);
    connection.socket.reset();
    if (--open_ == 0) idle_.notify_all();
  }

  void BeginRequest() {
    const std::lock_guard lock(mutex_);
    ++active_;
  }

  void EndRequest() {
    const std::lock_guard lock(mutex_);
    --active_;
    ++ended_;
    if (active_ == 0) idle_.notify_all();
  }

  HttpSite site_;
  const ListenSocket listener_;
  const ReadStop stop_reading_;
  std::atomic<bool> stopping_{false};
  std::atomic<int64_t> open_{0};  // connections with a socket
  mutable std::mutex mutex_;
  std::condition_variable idle_;
  int64_t active_ = 0;                 // guarded by mutex_
  int64_t ended_ = 0;                  // guarded by mutex_
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
  ASSIGN_OR_RETURN(ReadStop stop, ReadStop::Create());
  return std::unique_ptr<HttpServer>(std::make_unique<ThreadedHttpServer>(
      options, std::move(routes), std::move(listener), std::move(stop)));
}

}  // namespace innerq
