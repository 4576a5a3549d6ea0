// A client that speaks bytes, and a server with routes of the tests' own.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "server/http_server.h"

namespace innerq {

using nlohmann::json;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

struct Reply {
  int status = 0;  // 0: the connection ended without an answer
  std::map<std::string, std::string> headers;
  std::string body;
  bool complete = false;
};

// One TCP connection to a server on this machine, speaking bytes.
class Client {
 public:
  explicit Client(int port, int receive_buffer = 0) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    if (receive_buffer > 0) {
      ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    }
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  ~Client() { Close(); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  void Close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  // Ends the sending side.
  void CloseSending() { ::shutdown(fd_, SHUT_WR); }
  bool Send(std::string_view data) {
    while (!data.empty()) {
      const ssize_t n = ::send(fd_, data.data(), data.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      data.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }
  // Reads until `text` has come; false at the end or after 10 s.
  bool ReadUntil(std::string_view text) {
    while (buffer_.find(text) == std::string::npos) {
      if (!Fill()) return false;
    }
    return true;
  }
  // At most `size` bytes more into the buffer; false at the end or after 10 s.
  bool Fill(size_t size = 4096) {
    if (!Readable(milliseconds(10'000))) return false;
    char data[4096];
    const ssize_t n = ::recv(fd_, data, std::min(size, sizeof(data)), 0);
    if (n <= 0) return false;
    buffer_.append(data, static_cast<size_t>(n));
    return true;
  }
  // Whether bytes or the end have come, within the time.
  bool Readable(milliseconds timeout) const {
    pollfd entry{.fd = fd_, .events = POLLIN, .revents = 0};
    return ::poll(&entry, 1, static_cast<int>(timeout.count())) > 0;
  }
  // What has been received and not been read.
  std::string Take() { return std::exchange(buffer_, ""); }
  // Reads one answer.
  Reply Read() {
    Reply reply;
    if (!ReadUntil("\r\n\r\n")) return reply;
    const size_t end = buffer_.find("\r\n\r\n");
    std::istringstream head(buffer_.substr(0, end + 2));
    buffer_.erase(0, end + 4);
    std::string line;
    std::getline(head, line);
    reply.status = std::stoi(line.substr(9, 3));
    while (std::getline(head, line)) {
      const size_t colon = line.find(": ");
      reply.headers[line.substr(0, colon)] = line.substr(colon + 2, line.size() - colon - 3);
    }
    if (reply.status == 204) {  // ends with its head
      reply.complete = true;
    } else if (reply.headers.contains("Content-Length")) {
      const size_t length = std::stoul(reply.headers["Content-Length"]);
      while (buffer_.size() < length && Fill()) {
      }
      reply.complete = buffer_.size() >= length;
      reply.body = buffer_.substr(0, length);
      buffer_.erase(0, length);
    } else if (reply.headers.contains("Transfer-Encoding")) {
      for (;;) {
        if (!ReadUntil("\r\n")) return reply;
        const size_t size = std::stoul(buffer_, nullptr, 16);
        const size_t begin = buffer_.find("\r\n") + 2;
        while (buffer_.size() < begin + size + 2) {
          if (!Fill()) return reply;
        }
        reply.body += buffer_.substr(begin, size);
        buffer_.erase(0, begin + size + 2);
        if (size == 0) break;
      }
      reply.complete = true;
    } else {
      while (Fill()) {
      }
      reply.complete = true;
      reply.body = std::exchange(buffer_, "");
    }
    return reply;
  }
  // The server has closed the connection and sent nothing more.
  bool AtEnd() { return buffer_.empty() && !Fill(); }

 private:
  int fd_;
  std::string buffer_;
};

inline std::string Get(const std::string& path, const std::string& more = "") {
  return "GET " + path + " HTTP/1.1\r\nHost: x\r\n" + more + "\r\n";
}
inline std::string Post(const std::string& path, const std::string& body,
                        const std::string& more = "") {
  return "POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + more +
         "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}
// Whether the condition comes true in time.
template <typename Condition>
bool Eventually(Condition condition) {
  const auto deadline = steady_clock::now() + milliseconds(8000);
  while (steady_clock::now() < deadline) {
    if (condition()) return true;
    std::this_thread::sleep_for(milliseconds(5));
  }
  return condition();
}

class HttpServerTest : public testing::Test {
 protected:
  // Ends all connections before the members of derived fixtures go, which routes use.
  void TearDown() override { server_.reset(); }

  // Two routes of the test's own; small limits.
  void StartEcho(HttpServerOptions options = {}) {
    options.max_body_bytes = 1000;
    Start(
        options,
        {{"POST", "/echo", [](const HttpRequest& r) { return HttpResponse{.body = r.body}; }},
         {"GET", "/item/*", [](const HttpRequest& r) { return HttpResponse{.body = r.parameter}; }},
         {"GET", "/throw", [](const HttpRequest&) -> HttpResponse { throw std::bad_alloc(); }},
         {"GET", "/flood",
          [this](const HttpRequest&) {
            return HttpResponse{.stream = [this](HttpWriter& out) {
              const std::string data(10'000, 'x');
              while (out.Write(data)) {
              }
              ++floods_ended_;
            }};
          }},
         {"GET", "/throw-late",
          [](const HttpRequest&) {
            return HttpResponse{.stream = [](HttpWriter& out) {
              out.Write("begun");
              throw std::runtime_error("late");
            }};
          }},
         {"GET", "/wait", [this](const HttpRequest& r) {
            ++waiting_;
            while (!r.client_gone() && !released_) std::this_thread::sleep_for(milliseconds(2));
            --waiting_;
            return HttpResponse{.body = "waited"};
          }}});
  }
  void Start(const HttpServerOptions& options, std::vector<HttpRoute> routes) {
    auto server = HttpServer::Start(options, std::move(routes));
    ASSERT_TRUE(server.ok()) << server.error().message;
    server_ = std::move(server).value();
  }
  Reply Ask(const std::string& request) {
    Client client(server_->port());
    client.Send(request);
    return client.Read();
  }
  // The reply is an error with OpenAI's four fields.
  static void ExpectError(const Reply& reply, int status, const json& code) {
    EXPECT_EQ(reply.status, status) << reply.body;
    const json error = json::parse(reply.body, nullptr, false).value("error", json::object());
    EXPECT_EQ(error.size(), 4u) << reply.body;
    EXPECT_EQ(error.value("code", json()), code);
    EXPECT_TRUE(error.contains("param") && error.contains("type") && error.contains("message"));
  }

  std::atomic<int> waiting_{0}, floods_ended_{0};
  std::atomic<bool> released_{false};
  std::unique_ptr<HttpServer> server_;
};

}  // namespace innerq
