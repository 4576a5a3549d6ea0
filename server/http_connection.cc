#include "server/http_connection.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <exception>
#include <utility>

namespace innerq {
namespace {

using std::chrono::steady_clock;

// A line of a chunked body's framing: size and extensions, or a trailer; bytes.
constexpr int64_t kMaxFramingLine = 256;
constexpr int kMaxTrailers = 32;

const char* ReasonPhrase(int status) {
  constexpr std::array<std::pair<int, const char*>, 19> kPhrases = {
      {{200, "OK"},
       {204, "No Content"},
       {400, "Bad Request"},
       {401, "Unauthorized"},
       {403, "Forbidden"},
       {404, "Not Found"},
       {405, "Method Not Allowed"},
       {408, "Request Timeout"},
       {411, "Length Required"},
       {413, "Content Too Large"},
       {414, "URI Too Long"},
       {415, "Unsupported Media Type"},
       {422, "Unprocessable Content"},
       {429, "Too Many Requests"},
       {431, "Request Header Fields Too Large"},
       {499, "Client Closed Request"},
       {500, "Internal Server Error"},
       {501, "Not Implemented"},
       {503, "Service Unavailable"}}};
  for (const auto& [code, phrase] : kPhrases) {
    if (code == status) return phrase;
  }
  return "";
}

HttpResponse Refusal(int status, std::string_view message, std::string_view code,
                     std::string_view param = "") {
  const char* const type = status >= 500 ? "server_error" : "invalid_request_error";
  return {.status = status, .body = ErrorJson(message, type, param, code)};
}

HttpResponse Overloaded(std::string_view message) {
  HttpResponse response = Refusal(503, message, "server_is_overloaded");
  response.headers.emplace_back("Retry-After", "1");
  return response;
}

// RFC 9110, 5.6.7.
std::string HttpDate() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  ::gmtime_r(&now, &utc);
  char text[40];
  return {text, std::strftime(text, sizeof(text), "%a, %d %b %Y %H:%M:%S GMT", &utc)};
}

// Whether a body of this type is read as JSON. curl's default for -d is a form, and much is sent
// without any type; browsers are kept out by HttpOriginPolicy.
bool IsJsonType(std::string_view type) {
  type = type.substr(0, type.find(';'));
  type = type.substr(0, type.find_last_not_of(" \t") + 1);
  return type.empty() || EqualsIgnoringCase(type, "application/json") ||
         EqualsIgnoringCase(type, "application/x-www-form-urlencoded") || type.ends_with("+json");
}

// Sends a stream's data, framed; false for ever after the first failure.
class StreamWriter : public HttpWriter {
 public:
  StreamWriter(HttpSocket* socket, bool chunked) : socket_(*socket), chunked_(chunked) {}
  bool Write(std::string_view data) override {
    if (!ok_ || data.empty()) return ok_;  // an empty chunk would end the body
    if (!chunked_) return ok_ = socket_.Write(data);
    char size[24];
    std::snprintf(size, sizeof(size), "%zx\r\n", data.size());
    return ok_ = socket_.Write(size + std::string(data) + "\r\n");
  }
  bool client_gone() const override { return !ok_ || socket_.peer_gone(); }
  bool End() { return ok_ && chunked_ && socket_.Write("0\r\n\r\n"); }

 private:
  HttpSocket& socket_;
  const bool chunked_;
  bool ok_ = true;
};

}  // namespace

bool HttpConnection::AnswerOne() {
  const auto start = steady_clock::now();
  Asked asked;
  HttpResponse response;
  keep_alive_ = false;  // until the head has been understood
  notes_ = {};
  const auto text = socket_.ReadHead();
  if (!text && socket_.failure() == HttpSocket::Failure::kClosed) return false;
  auto parsed = text ? ParseHttpHead(*text) : HttpFault();
  if (auto* head = std::get_if<HttpHead>(&parsed)) {
    asked.head = std::move(*head);
    response = Handle(asked);
  } else {
    const HttpFault& fault = std::get<HttpFault>(parsed);
    asked.request.id = RequestId("");
    response = text ? Refusal(fault.status, "The request is not valid HTTP: " + fault.message + ".",
                              "bad_request")
                    : DescribeFailure();
  }
  const bool sent = Send(asked, response);
  must_linger_ = sent && !keep_alive_;
  response.stream = nullptr;  // ends what it holds
  place_.reset();
  if (site_.options.on_answer) {
    site_.options.on_answer({.id = asked.request.id,
                             .method = asked.head.method,
                             .path = asked.head.path,
                             .status = response.status,
                             .duration = steady_clock::now() - start,
                             .notes = notes_});
  }
  return sent && keep_alive_;
}

HttpResponse HttpConnection::Handle(Asked& asked) {
  const HttpHead& head = asked.head;
  keep_alive_ = head.keep_alive();
  asked.request = {.method = head.method,
                   .path = head.path,
                   .parameter = "",
                   .body = "",
                   .id = RequestId(head.Get("X-Request-Id")),
                   .authorization = std::string(head.Get("Authorization")),
                   .api_key = std::string(head.Get("X-Api-Key")),
                   .client_gone = [this] { return socket_.peer_gone(); },
                   .notes = &notes_};
  Find(&asked);
  // Until its body has been read, what follows must not be taken for the next request.
  const auto end_after = [&](HttpResponse response) {
    if (head.has_body()) keep_alive_ = false;
    return response;
  };
  try {
    if (auto refusal = Refuse(asked)) return end_after(std::move(*refusal));
    if (asked.route->admit) {
      HttpAdmission admission = asked.route->admit(asked.request);
      if (admission.refusal) return end_after(std::move(*admission.refusal));
      place_ = std::move(admission.place);
    }
    if (head.method == "POST") {
      if (auto refusal = ReadBody(head, &asked.request.body)) return end_after(std::move(*refusal));
    }
    HttpResponse response = asked.route->handle(asked.request);
    return head.method == "POST" ? std::move(response) : end_after(std::move(response));
  } catch (const std::exception&) {
    return end_after(Refusal(500, "The server failed to answer this request.", "internal_error"));
  }
}

std::optional<HttpResponse> HttpConnection::Refuse(const Asked& asked) {
  const HttpHead& head = asked.head;
  if (refuse_) {
    keep_alive_ = false;
    return Overloaded("The server has too many connections.");
  }
  const HttpOriginPolicy& origins = site_.options.origins;
  if (!origins.MayAddress(head.Get("Host"))) {
    return Refusal(403, "The server does not answer to this Host; see server.allowed_hosts.",
                   "host_not_allowed");
  }
  if (asked.methods.empty()) return Refusal(404, "Unknown path: " + head.path, "not_found");
  if (!origins.MaySend(head)) {
    return Refusal(403, "Pages of this Origin may not use the server; see server.cors_origins.",
                   "origin_not_allowed");
  }
  if (HttpOriginPolicy::IsPreflight(head) && origins.Allows(head.Get("Origin"))) {
    return HttpResponse{.status = 204};
  }
  if (asked.route == nullptr) {
    HttpResponse response =
        Refusal(405, "Method " + head.method + " is not allowed here; allowed: " + asked.methods,
                "method_not_allowed");
    response.headers.emplace_back("Allow", asked.methods);
    return response;
  }
  if (!head.query.empty()) {
    const std::string name = head.FirstParameter();
    return Refusal(400, "Parameters in the URL are not supported: " + name, "unsupported_parameter",
                   name);
  }
  if (head.method != "POST") return std::nullopt;
  if (!head.chunked && head.content_length < 0) {
    return Refusal(411, "A Content-Length is required.", "bad_request");
  }
  if (head.content_length > site_.options.max_body_bytes) return TooLarge();
  const std::string_view encoding = head.Get("Content-Encoding");
  if (!encoding.empty() && !EqualsIgnoringCase(encoding, "identity")) {
    return Refusal(415, "Compressed request bodies are not supported.", "bad_request");
  }
  if (!IsJsonType(head.Get("Content-Type"))) {
    return Refusal(415, "The Content-Type must be application/json.", "bad_request");
  }
  return std::nullopt;
}

// Finds the route and all methods of the path.
void HttpConnection::Find(Asked* asked) const {
  const std::string method = asked->head.method == "HEAD" ? "GET" : asked->head.method;
  for (const HttpRoute& route : site_.routes) {
    if (!route.Matches(asked->head.path)) continue;
    asked->methods += (asked->methods.empty() ? "" : ", ") + route.method;
    if (route.method != method || asked->route != nullptr) continue;
    asked->route = &route;
    if (route.path.ends_with('*')) {
      asked->request.parameter = asked->head.path.substr(route.path.size() - 1);
    }
  }
}

std::optional<HttpResponse> HttpConnection::ReadBody(const HttpHead& head, std::string* body) {
  if (EqualsIgnoringCase(head.Get("Expect"), "100-continue") && !head.http_1_0) {
    socket_.Write("HTTP/1.1 100 Continue\r\n\r\n");  // if it fails, so does reading
  }
  socket_.BeginBody();
  bool too_large = false;
  const bool complete =
      head.chunked ? ReadChunks(body, &too_large) : socket_.ReadExactly(head.content_length, body);
  if (complete) return std::nullopt;
  keep_alive_ = false;
  if (too_large) return TooLarge();
  const bool malformed = socket_.failure() == HttpSocket::Failure::kNone ||
                         socket_.failure() == HttpSocket::Failure::kTooLarge;
  return malformed ? Refusal(400, "The chunks of the body are malformed.", "bad_request")
                   : DescribeFailure();
}

// RFC 9112, 7.1. False: too large, malformed, or the socket has a failure.
bool HttpConnection::ReadChunks(std::string* body, bool* too_large) {
  for (;;) {
    const auto line = socket_.ReadLine(kMaxFramingLine);
    if (!line) return false;
    const int64_t size = ParseChunkSize(*line);
    if (size < 0) return false;
    if (size == 0) break;
    *too_large = size > site_.options.max_body_bytes - static_cast<int64_t>(body->size());
    if (*too_large || !socket_.ReadExactly(size, body)) return false;
    if (const auto end = socket_.ReadLine(0); !end) return false;
  }
  for (int i = 0; i < kMaxTrailers; ++i) {
    const auto trailer = socket_.ReadLine(kMaxFramingLine);
    if (!trailer) return false;
    if (trailer->empty()) return true;
    if (std::holds_alternative<HttpFault>(ParseHttpField(*trailer))) return false;
  }
  return false;
}

HttpResponse HttpConnection::TooLarge() const {
  return Refusal(
      413, "The request body exceeds " + std::to_string(site_.options.max_body_bytes) + " bytes.",
      "request_too_large");
}

HttpResponse HttpConnection::DescribeFailure() const {
  switch (socket_.failure()) {
    case HttpSocket::Failure::kTooLarge:
      return Refusal(431, "The request headers are too large.", "bad_request");
    case HttpSocket::Failure::kTimeout:
      return Refusal(408, "The request did not arrive in time.", "request_timeout");
    case HttpSocket::Failure::kStopped:
      return Overloaded("The server is shutting down.");
    case HttpSocket::Failure::kTls:
      return Refusal(400, "The client speaks TLS; this port speaks plain HTTP.", "bad_request");
    case HttpSocket::Failure::kClosed:
    case HttpSocket::Failure::kNone:
      break;
  }
  return Refusal(400, "The request ended too early.", "bad_request");
}

bool HttpConnection::Send(const Asked& asked, HttpResponse& response) {
  const bool has_body = response.status != 204;
  const bool chunked = response.stream && !asked.head.http_1_0;
  if (response.stream && !chunked) keep_alive_ = false;  // the only way to say where it ends
  if (site_.closing) keep_alive_ = false;
  std::string text =
      "HTTP/1.1 " + std::to_string(response.status) + " " + ReasonPhrase(response.status) + "\r\n";
  const auto add = [&text](std::string_view name, std::string_view value) {
    text.append(name).append(": ").append(value).append("\r\n");
  };
  add("Date", HttpDate());
  if (has_body) add("Content-Type", response.content_type);
  if (response.stream) {
    add("Cache-Control", "no-cache");
    if (chunked) add("Transfer-Encoding", "chunked");
  } else if (has_body) {
    add("Content-Length", std::to_string(response.body.size()));
  }
  add("X-Request-Id", asked.request.id);
  for (const auto& [name, value] : response.headers) add(name, value);
  for (const auto& [name, value] : site_.options.origins.Headers(asked.head, asked.methods)) {
    add(name, value);
  }
  add("Connection", keep_alive_ ? "keep-alive" : "close");
  text += "\r\n";
  const bool head_only = asked.head.method == "HEAD" || !has_body;
  if (!response.stream && !head_only) text += response.body;
  if (!response.stream) place_.reset();  // whoever has read the answer finds its place free
  if (!socket_.Write(text)) return false;
  return head_only || !response.stream || SendStream(response, chunked);
}

bool HttpConnection::SendStream(const HttpResponse& response, bool chunked) {
  StreamWriter writer(&socket_, chunked);
  try {
    response.stream(writer);
  } catch (const std::exception&) {
    return false;  // the headers are out: a cut connection is all that can be said
  }
  place_.reset();  // likewise
  return writer.End();
}

}  // namespace innerq
