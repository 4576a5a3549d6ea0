#include "kernels/paged_kv.h"

#include "kernels/float16.h"

namespace innerq {
namespace {

constexpr int64_t kMaxHeadDim = 256;

bool IsPowerOfTwo(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

// `inner` and `outer` are the extents of a page along these axes.
Result<void> CheckSpec(const QuantSpec& spec, const std::string& name, int64_t inner,
                       int64_t outer) {
  if (spec.bits == 16) return {};
  if (spec.bits != 2 && spec.bits != 3 && spec.bits != 4 && spec.bits != 8) {
    return InvalidArgument("bits must be 2, 3, 4, 8 or 16, not " + std::to_string(spec.bits),
                           name + ".bits");
  }
  if (spec.group_size < 8 || spec.group_size > 128 || !IsPowerOfTwo(spec.group_size)) {
    return InvalidArgument(
        "group_size must be 8, 16, 32, 64 or 128, not " + std::to_string(spec.group_size),
        name + ".group_size");
  }
  const int64_t extent = spec.axis == QuantAxis::kInner ? inner : outer;
  if (extent % spec.group_size != 0) {
    return InvalidArgument("group_size " + std::to_string(spec.group_size) + " does not divide " +
                               std::to_string(extent) +
                               ", the extent of a page along the grouped axis",
                           name + ".group_size");
  }
  return {};
}

// Whether products of kMmaFragment serve a layer: groups cover squares of 32 along the inner axis,
// both sides are quantized or neither is, and the head is one that kernels exist for.
bool HasFragments(const KvLayerLayout& layer) {
  const auto serves = [](const QuantSpec& spec) {
    return !spec.quantized() || (spec.axis == QuantAxis::kInner && spec.group_size >= 32);
  };
  return (layer.head_dim == 64 || layer.head_dim == 128) &&
         layer.key.quantized() == layer.value.quantized() && serves(layer.key) &&
         serves(layer.value);
}

// Bytes of scales and zeros of one head of one page.
int64_t NumScales(const QuantSpec& spec, int64_t inner, int64_t outer) {
  return spec.axis == QuantAxis::kInner ? inner / spec.group_size * outer
                                        : outer / spec.group_size * inner;
}

void PlanLayer(KvLayerLayout& layout) {
  const int64_t tokens = layout.page_tokens;
  const int64_t dim = layout.head_dim;
  const int64_t padded = layout.padded_dim();
  int64_t offset = 0;
  const auto take = [&offset](int64_t bytes) {
    const int64_t at = offset;
    offset += bytes;
    return at;
  };
  const QuantSpec& key = layout.key;
  layout.key_codes = take(tokens * dim * key.bits / 8);
  const int64_t key_scales = key.quantized() ? NumScales(key, dim, tokens) * 2 : 0;
  layout.key_scales = take(key_scales);
  layout.key_zeros = take(key.has_zero() ? key_scales : 0);
  const QuantSpec& value = layout.value;
  layout.value_codes = take(tokens * padded * value.bits / 8);
  // Values grouped over channels have scales for real channels only.
  const int64_t outer = value.axis == QuantAxis::kInner ? padded : dim;
  const int64_t value_scales = value.quantized() ? NumScales(value, tokens, outer) * 2 : 0;
  layout.value_scales = take(value_scales);
  layout.value_zeros = take(value.has_zero() ? value_scales : 0);
  layout.sealed_head_bytes = offset;
  layout.open_values = tokens * dim * 2;
  layout.open_head_bytes = layout.open_values + tokens * padded * 2;
}

// F16 arrays of one side of a head's page.
struct StoredGroups {
  const std::byte* scales;
  const std::byte* zeros;
};

// Counts the groups of one side, which run along tokens or channels. `scale_index(t, d)` is the
// layout's.
template <typename ScaleIndex>
GroupCount CountGroups(const QuantSpec& spec, const KvLayerLayout& layout, bool groups_of_tokens,
                       const StoredGroups& stored, ScaleIndex scale_index) {
  if (!spec.quantized()) return {};
  GroupCount count{.groups = layout.page_tokens * layout.head_dim / spec.group_size};
  if (spec.mode == QuantMode::kAsymmetric) count.asymmetric = count.groups;
  if (spec.mode != QuantMode::kHybrid) return count;
  const auto* scales = reinterpret_cast<const uint16_t*>(stored.scales);
  const auto* zeros = reinterpret_cast<const uint16_t*>(stored.zeros);
  for (int64_t t = 0; t < layout.page_tokens; t += groups_of_tokens ? spec.group_size : 1) {
    for (int64_t d = 0; d < layout.head_dim; d += groups_of_tokens ? 1 : spec.group_size) {
      const int64_t at = scale_index(t, d);
      const StoredParams symmetric = StoreParams({.scale = F16ToF32(scales[at])}, spec.bits);
      count.asymmetric += zeros[at] != symmetric.zero ? 1 : 0;
    }
  }
  return count;
}

}  // namespace

Result<KvLayout> KvLayout::Create(const KvCacheSpec& spec, CodeOrder order) {
  KvLayout layout;
  const int64_t tokens = spec.page_tokens;
  if (tokens != 32 && tokens != 64 && tokens != 128) {
    return InvalidArgument("page_tokens must be 32, 64 or 128, not " + std::to_string(tokens),
                           "kv_cache.page_tokens");
  }
  if (spec.sink_tokens < 0 || spec.sink_tokens % tokens != 0) {
    return InvalidArgument("sink_tokens must be a multiple of page_tokens (" +
                               std::to_string(tokens) + "), not " +
                               std::to_string(spec.sink_tokens),
                           "kv_cache.sink_tokens");
  }
  if (spec.recent_tokens < tokens || spec.recent_tokens % tokens != 0) {
    return InvalidArgument("recent_tokens must be a positive multiple of page_tokens (" +
                               std::to_string(tokens) + "), not " +
                               std::to_string(spec.recent_tokens),
                           "kv_cache.recent_tokens");
  }
  if (spec.kv_heads <= 0 || spec.head_dim < 8 || spec.head_dim > kMaxHeadDim ||
      spec.head_dim % 8 != 0) {
    return InvalidArgument("head_dim must be a multiple of 8 in [8, " +
                           std::to_string(kMaxHeadDim) + "] with at least one head, not " +
                           std::to_string(spec.head_dim) + " with " +
                           std::to_string(spec.kv_heads));
  }
  if (spec.layers.empty()) return InvalidArgument("a cache needs at least one layer");
  layout.order_ = order;
  layout.windows_.page_tokens = tokens;
  layout.windows_.sink_pages = spec.sink_tokens / tokens;
  layout.windows_.recent_pages = spec.recent_tokens / tokens;
  for (const KvCacheSpec::Layer& from : spec.layers) {
    RETURN_IF_ERROR(CheckSpec(from.key, "kv_cache.key", spec.head_dim, tokens));
    RETURN_IF_ERROR(CheckSpec(from.value, "kv_cache.value", tokens, spec.head_dim));
    KvLayerLayout layer;
    layer.page_tokens = tokens;
    layer.kv_heads = spec.kv_heads;
    layer.head_dim = spec.head_dim;
    layer.key = from.key;
    layer.value = from.value;
    layer.normalize_keys = from.normalize_keys && from.key.quantized();
    const bool row_major = order == CodeOrder::kMmaFragment && !HasFragments(layer);
    layer.order = row_major ? CodeOrder::kRowMajor : order;
    PlanLayer(layer);
    layout.windows_.quantized |= layer.quantized();
    layout.normalizes_ |= layer.normalize_keys;
    layout.open_page_bytes_ += layer.open_page_bytes();
    layout.sealed_page_bytes_ += layer.sealed_page_bytes();
    layout.layers_.push_back(layer);
  }
  return layout;
}

double KvLayout::sealed_bits_per_element() const {
  if (!quantized()) return 16.0;
  const int64_t elements = num_layers() * kv_heads() * head_dim() * 2 * page_tokens();
  return static_cast<double>(sealed_page_bytes_) * 8.0 / static_cast<double>(elements);
}

double KvLayout::effective_bits_per_element(int64_t tokens) const {
  if (tokens <= 0) return 0.0;
  const int64_t pages = CeilDiv(tokens, page_tokens());
  const int64_t sealed = SealedPages(tokens - 1).size();
  const int64_t norm = normalizes_keys() && sealed > 0 ? key_norm_bytes() : 0;
  const int64_t bytes = (pages - sealed) * open_page_bytes_ + sealed * sealed_page_bytes_ + norm;
  const int64_t elements = num_layers() * kv_heads() * head_dim() * 2 * tokens;
  return static_cast<double>(bytes) * 8.0 / static_cast<double>(elements);
}

LayerGroups CountSealedGroups(const PagedKvView& kv, int64_t sealed_id) {
  const KvLayerLayout& layout = *kv.layout;
  LayerGroups sum;
  for (int64_t head = 0; head < layout.kv_heads; ++head) {
    const std::byte* page = kv.SealedHead(sealed_id, head);
    sum.key.Add(
        CountGroups(layout.key, layout, layout.key.axis == QuantAxis::kOuter,
                    {page + layout.key_scales, page + layout.key_zeros},
                    [&layout](int64_t t, int64_t d) { return layout.KeyScaleIndex(t, d); }));
    sum.value.Add(
        CountGroups(layout.value, layout, layout.value.axis == QuantAxis::kInner,
                    {page + layout.value_scales, page + layout.value_zeros},
                    [&layout](int64_t t, int64_t c) { return layout.ValueScaleIndex(t, c); }));
  }
  return sum;
}

float DecodeSealedKey(const PagedKvView& kv, int64_t sealed_id, int64_t head, int64_t t,
                      int64_t d) {
  const KvLayerLayout& layout = *kv.layout;
  const std::byte* page = kv.SealedHead(sealed_id, head);
  if (!layout.key.quantized()) {
    return F16ToF32(
        reinterpret_cast<const uint16_t*>(page + layout.key_codes)[layout.OpenKeyIndex(t, d)]);
  }
  const int64_t group = layout.KeyScaleIndex(t, d);
  const float scale = F16ToF32(reinterpret_cast<const uint16_t*>(page + layout.key_scales)[group]);
  const float zero =
      layout.key.has_zero()
          ? F16ToF32(reinterpret_cast<const uint16_t*>(page + layout.key_zeros)[group])
          : -scale * static_cast<float>(1 << (layout.key.bits - 1));
  const uint32_t code = layout.ReadCodeAt(reinterpret_cast<const uint8_t*>(page + layout.key_codes),
                                          layout.key.bits, layout.KeyCodeIndex(t, d));
  return scale * static_cast<float>(code) + zero;
}

float DecodeSealedValue(const PagedKvView& kv, int64_t sealed_id, int64_t head, int64_t t,
                        int64_t c) {
  const KvLayerLayout& layout = *kv.layout;
  const std::byte* page = kv.SealedHead(sealed_id, head);
  if (!layout.value.quantized()) {
    return F16ToF32(
        reinterpret_cast<const uint16_t*>(page + layout.value_codes)[layout.OpenValueIndex(t, c)]);
  }
  const int64_t group = layout.ValueScaleIndex(t, c);
  const float scale =
      F16ToF32(reinterpret_cast<const uint16_t*>(page + layout.value_scales)[group]);
  const float zero =
      layout.value.has_zero()
          ? F16ToF32(reinterpret_cast<const uint16_t*>(page + layout.value_zeros)[group])
          : -scale * static_cast<float>(1 << (layout.value.bits - 1));
  const uint32_t code =
      layout.ReadCodeAt(reinterpret_cast<const uint8_t*>(page + layout.value_codes),
                        layout.value.bits, layout.ValueCodeIndex(t, c));
  return scale * static_cast<float>(code) + zero;
}

}  // namespace innerq
