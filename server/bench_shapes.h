// Shapes of models that are known by name, for benchmarks with random weights.
#pragma once

#include <string>
#include <string_view>

#include "models/checkpoint.h"

namespace innerq {

// The extents of a published model, with all of its layers; what costs nothing (frequencies of
// rotary embeddings, special tokens) is left at its default. Errors: invalid argument, with the
// names that there are.
Result<ModelConfig> FindShape(std::string_view name);

// "llama-3.1-8b, llama-3.2-1b, ..."
std::string ShapeNames();

}  // namespace innerq
