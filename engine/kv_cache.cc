#include "engine/kv_cache.h"

#include <algorithm>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

namespace innerq {
namespace {

void Apply(const QuantOverride& from, QuantSpec& to) {
  to.bits = from.bits.value_or(to.bits);
  to.mode = from.mode.value_or(to.mode);
  to.axis = from.axis.value_or(to.axis);
  to.group_size = from.group_size.value_or(to.group_size);
  to.codec = from.codec.value_or(to.codec);
}

int64_t PoolBytes(const KvLayout& layout, const PageCounts& pools) {
  return layout.open_pool_bytes(pools.open) +
         (layout.quantized() ? layout.sealed_pool_bytes(pools.sealed) : 0) +
         pools.norms * layout.key_norm_bytes();
}

// Splits `memory` bytes, of which `need` takes no more than there are.
PageCounts Split(const KvLayout& layout, const KvCacheOptions& options, int64_t memory,
                 const PageCounts& need, int64_t max_sequences, int64_t max_batch_tokens) {
  constexpr int64_t kMaxPages = std::numeric_limits<int32_t>::max();  // block ids are 32-bit
  const bool shares = options.prefix_cache && !options.exact_prefill;
  const int64_t open_bytes = layout.open_page_bytes();
  const int64_t sealed_bytes = layout.sealed_page_bytes();
  PageCounts pools;
  if (layout.normalizes_keys()) {
    // Not more than the states that could hold their windows if all memory were open pages.
    const int64_t states = memory / open_bytes / (OpenWindowPages(layout) - 1);
    const int64_t spare = (memory - PoolBytes(layout, need)) / layout.key_norm_bytes();
    pools.norms = std::min({max_sequences + (shares ? states : 0), std::max(states, need.norms),
                            need.norms + spare, kMaxPages});
  }
  const int64_t bytes = memory - PoolBytes(layout, {0, 0, pools.norms});
  if (!layout.quantized()) {
    pools.open = std::min(bytes / open_bytes, kMaxPages);
    return pools;
  }
  // Under exact prefill a prompt is open as a whole before it is sealed as a whole. Otherwise open
  // pages beyond all windows and one step's rows only hold states of cached prefixes. Each has a
  // window of its own, in bytes some 700 tokens of 3 bits: these get a quarter of what is left. All
  // open pages together never get more than half.
  const int64_t windows =
      max_sequences * OpenWindowPages(layout) + CeilDiv(max_batch_tokens, layout.page_tokens());
  const int64_t cached = shares ? std::max<int64_t>(bytes / open_bytes - windows, 0) / 4 : 0;
  const int64_t share = options.exact_prefill ? bytes / (open_bytes + sealed_bytes)
                                              : std::min(windows + cached, bytes / 2 / open_bytes);
  const int64_t most = (bytes - need.sealed * sealed_bytes) / open_bytes;
  pools.open = std::min({std::max(share, need.open), most, kMaxPages});
  pools.sealed = std::min((bytes - pools.open * open_bytes) / sealed_bytes, kMaxPages);
  return pools;
}

// The longest sequence for which the pools suffice, whatever part of it is prompt.
int64_t LongestSequence(const KvLayout& layout, const PageCounts& pools, bool exact_prefill) {
  int64_t fits = 0;
  int64_t too_long = (pools.open + pools.sealed + 1) * layout.page_tokens() + 1;
  while (too_long - fits > 1) {
    const int64_t middle = fits + (too_long - fits) / 2;
    (WorstPeakPages(layout, middle, exact_prefill).FitsIn(pools) ? fits : too_long) = middle;
  }
  return fits;
}

// Whether a layer can be stored. The error's param is a path below the last override that shaped
// the keys or values to blame.
Result<void> CheckLayer(KvCacheSpec spec, size_t index, const std::vector<KvLayerOverride>& all) {
  spec.layers = {spec.layers[index]};
  const auto layout = KvLayout::Create(spec, CodeOrder::kRowMajor);
  if (layout) return {};
  Error error = layout.error();
  constexpr std::string_view kBase = "kv_cache";
  const auto layer = static_cast<int64_t>(index);
  for (size_t i = all.size(); i-- > 0;) {
    if (layer < all[i].first_layer || layer > all[i].last_layer) continue;
    const bool key = error.param.starts_with("kv_cache.key.") && all[i].key != QuantOverride{};
    const bool value =
        error.param.starts_with("kv_cache.value.") && all[i].value != QuantOverride{};
    if (!key && !value) continue;
    error.param.replace(0, kBase.size(), "kv_cache.layers." + std::to_string(i));
    break;
  }
  return error;
}

}  // namespace

Result<KvCacheSpec> ResolveKvCacheSpec(const KvCacheOptions& options, const ModelConfig& model) {
  KvCacheSpec spec{.kv_heads = model.num_kv_heads,
                   .head_dim = model.head_dim,
                   .page_tokens = options.page_tokens,
                   .sink_tokens = options.sink_tokens,
                   .recent_tokens = options.recent_tokens,
                   .layers = {}};
  spec.layers.assign(static_cast<size_t>(model.num_layers),
                     {options.key, options.value, options.normalize_keys});
  for (size_t i = 0; i < options.layers.size(); ++i) {
    const KvLayerOverride& layers = options.layers[i];
    if (layers.first_layer < 0 || layers.first_layer > layers.last_layer ||
        layers.last_layer >= model.num_layers) {
      return InvalidArgument(
          "layers " + std::to_string(layers.first_layer) + "-" + std::to_string(layers.last_layer) +
              " are not a range of the model's layers 0-" + std::to_string(model.num_layers - 1),
          "kv_cache.layers." + std::to_string(i) + ".range");
    }
    for (int64_t layer = layers.first_layer; layer <= layers.last_layer; ++layer) {
      KvCacheSpec::Layer& to = spec.layers[static_cast<size_t>(layer)];
      Apply(layers.key, to.key);
      Apply(layers.value, to.value);
      to.normalize_keys = layers.normalize_keys.value_or(to.normalize_keys);
    }
  }
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    RETURN_IF_ERROR(CheckLayer(spec, i, options.layers));
  }
  return spec;
}

Result<KvPoolPlan> PlanKvPools(const KvLayout& layout, const KvCacheOptions& options,
                               int64_t max_sequences, int64_t max_batch_tokens,
                               int64_t min_context) {
  CHECK(options.memory_bytes.has_value(), "memory that nobody has chosen yet");
  const int64_t memory = *options.memory_bytes;
  const PageCounts need = WorstPeakPages(layout, min_context, options.exact_prefill);
  if (PoolBytes(layout, need) > memory) {
    return Error{ErrorCode::kResourceExhausted,
                 "one sequence of " + std::to_string(min_context) + " tokens needs " +
                     std::to_string(PoolBytes(layout, need)) + " bytes of cache (" +
                     ToString(need) + "); there are " + std::to_string(memory),
                 "kv_cache.memory"};
  }
  const PageCounts pools = Split(layout, options, memory, need, max_sequences, max_batch_tokens);
  CHECK(need.FitsIn(pools) && PoolBytes(layout, pools) <= memory,
        "the split must honour the need and the memory");
  return KvPoolPlan{.open_pages = pools.open,
                    .sealed_pages = pools.sealed,
                    .norm_slots = pools.norms,
                    .bytes = PoolBytes(layout, pools),
                    .tokens_that_fit = LongestSequence(layout, pools, options.exact_prefill)};
}

KvPoolPlan TrimKvPools(const KvLayout& layout, const KvPoolPlan& plan, const PageCounts& most,
                       bool exact_prefill) {
  const PageCounts pools{.open = std::min(plan.open_pages, most.open),
                         .sealed = std::min(plan.sealed_pages, most.sealed),
                         .norms = std::min(plan.norm_slots, most.norms)};
  return {.open_pages = pools.open,
          .sealed_pages = pools.sealed,
          .norm_slots = pools.norms,
          .bytes = PoolBytes(layout, pools),
          .tokens_that_fit = LongestSequence(layout, pools, exact_prefill)};
}

Result<std::unique_ptr<KvCache>> KvCache::Create(Backend* backend, KvLayout layout,
                                                 const KvPoolPlan& plan) {
  CHECK(layout.order() == backend->code_order(), "a layout in another backend's order");
  const auto allocate = [backend](int64_t bytes) -> Result<Buffer> {
    auto buffer = backend->Allocate(bytes);
    if (buffer) return buffer;
    return Error{buffer.error().code, buffer.error().message, "kv_cache.memory"};
  };
  auto cache = std::make_unique<KvCache>();
  cache->layout_ = std::move(layout);
  cache->plan_ = plan;
  const KvLayout& shape = cache->layout_;
  ASSIGN_OR_RETURN(cache->open_, allocate(shape.open_pool_bytes(plan.open_pages)));
  if (shape.quantized()) {
    ASSIGN_OR_RETURN(cache->sealed_, allocate(shape.sealed_pool_bytes(plan.sealed_pages)));
  }
  if (plan.norm_slots > 0) {
    ASSIGN_OR_RETURN(cache->norms_, allocate(plan.norm_slots * shape.key_norm_bytes()));
  }
  int64_t open = 0;
  int64_t sealed = 0;
  int64_t norm = 0;
  for (int64_t i = 0; i < shape.num_layers(); ++i) {
    const KvLayerLayout& layer = shape.layer(i);
    PagedKvView& view = cache->views_.emplace_back();
    view.layout = &layer;
    view.open_pages = cache->open_.data() + open;
    open += plan.open_pages * layer.open_page_bytes();
    if (shape.quantized()) {
      view.sealed_pages = cache->sealed_.data() + sealed;
      sealed += plan.sealed_pages * layer.sealed_page_bytes();
    }
    if (layer.normalize_keys && plan.norm_slots > 0) {
      view.key_norms = reinterpret_cast<float*>(cache->norms_.data() + norm);
    }
    norm += plan.norm_slots * layer.kv_heads * layer.head_dim * static_cast<int64_t>(sizeof(float));
  }
  return cache;
}

}  // namespace innerq
