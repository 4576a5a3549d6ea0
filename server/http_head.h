// HttpHead: the request line and headers of an HTTP/1.x request, read strictly.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace innerq {

// A request before its body.
struct HttpHead {
  struct Field {
    std::string name;   // as sent
    std::string value;  // without the white space around it
  };
  std::string method;
  std::string path;        // decoded, without the query; of absolute targets too
  std::string query = {};  // as sent, without the question mark
  bool http_1_0 = false;
  std::vector<Field> fields;

  bool chunked = false;         // the body comes in chunks ...
  int64_t content_length = -1;  // ... or has this many bytes; -1: not given

  // The first field of a name, in any case; empty if there is none.
  std::string_view Get(std::string_view name) const;
  bool has_body() const { return chunked || content_length > 0; }
  // The client lets the connection go on. HTTP/1.0 connections end after an answer.
  bool keep_alive() const;
  // The name of the query's first parameter, decoded where it can be.
  std::string FirstParameter() const;
};

// Why a request is refused.
struct HttpFault {
  int status = 400;
  std::string message;
};

// Reads "POST /x HTTP/1.1\r\nHost: y\r\n\r\n" by RFC 9112 without the leniencies that it allows
// (bare line feeds, folded headers, space before a colon), since two readers that differ in them
// can be made to see different requests. Faults: 400, 414 and 431 for a target or a number of
// headers beyond reason, 501 for a transfer encoding that is not chunked.
std::variant<HttpHead, HttpFault> ParseHttpHead(std::string_view text);

// Reads "Name: value", a header or a trailer without its CR LF. Faults: 400.
std::variant<HttpHead::Field, HttpFault> ParseHttpField(std::string_view line);

// The size that begins a line of a chunked body; extensions are skipped. -1 if there is none, or if
// the line holds a control character: one of them might end the line for another reader.
int64_t ParseChunkSize(std::string_view line);

// Compares ASCII text in any case.
bool EqualsIgnoringCase(std::string_view a, std::string_view b);

}  // namespace innerq
