// The tensors of a decoder's layers by their names in a checkpoint.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "models/checkpoint.h"

namespace innerq {

// One matrix of a stack: "<name>.weight" [rows, K], or its codes, and, if `bias`, "<name>.bias"
// [rows].
struct Part {
  std::string name;
  int64_t rows = 0;
  bool bias = false;
};

// Matrices [n_i, cols], stacked along N: they are multiplied with the same inputs.
struct Stack {
  std::vector<Part> parts;
  int64_t cols = 0;  // K
};

struct LayerTensors {
  std::string attention_norm;
  Stack qkv, output;
  std::string mlp_norm;
  Stack gate_up, down;
};

LayerTensors TensorsOfLayer(const ModelConfig& config, int64_t index);

// The stacks of all layers, in the order in which they are multiplied.
std::vector<Stack> LayerStacks(const ModelConfig& config);

}  // namespace innerq
