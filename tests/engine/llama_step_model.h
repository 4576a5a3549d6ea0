// LlamaStepModel: a Llama, small and random or given, with its cache as the engine's StepModel.
#pragma once

#include <filesystem>
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

// What step models may share, if they take turns. Steps have up to 512 rows.
struct LlamaWeights {
  std::unique_ptr<Backend> backend;  // outlives what it allocated
  std::unique_ptr<LlamaModel> model;
};

inline std::shared_ptr<LlamaWeights> WeightsOn(const std::string& variant) {
  auto weights = std::make_shared<LlamaWeights>();
  weights->backend = CreateBackend(OptionsFor(variant)).value();
  return weights;
}

// `format` nullopt: codes of 3 bits.
inline std::shared_ptr<LlamaWeights> RandomWeights(std::unique_ptr<Backend> backend,
                                                   std::optional<WeightFormat> format,
                                                   int64_t max_logit_rows) {
  auto weights = std::make_shared<LlamaWeights>();
  weights->backend = std::move(backend);
  ModelConfig config = TinyLlama();
  if (!format) config.low_bit = LowBitSpec{LowBitScheme::kPow2, 3, 32, 16};
  weights->model = LlamaModel::Random(config, /*seed=*/11, weights->backend.get(),
                                      {.max_rows = 512,
                                       .max_logit_rows = max_logit_rows,
                                       .format = format,
                                       .progress = nullptr,
                                       .observe = nullptr})
                       .value();
  return weights;
}

inline std::shared_ptr<LlamaWeights> RandomWeights(const std::string& variant,
                                                   std::optional<WeightFormat> format,
                                                   int64_t max_logit_rows) {
  return RandomWeights(CreateBackend(OptionsFor(variant)).value(), format, max_logit_rows);
}

// Of a Hugging Face model directory, in the format in which they are stored.
inline std::shared_ptr<LlamaWeights> GivenWeights(const std::string& variant,
                                                  const std::filesystem::path& directory,
                                                  int64_t max_logit_rows) {
  auto weights = WeightsOn(variant);
  weights->model = LlamaModel::Load(Checkpoint::Open(directory).value(), weights->backend.get(),
                                    {.max_rows = 512,
                                     .max_logit_rows = max_logit_rows,
                                     .format = std::nullopt,
                                     .progress = nullptr})
                       .value();
  return weights;
}

class LlamaStepModel : public StepModel {
 public:
  struct Config {
    std::string variant{};
    std::optional<WeightFormat> format{};
    KvCacheOptions cache{};
    PageCounts pools;
    int64_t max_logit_rows = 512;
  };

  explicit LlamaStepModel(const Config& config)
      : LlamaStepModel(RandomWeights(config.variant, config.format, config.max_logit_rows),
                       config) {}
  // Of the variant and format of `weights`, whatever the others say.
  LlamaStepModel(std::shared_ptr<LlamaWeights> weights, const Config& config)
      : weights_(std::move(weights)), max_logit_rows_(config.max_logit_rows) {
    Backend* backend = weights_->backend.get();
    KvLayout layout =
        KvLayout::Create(ResolveKvCacheSpec(config.cache, weights_->model->config()).value(),
                         backend->code_order())
            .value();
    KvPoolPlan plan;
    plan.open_pages = config.pools.open;
    plan.sealed_pages = config.pools.sealed;
    plan.norm_slots = config.pools.norms;
    cache_ = KvCache::Create(backend, std::move(layout), plan).value();
  }

  int64_t vocab_size() const override { return weights_->model->config().vocab_size; }
  const KvLayout& layout() const override { return cache_->layout(); }
  int64_t num_open_pages() const override { return cache_->plan().open_pages; }
  int64_t num_sealed_pages() const override { return cache_->plan().sealed_pages; }
  int64_t num_norm_slots() const override { return cache_->plan().norm_slots; }
  int64_t max_logit_rows() const override { return max_logit_rows_; }

  Result<std::span<const float>> Step(const ForwardBatch& batch) override {
    const ConstTensorView view = weights_->model->Forward(batch, layout(), cache_->layers());
    RETURN_IF_ERROR(weights_->backend->Synchronize());
    return std::span(view.As<float>(), static_cast<size_t>(view.shape.num_elements()));
  }
  std::span<const TopLogit> top_logits(int64_t row) const override {
    return weights_->model->top_logits(row);
  }

 private:
  const std::shared_ptr<LlamaWeights> weights_;  // first: their device outlives the cache
  std::unique_ptr<KvCache> cache_;
  const int64_t max_logit_rows_;
};

}  // namespace innerq
