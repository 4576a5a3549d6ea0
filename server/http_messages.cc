#include "server/http_messages.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <random>

#include "server/utf8.h"

namespace innerq {

bool HttpRoute::Matches(std::string_view request_path) const {
  if (!path.ends_with('*')) return request_path == path;
  const std::string_view stem(path.data(), path.size() - 1);
  return request_path.starts_with(stem) && request_path.size() > stem.size();
}

std::string ErrorJson(std::string_view message, std::string_view type, std::string_view param,
                      std::string_view code, std::string_view extra) {
  const auto text = [](std::string_view s) { return s.empty() ? "null" : QuoteJson(s); };
  return "{\"error\": {\"message\": " + QuoteJson(message) + ", \"type\": " + QuoteJson(type) +
         ", \"param\": " + text(param) + ", \"code\": " + text(code) + std::string(extra) + "}}";
}

std::string RequestId(std::string_view given) {
  const bool plain = std::all_of(given.begin(), given.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.';
  });
  if (!given.empty() && given.size() <= 128 && plain) return std::string(given);
  std::random_device random;  // of the system: no seed bounds how many ids there are
  char id[40];
  std::snprintf(id, sizeof(id), "req-%08x%08x%08x", random(), random(), random());
  return id;
}

}  // namespace innerq
