#include "engine/model_runner.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "engine/page_budget.h"
#include "engine/sealed_group_counter.h"
#include "kernels/backend.h"
#include "kernels/cpu/host_threads.h"
#include "models/llama.h"

namespace innerq {
namespace {

// Rows of a step, beyond one per sequence, that may have logits: what scores a prompt. More would
// take memory (4 bytes per row and token of the vocabulary) and save little: so many rows already
// cost more than reading the weights once.
constexpr int64_t kScoreRows = 128;

constexpr int64_t kLeastContext = 2;  // tokens: one of a prompt, one of its answer

int64_t MaxLogitRows(const EngineOptions& options) {
  return std::min(options.max_sequences + kScoreRows, options.max_batch_tokens);
}

// Entries of all page tables of a step.
int64_t MostPages(const EngineOptions& engine, const KvLayout& layout) {
  return engine.max_sequences * CeilDiv(engine.max_context, layout.page_tokens());
}

// What runners share: a loaded model and the device that holds it.
struct Weights {
  std::unique_ptr<Backend> backend;  // first: outlives what it allocated
  std::unique_ptr<LlamaModel> model;
  int64_t max_logit_rows = 0;
  std::atomic<bool> in_use = false;  // a runner steps
};

// All pages that the sequences, each as long as it may be, and the rows of a step can make use of.
PageCounts UsefulPages(const KvLayout& layout, const EngineOptions& engine) {
  const PageCounts longest = WorstPeakPages(layout, engine.max_context, engine.exact_prefill);
  return {.open = engine.max_sequences * longest.open +
                  CeilDiv(engine.max_batch_tokens, layout.page_tokens()),
          .sealed = engine.max_sequences * longest.sealed,
          .norms = engine.max_sequences * longest.norms};
}

// What a device says about a cache.
struct DevicePart {
  CodeOrder order;
  int64_t free_bytes;  // that a cache of memory "auto" may take
};

Result<void> PlanCache(const ModelConfig& config, KvCacheOptions kv_cache, const DevicePart& device,
                       ModelPlan* plan) {
  EngineOptions& engine = plan->engine;
  engine.exact_prefill = kv_cache.exact_prefill;
  engine.prefix_cache = kv_cache.prefix_cache && !kv_cache.exact_prefill;
  if (engine.max_context > config.max_positions) {
    return InvalidArgument("max_context is " + std::to_string(engine.max_context) +
                               ", the model's longest context is " +
                               std::to_string(config.max_positions),
                           "scheduler.max_context");
  }
  ASSIGN_OR_RETURN(const KvCacheSpec spec, ResolveKvCacheSpec(kv_cache, config));
  ASSIGN_OR_RETURN(plan->layout, KvLayout::Create(spec, device.order));
  // Without a wish of the user, at least a context that reaches the first sealed page.
  const int64_t windows = OpenWindowPages(plan->layout) * plan->layout.page_tokens();
  const int64_t min_context =
      engine.max_context > 0 ? engine.max_context : std::min(config.max_positions, windows);
  const bool chosen = kv_cache.memory_bytes.has_value();
  if (!chosen) kv_cache.memory_bytes = device.free_bytes;
  ASSIGN_OR_RETURN(plan->pools, PlanKvPools(plan->layout, kv_cache, engine.max_sequences,
                                            engine.max_batch_tokens, min_context));
  if (engine.max_context == 0) {
    engine.max_context = std::min(config.max_positions, plan->pools.tokens_that_fit);
  }
  if (!chosen) {
    PageCounts most = UsefulPages(plan->layout, engine);
    // Beside those of sequences that run there is use for those of as many that have ended.
    if (engine.prefix_cache) most = {2 * most.open, 2 * most.sealed, 2 * most.norms};
    plan->pools = TrimKvPools(plan->layout, plan->pools, most, engine.exact_prefill);
  }
  return {};
}

// The same for a further cache: of no more pages than it can make use of. The plan's options are
// those of the runner that it is made from.
Result<void> PlanNarrowCache(const ModelConfig& config, const KvCacheOptions& kv_cache,
                             const RunnerLimits& limits, CodeOrder order, ModelPlan* plan) {
  CHECK(limits.max_context > 0, "a runner for no tokens");
  EngineOptions& engine = plan->engine;
  const auto narrow = [](int64_t limit, int64_t* own) {
    if (limit > 0) *own = std::min(*own, limit);
  };
  engine.max_context = limits.max_context;
  narrow(limits.max_sequences, &engine.max_sequences);
  narrow(limits.max_batch_tokens, &engine.max_batch_tokens);
  constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
  RETURN_IF_ERROR(PlanCache(config, kv_cache, {order, kAll}, plan));
  plan->pools = TrimKvPools(plan->layout, plan->pools, UsefulPages(plan->layout, engine),
                            engine.exact_prefill);
  return {};
}

ModelReport Report(const Weights& weights, const KvCache& cache, int64_t max_context) {
  const KvLayout& shape = cache.layout();
  const auto page_tokens = static_cast<double>(shape.page_tokens());
  return {.backend = std::string(weights.backend->name()),
          .threads = weights.backend->threads(),
          .parameters = weights.model->config().num_parameters(),
          .weight_bytes = weights.model->weight_bytes(),
          .step_weight_bytes = weights.model->step_weight_bytes(),
          .open_page_bytes = shape.open_page_bytes(),
          .sealed_page_bytes = shape.sealed_page_bytes(),
          .pools = cache.plan(),
          .sealed_bits_per_element = shape.sealed_bits_per_element(),
          .open_bytes_per_token = static_cast<double>(shape.open_page_bytes()) / page_tokens,
          .sealed_bytes_per_token = static_cast<double>(shape.sealed_page_bytes()) / page_tokens,
          .max_context = max_context};
}

// A cache on its device.
struct CacheMemory {
  std::unique_ptr<KvCache> cache;
  SealedGroupCounter sealed_groups;
};

Result<CacheMemory> AllocateCache(Backend* backend, ModelPlan* plan) {
  ASSIGN_OR_RETURN(auto cache, KvCache::Create(backend, std::move(plan->layout), plan->pools));
  // Rows of a step complete at most so many: a page that each sequence had begun, and whole ones.
  const EngineOptions& engine = plan->engine;
  const int64_t most_seals =
      engine.max_sequences + engine.max_batch_tokens / cache->layout().page_tokens();
  ASSIGN_OR_RETURN(SealedGroupCounter counter,
                   SealedGroupCounter::Create(backend, cache->layers(), most_seals));
  return CacheMemory{std::move(cache), std::move(counter)};
}

class LlamaRunner final : public ModelRunner {
 public:
  LlamaRunner(std::shared_ptr<Weights> weights, CacheMemory memory, const EngineOptions& options)
      : weights_(std::move(weights)),
        cache_(std::move(memory.cache)),
        sealed_groups_(std::move(memory.sealed_groups)),
        options_(options),
        report_(Report(*weights_, *cache_, options.max_context)) {}

  int64_t vocab_size() const override { return weights_->model->config().vocab_size; }
  const KvLayout& layout() const override { return cache_->layout(); }
  int64_t num_open_pages() const override { return cache_->plan().open_pages; }
  int64_t num_sealed_pages() const override { return cache_->plan().sealed_pages; }
  int64_t num_norm_slots() const override { return cache_->plan().norm_slots; }
  int64_t max_logit_rows() const override {
    return std::min(weights_->max_logit_rows, options_.max_batch_tokens);
  }
  int host_threads() const override {
    const Backend& backend = *weights_->backend;
    return backend.host_visible() ? backend.threads() : UsableCores();
  }
  std::vector<LayerGroups> sealed_groups() const override { return sealed_groups_.groups(); }
  std::span<const TopLogit> top_logits(int64_t row) const override {
    return weights_->model->top_logits(row);
  }
  std::vector<int64_t> failed_seals() const override { return weights_->backend->failed_seals(); }
  const ModelReport& report() const override { return report_; }
  const EngineOptions& engine_options() const override { return options_; }

  Result<std::unique_ptr<ModelRunner>> WithCache(const KvCacheOptions& kv_cache,
                                                 const RunnerLimits& limits) const override {
    ModelPlan plan{.engine = options_};
    Backend* backend = weights_->backend.get();
    RETURN_IF_ERROR(
        PlanNarrowCache(weights_->model->config(), kv_cache, limits, backend->code_order(), &plan));
    ASSIGN_OR_RETURN(CacheMemory memory, AllocateCache(backend, &plan));
    // What is reserved is for the contexts that there were so far.
    RETURN_IF_ERROR(weights_->model->ReservePages(MostPages(plan.engine, memory.cache->layout())));
    return std::unique_ptr<ModelRunner>(
        std::make_unique<LlamaRunner>(weights_, std::move(memory), plan.engine));
  }

  Result<std::optional<double>> MeasureReadBandwidth() const override {
    return weights_->backend->MeasureReadBandwidth();
  }

  Result<std::span<const float>> Step(const ForwardBatch& batch) override {
    CHECK(!weights_->in_use.exchange(true), "two runners on the same weights step at once");
    const ConstTensorView logits = weights_->model->Forward(batch, layout(), cache_->layers());
    const Result<void> computed = weights_->backend->Synchronize();
    weights_->in_use = false;
    RETURN_IF_ERROR(computed);
    RETURN_IF_ERROR(sealed_groups_.Add(batch.seals));
    return std::span(logits.As<float>(), static_cast<size_t>(logits.shape.num_elements()));
  }

 private:
  const std::shared_ptr<Weights> weights_;  // first: their device outlives the cache
  const std::unique_ptr<KvCache> cache_;
  SealedGroupCounter sealed_groups_;  // since the start
  const EngineOptions options_;
  const ModelReport report_;
};

// Bytes of a model's weights in a format, but for those that are held as codes; the table of
// embeddings is held as BF16 and, where it is the last matrix as well, packed once more, unless
// that can serve for both.
int64_t LeastWeightBytes(const ModelConfig& config, std::optional<WeightFormat> format,
                         const Backend& backend) {
  const bool has_codes = config.low_bit && !format;
  const bool has_head_codes = config.low_bit_head && !format;
  const int64_t table = config.vocab_size * config.hidden_size;
  const int64_t packed = config.num_parameters() - (config.tie_word_embeddings ? 0 : table) -
                         (has_codes ? config.num_layer_weights() : 0) -
                         (has_head_codes ? table : 0);
  const bool shared = config.tie_word_embeddings && !config.low_bit_head && !format &&
                      backend.packs_row_major(config.hidden_size);
  return (shared ? 0 : table * DTypeBytes(DType::kBF16)) +
         packed * (format == WeightFormat::kF32 ? 4 : 2) +
         (has_codes ? config.low_bit_bytes() : 0) +
         (has_head_codes ? config.low_bit_head_bytes() : 0);
}

Result<void> CheckMemory(const Backend& backend, int64_t weight_bytes, int64_t cache_bytes) {
  const int64_t available = backend.available_bytes();
  if (cache_bytes <= available - weight_bytes) return {};
  return Error{ErrorCode::kResourceExhausted,
               "weights of " + std::to_string(weight_bytes) + " bytes and a cache of " +
                   std::to_string(cache_bytes) + " are more than " + std::string(backend.name()) +
                   " has left, " + std::to_string(available) + " bytes"};
}

// Bytes of the weights of `checkpoint`, or, if that is null, of random ones.
int64_t WeightBytes(const ModelConfig& config, const ModelRunnerOptions& options,
                    const Backend& backend, const Checkpoint* checkpoint) {
  const int64_t least = LeastWeightBytes(config, options.dtype, backend);
  if (checkpoint == nullptr || options.dtype) return least;
  int64_t stored = 0;  // where it is of 4 bytes, it stays so
  for (const CheckpointTensor& tensor : checkpoint->tensors()) stored += tensor.view.bytes();
  return std::max(least, stored);
}

// What a cache of memory "auto" may take of the device's memory: half of what the weights leave on
// a host, which others use, too; on a device of its own all but what steps take. Errors: resource
// exhausted, with the numbers, if the weights leave nothing.
Result<int64_t> FreeForCache(const ModelConfig& config, const ModelPlan& plan) {
  constexpr int64_t kLeastRest = int64_t{512} << 20;  // a backend's own
  const int64_t available = plan.backend->available_bytes();
  const int64_t left = available - plan.weight_bytes;
  const int64_t steps =
      LlamaModel::ActivationBytes(config, plan.engine.max_batch_tokens, MaxLogitRows(plan.engine));
  const int64_t free =
      plan.backend->host_visible() ? left / 2 : left - steps - std::max(kLeastRest, available / 16);
  if (free > 0) return free;
  return Error{ErrorCode::kResourceExhausted,
               "weights of " + std::to_string(plan.weight_bytes) +
                   " bytes leave no memory for a cache: " + std::string(plan.backend->name()) +
                   " has " + std::to_string(available) + " bytes left",
               "kv_cache.memory"};
}

// All but the checkpoint's tensors; it may be null.
Result<ModelPlan> PlanRunner(const ModelConfig& config, const ModelRunnerOptions& options,
                             const Checkpoint* checkpoint) {
  ModelPlan plan{.engine = options.engine};
  ASSIGN_OR_RETURN(plan.backend, CreateBackend(options.backend));
  // For a single row: the least that a step takes, and all that the device says about the heads'
  // shape.
  RETURN_IF_ERROR(plan.backend->Reserve({.max_rows = 1,
                                         .max_head_dim = config.head_dim,
                                         .max_group = config.num_heads / config.num_kv_heads,
                                         .max_pages = 1}));
  plan.weight_bytes = WeightBytes(config, options, *plan.backend, checkpoint);
  int64_t free_bytes = 0;
  if (!options.kv_cache.memory_bytes) {
    ASSIGN_OR_RETURN(free_bytes, FreeForCache(config, plan));
  }
  RETURN_IF_ERROR(
      PlanCache(config, options.kv_cache, {plan.backend->code_order(), free_bytes}, &plan));
  if (plan.engine.max_context < kLeastContext) {
    return InvalidArgument("a context of " + std::to_string(plan.engine.max_context) +
                               " token has no room for a prompt and an answer",
                           "scheduler.max_context");
  }
  return plan;
}

using MakeModel = std::function<Result<std::unique_ptr<LlamaModel>>(Backend*, LoadOptions)>;

Result<std::unique_ptr<ModelRunner>> CreateRunner(ModelPlan plan, const ModelRunnerOptions& options,
                                                  const MakeModel& make) {
  const EngineOptions& engine = plan.engine;

  const auto weights = std::make_shared<Weights>();
  weights->backend = std::move(plan.backend);
  ASSIGN_OR_RETURN(CacheMemory memory, AllocateCache(weights->backend.get(), &plan));
  weights->max_logit_rows = MaxLogitRows(engine);
  ASSIGN_OR_RETURN(weights->model, make(weights->backend.get(),
                                        {.max_rows = engine.max_batch_tokens,
                                         .max_logit_rows = weights->max_logit_rows,
                                         .format = options.dtype,
                                         .progress = options.progress,
                                         .max_pages = MostPages(engine, memory.cache->layout()),
                                         .observe = options.observe}));
  return std::unique_ptr<ModelRunner>(
      std::make_unique<LlamaRunner>(weights, std::move(memory), engine));
}

}  // namespace

Result<ModelPlan> PlanModel(const Checkpoint& checkpoint, const ModelRunnerOptions& options) {
  ASSIGN_OR_RETURN(ModelPlan plan, PlanRunner(checkpoint.config(), options, &checkpoint));
  RETURN_IF_ERROR(LlamaModel::CheckTensors(checkpoint));
  return plan;
}

Result<void> CheckMemory(const ModelConfig& config, const ModelRunnerOptions& options,
                         int64_t cache_bytes) {
  ASSIGN_OR_RETURN(const auto backend, CreateBackend(options.backend));
  return CheckMemory(*backend, LeastWeightBytes(config, options.dtype, *backend), cache_bytes);
}

Result<void> CheckMemory(const ModelPlan& plan) {
  return CheckMemory(*plan.backend, plan.weight_bytes, plan.pools.bytes);
}

Result<KvPoolPlan> PlanFurtherCache(const ModelConfig& config, const EngineOptions& engine,
                                    const KvCacheOptions& kv_cache, const RunnerLimits& limits) {
  ModelPlan plan{.engine = engine};
  // Devices order codes differently, in the same number of bytes.
  RETURN_IF_ERROR(PlanNarrowCache(config, kv_cache, limits, CodeOrder::kRowMajor, &plan));
  return plan.pools;
}

Result<std::unique_ptr<ModelRunner>> ModelRunner::Create(
    std::shared_ptr<const Checkpoint> checkpoint, const ModelRunnerOptions& options) {
  const ModelConfig& config = checkpoint->config();
  ASSIGN_OR_RETURN(ModelPlan plan, PlanRunner(config, options, checkpoint.get()));
  const auto make = [&](Backend* backend, LoadOptions load) {
    return LlamaModel::Load(checkpoint, backend, std::move(load));
  };
  return CreateRunner(std::move(plan), options, make);
}

Result<std::unique_ptr<ModelRunner>> ModelRunner::CreateRandom(const ModelConfig& config,
                                                               uint64_t seed,
                                                               const ModelRunnerOptions& options) {
  ASSIGN_OR_RETURN(ModelPlan plan, PlanRunner(config, options, nullptr));
  const auto make = [&](Backend* backend, LoadOptions load) {
    return LlamaModel::Random(config, seed, backend, std::move(load));
  };
  return CreateRunner(std::move(plan), options, make);
}

}  // namespace innerq
