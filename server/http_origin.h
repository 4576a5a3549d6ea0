// HttpOriginPolicy: which browser pages may use the server, and by which names it may be called.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/http_head.h"

namespace innerq {

// A page of any site can make a browser send requests to an address that only the browser reaches.
// Two rules stop that; clients that are no browsers notice neither.
//   - A POST with an Origin header must come from a page of this server or of an allowed origin.
//     Browsers send that header with every POST, also with those that need no preflight.
//   - Where `allowed_hosts` is not empty, the Host header must name one of them, or be an address
//     or localhost: a name that was pointed at this machine (DNS rebinding) makes a foreign page
//     look like one of this server.
struct HttpOriginPolicy {
  std::vector<std::string> cors_origins = {};   // "https://chat.example.com"; "*": any
  std::vector<std::string> allowed_hosts = {};  // lower-case names without port; empty: any

  // Whether pages of this origin may read answers.
  bool Allows(std::string_view origin) const;
  // Whether a request may be answered, but for the name it was sent to.
  bool MaySend(const HttpHead& head) const;
  // Whether the server may be called by this Host header.
  bool MayAddress(std::string_view host) const;
  // The CORS headers of any answer; those of a preflight tell `methods` as well. None without
  // cors_origins.
  std::vector<std::pair<std::string, std::string>> Headers(const HttpHead& head,
                                                           std::string_view methods) const;
  // An OPTIONS request by which a browser asks before it sends the real one.
  static bool IsPreflight(const HttpHead& head);
};

// Whether a server bound to `host` (a name or address) is reached from its own machine alone.
bool IsLoopback(std::string_view host);

}  // namespace innerq
