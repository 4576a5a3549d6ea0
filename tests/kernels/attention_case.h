// A sequence in one layer's cache: its layout, input, pages and attention, and the bound on what a
// variant's attention may differ from the reference's. For tests and fuzzers of CpuAttention.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/attention_ops.h"
#include "kernels/float16.h"

namespace innerq {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int32_t kNormId = 1;  // of two slots

constexpr QuantMode kSym = QuantMode::kSymmetric, kAsym = QuantMode::kAsymmetric,
                    kHybrid = QuantMode::kHybrid;
constexpr QuantAxis kIn = QuantAxis::kInner, kOut = QuantAxis::kOuter;

struct Case {
  std::string name;
  QuantSpec key, value;
  int64_t head_dim = 64, kv_heads = 2, heads = 8;
  int64_t page_tokens = 32, sink_tokens = 32, recent_tokens = 96;
  bool normalize = true;
};

// Fixes the windows of cases whose page does not divide the defaults.
inline Case Normalized(Case c) {
  c.sink_tokens = RoundUp(c.sink_tokens, c.page_tokens);
  c.recent_tokens = RoundUp(c.recent_tokens, c.page_tokens);
  return c;
}

// One layer's pools in one order, prefilled with NaN patterns.
struct Cache {
  Cache(const Case& c, CodeOrder order, int64_t num_pages)
      : layout(Create(c, order)),
        open(static_cast<size_t>(layout.open_pool_bytes(num_pages)), std::byte{0x7e}),
        sealed(static_cast<size_t>(layout.sealed_pool_bytes(num_pages)), std::byte{0x7e}),
        norms(static_cast<size_t>(2 * c.kv_heads * c.head_dim), kNaN) {}

  static KvLayout Create(const Case& c, CodeOrder order) {
    KvCacheSpec spec;
    spec.kv_heads = c.kv_heads;
    spec.head_dim = c.head_dim;
    spec.page_tokens = c.page_tokens;
    spec.sink_tokens = c.sink_tokens;
    spec.recent_tokens = c.recent_tokens;
    spec.layers = {{c.key, c.value, c.normalize}};
    Result<KvLayout> layout = KvLayout::Create(spec, order);
    CHECK(layout.ok(), layout.error().message);
    return *layout;
  }
  PagedKvView View() { return {&layout.layer(0), open.data(), sealed.data(), norms.data()}; }

  KvLayout layout;
  std::vector<std::byte> open, sealed;
  std::vector<float> norms;
};

struct Input {
  std::vector<float> qkv;  // [tokens][(H + 2G) D]
  std::vector<float> cos, sin;
  double largest_key = 40, largest_value = 8;  // magnitudes that none exceeds
};

inline TensorView View(std::vector<float>& x, int64_t rows) {
  return {reinterpret_cast<std::byte*>(x.data()), DType::kF32,
          Shape{rows, static_cast<int64_t>(x.size()) / std::max<int64_t>(rows, 1)}};
}

// A sequence of `tokens` random tokens. Keys have a few large channels and a slow drift, so that
// scores differ; positions rotate them.
inline Input RandomInput(const Case& c, int64_t tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Input input;
  const int64_t width = (c.heads + 2 * c.kv_heads) * c.head_dim;
  input.qkv.resize(static_cast<size_t>(tokens * width));
  for (size_t i = 0; i < input.qkv.size(); ++i) {
    const int64_t column = static_cast<int64_t>(i) % width, d = column % c.head_dim;
    const bool key = column >= c.heads * c.head_dim && column < (c.heads + c.kv_heads) * c.head_dim;
    input.qkv[i] = normal(random) * (key && d % 7 == 3 ? 4.0f : 1.0f) + (key ? 0.2f : 0.1f);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < c.head_dim / 2; ++i) {
      const double angle = static_cast<double>(t) / std::pow(100.0, 2.0 * i / c.head_dim);
      input.cos.push_back(static_cast<float>(std::cos(angle)));
      input.sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  return input;
}

// Pages of sequence `index` out of `count`, scattered over the pools.
inline std::vector<PageRef> Pages(int64_t num_pages, int32_t index, int32_t count) {
  std::vector<PageRef> pages;
  for (int32_t p = 0; p < num_pages; ++p) {
    const auto last = static_cast<int32_t>(num_pages - 1);
    pages.push_back({p * count + index, (last - p) * count + index});
  }
  return pages;
}

// Appends a whole sequence and seals every page that its last position sees sealed.
// `Ops` is CpuAttention or Backend.
template <typename Ops>
void Fill(Ops& ops, Cache& cache, Input& input, const std::vector<PageRef>& pages, int32_t norm_id,
          std::vector<float>& q) {
  const KvLayerLayout& layer = cache.layout.layer(0);
  const auto tokens = static_cast<int64_t>(input.cos.size()) / (layer.head_dim / 2);
  const int64_t width = static_cast<int64_t>(input.qkv.size()) / tokens;
  q.assign(static_cast<size_t>(tokens * (width - 2 * layer.kv_heads * layer.head_dim)), kNaN);
  const SequenceSlice slice{0, tokens, 0, pages, norm_id, 0};
  ops.RopeAppend({View(input.qkv, tokens),
                  View(input.cos, tokens),
                  View(input.sin, tokens),
                  cache.View(),
                  {&slice, 1},
                  View(q, tokens)});
  const PageRange sealed = cache.layout.SealedPages(tokens - 1);
  if (sealed.size() == 0) return;
  if (layer.normalize_keys) {
    KeyNormItem item{norm_id, {}};
    const PageRange span = cache.layout.KeyNormPages();
    for (int64_t p = span.begin; p < span.end; ++p) {
      item.open_ids.push_back(pages[static_cast<size_t>(p)].open_id);
    }
    ops.ComputeKeyNorm({cache.View(), {&item, 1}});
  }
  std::vector<SealItem> items;
  for (int64_t p = sealed.begin; p < sealed.end; ++p) {
    const PageRef page = pages[static_cast<size_t>(p)];
    items.push_back({page.open_id, page.sealed_id, layer.normalize_keys ? norm_id : -1});
  }
  ops.Seal({cache.View(), items});
}

struct Rows {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};

// Attention of positions [rows) of one sequence.
template <typename Ops>
std::vector<float> Attend(Ops& ops, Cache& cache, const std::vector<float>& q, int64_t heads,
                          const std::vector<PageRef>& pages, int32_t norm_id, Rows rows,
                          int64_t exact_before = 0) {
  const int64_t width = heads * cache.layout.head_dim();
  std::vector<float> part(q.begin() + rows.begin * width, q.begin() + rows.end * width);
  std::vector<float> out(part.size(), kNaN);
  const SequenceSlice slice{0, rows.size(), rows.begin, pages, norm_id, exact_before};
  const float scale = 1.0f / std::sqrt(static_cast<float>(cache.layout.head_dim()));
  ops.Attention({View(part, rows.size()),
                 cache.View(),
                 &cache.layout,
                 {&slice, 1},
                 heads,
                 scale,
                 View(out, rows.size())});
  return out;
}

inline float Largest(const std::vector<float>& x) {
  float largest = 0;
  for (const float v : x) largest = std::max(largest, std::fabs(v));
  return largest;
}

// Largest scale * (number of codes - 1) of a side's sealed pages: what a full-scale code is worth.
inline double CodeReach(Cache& cache, const QuantSpec& spec, int64_t scales_at, int64_t num_scales,
                        const std::vector<PageRef>& pages, PageRange sealed) {
  double reach = 0;
  for (int64_t p = sealed.begin; p < sealed.end; ++p) {
    for (int64_t g = 0; g < cache.layout.kv_heads(); ++g) {
      const std::byte* head = cache.View().SealedHead(pages[static_cast<size_t>(p)].sealed_id, g);
      const auto* scales = reinterpret_cast<const uint16_t*>(head + scales_at);
      for (int64_t i = 0; i < num_scales; ++i) {
        reach = std::max<double>(reach, std::fabs(F16ToF32(scales[i])) * ((1 << spec.bits) - 1));
      }
    }
  }
  return reach;
}

// Half a unit of integers of two bytes that meet codes of `spec`, relative to their largest.
inline double HalfUnit(const QuantSpec& spec) { return 0.5 / MaxRowInteger(HighShift(spec.bits)); }

// Bound on |out - exact| from the integers of q and p, whose errors are at most half a unit, and
// from F32 sums (u = 2^-24, unit errors of the sum of magnitudes).
inline double ErrorBound(Cache& reference, const Case& c, const Input& input,
                         const std::vector<float>& q, const std::vector<PageRef>& pages,
                         int64_t last) {
  constexpr double kRoundoff = 0x1p-24;
  const KvLayerLayout& layer = reference.layout.layer(0);
  const PageRange sealed = reference.layout.SealedPages(last);
  const double dim = static_cast<double>(c.head_dim), tokens = static_cast<double>(c.page_tokens);
  double norm = 1, key_reach = 0, value_reach = 0;
  if (sealed.size() > 0) {
    if (layer.normalize_keys) {
      const float* norms = reference.View().KeyNorm(kNormId, 0);
      norm = *std::max_element(norms, norms + c.kv_heads * c.head_dim);
    }
    if (c.key.quantized()) {
      key_reach = CodeReach(reference, c.key, layer.key_scales,
                            c.page_tokens * c.head_dim / c.key.group_size, pages, sealed);
    }
    if (c.value.quantized()) {
      value_reach = CodeReach(reference, c.value, layer.value_scales,
                              c.page_tokens * c.head_dim / c.value.group_size, pages, sealed);
    }
  }
  const double largest_q = Largest(q), largest_k = input.largest_key;
  const double scale = 1 / std::sqrt(dim);
  const double score_error =
      scale * dim *
      (HalfUnit(c.key) * largest_q * norm * key_reach +
       4 * kRoundoff * dim * largest_q * std::max(largest_k, norm * key_reach));
  const double value_scale = std::max(input.largest_value, value_reach);
  // Weights change by a factor exp(+-score_error), both in the sum and in the norm; rounding of p
  // moves the sum, the norm and, folded with outer scales, the product.
  return value_scale *
         (2 * std::expm1(score_error) + 3 * tokens * HalfUnit(c.value) * (value_reach > 0) +
          4 * kRoundoff * static_cast<double>(last + 1));
}

}  // namespace innerq
