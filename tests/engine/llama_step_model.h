// LlamaStepModel: a small random Llama with its cache as the engine's StepModel.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "engine/kv_cache.h"
#include "engine/page_budget.h"
#include "engine/step_model.h"
#include "models/llama.h"

namespace innerq {

inline ModelConfig TinyLlama() {
  ModelConfig config;
  config.hidden_size = 256;
  config.intermediate_size = 512;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.vocab_size = 256;
  config.max_positions = 1024;
  return config;
}

// Of a variant of the CPU, or "cuda".
inline BackendOptions OptionsFor(const std::string& variant) {
  if (variant == "cuda") return {.device = "cuda"};
  return {.device = "cpu", .variant = variant, .threads = 2};
}

// Why a variant cannot be had here, or an empty text.
inline std::string WhyAbsent(const std::string& variant) {
  const auto backend = CreateBackend(OptionsFor(variant));
  return backend.ok() ? "" : backend.error().message;
}

class LlamaStepModel : public StepModel {
 public:
  struct Config {
    std::string variant;
    WeightFormat format;
    KvCacheOptions cache;
    PageCounts pools;
    int64_t max_logit_rows;
  };

  explicit LlamaStepModel(const Config& config) : max_logit_rows_(config.max_logit_rows) {
    backend_ = CreateBackend(OptionsFor(config.variant)).value();
    Backend* backend = backend_.get();
    model_ =
        LlamaModel::Random(TinyLlama(), config.format, /*seed=*/11, backend, 512, max_logit_rows_)
            .value();
    KvLayout layout = KvLayout::Create(ResolveKvCacheSpec(config.cache, TinyLlama()).value(),
                                       backend->code_order())
                          .value();
    KvPoolPlan plan;
    plan.open_pages = config.pools.open;
    plan.sealed_pages = config.pools.sealed;
    plan.norm_slots = config.pools.norms;
    cache_ = KvCache::Create(backend, std::move(layout), plan).value();
  }

  int64_t vocab_size() const override { return TinyLlama().vocab_size; }
  const KvLayout& layout() const override { return cache_->layout(); }
  int64_t num_open_pages() const override { return cache_->plan().open_pages; }
  int64_t num_sealed_pages() const override { return cache_->plan().sealed_pages; }
  int64_t num_norm_slots() const override { return cache_->plan().norm_slots; }
  int64_t max_logit_rows() const override { return max_logit_rows_; }

  Result<std::span<const float>> Step(const ForwardBatch& batch) override {
    const ConstTensorView view = model_->Forward(batch, layout(), cache_->layers());
    RETURN_IF_ERROR(backend_->Synchronize());
    return std::span(view.As<float>(), static_cast<size_t>(view.shape.num_elements()));
  }

 private:
  std::unique_ptr<Backend> backend_;  // outlives what it allocated
  std::unique_ptr<LlamaModel> model_;
  std::unique_ptr<KvCache> cache_;
  const int64_t max_logit_rows_;
};

}  // namespace innerq
