// LlamaModel: weights of a Llama-family decoder and its forward pass.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "models/checkpoint.h"
#include "models/forward_batch.h"

namespace innerq {

// How to build a model.
struct LoadOptions {
  int64_t max_rows = 0;        // of a step
  int64_t max_logit_rows = 0;  // of a step, those that need logits
  // nullopt: as stored (F32 stays F32, F16 F16, BF16 BF16, codes codes). Codes are decoded to a
  // format that is named, and to BF16 on a backend that does not multiply them.
  std::optional<WeightFormat> format;
  // Called with (tensors done, tensors in all) as weights are packed; false ends it with the error
  // "cancelled". May be empty.
  std::function<bool(int64_t, int64_t)> progress;
  // Of a step, of all sequences together, unless ReservePages makes it more.
  int64_t max_pages = StepLimits{}.max_pages;
  // Is shown the inputs x [M, K] F32 of each product with matrices of the layers, named as in
  // "<name>.weight" (those that are stacked share their inputs), before it runs, where the host
  // sees the backend's memory. May be empty.
  std::function<void(std::span<const std::string> matrices, ConstTensorView x)> observe{};
};

// Weights on one backend. Immutable after loading, except for the step's activation memory; one
// thread at a time may call Forward.
class LlamaModel {
 public:
  // Compares a checkpoint's tensors with its config.json, by names and shapes; reads no weights.
  // Matrices that are multiplied together must be stored as codes, with the same clip of inputs,
  // all or none. Errors: data loss for one that is missing or misshapen, invalid argument for a
  // bias that config.json does not declare, which would go unused; the message names the tensor.
  static Result<void> CheckTensors(const Checkpoint& checkpoint);

  // Bytes that steps of so many rows, and rows of logits, take beside weights and cache.
  static int64_t ActivationBytes(const ModelConfig& config, int64_t rows, int64_t logit_rows);
  // Takes the memory of a step and packs a checkpoint for `backend`, which must outlive the model.
  // The checkpoint stays mapped as long as the model lives. Errors: as of CheckTensors; invalid
  // argument for heads that the backend cannot compute; resource exhausted.
  static Result<std::unique_ptr<LlamaModel>> Load(std::shared_ptr<const Checkpoint> checkpoint,
                                                  Backend* backend, LoadOptions options);
  // A model with seeded random weights of the given shape, for benchmarks and tests. "As stored" is
  // BF16 or, for matrices of layers, as config.low_bit says. Errors: resource exhausted, and
  // cancelled.
  static Result<std::unique_ptr<LlamaModel>> Random(const ModelConfig& config, uint64_t seed,
                                                    Backend* backend, LoadOptions options);
  // The same without progress.
  static Result<std::unique_ptr<LlamaModel>> Random(const ModelConfig& config, WeightFormat format,
                                                    uint64_t seed, Backend* backend,
                                                    int64_t max_rows, int64_t max_logit_rows);
  virtual ~LlamaModel() = default;

  virtual const ModelConfig& config() const = 0;
  // Bytes of packed weights.
  virtual int64_t weight_bytes() const = 0;
  // Bytes of those that a step with logits reads: all but the table of embeddings, of which it
  // reads a row for each token, unless the last matrix holds that.
  virtual int64_t step_weight_bytes() const = 0;

  // Runs one step: appends, computes norms, seals and attends in every layer of `layers`
  // ([num_layers] views), and returns logits [R, V] F32, in host memory, for batch.logit_rows. A
  // row that top_logits() has is not in it. The view stays valid until the next call. Enqueued:
  // call Backend::Synchronize before reading.
  virtual ConstTensorView Forward(const ForwardBatch& batch, const KvLayout& layout,
                                  std::span<const PagedKvView> layers) = 0;
  // Readies the backend for steps of so many pages, of all sequences together, where it was not
  // yet. Errors: resource exhausted; steps as before are still possible.
  virtual Result<void> ReservePages(int64_t max_pages) = 0;
  // The batch.num_top[row] largest of the last step's logits `row`, as SelectTop orders them; empty
  // if Forward returned all. Valid as long as that.
  virtual std::span<const TopLogit> top_logits(int64_t row) const = 0;
};

}  // namespace innerq
