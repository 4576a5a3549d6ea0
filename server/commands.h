// The commands of the innerq program. Each returns the exit code: 0 done, 1 it failed, 2 the
// configuration cannot work here; errors are one line on standard error.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "kernels/result.h"

namespace innerq {

// Where the configuration comes from.
struct ConfigSource {
  std::filesystem::path file;
  std::vector<std::string> overrides;  // "a.b.c=value"
};

// Prints an error on standard error; returns the exit code for it.
int ReportError(const Error& error);

// What work hears of signals.
struct Interruption {
  std::function<bool()> interrupted;  // true from SIGINT or SIGTERM on
  // Takes what is to be done before a second signal ends the process at once: on another thread,
  // for which the work waits as soon as it asks. To be taken back, by an empty function, before it
  // cannot be done any more. May be empty: there are no signals.
  std::function<void(std::function<void()>)> set_before_exit{};
};

// Runs work that asks `interrupted` again and again and ends with the error "cancelled" once that
// is true. Returns the exit code, 128 and the signal's number after one.
int RunUntilSignal(const std::function<Result<void>(const Interruption&)>& work);

struct GenerateArgs {
  std::string prompt;
  bool chat = false;  // the prompt is a user's message
  int64_t max_tokens = 128;
  float temperature = 0.0f;
  uint64_t seed = 0;
};

// Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once.
int ServeCommand(const ConfigSource& source, const std::string& version);
// Streams the answer to one prompt to standard output.
int GenerateCommand(const ConfigSource& source, const GenerateArgs& args);
// Validates a configuration against its model, and says what would run. Loads no weights.
int CheckConfigCommand(const ConfigSource& source);
// Describes a model and its cache. `path` is a configuration or a model directory.
int InspectCommand(const std::filesystem::path& path, const std::vector<std::string>& overrides);

}  // namespace innerq
