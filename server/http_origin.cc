#include "server/http_origin.h"

#include <algorithm>

#include "server/http_socket.h"

namespace innerq {
namespace {

// Time for which browsers remember the answer to a preflight, in seconds.
constexpr const char* kPreflightMaxAge = "600";

// "[::1]:8080" and "x.org:8080" without port and brackets.
std::string_view NameOf(std::string_view host) {
  if (const size_t end = host.find(']'); host.starts_with('[')) {
    return end == std::string_view::npos ? std::string_view() : host.substr(1, end - 1);
  }
  return host.substr(0, host.find(':'));
}

// RFC 6761, 6.3: resolvers must not look these names up elsewhere.
bool IsLocalhost(std::string_view name) {
  constexpr std::string_view kLocalhost = "localhost";
  if (name.size() < kLocalhost.size()) return false;
  const std::string_view stem = name.substr(0, name.size() - kLocalhost.size());
  return EqualsIgnoringCase(name.substr(stem.size()), kLocalhost) &&
         (stem.empty() || stem.ends_with('.'));
}

bool Contains(const std::vector<std::string>& names, std::string_view name) {
  return std::any_of(names.begin(), names.end(),
                     [name](const std::string& x) { return EqualsIgnoringCase(x, name); });
}

}  // namespace

bool HttpOriginPolicy::Allows(std::string_view origin) const {
  return Contains(cors_origins, "*") || Contains(cors_origins, origin);
}

bool HttpOriginPolicy::MaySend(const HttpHead& head) const {
  const std::string_view origin = head.Get("Origin");
  if (origin.empty() || head.method == "GET" || head.method == "HEAD") return true;
  const size_t scheme = origin.find("://");
  const bool own = scheme != std::string_view::npos &&
                   EqualsIgnoringCase(origin.substr(scheme + 3), head.Get("Host"));
  return own || Allows(origin);
}

bool HttpOriginPolicy::MayAddress(std::string_view host) const {
  const std::string_view name = NameOf(host);
  return allowed_hosts.empty() || host.empty() || IsIpAddress(name) || IsLocalhost(name) ||
         Contains(allowed_hosts, name);
}

std::vector<std::pair<std::string, std::string>> HttpOriginPolicy::Headers(
    const HttpHead& head, std::string_view methods) const {
  if (cors_origins.empty()) return {};
  std::vector<std::pair<std::string, std::string>> headers = {{"Vary", "Origin"}};
  const std::string origin(head.Get("Origin"));
  if (origin.empty() || !Allows(origin)) return headers;
  headers.emplace_back("Access-Control-Allow-Origin",
                       Contains(cors_origins, "*") ? std::string("*") : origin);
  if (!IsPreflight(head)) {
    headers.emplace_back("Access-Control-Expose-Headers", "X-Request-Id, Retry-After");
    return headers;
  }
  headers.emplace_back("Access-Control-Allow-Methods", methods);
  headers.emplace_back("Access-Control-Max-Age", kPreflightMaxAge);
  if (const auto wanted = head.Get("Access-Control-Request-Headers"); !wanted.empty()) {
    headers.emplace_back("Access-Control-Allow-Headers", wanted);
  }
  return headers;
}

bool HttpOriginPolicy::IsPreflight(const HttpHead& head) {
  return head.method == "OPTIONS" && !head.Get("Origin").empty() &&
         !head.Get("Access-Control-Request-Method").empty();
}

bool IsLoopback(std::string_view host) {
  return IsLocalhost(host) || host == "::1" || (IsIpAddress(host) && host.starts_with("127."));
}

}  // namespace innerq
