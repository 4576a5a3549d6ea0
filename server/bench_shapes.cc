#include "server/bench_shapes.h"

namespace innerq {
namespace {

// From the models' config.json, in the order of ModelConfig.
struct NamedShape {
  std::string_view name;
  int64_t hidden_size, intermediate_size, num_layers;
  int64_t num_heads, num_kv_heads, head_dim;
  int64_t vocab_size, max_positions;
  bool tie_word_embeddings;
};
constexpr NamedShape kShapes[] = {
    {"llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256, 131072, false},
    {"llama-3.2-3b", 3072, 8192, 28, 24, 8, 128, 128256, 131072, true},
    {"llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128256, 131072, true},
    {"llama-2-7b", 4096, 11008, 32, 32, 32, 128, 32000, 4096, false},
    {"tinyllama-1.1b", 2048, 5632, 22, 32, 4, 64, 32000, 2048, false},
    // The 1B shape with a small vocabulary, as in tests/bench/model_bench.cc.
    {"llama-1b-32k", 2048, 8192, 16, 32, 8, 64, 32000, 131072, false},
};

}  // namespace

Result<ModelConfig> FindShape(std::string_view name) {
  for (const NamedShape& shape : kShapes) {
    if (shape.name != name) continue;
    ModelConfig config;
    config.hidden_size = shape.hidden_size;
    config.intermediate_size = shape.intermediate_size;
    config.num_layers = shape.num_layers;
    config.num_heads = shape.num_heads;
    config.num_kv_heads = shape.num_kv_heads;
    config.head_dim = shape.head_dim;
    config.vocab_size = shape.vocab_size;
    config.max_positions = shape.max_positions;
    config.tie_word_embeddings = shape.tie_word_embeddings;
    return config;
  }
  return InvalidArgument("--shape: unknown shape \"" + std::string(name) + "\"; there are " +
                         ShapeNames());
}

std::string ShapeNames() {
  std::string names;
  for (const NamedShape& shape : kShapes) {
    names += (names.empty() ? "" : ", ") + std::string(shape.name);
  }
  return names;
}

}  // namespace innerq
