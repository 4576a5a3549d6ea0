// ModelRunner: a loaded Llama with its cache on one backend, as the engine's StepModel.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "engine/engine.h"
#include "engine/kv_cache.h"
#include "engine/step_model.h"
#include "models/checkpoint.h"

namespace innerq {

// Everything needed to bring a checkpoint up. `engine.max_context` 0 means: the model's longest
// context, or what fits in the cache if that is less.
struct ModelRunnerOptions {
  std::optional<WeightFormat> dtype;  // nullopt: as stored
  BackendOptions backend;
  KvCacheOptions kv_cache;
  EngineOptions engine;
  // While loading weights; false ends it with the error "cancelled". May be empty.
  std::function<bool(int64_t done, int64_t total)> progress;
  // As of LlamaModel's LoadOptions. May be empty.
  std::function<void(std::span<const std::string> matrices, ConstTensorView x)> observe{};
};

// What would come up: the device, and how the cache fills its memory. Cheap; reads no weights.
struct ModelPlan {
  std::unique_ptr<Backend> backend{};
  int64_t weight_bytes = 0;  // in the device's memory, about
  KvLayout layout{};
  KvPoolPlan pools{};
  EngineOptions engine;  // max_context resolved
};
// Errors: whatever is wrong with device, context, cache options or memory, with the key's path in
// `param`; as of LlamaModel::CheckTensors; invalid argument for heads that the device cannot
// compute.
Result<ModelPlan> PlanModel(const Checkpoint& checkpoint, const ModelRunnerOptions& options);
// Errors: resource exhausted, with the numbers, if weights of such a model in `options.dtype`
// (nullopt: codes where config.json has a "quantization_config" and the device multiplies them,
// BF16 otherwise) and `cache_bytes` beside them are more than the device has left. What steps take
// comes on top.
Result<void> CheckMemory(const ModelConfig& config, const ModelRunnerOptions& options,
                         int64_t cache_bytes);
// The same of what would come up.
Result<void> CheckMemory(const ModelPlan& plan);

// What came up: for the start-up report and `inspect`.
struct ModelReport {
  std::string backend;  // "cpu/amx"
  int threads = 1;      // of the host, that compute an operation
  int64_t parameters = 0;
  int64_t weight_bytes = 0;
  int64_t step_weight_bytes = 0;  // of those, what every step with logits reads
  int64_t open_page_bytes = 0;
  int64_t sealed_page_bytes = 0;
  KvPoolPlan pools;
  double sealed_bits_per_element = 0;
  double open_bytes_per_token = 0;    // all layers
  double sealed_bytes_per_token = 0;  // all layers
  int64_t max_context = 0;            // resolved
};

// What a further runner on loaded weights is for.
struct RunnerLimits {
  int64_t max_context = 0;       // tokens, positive
  int64_t max_sequences = 0;     // at once; 0, or more: as the runner that it is made from
  int64_t max_batch_tokens = 0;  // rows of a step; likewise
};

// The pools that WithCache would make beside a runner of these options. Errors: as of PlanModel.
Result<KvPoolPlan> PlanFurtherCache(const ModelConfig& config, const EngineOptions& engine,
                                    const KvCacheOptions& kv_cache, const RunnerLimits& limits);

class ModelRunner : public StepModel {
 public:
  // Errors: whatever is wrong with checkpoint, backend, cache options or memory, explained.
  static Result<std::unique_ptr<ModelRunner>> Create(std::shared_ptr<const Checkpoint> checkpoint,
                                                     const ModelRunnerOptions& options);
  // The same with seeded random weights of a shape, for benchmarks.
  static Result<std::unique_ptr<ModelRunner>> CreateRandom(const ModelConfig& config, uint64_t seed,
                                                           const ModelRunnerOptions& options);
  virtual const ModelReport& report() const = 0;
  // `options.engine` with max_context resolved; pass it to Engine::Create.
  virtual const EngineOptions& engine_options() const = 0;
  // Another runner on the same weights and device, with a cache of its own: of no more pages than
  // its sequences and a step can make use of, nor than the cache's memory. Of all that share
  // weights only one may step at a time (CHECK), and its logits last until the next step of any.
  // Errors: as of PlanModel.
  virtual Result<std::unique_ptr<ModelRunner>> WithCache(const KvCacheOptions& kv_cache,
                                                         const RunnerLimits& limits) const = 0;
  // See Backend. No runner on the same weights may step meanwhile.
  virtual Result<std::optional<double>> MeasureReadBandwidth() const = 0;
};

}  // namespace innerq
