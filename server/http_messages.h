// HttpRequest, HttpResponse, HttpRoute: what crosses between the HTTP server and its handlers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace innerq {

// What the log tells of an answer besides its status. Handlers and streams fill it in.
struct AnswerNotes {
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  std::string finish_reason = {};  // empty: none, or broken off
};

// What a handler sees of a request. Valid during the call of the handler and of its answer's
// stream.
struct HttpRequest {
  std::string method;
  std::string path;       // decoded, without the query
  std::string parameter;  // what the route's trailing "*" matched
  std::string body;
  std::string id;             // given by the client (x-request-id) or made here; echoed to it
  std::string authorization;  // header Authorization, or empty
  std::string api_key;        // header X-Api-Key, or empty
  std::function<bool()> client_gone;  // whether the peer has closed the connection
  AnswerNotes* notes = nullptr;       // may be null
};

// Where a streaming answer goes.
class HttpWriter {
 public:
  virtual ~HttpWriter() = default;
  // Sends at once; false if the client is gone or has not read for the write timeout: stop then.
  virtual bool Write(std::string_view data) = 0;
  virtual bool client_gone() const = 0;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body = {};
  std::vector<std::pair<std::string, std::string>> headers = {};
  // If set, called once after the headers have gone out; what it writes is the body.
  std::function<void(HttpWriter&)> stream = {};
};

// Whether a request is answered at all, decided from its headers.
struct HttpAdmission {
  std::optional<HttpResponse> refusal = {};  // answered instead
  std::shared_ptr<void> place = {};          // dropped when the request has ended, in any way
};

struct HttpRoute {
  std::string method;                                      // GET or POST
  std::string path;                                        // exact, or a prefix that ends with "*"
  std::function<HttpResponse(const HttpRequest&)> handle;  // called by many threads at once
  // If set, asked before the body is read; the request has no body yet. Likewise.
  std::function<HttpAdmission(const HttpRequest&)> admit = {};

  bool Matches(std::string_view request_path) const;
};

// OpenAI's error object as JSON text; empty `param` and `code` become null. `extra` is put before
// the closing brace of the object as it is (", \"n_ctx\": 512").
std::string ErrorJson(std::string_view message, std::string_view type, std::string_view param,
                      std::string_view code, std::string_view extra = "");

// The id of a request: the one its client gave, if that is short and plain, else a fresh one.
std::string RequestId(std::string_view given);

}  // namespace innerq
