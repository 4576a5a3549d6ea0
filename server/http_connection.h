// HttpConnection: the requests and answers of one connection.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/http_head.h"
#include "server/http_messages.h"
#include "server/http_server.h"
#include "server/http_socket.h"

namespace innerq {

// What all connections share.
struct HttpSite {
  HttpServerOptions options;
  std::vector<HttpRoute> routes;
  std::atomic<bool> closing{false};  // every answer is its connection's last
};

// Reads requests, finds their routes and writes the answers. One thread.
class HttpConnection {
 public:
  // `refuse`: answers 503 whatever is asked. `site` and `socket` must outlive it.
  HttpConnection(const HttpSite& site, HttpSocket* socket, bool refuse)
      : site_(site), socket_(*socket), refuse_(refuse) {}

  // Answers one request whose first byte has come; false if no other can follow.
  bool AnswerOne();
  // The last answer may still be on its way to a client that is sending.
  bool must_linger() const { return must_linger_; }

 private:
  // What is known of a request from its head.
  struct Asked {
    HttpHead head;
    const HttpRoute* route = nullptr;
    std::string methods;  // that its path has, "GET, POST"
    HttpRequest request;
  };

  // Decides by the head alone; nullopt: read the body and let the route handle it.
  std::optional<HttpResponse> Refuse(const Asked& asked);
  HttpResponse Handle(Asked& asked);
  std::optional<HttpResponse> ReadBody(const HttpHead& head, std::string* body);
  bool ReadChunks(std::string* body, bool* too_large);
  void Find(Asked* asked) const;
  HttpResponse TooLarge() const;
  // Why the socket could not read.
  HttpResponse DescribeFailure() const;

  // Writes an answer; false if the connection is over.
  bool Send(const Asked& asked, HttpResponse& response);
  bool SendStream(const HttpResponse& response, bool chunked);

  const HttpSite& site_;
  HttpSocket& socket_;
  const bool refuse_;
  bool keep_alive_ = true;
  bool must_linger_ = false;
  std::shared_ptr<void> place_;  // of the request being answered
  AnswerNotes notes_;            // likewise
};

}  // namespace innerq
