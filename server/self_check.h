// The self-check of a model that has just been loaded: what it found goes to the log.
#pragma once

#include <string>
#include <vector>

#include "engine/self_check.h"
#include "server/model_setup.h"
#include "server/options.h"

namespace innerq {

// A line for the log.
struct SelfCheckLine {
  bool warning = false;
  std::string text;
};

// Runs configuration "self_check" on a loaded model: none for a cache that is not quantized. What
// cannot be checked is told, not an error.
std::vector<SelfCheckLine> SelfCheck(const Options& options, const ModelParts& parts);

// The same, into the log.
void CheckLoadedModel(const Options& options, const ModelParts& parts);

}  // namespace innerq
