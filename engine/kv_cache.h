// KvCache: the page memory of all layers, and the options that shape it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/page_budget.h"
#include "kernels/backend.h"
#include "kernels/paged_kv.h"
#include "models/checkpoint.h"

namespace innerq {

// Single keys that replace those of the base codec in a range of layers.
struct QuantOverride {
  std::optional<int> bits{};
  std::optional<QuantMode> mode{};
  std::optional<QuantAxis> axis{};
  std::optional<int> group_size{};
  std::optional<QuantCodec> codec{};

  bool operator==(const QuantOverride&) const = default;
};
struct KvLayerOverride {
  int64_t first_layer = 0;
  int64_t last_layer = 0;  // inclusive
  QuantOverride key{};
  std::optional<bool> normalize_keys{};
  QuantOverride value{};
};

// Configuration "kv_cache".
struct KvCacheOptions {
  // Both pools and the key norms together. nullopt, "auto": what its sequences can make use of, and
  // the same again for cached prefixes, as far as the device has it (see PlanModel).
  std::optional<int64_t> memory_bytes;
  int64_t page_tokens = 32;
  int64_t sink_tokens = 32;
  int64_t recent_tokens = 96;
  bool exact_prefill = false;
  bool prefix_cache = true;  // of no effect under exact prefill
  QuantSpec key{.bits = 3};
  QuantSpec value{.bits = 3};
  bool normalize_keys = true;
  std::vector<KvLayerOverride> layers;
};

// Applies the overrides, in order, to a model's layers. Errors: invalid argument, with the key's
// path in `param`, for a range beyond the model or a layer that cannot be stored.
Result<KvCacheSpec> ResolveKvCacheSpec(const KvCacheOptions& options, const ModelConfig& model);

// How many pages of each kind the memory buys.
struct KvPoolPlan {
  int64_t open_pages = 0;
  int64_t sealed_pages = 0;
  int64_t norm_slots = 0;
  int64_t bytes = 0;            // of all three
  int64_t tokens_that_fit = 0;  // cached by one sequence that grows alone, windows included
};

// Splits the memory, `options.memory_bytes`, which must be there: every one of `max_sequences`
// should find its F16 window and one step's rows their open pages, the rest is for sealed pages;
// when memory is short both pools shrink together. With a prefix cache a quarter of that rest is
// open pages as well, and there are key norms for as many states as could fill the memory with
// windows: prefixes that nobody uses keep theirs. So a sequence that grows alone reaches less; who
// needs more says so by `min_context`. Errors: resource exhausted, with bytes needed and given, if
// not even one sequence of `min_context` tokens fits.
Result<KvPoolPlan> PlanKvPools(const KvLayout& layout, const KvCacheOptions& options,
                               int64_t max_sequences, int64_t max_batch_tokens,
                               int64_t min_context);

// The same plan with at most so many pages and key norms.
KvPoolPlan TrimKvPools(const KvLayout& layout, const KvPoolPlan& plan, const PageCounts& most,
                       bool exact_prefill);

// Owns the pools. Memory is allocated once, through the backend, and zeroed.
class KvCache {
 public:
  static Result<std::unique_ptr<KvCache>> Create(Backend* backend, KvLayout layout,
                                                 const KvPoolPlan& plan);
  const KvLayout& layout() const { return layout_; }
  const KvPoolPlan& plan() const { return plan_; }
  const std::vector<PagedKvView>& layers() const { return views_; }

 private:
  KvLayout layout_;
  KvPoolPlan plan_;
  Buffer open_, sealed_, norms_;
  std::vector<PagedKvView> views_;
};

}  // namespace innerq
