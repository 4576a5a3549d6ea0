#include "engine/model_runner.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "engine/page_budget.h"
#include "kernels/backend.h"
#include "models/llama.h"

namespace innerq {
namespace {

class LlamaRunner final : public ModelRunner {
 public:
  // The backend first, so that it outlives what it allocated.
  struct Parts {
    std::unique_ptr<Backend> backend;
    std::unique_ptr<LlamaModel> model;
    std::unique_ptr<KvCache> cache;
  };

  LlamaRunner(Parts parts, const EngineOptions& options, ModelReport report)
      : parts_(std::move(parts)), options_(options), report_(std::move(report)) {}

  int64_t vocab_size() const override { return parts_.model->config().vocab_size; }
  const KvLayout& layout() const override { return parts_.cache->layout(); }
  int64_t num_open_pages() const override { return parts_.cache->plan().open_pages; }
  int64_t num_sealed_pages() const override { return parts_.cache->plan().sealed_pages; }
  int64_t num_norm_slots() const override { return parts_.cache->plan().norm_slots; }
  const ModelReport& report() const override { return report_; }
  const EngineOptions& engine_options() const override { return options_; }

  Result<std::span<const float>> Step(const ForwardBatch& batch) override {
    const ConstTensorView logits = parts_.model->Forward(batch, layout(), parts_.cache->layers());
    RETURN_IF_ERROR(parts_.backend->Synchronize());
    return std::span(logits.As<float>(), static_cast<size_t>(logits.shape.num_elements()));
  }

 private:
  Parts parts_;
  const EngineOptions options_;
  const ModelReport report_;
};

// Sizes the pools; sets `engine.max_context` where it is open.
Result<KvPoolPlan> Plan(const KvLayout& layout, const KvCacheOptions& cache, int64_t max_positions,
                        EngineOptions& engine) {
  if (engine.max_context > max_positions) {
    return InvalidArgument("max_context is " + std::to_string(engine.max_context) +
                               ", the model's longest context is " + std::to_string(max_positions),
                           "scheduler.max_context");
  }
  // Without a wish of the user, at least a context that reaches the first sealed page.
  const int64_t windows = OpenWindowPages(layout) * layout.page_tokens();
  const int64_t min_context =
      engine.max_context > 0 ? engine.max_context : std::min(max_positions, windows);
  ASSIGN_OR_RETURN(const KvPoolPlan plan, PlanKvPools(layout, cache, engine.max_sequences,
                                                      engine.max_batch_tokens, min_context));
  if (engine.max_context == 0) {
    engine.max_context = std::min(max_positions, plan.tokens_that_fit);
  }
  return plan;
}

}  // namespace

Result<std::unique_ptr<ModelRunner>> ModelRunner::Create(
    std::shared_ptr<const Checkpoint> checkpoint, const ModelRunnerOptions& options) {
  const ModelConfig config = checkpoint->config();
  EngineOptions engine = options.engine;
  engine.exact_prefill = options.kv_cache.exact_prefill;

  LlamaRunner::Parts parts;
  ASSIGN_OR_RETURN(parts.backend, CreateBackend(options.backend));
  Backend* backend = parts.backend.get();
  // The cache is planned before the weights are read: wrong options fail at once.
  ASSIGN_OR_RETURN(const KvCacheSpec spec, ResolveKvCacheSpec(options.kv_cache, config));
  ASSIGN_OR_RETURN(KvLayout layout, KvLayout::Create(spec, backend->code_order()));
  ASSIGN_OR_RETURN(const KvPoolPlan plan,
                   Plan(layout, options.kv_cache, config.max_positions, engine));
  ASSIGN_OR_RETURN(parts.cache, KvCache::Create(backend, std::move(layout), plan));
  const int64_t max_logit_rows = std::min(engine.max_sequences, engine.max_batch_tokens);
  ASSIGN_OR_RETURN(
      parts.model,
      LlamaModel::Load(std::move(checkpoint), backend, engine.max_batch_tokens, max_logit_rows,
                       {.format = options.dtype, .progress = options.progress}));

  const KvLayout& shape = parts.cache->layout();
  const auto page_tokens = static_cast<double>(shape.page_tokens());
  ModelReport report{
      .backend = std::string(backend->name()),
      .parameters = config.num_parameters(),
      .weight_bytes = parts.model->weight_bytes(),
      .open_page_bytes = shape.open_page_bytes(),
      .sealed_page_bytes = shape.sealed_page_bytes(),
      .pools = plan,
      .sealed_bits_per_element = shape.sealed_bits_per_element(),
      .open_bytes_per_token = static_cast<double>(shape.open_page_bytes()) / page_tokens,
      .sealed_bytes_per_token = static_cast<double>(shape.sealed_page_bytes()) / page_tokens,
      .max_context = engine.max_context};
  return std::unique_ptr<ModelRunner>(
      std::make_unique<LlamaRunner>(std::move(parts), engine, std::move(report)));
}

}  // namespace innerq
