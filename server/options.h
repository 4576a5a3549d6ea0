// Options: the configuration as plain values.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "engine/model_runner.h"
#include "kernels/result.h"

namespace innerq {

// Configuration "model", but for its dtype, which is the runner's.
struct ModelOptions {
  std::filesystem::path path;
  std::string alias;          // never empty: the directory's name unless given
  std::string chat_template;  // auto, none or one of ChatTemplate::Names()
};

// Configuration "server.key_limits": of each API key. 0: no limit.
struct KeyLimits {
  int64_t requests_per_minute = 0;  // in any 60 seconds
  int64_t concurrent_requests = 0;
};

// Configuration "server".
struct ServerOptions {
  std::string host;
  int port = 0;  // 0: any free one
  std::vector<std::string> api_keys;
  std::filesystem::path api_key_file;  // empty: none
  KeyLimits key_limits;
  std::vector<std::string> cors_origins;
  std::vector<std::string> allowed_hosts;
  int64_t max_connections = 0;
  int64_t max_body_bytes = 0;
  int64_t max_header_bytes = 0;
  std::chrono::seconds header_timeout{0};
  std::chrono::seconds read_timeout{0};
  std::chrono::seconds write_timeout{0};
  std::chrono::seconds keep_alive_timeout{0};
  std::chrono::seconds drain_timeout{0};
};

// Configuration "log".
struct LogOptions {
  std::string level;  // debug, info, warn, error
  bool json = false;
};

// Configuration "self_check".
struct SelfCheckOptions {
  bool enabled = true;
  double seconds = 5;       // time it may take
  double warn_kl = 0.0045;  // nats, mean
};

// One configuration file, checked, with defaults and overrides applied. See configs/schema.json for
// every key.
struct Options {
  ModelOptions model;
  ModelRunnerOptions runner;  // model.dtype, backend, kv_cache, scheduler
  std::string kv_cache_json;  // the section kv_cache as JSON text
  SelfCheckOptions self_check;
  ServerOptions server;
  LogOptions log;
};

// Reads a configuration text; `overrides` are "a.b.c=value". Paths stay as written. Errors: invalid
// argument with the key's path in `param`.
Result<Options> ParseOptions(std::string_view text, const std::vector<std::string>& overrides);

// Reads a configuration file and finds its model's directory and its key file: relative to the
// working directory, to the file's directory, or to the parent of that. Errors: as above, and not
// found, also for what may not be looked at.
Result<Options> LoadOptions(const std::filesystem::path& file,
                            const std::vector<std::string>& overrides);

}  // namespace innerq
