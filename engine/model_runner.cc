#include "engine/model_runner.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "engine/page_budget.h"
#include "kernels/backend.h"
#include "models/llama.h"

namespace innerq {
namespace {

// Rows of a step, beyond one per sequence, that may have logits: what scores a prompt. More would
// take memory (4 bytes per row and token of the vocabulary) and save little: so many rows already
// cost more than reading the weights once.
constexpr int64_t kScoreRows = 128;

int64_t MaxLogitRows(const EngineOptions& options) {
  return std::min(options.max_sequences + kScoreRows, options.max_batch_tokens);
}

bool HasHybridGroups(const KvLayerLayout& layer) {
  return layer.key.mode == QuantMode::kHybrid || layer.value.mode == QuantMode::kHybrid;
}

class LlamaRunner final : public ModelRunner {
 public:
  // The backend first, so that it outlives what it allocated.
  struct Parts {
    std::unique_ptr<Backend> backend;
    std::unique_ptr<LlamaModel> model;
    std::unique_ptr<KvCache> cache;
    Buffer page;  // one sealed page of all layers, for the host; empty if it can read the cache
  };

  LlamaRunner(Parts parts, const EngineOptions& options, ModelReport report)
      : parts_(std::move(parts)), options_(options), report_(std::move(report)) {}

  int64_t vocab_size() const override { return parts_.model->config().vocab_size; }
  const KvLayout& layout() const override { return parts_.cache->layout(); }
  int64_t num_open_pages() const override { return parts_.cache->plan().open_pages; }
  int64_t num_sealed_pages() const override { return parts_.cache->plan().sealed_pages; }
  int64_t num_norm_slots() const override { return parts_.cache->plan().norm_slots; }
  int64_t max_logit_rows() const override { return MaxLogitRows(options_); }
  std::vector<LayerGroups> sealed_groups() const override { return sealed_groups_; }
  const ModelReport& report() const override { return report_; }
  const EngineOptions& engine_options() const override { return options_; }

  Result<std::span<const float>> Step(const ForwardBatch& batch) override {
    const ConstTensorView logits = parts_.model->Forward(batch, layout(), parts_.cache->layers());
    RETURN_IF_ERROR(parts_.backend->Synchronize());
    RETURN_IF_ERROR(CountGroups(batch));
    return std::span(logits.As<float>(), static_cast<size_t>(logits.shape.num_elements()));
  }

 private:
  Result<void> CountGroups(const ForwardBatch& batch) {
    const std::vector<PagedKvView>& layers = parts_.cache->layers();
    sealed_groups_.resize(layers.size());
    for (const SealItem& seal : batch.seals) {
      if (parts_.page.bytes() > 0) RETURN_IF_ERROR(ReadPage(seal.sealed_id));
      std::byte* read = parts_.page.data();
      for (size_t i = 0; i < layers.size(); ++i) {
        PagedKvView view = layers[i];
        int64_t id = seal.sealed_id;
        if (parts_.page.bytes() > 0) {
          view.sealed_pages = read;
          read += view.layout->sealed_page_bytes();
          id = 0;
        }
        const LayerGroups page = CountSealedGroups(view, id);
        sealed_groups_[i].key.Add(page.key);
        sealed_groups_[i].value.Add(page.value);
      }
    }
    return {};
  }

  // Copies a sealed page to host memory, layer after layer. Only hybrid layers have anything in it
  // that must be counted.
  Result<void> ReadPage(int64_t sealed_id) {
    std::byte* to = parts_.page.data();
    for (const PagedKvView& layer : parts_.cache->layers()) {
      const int64_t bytes = layer.layout->sealed_page_bytes();
      if (HasHybridGroups(*layer.layout)) {
        parts_.backend->ReadToHost(layer.SealedHead(sealed_id, 0), bytes, to);
      }
      to += bytes;
    }
    return parts_.backend->Synchronize();
  }

  Parts parts_;
  const EngineOptions options_;
  const ModelReport report_;
  std::vector<LayerGroups> sealed_groups_;  // since the start, per layer
};

}  // namespace

Result<ModelPlan> PlanModel(const ModelConfig& config, const ModelRunnerOptions& options) {
  ModelPlan plan{.engine = options.engine};
  plan.engine.exact_prefill = options.kv_cache.exact_prefill;
  if (plan.engine.max_context > config.max_positions) {
    return InvalidArgument("max_context is " + std::to_string(plan.engine.max_context) +
                               ", the model's longest context is " +
                               std::to_string(config.max_positions),
                           "scheduler.max_context");
  }
  ASSIGN_OR_RETURN(plan.backend, CreateBackend(options.backend));
  ASSIGN_OR_RETURN(const KvCacheSpec spec, ResolveKvCacheSpec(options.kv_cache, config));
  ASSIGN_OR_RETURN(plan.layout, KvLayout::Create(spec, plan.backend->code_order()));
  // Without a wish of the user, at least a context that reaches the first sealed page.
  const int64_t windows = OpenWindowPages(plan.layout) * plan.layout.page_tokens();
  const int64_t min_context = plan.engine.max_context > 0 ? plan.engine.max_context
                                                          : std::min(config.max_positions, windows);
  ASSIGN_OR_RETURN(plan.pools, PlanKvPools(plan.layout, options.kv_cache, plan.engine.max_sequences,
                                           plan.engine.max_batch_tokens, min_context));
  if (plan.engine.max_context == 0) {
    plan.engine.max_context = std::min(config.max_positions, plan.pools.tokens_that_fit);
  }
  return plan;
}

Result<std::unique_ptr<ModelRunner>> ModelRunner::Create(
    std::shared_ptr<const Checkpoint> checkpoint, const ModelRunnerOptions& options) {
  const ModelConfig config = checkpoint->config();
  ASSIGN_OR_RETURN(ModelPlan plan, PlanModel(config, options));
  const EngineOptions& engine = plan.engine;

  LlamaRunner::Parts parts;
  parts.backend = std::move(plan.backend);
  Backend* backend = parts.backend.get();
  const int64_t max_pages = CeilDiv(engine.max_context, plan.layout.page_tokens());
  ASSIGN_OR_RETURN(parts.cache, KvCache::Create(backend, std::move(plan.layout), plan.pools));
  ASSIGN_OR_RETURN(parts.model, LlamaModel::Load(std::move(checkpoint), backend,
                                                 {.max_rows = engine.max_batch_tokens,
                                                  .max_logit_rows = MaxLogitRows(engine),
                                                  .format = options.dtype,
                                                  .progress = options.progress,
                                                  .max_pages = engine.max_sequences * max_pages}));

  const KvLayout& shape = parts.cache->layout();
  if (shape.quantized() && !backend->host_visible()) {
    ASSIGN_OR_RETURN(parts.page, backend->AllocateForHost(shape.sealed_page_bytes()));
  }
  const auto page_tokens = static_cast<double>(shape.page_tokens());
  ModelReport report{
      .backend = std::string(backend->name()),
      .parameters = config.num_parameters(),
      .weight_bytes = parts.model->weight_bytes(),
      .open_page_bytes = shape.open_page_bytes(),
      .sealed_page_bytes = shape.sealed_page_bytes(),
      .pools = plan.pools,
      .sealed_bits_per_element = shape.sealed_bits_per_element(),
      .open_bytes_per_token = static_cast<double>(shape.open_page_bytes()) / page_tokens,
      .sealed_bytes_per_token = static_cast<double>(shape.sealed_page_bytes()) / page_tokens,
      .max_context = engine.max_context};
  return std::unique_ptr<ModelRunner>(
      std::make_unique<LlamaRunner>(std::move(parts), engine, std::move(report)));
}

}  // namespace innerq
