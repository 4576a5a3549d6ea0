// One connection's bytes to a running HTTP server: whatever they are, it answers with statuses that
// blame the client and lets the connection go.
//
// The input is cut at 0xff bytes into what one send takes each.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <string>
#include <string_view>

#include "server/http_server.h"
#include "server/http_socket.h"

namespace innerq {
namespace {

std::unique_ptr<HttpServer> StartServer() {
  HttpServerOptions options;
  options.max_body_bytes = 256;
  std::vector<HttpRoute> routes;
  routes.push_back({"GET", "/text", [](const HttpRequest&) { return HttpResponse{.body = "{}"}; }});
  routes.push_back({"GET", "/text/*", [](const HttpRequest& request) {
                      return HttpResponse{.body = request.parameter + request.authorization};
                    }});
  routes.push_back({"POST", "/echo",
                    [](const HttpRequest& request) { return HttpResponse{.body = request.body}; }});
  routes.push_back({"POST", "/stream", [](const HttpRequest& request) {
                      HttpResponse response;
                      response.content_type = "text/event-stream";
                      response.stream = [body = request.body](HttpWriter& writer) {
                        for (const char c : body) {
                          if (!writer.Write({&c, 1})) return;
                        }
                      };
                      return response;
                    }});
  auto server = HttpServer::Start(options, std::move(routes));
  CHECK(server.ok(), server.ok() ? "" : server.error().message);
  return std::move(server).value();
}

UniqueFd Connect(int port) {
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  // The fuzzer's timer interrupts calls; a connection goes on being made all the same.
  if (::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    CHECK(errno == EINTR, "connect: error " + std::to_string(errno));
    pollfd made{.fd = fd.get(), .events = POLLOUT, .revents = 0};
    while (::poll(&made, 1, -1) < 0) CHECK(errno == EINTR, "poll: error " + std::to_string(errno));
    int error = 0;
    socklen_t size = sizeof(error);
    CHECK(::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error == 0,
          "connect: error " + std::to_string(error));
  }
  // Closing resets the connection, which leaves no port waiting behind.
  const linger reset{.l_onoff = 1, .l_linger = 0};
  CHECK(::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)) == 0, "linger");
  return fd;
}

// Sends all, ends the sending side, and returns what the server sends until it ends its own.
std::string Talk(int port, std::string_view bytes) {
  const UniqueFd fd = Connect(port);
  while (!bytes.empty()) {
    const size_t end = std::min(bytes.find('\xff'), bytes.size());
    // Fails where the server has had enough.
    while (::send(fd.get(), bytes.data(), end, MSG_NOSIGNAL) < 0 && errno == EINTR) {
    }
    bytes.remove_prefix(std::min(end + 1, bytes.size()));
  }
  ::shutdown(fd.get(), SHUT_WR);
  std::string answer;
  char buffer[4096];
  for (;;) {
    const ssize_t n = ::recv(fd.get(), buffer, sizeof(buffer), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    answer.append(buffer, static_cast<size_t>(n));
  }
  return answer;
}

}  // namespace
}  // namespace innerq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace innerq;
  static const std::unique_ptr<HttpServer> server = StartServer();
  const std::string answer = Talk(server->port(), {reinterpret_cast<const char*>(data), size});
  if (!answer.empty()) {
    CHECK(answer.starts_with("HTTP/1.1 "), answer);
    const std::string status = answer.substr(9, 3);
    // What the client did is never the server's fault: 501 and 505 name what HTTP has beyond us.
    CHECK(status < "500" || status == "501" || status == "505", answer);
    CHECK(answer.find("\r\n\r\n") != answer.npos, "headers without an end: " + answer);
  }
  CHECK(server->WaitUntilIdle(std::chrono::seconds(5)), "a request outlives its connection");
  return 0;
}
