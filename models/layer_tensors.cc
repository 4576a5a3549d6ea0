#include "models/layer_tensors.h"

namespace innerq {

LayerTensors TensorsOfLayer(const ModelConfig& config, int64_t index) {
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  const int64_t queries = config.num_heads * config.head_dim;
  const int64_t keys = config.num_kv_heads * config.head_dim;
  const bool attention_bias = config.attention_bias, mlp_bias = config.mlp_bias;
  return {.attention_norm = prefix + "input_layernorm.weight",
          .qkv = {{{attention + "q_proj", queries, attention_bias},
                   {attention + "k_proj", keys, attention_bias},
                   {attention + "v_proj", keys, attention_bias}},
                  hidden},
          .output = {{{attention + "o_proj", hidden, attention_bias}}, queries},
          .mlp_norm = prefix + "post_attention_layernorm.weight",
          .gate_up = {{{mlp + "gate_proj", inner, mlp_bias}, {mlp + "up_proj", inner, mlp_bias}},
                      hidden},
          .down = {{{mlp + "down_proj", hidden, mlp_bias}}, inner}};
}

std::vector<Stack> LayerStacks(const ModelConfig& config) {
  std::vector<Stack> stacks;
  for (int64_t i = 0; i < config.num_layers; ++i) {
    LayerTensors layer = TensorsOfLayer(config, i);
    for (Stack* stack : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) {
      stacks.push_back(std::move(*stack));
    }
  }
  return stacks;
}

}  // namespace innerq
