// StepHarness: runs a LlamaModel over a cache of its own, without an engine.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <vector>

#include "models/llama.h"

namespace innerq {

// Cache options of every layer of a model. The default keeps 16 bits: nothing is ever sealed.
inline KvCacheSpec UniformCacheSpec(const ModelConfig& config, QuantSpec key = {},
                                    QuantSpec value = {}, bool normalize_keys = false) {
  KvCacheSpec spec;
  spec.kv_heads = config.num_kv_heads;
  spec.head_dim = config.head_dim;
  spec.layers.assign(static_cast<size_t>(config.num_layers), {key, value, normalize_keys});
  return spec;
}

// Owns the pools of `max_sequences` sequences of `max_tokens` tokens each, and feeds the model. No
// page is ever recycled: page i of sequence s is block s * pages_per_sequence + i of both pools,
// and the key norm of sequence s is slot s. Pages are sealed, and norms computed, in the step whose
// queries first need them.
class StepHarness {
 public:
  // Tokens to append to one sequence.
  struct Feed {
    int64_t sequence = 0;
    std::vector<int32_t> tokens;
  };

  // Throws a GoogleTest failure and returns null if the layout or the memory cannot be had.
  static std::unique_ptr<StepHarness> Create(Backend* backend, const KvCacheSpec& spec,
                                             int64_t max_tokens, int64_t max_sequences = 1) {
    auto harness = std::unique_ptr<StepHarness>(new StepHarness(backend));
    const Result<void> status = harness->Allocate(spec, max_tokens, max_sequences);
    if (!status.ok()) {
      ADD_FAILURE() << status.error().message;
      return nullptr;
    }
    return harness;
  }

  const KvLayout& layout() const { return layout_; }
  const std::vector<PagedKvView>& layers() const { return views_; }
  int64_t num_computed(int64_t sequence) const { return computed_[static_cast<size_t>(sequence)]; }

  // Appends tokens to sequences in one step; returns the logits [V] of every row, in order.
  std::vector<std::vector<float>> Step(LlamaModel& model, const std::vector<Feed>& feeds) {
    const ForwardBatch batch = MakeBatch(feeds);
    const ConstTensorView logits = model.Forward(batch, layout_, views_);
    const Result<void> status = backend_->Synchronize();
    EXPECT_TRUE(status.ok()) << (status.ok() ? "" : status.error().message);
    std::vector<std::vector<float>> rows;
    for (int64_t r = 0; r < logits.shape[0]; ++r) {
      const float* row = logits.As<float>() + r * logits.shape[1];
      rows.emplace_back(row, row + logits.shape[1]);
    }
    return rows;
  }

  // Appends `tokens` to one sequence in steps of `chunk`; returns the logits of every token.
  std::vector<std::vector<float>> Run(LlamaModel& model, std::span<const int32_t> tokens,
                                      int64_t chunk, int64_t sequence = 0) {
    std::vector<std::vector<float>> logits;
    while (!tokens.empty()) {
      const auto part = tokens.first(std::min(tokens.size(), static_cast<size_t>(chunk)));
      for (std::vector<float>& row : Step(model, {{sequence, {part.begin(), part.end()}}})) {
        logits.push_back(std::move(row));
      }
      tokens = tokens.subspan(part.size());
    }
    return logits;
  }

 private:
  explicit StepHarness(Backend* backend) : backend_(backend) {}

  Result<void> Allocate(const KvCacheSpec& spec, int64_t max_tokens, int64_t max_sequences) {
    ASSIGN_OR_RETURN(layout_, KvLayout::Create(spec, backend_->code_order()));
    pages_per_sequence_ = CeilDiv(max_tokens, layout_.page_tokens());
    const int64_t pages = pages_per_sequence_ * max_sequences;
    computed_.assign(static_cast<size_t>(max_sequences), 0);
    sealed_.assign(static_cast<size_t>(max_sequences), 0);
    ASSIGN_OR_RETURN(open_, backend_->Allocate(layout_.open_pool_bytes(pages)));
    ASSIGN_OR_RETURN(sealed_pool_, backend_->Allocate(layout_.sealed_pool_bytes(pages)));
    ASSIGN_OR_RETURN(norms_, backend_->Allocate(layout_.key_norm_bytes() * max_sequences));
    std::byte* open = open_.data();
    std::byte* sealed = sealed_pool_.data();
    std::byte* norms = norms_.data();
    for (int64_t i = 0; i < layout_.num_layers(); ++i) {
      const KvLayerLayout& layer = layout_.layer(i);
      views_.push_back({&layer, open, sealed, reinterpret_cast<float*>(norms)});
      open += pages * layer.open_page_bytes();
      sealed += pages * layer.sealed_page_bytes();
      norms += max_sequences * layer.kv_heads * layer.head_dim * DTypeBytes(DType::kF32);
    }
    return {};
  }

  int32_t Block(int64_t sequence, int64_t page) const {
    return static_cast<int32_t>(sequence * pages_per_sequence_ + page);
  }

  ForwardBatch MakeBatch(const std::vector<Feed>& feeds) {
    ForwardBatch batch;
    batch.page_tables.reserve(feeds.size());  // slices point into it
    for (const Feed& feed : feeds) {
      int64_t& computed = computed_[static_cast<size_t>(feed.sequence)];
      SequenceSlice slice;
      slice.row_begin = batch.num_rows();
      slice.num_rows = static_cast<int64_t>(feed.tokens.size());
      slice.first_position = computed;
      for (const int32_t token : feed.tokens) {
        batch.token_ids.push_back(token);
        batch.positions.push_back(computed++);
      }
      AddSeals(feed.sequence, batch);
      const int64_t num_sealed = sealed_[static_cast<size_t>(feed.sequence)];
      auto& table = batch.page_tables.emplace_back();
      for (int64_t page = 0; page <= layout_.PageOf(computed - 1); ++page) {
        const bool is_sealed = page >= layout_.sink_pages() && page < num_sealed;
        const int32_t block = Block(feed.sequence, page);
        table.push_back({block, is_sealed ? block : -1});
      }
      slice.pages = table;
      if (layout_.normalizes_keys() && num_sealed > 0) {
        slice.norm_id = static_cast<int32_t>(feed.sequence);
      }
      batch.slices.push_back(slice);
    }
    batch.logit_rows.resize(static_cast<size_t>(batch.num_rows()));
    std::iota(batch.logit_rows.begin(), batch.logit_rows.end(), 0);
    return batch;
  }

  // Seals what the last position of the sequence reads as sealed.
  void AddSeals(int64_t sequence, ForwardBatch& batch) {
    int64_t& sealed = sealed_[static_cast<size_t>(sequence)];
    const PageRange wanted = layout_.SealedPages(computed_[static_cast<size_t>(sequence)] - 1);
    if (wanted.size() == 0) return;
    const int32_t norm_id = layout_.normalizes_keys() ? static_cast<int32_t>(sequence) : -1;
    if (sealed == 0 && norm_id >= 0) {
      KeyNormItem item{norm_id, {}};
      const PageRange pages = layout_.KeyNormPages();
      for (int64_t p = pages.begin; p < pages.end; ++p) {
        item.open_ids.push_back(Block(sequence, p));
      }
      batch.key_norms.push_back(item);
    }
    for (int64_t page = std::max(sealed, wanted.begin); page < wanted.end; ++page) {
      batch.seals.push_back({Block(sequence, page), Block(sequence, page), norm_id});
    }
    sealed = wanted.end;
  }

  Backend* backend_;
  KvLayout layout_;
  int64_t pages_per_sequence_ = 0;
  Buffer open_, sealed_pool_, norms_;
  std::vector<PagedKvView> views_;  // one a layer
  std::vector<int64_t> computed_;   // tokens in the cache, a sequence
  std::vector<int64_t> sealed_;     // end of the sealed pages, a sequence; 0 before the first
};

}  // namespace innerq
