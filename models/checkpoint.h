// ModelConfig and Checkpoint: a Hugging Face model directory, checked and memory-mapped.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/low_bit_weight.h"
#include "kernels/result.h"
#include "kernels/tensor.h"

namespace innerq {

// Frequency scaling of rotary embeddings (config.json, "rope_scaling").
struct RopeScaling {
  enum class Type { kNone, kLinear, kLlama3 };
  Type type = Type::kNone;
  double factor = 1.0;
  double low_freq_factor = 1.0;        // llama3 only
  double high_freq_factor = 4.0;       // llama3 only
  int64_t original_max_positions = 0;  // llama3 only, tokens
};

constexpr char kTableName[] = "model.embed_tokens";  // the matrix [V, C] of embeddings
constexpr char kHeadName[] = "lm_head";              // the matrix [V, C] that gives logits

// Shape of a Llama-family decoder, from config.json. Every field has been checked.
struct ModelConfig {
  std::string architecture = "LlamaForCausalLM";
  int64_t hidden_size = 0;        // C
  int64_t intermediate_size = 0;  // I
  int64_t num_layers = 0;
  int64_t num_heads = 0;      // H
  int64_t num_kv_heads = 0;   // G, divides H
  int64_t head_dim = 0;       // D
  int64_t vocab_size = 0;     // V
  int64_t max_positions = 0;  // longest context, tokens
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  double rms_norm_eps = 1e-5;
  bool tie_word_embeddings = false;
  bool attention_bias = false;         // q, k, v and o projections have biases
  bool mlp_bias = false;               // gate, up and down projections have biases
  std::vector<int32_t> eos_token_ids;  // from generation_config.json where present
  // How matrices that are stored as codes are coded ("quantization_config"); nullopt: none are.
  std::optional<LowBitSpec> low_bit;
  // How the matrix of logits, kHeadName, is coded ("head" in it); nullopt: it is not.
  std::optional<LowBitSpec> low_bit_head;
  LowBitScale low_bit_scale = LowBitScale::kFree;  // of all that are coded

  int64_t num_parameters() const;
  // Weights of all matrices of the layers: those that may be stored as codes.
  int64_t num_layer_weights() const;
  // Bytes of codes and scales of those matrices as `low_bit`, which must be there, says; and of the
  // head as `low_bit_head` says.
  int64_t low_bit_bytes() const;
  int64_t low_bit_head_bytes() const;
  // How a matrix is coded if it is: the head or one of a layer.
  const std::optional<LowBitSpec>& LowBitOf(std::string_view matrix) const {
    return matrix == kHeadName ? low_bit_head : low_bit;
  }
  // [D/2] rotary frequencies after scaling, computed as Hugging Face transformers does, in F32.
  std::vector<float> InverseFrequencies() const;
};

// One tensor of a checkpoint. The data is mapped, read-only, and lives as long as the Checkpoint.
struct CheckpointTensor {
  std::string name;
  ConstTensorView view;
};

// A model directory: config.json, generation_config.json, model.safetensors or its shards with
// model.safetensors.index.json. Everything in it is untrusted: headers and offsets are checked when
// it is opened, dtypes and shapes when a tensor is asked for. Immutable; may be shared by threads.
class Checkpoint {
 public:
  // Errors: not found for a missing file, data loss or invalid argument for a damaged or
  // unsupported one, also where config.low_bit is set and no matrix is stored as codes; the message
  // names file, tensor or key.
  static Result<std::shared_ptr<const Checkpoint>> Open(const std::filesystem::path& directory);
  virtual ~Checkpoint() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const std::filesystem::path& directory() const = 0;
  // Those that can be read, sorted by name.
  virtual const std::vector<CheckpointTensor>& tensors() const = 0;
  // The others, which may be there as long as no model asks for them: dtype and shape by name, e.g.
  // "I64 [1, 512]".
  virtual const std::map<std::string, std::string>& unreadable() const = 0;
  // What the program that wrote the files says of them ("__metadata__"); of a key in several shards
  // the first.
  virtual const std::map<std::string, std::string>& metadata() const = 0;
  // Null if it is absent or cannot be read.
  virtual const CheckpointTensor* Find(std::string_view name) const = 0;
  // Whether it is there, readable or not.
  bool Has(const std::string& name) const {
    return Find(name) != nullptr || unreadable().contains(name);
  }
  // A tensor of floats of the shape that config.json asks for. Errors: data loss, naming the
  // tensor, if it is absent, cannot be read, has another shape, or holds no floats.
  Result<ConstTensorView> Get(const std::string& name, const Shape& shape) const;
  // Whether matrix `name`, e.g. "model.layers.0.mlp.up_proj", is stored as codes, not as
  // "<name>.weight": whether any of the tensors that GetLowBit reads is there.
  bool HasLowBit(const std::string& name) const;
  // Such a matrix, of `shape` [N, K], as config() says:
  //   <name>.weight_codes   U8 [N, K * bits / 8]
  //   <name>.weight_scales  F16 [N, groups], not read here
  //   <name>.input_clip     F32 [1], finite and positive; may be absent
  // Errors: data loss, naming the tensor, for one that is absent or of another type or shape, for a
  // matrix that is stored as floats as well, and where config.json does not say how it is coded.
  Result<LowBitMatrix> GetLowBit(const std::string& name, const Shape& shape) const;
};

// Reads and checks config.json (and generation_config.json beside it) alone.
Result<ModelConfig> ReadModelConfig(const std::filesystem::path& directory);

}  // namespace innerq
