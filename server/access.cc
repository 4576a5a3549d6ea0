#include "server/access.h"

#include <algorithm>
#include <sstream>

#include "models/files.h"
#include "server/http_head.h"

namespace innerq {
namespace {

constexpr std::chrono::minutes kWindow{1};
constexpr const char* kKeyFile = "server.api_key_file";

// The token of an Authorization header; empty if it has none. RFC 9110, 11.4: it comes after one
// space or more.
std::string_view BearerToken(std::string_view text) {
  constexpr std::string_view kScheme = "Bearer ";
  if (!EqualsIgnoringCase(text.substr(0, kScheme.size()), kScheme)) return {};
  return text.substr(std::min(text.find_first_not_of(' ', kScheme.size()), text.size()));
}

HttpAdmission TooMany(const std::string& message, std::chrono::steady_clock::duration wait) {
  const auto seconds = std::max<int64_t>(std::chrono::ceil<std::chrono::seconds>(wait).count(), 1);
  return {.refusal = HttpResponse{
              .status = 429,
              .body = ErrorJson(message, "rate_limit_error", "", "rate_limit_exceeded"),
              .headers = {{"Retry-After", std::to_string(seconds)}}}};
}

bool IsKey(std::string_view text) {
  return !text.empty() && text.size() <= Access::kMaxKeyBytes &&
         std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

}  // namespace

Result<std::vector<std::string>> LoadApiKeys(const ServerOptions& options) {
  std::vector<std::string> keys = options.api_keys;
  if (options.api_key_file.empty()) return keys;
  const std::string name = std::string(kKeyFile) + ": " + options.api_key_file.string();
  const Result<std::string> text = ReadTextFile(options.api_key_file, kMaxTextFileBytes);
  if (!text) {
    return Error{ErrorCode::kNotFound,
                 std::string(kKeyFile) + ": cannot read " + text.error().message, kKeyFile};
  }
  std::istringstream file(*text);
  std::string line;
  for (int64_t number = 1; std::getline(file, line); ++number) {
    const size_t end = line.find_last_not_of(" \t\r");
    line.erase(end == std::string::npos ? 0 : end + 1);
    if (line.empty() || line.starts_with('#')) continue;
    if (!IsKey(line)) {
      return InvalidArgument(name + ", line " + std::to_string(number) + ": a key is 1 to " +
                                 std::to_string(Access::kMaxKeyBytes) + " visible ASCII characters",
                             kKeyFile);
    }
    keys.push_back(line);
  }
  if (keys.size() == options.api_keys.size()) {
    return InvalidArgument(name + " has no keys", kKeyFile);
  }
  return keys;
}

Access::Access(const std::vector<std::string>& keys, const KeyLimits& limits) : limits_(limits) {
  for (const std::string& key : keys) {
    CHECK(IsKey(key), "a key that no client could show");
    keys_.push_back(ToKey(key));
    uses_.push_back(std::make_shared<Use>());
  }
}

Access::Key Access::ToKey(std::string_view text) {
  Key key{.size = text.size()};
  std::copy_n(text.begin(), std::min(text.size(), kMaxKeyBytes), key.bytes.begin());
  return key;
}

size_t Access::Find(const HttpRequest& request) const {
  // A proxy may have put a key of its own into one of the two.
  const size_t own = Find(request.api_key);
  const size_t bearer = Find(BearerToken(request.authorization));
  return own < keys_.size() ? own : bearer;
}

size_t Access::Find(std::string_view text) const {
  // Every byte of every key is compared, and no branch depends on them.
  const Key shown = ToKey(text);
  size_t found = keys_.size();
  for (size_t i = 0; i < keys_.size(); ++i) {
    size_t difference = shown.size ^ keys_[i].size;
    for (size_t b = 0; b < kMaxKeyBytes; ++b) {
      difference |= static_cast<size_t>(shown.bytes[b] ^ keys_[i].bytes[b]);
    }
    const size_t equal = static_cast<size_t>(difference == 0);
    found = equal * i + (1 - equal) * found;
  }
  return found;
}

std::optional<HttpResponse> Access::CheckKey(const HttpRequest& request) const {
  if (keys_.empty() || Find(request) < keys_.size()) return std::nullopt;
  return HttpResponse{.status = 401,
                      .body = ErrorJson("A valid API key is required.", "authentication_error", "",
                                        "invalid_api_key"),
                      .headers = {{"WWW-Authenticate", "Bearer"}}};
}

HttpAdmission Access::Admit(const HttpRequest& request, TimePoint now) {
  if (keys_.empty()) return {};
  if (auto refusal = CheckKey(request)) return {.refusal = std::move(refusal)};
  const std::shared_ptr<Use> use = uses_[Find(request)];
  // Made first: without memory for it nothing has been counted, and nothing is locked.
  const auto place = std::make_shared<Place>(use);
  const std::lock_guard lock(use->mutex);
  if (limits_.concurrent_requests > 0 && use->running >= limits_.concurrent_requests) {
    return TooMany("This API key may have " + std::to_string(limits_.concurrent_requests) +
                       " requests at once.",
                   std::chrono::seconds(1));
  }
  if (limits_.requests_per_minute > 0) {
    auto& starts = use->starts;
    while (!starts.empty() && starts.front() <= now - kWindow) starts.pop_front();
    if (static_cast<int64_t>(starts.size()) >= limits_.requests_per_minute) {
      return TooMany("This API key may make " + std::to_string(limits_.requests_per_minute) +
                         " requests a minute.",
                     starts.front() + kWindow - now);
    }
    starts.push_back(now);
  }
  ++use->running;
  place->taken = true;
  return {.place = place};
}

Access::Place::~Place() {
  if (!taken) return;
  const std::lock_guard lock(use->mutex);
  --use->running;
}

}  // namespace innerq
