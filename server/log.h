// Logging: where messages go and how they look.
#pragma once

#include "server/options.h"

namespace innerq {

// Sends log messages to standard error, as lines of text or as one JSON object each. Call once,
// before other threads log.
void ConfigureLog(const LogOptions& options);

}  // namespace innerq
