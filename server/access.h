// Access: who may use the model, and how much of it.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/result.h"
#include "server/http_messages.h"
#include "server/options.h"

namespace innerq {

// The keys of the configuration and of the key file, which has one a line; blank lines and lines
// that begin with # are skipped. Errors: not found or invalid argument, with the key's path, for a
// file that cannot be read, has no keys, or has one that no header could carry. Messages never hold
// a key.
Result<std::vector<std::string>> LoadApiKeys(const ServerOptions& options);

// Asks requests for a key and counts them against its limits. Without keys everybody may ask, and
// there are no limits. Thread-safe.
class Access {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  static constexpr size_t kMaxKeyBytes = 256;

  // Keys are as LoadApiKeys gives them.
  explicit Access(const std::vector<std::string>& keys = {}, const KeyLimits& limits = {});

  // Refuses with 401.
  std::optional<HttpResponse> CheckKey(const HttpRequest& request) const;
  // Refuses with 401 or 429, or takes a place that the request holds until it has ended. The place
  // may outlive this object. `now` must not go back by more than threads race.
  HttpAdmission Admit(const HttpRequest& request, TimePoint now);

 private:
  // Padded, so that comparing takes the same time for all keys.
  struct Key {
    std::array<unsigned char, kMaxKeyBytes> bytes{};
    size_t size = 0;
  };
  struct Use {
    std::mutex mutex;
    int64_t running = 0;           // guarded by mutex
    std::deque<TimePoint> starts;  // likewise: those of the last minute
  };
  // Counts a running request out when it goes.
  struct Place {
    explicit Place(std::shared_ptr<Use> its_use) : use(std::move(its_use)) {}
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
    ~Place();
    const std::shared_ptr<Use> use;
    bool taken = false;
  };
  static Key ToKey(std::string_view text);
  // Index of the key that a request shows, in X-Api-Key or else as a bearer token; the number of
  // keys if it shows none of them.
  size_t Find(const HttpRequest& request) const;
  // Index of a key; the number of keys for another text.
  size_t Find(std::string_view text) const;

  std::vector<Key> keys_;
  const KeyLimits limits_;
  std::vector<std::shared_ptr<Use>> uses_;  // per key
};

}  // namespace innerq
