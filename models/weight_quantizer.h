// QuantizeCheckpoint: makes a checkpoint with low-bit weights of one with floats.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/low_bit_weight.h"
#include "kernels/result.h"
#include "models/checkpoint.h"
#include "models/input_statistics.h"

namespace innerq {

// A share of weights to make zero in the matrices whose names match a pattern.
struct PruneRule {
  std::string pattern;  // of names as in "<name>.weight"; * stands for any characters, or none
  double share = 0;     // as of EncodeLowBitArgs::prune

  bool Matches(std::string_view name) const;
};

// The last rule that matches; null: none does.
const PruneRule* FindPruneRule(std::span<const PruneRule> rules, std::string_view name);

// How to encode the matrices of a model's layers.
struct QuantizeOptions {
  LowBitSpec spec;                   // divides the K of all of them
  std::optional<LowBitSpec> head{};  // of the matrix of logits, of which nothing is pruned; null:
                                     // it stays as it is
  LowBitScale scale = LowBitScale::kFree;
  double prune = 0;                         // as of EncodeLowBitArgs
  std::vector<PruneRule> prune_matrices{};  // instead of `prune` where one matches
  int threads = 1;
  // Of the layers' inputs; null: none were seen, all count alike. Static activations take them.
  const InputCollector* inputs = nullptr;
  // Called as tensors are read; false ends it with the error "cancelled". May be empty.
  std::function<bool(int64_t bytes_done, int64_t bytes_total)> progress{};
};

// Activations of so few bits have a clip that is learned; others take each row's own range.
constexpr bool HasStaticActivations(const LowBitSpec& spec) { return spec.activation_bits < 8; }

struct QuantizedMatrix {
  std::string name;        // as in "<name>.weight"
  int64_t rows = 0;        // N
  int64_t cols = 0;        // K
  double alpha = 0;        // of weights, before groups were refined
  double zeros = 0;        // share of weights
  double error = 0;        // relative, squared, of outputs; of weights without statistics
  double input_alpha = 0;  // of static activations, else 0
};

struct QuantizedCheckpoint {
  std::vector<QuantizedMatrix> matrices;  // in order of layers, then the head
  int64_t num_weights = 0;                // of them all
  int64_t low_bit_bytes = 0;              // of their codes and scales
  double zeros = 0;                       // share of `num_weights`
  int64_t source_bytes = 0;               // of all tensors, as stored
  int64_t file_bytes = 0;                 // of the new model.safetensors
};

// Looks for what makes a source unfit, without reading weights. Errors: invalid argument for one
// that is quantized already, for sizes that the spec does not divide (param "group_size"), and for
// a rule that matches no matrix (param "prune_matrices"); as of LlamaModel::CheckTensors.
Result<void> CheckQuantizable(const Checkpoint& source, const QuantizeOptions& options);

// What happens beside encoding.
struct CalibrationPlan {
  bool runs = false;        // the float model itself, to calibrate or to measure
  bool calibrates = false;  // so that there will be `inputs`
  int64_t scored_rows = 0;  // logits of the longest text by which both models are measured after
                            // it; 0: they are not
};
// Looks whether there is memory for what is there at once, before any of it is taken: the float
// model, the statistics of its inputs and the encoding of any matrix; then the float model, the
// low-bit one and the logits of a text. Errors: resource exhausted, with the sizes of the two that
// takes more.
Result<void> CheckMemoryToQuantize(const Checkpoint& source, const QuantizeOptions& options,
                                   const CalibrationPlan& plan);

// Writes to `directory`, which is there and empty:
//   config.json        the source's, with
//                      "quantization_config": {"quant_method": "sigma", "scheme", "bits",
//                      "group_size", "activation_bits", "scale", "head" if there is one}
//   model.safetensors  every "<name>.weight" of a layer's matrix, and of a head that is coded, as
//                      the tensors of Checkpoint::GetLowBit, "<name>.input_clip" for static
//                      activations alone; all others as stored, but for those that nobody here can
//                      read (Checkpoint::unreadable), which are left out. A tied head has codes
//                      beside the table, which is then called "model.embed_tokens". "__metadata__":
//                      "format" pt, "scheme", "bits", "group_size", "activation_bits", "scale",
//                      "prune" as asked, "zeros" as reached; "prune_matrices", if there are rules,
//                      PATTERN=SHARE in their order with commas between them; "head", if there is
//                      one, its scheme and bits; "source" FNV-1a of 64 bits over the source's
//                      tensors by name: name, dtype, shape (each of these with a newline after it)
//                      and data
//   and copies of the source's other regular files but weights, their indices and its card,
//   README.md, which describes the source.
// One matrix is in memory at a time, and a Hessian is factored once for all that share it. What was
// written stays where it fails. CHECK: the spec is valid, and there are statistics for static
// activations. Errors: as of CheckQuantizable; invalid argument for weights that are not finite or
// exceed F16, and as of LearnInputClip; resource exhausted; unavailable, with path and reason, for
// what cannot be read or written; cancelled.
Result<QuantizedCheckpoint> QuantizeCheckpoint(const Checkpoint& source,
                                               const QuantizeOptions& options,
                                               const std::filesystem::path& directory);

}  // namespace innerq
