// HashModel: a decoder of hashes instead of numbers, behind the same batches and pages as a real
// one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <vector>

#include "engine/page_budget.h"
#include "engine/step_model.h"
#include "gtest/gtest.h"

namespace innerq {

inline uint64_t HashOf(uint64_t a, uint64_t b) {
  uint64_t x = (a ^ (b * 0x9e3779b97f4a7c15u)) + 0x632be59bd9b4e019u;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
  return x ^ (x >> 32);
}

// A layout of `layers` equal layers with 3-bit keys and values, pages of 32, one sink page.
inline KvLayout TestLayout(bool quantized = true, int64_t recent_tokens = 96, bool norms = true,
                           int64_t sink_tokens = 32) {
  KvCacheSpec spec;
  spec.kv_heads = 1;
  spec.head_dim = 32;
  spec.sink_tokens = sink_tokens;
  spec.recent_tokens = recent_tokens;
  QuantSpec codec;
  codec.bits = quantized ? 3 : 16;
  spec.layers.assign(2, {codec, codec, norms});
  return KvLayout::Create(spec, CodeOrder::kRowMajor).value();
}

// The arithmetic of the hash decoder, two layers deep: a row's value in one layer is a hash of all
// it attends to, in the form in which it sees it, and becomes the "key and value" of the next.
namespace hash_decoder {

constexpr int kLayers = 2;
constexpr int64_t kVocab = 96;

inline uint64_t Embed(int32_t token, int64_t position) {
  return HashOf(static_cast<uint64_t>(token) + 1, static_cast<uint64_t>(position) + 1);
}
inline uint64_t Sealed(uint64_t cell, uint64_t norm) { return HashOf(HashOf(cell, norm), 77); }
inline uint64_t Attend(uint64_t sum, uint64_t cell) { return HashOf(sum, cell); }
inline void Logits(uint64_t value, float* logits) {  // [kVocab], in [-3, 3)
  for (int64_t v = 0; v < kVocab; ++v) {
    const uint64_t hash = HashOf(value, static_cast<uint64_t>(v) + 1000);
    logits[v] = static_cast<float>(static_cast<double>(hash >> 11) * 0x1p-53 * 6.0 - 3.0);
  }
}

// The same without pages, batches or chunks: what every schedule must reproduce.
class Oracle {
 public:
  Oracle(const KvLayout& layout, int64_t exact_before)
      : layout_(layout), exact_before_(exact_before) {}

  // Appends a token; returns the logits [kVocab] of its row.
  std::vector<float> Next(int32_t token) {
    const auto position = static_cast<int64_t>(cells_[0].size());
    const PageRange sealed = layout_.SealedPages(position, exact_before_);
    uint64_t value = Embed(token, position);
    for (std::vector<uint64_t>& cells : cells_) {
      cells.push_back(value);
      uint64_t norm = 0;
      if (sealed.size() > 0 && layout_.normalizes_keys()) {
        const PageRange span = layout_.KeyNormPages();
        for (int64_t p = span.begin * layout_.page_tokens(); p < span.end * layout_.page_tokens();
             ++p) {
          norm = HashOf(norm, cells[static_cast<size_t>(p)]);
        }
      }
      uint64_t sum = 0;
      for (int64_t p = 0; p <= position; ++p) {
        const int64_t page = layout_.PageOf(p);
        const uint64_t cell = cells[static_cast<size_t>(p)];
        const bool is_sealed = page >= sealed.begin && page < sealed.end;
        sum = Attend(sum, is_sealed ? Sealed(cell, norm) : cell);
      }
      value = sum;
    }
    std::vector<float> logits(kVocab);
    Logits(value, logits.data());
    return logits;
  }

 private:
  const KvLayout& layout_;
  const int64_t exact_before_;
  std::vector<uint64_t> cells_[kLayers];
};

}  // namespace hash_decoder

// Runs the hash decoder through page tables, as a backend would. A token that is lost, doubled or
// misplaced, a page that is stale, shared, missing or in the wrong form changes the logits.
class HashModel : public StepModel {
 public:
  using Hook = std::function<Result<void>(const ForwardBatch&)>;

  // `hook`, if any, runs at the start of every step; its error is the step's.
  HashModel(KvLayout layout, PageCounts pools, Hook hook = nullptr, int64_t max_logit_rows = 512)
      : layout_(std::move(layout)),
        pools_(pools),
        hook_(std::move(hook)),
        max_logit_rows_(max_logit_rows) {
    const auto tokens = static_cast<size_t>(layout_.page_tokens());
    for (Layer& layer : layers_) {
      layer.open.assign(static_cast<size_t>(pools.open) * tokens, 0xdeadu);
      layer.sealed.assign(static_cast<size_t>(pools.sealed) * tokens, 0xdeadu);
      layer.norms.assign(static_cast<size_t>(pools.norms), 0xdeadu);
    }
  }

  int64_t vocab_size() const override { return hash_decoder::kVocab; }
  const KvLayout& layout() const override { return layout_; }
  int64_t num_open_pages() const override { return pools_.open; }
  int64_t num_sealed_pages() const override { return pools_.sealed; }
  int64_t num_norm_slots() const override { return pools_.norms; }
  int64_t max_logit_rows() const override { return max_logit_rows_; }

  Result<std::span<const float>> Step(const ForwardBatch& batch) override {
    if (hook_) RETURN_IF_ERROR(hook_(batch));
    CheckShape(batch);
    std::vector<uint64_t> values;
    for (size_t row = 0; row < batch.token_ids.size(); ++row) {
      values.push_back(hash_decoder::Embed(batch.token_ids[row], batch.positions[row]));
    }
    for (Layer& layer : layers_) {
      for (const SequenceSlice& slice : batch.slices) Append(slice, values, layer);
      for (const KeyNormItem& item : batch.key_norms) ComputeNorm(item, layer);
      for (const SealItem& item : batch.seals) Seal(item, layer);
      for (const SequenceSlice& slice : batch.slices) Attend(slice, layer, values);
    }
    logits_.resize(batch.logit_rows.size() * hash_decoder::kVocab);
    for (size_t i = 0; i < batch.logit_rows.size(); ++i) {
      hash_decoder::Logits(values[static_cast<size_t>(batch.logit_rows[i])],
                           logits_.data() + i * hash_decoder::kVocab);
    }
    return std::span<const float>(logits_);
  }

 private:
  struct Layer {
    std::vector<uint64_t> open;    // [pages][page_tokens]
    std::vector<uint64_t> sealed;  // [pages][page_tokens]
    std::vector<uint64_t> norms;   // [slots]
  };

  uint64_t& Cell(std::vector<uint64_t>& pool, int64_t page, int64_t t) {
    CHECK(page >= 0, "a page that is not there");
    return pool.at(static_cast<size_t>(page * layout_.page_tokens() + t));
  }

  // Rows, positions and page ids must be consistent, and what is written must belong to one
  // sequence.
  void CheckShape(const ForwardBatch& batch) const {
    int64_t row = 0;
    std::map<int32_t, int> open, sealed, norms;  // sequences that have a page
    std::set<int32_t> written;
    for (const SequenceSlice& slice : batch.slices) {
      ASSERT_EQ(slice.row_begin, row);
      ASSERT_GT(slice.num_rows, 0);
      for (int64_t i = 0; i < slice.num_rows; ++i) {
        ASSERT_EQ(batch.positions[static_cast<size_t>(row + i)], slice.first_position + i);
      }
      row += slice.num_rows;
      ASSERT_EQ(static_cast<int64_t>(slice.pages.size()),
                layout_.PageOf(slice.first_position + slice.num_rows - 1) + 1);
      for (const PageRef& page : slice.pages) {
        ++open[page.open_id];
        ++sealed[page.sealed_id];
      }
      ++norms[slice.norm_id];
      for (size_t page = static_cast<size_t>(layout_.PageOf(slice.first_position));
           page < slice.pages.size(); ++page) {
        written.insert(slice.pages[page].open_id);
      }
    }
    for (const int32_t id : written) EXPECT_EQ(open[id], 1);
    for (const SealItem& item : batch.seals) EXPECT_EQ(sealed[item.sealed_id], 1);
    for (const KeyNormItem& item : batch.key_norms) EXPECT_EQ(norms[item.norm_id], 1);
    ASSERT_EQ(row, batch.num_rows());
    EXPECT_LE(static_cast<int64_t>(batch.logit_rows.size()), max_logit_rows_);
    EXPECT_TRUE(std::is_sorted(batch.logit_rows.begin(), batch.logit_rows.end()));
  }

  void Append(const SequenceSlice& slice, const std::vector<uint64_t>& values, Layer& layer) {
    for (int64_t i = 0; i < slice.num_rows; ++i) {
      const int64_t position = slice.first_position + i;
      const PageRef page = slice.pages[static_cast<size_t>(layout_.PageOf(position))];
      Cell(layer.open, page.open_id, position % layout_.page_tokens()) =
          values[static_cast<size_t>(slice.row_begin + i)];
    }
  }

  void ComputeNorm(const KeyNormItem& item, Layer& layer) {
    uint64_t norm = 0;
    for (const int32_t id : item.open_ids) {
      for (int64_t t = 0; t < layout_.page_tokens(); ++t) {
        norm = HashOf(norm, Cell(layer.open, id, t));
      }
    }
    layer.norms.at(static_cast<size_t>(item.norm_id)) = norm;
  }

  void Seal(const SealItem& item, Layer& layer) {
    const uint64_t norm =
        layout_.normalizes_keys() ? layer.norms.at(static_cast<size_t>(item.norm_id)) : 0;
    for (int64_t t = 0; t < layout_.page_tokens(); ++t) {
      Cell(layer.sealed, item.sealed_id, t) =
          hash_decoder::Sealed(Cell(layer.open, item.open_id, t), norm);
    }
  }

  void Attend(const SequenceSlice& slice, Layer& layer, std::vector<uint64_t>& values) {
    for (int64_t i = 0; i < slice.num_rows; ++i) {
      const int64_t position = slice.first_position + i;
      const PageRange sealed = layout_.SealedPages(position, slice.exact_before);
      uint64_t sum = 0;
      for (int64_t p = 0; p <= position; ++p) {
        const int64_t page = layout_.PageOf(p);
        const PageRef ref = slice.pages[static_cast<size_t>(page)];
        const int64_t t = p % layout_.page_tokens();
        const bool is_sealed = page >= sealed.begin && page < sealed.end;
        sum = hash_decoder::Attend(sum, is_sealed ? Cell(layer.sealed, ref.sealed_id, t)
                                                  : Cell(layer.open, ref.open_id, t));
      }
      values[static_cast<size_t>(slice.row_begin + i)] = sum;
    }
  }

  const KvLayout layout_;
  const PageCounts pools_;
  const Hook hook_;
  const int64_t max_logit_rows_;
  Layer layers_[hash_decoder::kLayers];
  std::vector<float> logits_;
};

}  // namespace innerq
