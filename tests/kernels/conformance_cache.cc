// Checks of the operations on the cache, each for caches of many formats.
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "kernels/float16.h"
#include "tests/kernels/conformance_parts.h"
#include "tests/kernels/conformance_suite.h"

namespace innerq::conformance {
namespace {

// One layer's cache of one sequence on one backend: page i of the sequence is open block
// num_pages - 1 - i and sealed block i, so that ids differ from logical pages.
struct Cache {
  Cache(Backend& owner, const KvCacheSpec& spec, int64_t pages)
      : layout(*KvLayout::Create(spec, owner.code_order())),
        num_pages(pages),
        open(*owner.Allocate(layout.open_pool_bytes(pages))),
        sealed(*owner.Allocate(layout.sealed_pool_bytes(pages))),
        norms(*owner.Allocate(2 * layout.key_norm_bytes())) {
    std::memset(open.data(), 0xff, static_cast<size_t>(open.bytes()));  // NaN in every format
    std::memset(sealed.data(), 0xff, static_cast<size_t>(sealed.bytes()));
    for (int64_t i = 0; i < pages; ++i) {
      table.push_back({static_cast<int32_t>(pages - 1 - i), static_cast<int32_t>(i)});
    }
  }
  PagedKvView view() {
    return {&layout.layer(0), open.data(), sealed.data(), reinterpret_cast<float*>(norms.data())};
  }
  uint16_t& Key(int64_t position, int64_t head, int64_t d) {
    const int64_t t = position % layout.page_tokens();
    return view().OpenKeys(OpenId(position), head)[layout.layer(0).OpenKeyIndex(t, d)];
  }
  uint16_t& Value(int64_t position, int64_t head, int64_t d) {
    const int64_t t = position % layout.page_tokens();
    return view().OpenValues(OpenId(position), head)[layout.layer(0).OpenValueIndex(t, d)];
  }
  int32_t OpenId(int64_t position) const {
    return table[static_cast<size_t>(layout.PageOf(position))].open_id;
  }
  // Into norm slot 1.
  void ComputeKeyNorm(Backend& backend) {
    KeyNormItem item{1, {}};
    for (int64_t p = layout.KeyNormPages().begin; p < layout.KeyNormPages().end; ++p) {
      item.open_ids.push_back(table[static_cast<size_t>(p)].open_id);
    }
    backend.ComputeKeyNorm({view(), {&item, 1}});
  }
  // The key norm, then every page that a query at `position` sees as sealed.
  void SealUpTo(Backend& backend, int64_t position) {
    const PageRange range = layout.SealedPages(position);
    if (range.size() == 0) return;
    if (layout.layer(0).normalize_keys) ComputeKeyNorm(backend);
    std::vector<SealItem> items;
    for (int64_t p = range.begin; p < range.end; ++p) {
      const PageRef ref = table[static_cast<size_t>(p)];
      items.push_back({ref.open_id, ref.sealed_id, 1});
    }
    backend.Seal({view(), items});
  }

  KvLayout layout;
  int64_t num_pages;
  Buffer open, sealed, norms;
  std::vector<PageRef> table;
};

// Fills both caches with the same keys and values for positions [0, tokens). Keys have channels of
// very different size, as real ones do.
void Fill(Cache& a, Cache& b, int64_t tokens) {
  std::mt19937_64 random(kSeed);
  std::normal_distribution<float> normal;
  const int64_t dim = a.layout.head_dim();
  for (int64_t p = 0; p < tokens; ++p) {
    for (int64_t g = 0; g < a.layout.kv_heads(); ++g) {
      for (int64_t d = 0; d < dim; ++d) {
        const float size = d % 7 == 3 ? 8.0f : 0.5f + 0.1f * static_cast<float>(d % 5);
        a.Key(p, g, d) = b.Key(p, g, d) = F32ToF16(normal(random) * size);
        a.Value(p, g, d) = b.Value(p, g, d) = F32ToF16(normal(random) + 0.3f);
      }
    }
  }
}

std::string CheckRopeAppend(Backend& candidate, const CacheCase& c) {
  std::mt19937_64 random(kSeed);
  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  Cache want(*reference, c.spec, 4), got(candidate, c.spec, 4);
  const int64_t dim = c.spec.head_dim, heads = c.spec.kv_heads * c.group;
  const int64_t rows = 35, first = 30;  // crosses two page borders
  const std::vector<float> qkv = Normal(random, rows * (heads + 2 * c.spec.kv_heads) * dim);
  std::vector<float> cos, sin;
  for (int64_t i = 0; i < rows * dim / 2; ++i) {
    cos.push_back(std::cos(static_cast<float>(i)));
    sin.push_back(std::sin(static_cast<float>(i)));
  }
  // Two sequences' slices share the rows; the second has the last page for its own.
  std::vector<PageRef> other = {{want.table[3].open_id, -1}};
  Guarded want_q(Shape{rows, heads * dim}), got_q(Shape{rows, heads * dim});
  const auto append = [&](Backend& backend, Cache& cache, Guarded& q) {
    const std::vector<SequenceSlice> slices = {{0, rows - 2, first, cache.table, -1, 0},
                                               {rows - 2, 2, 7, other, -1, 0}};
    backend.RopeAppend({View(qkv, Shape{rows, (heads + 2 * c.spec.kv_heads) * dim}),
                        View(cos, Shape{rows, dim / 2}), View(sin, Shape{rows, dim / 2}),
                        cache.view(), slices, q.view()});
  };
  append(*reference, want, want_q);
  append(candidate, got, got_q);
  RETURN_IF_WRONG(Failed(candidate, "RopeAppend"));
  // Two products and a sum of numbers below 6.
  RETURN_IF_WRONG(Compare(want_q, got_q, rows * heads * dim, "RopeAppend.q " + c.name,
                          [](int64_t) { return 4 * kU * 12; }));
  const int64_t other_first = 3 * c.spec.page_tokens + 7;
  for (int64_t p = 0; p < 4 * c.spec.page_tokens; ++p) {
    const bool written =
        (p >= first && p < first + rows - 2) || (p >= other_first && p < other_first + 2);
    for (int64_t g = 0; g < c.spec.kv_heads; ++g) {
      for (int64_t d = 0; d < dim; ++d) {
        const float key = F16ToF32(want.Key(p, g, d)), key_got = F16ToF32(got.Key(p, g, d));
        // A sum near a rounding border may round either way: one unit of F16.
        const bool key_near = written
                                  ? std::fabs(key - key_got) <= 0x1p-10 * std::fabs(key) + 0x1p-24
                                  : want.Key(p, g, d) == got.Key(p, g, d);
        if (!key_near || want.Value(p, g, d) != got.Value(p, g, d)) {
          return "RopeAppend cache " + c.name + ": position " + std::to_string(p) + ", channel " +
                 std::to_string(d) + ": key " + std::to_string(key) + " " + std::to_string(key_got);
        }
      }
    }
  }
  return "";
}

std::string CheckComputeKeyNorm(Backend& candidate, const CacheCase& c) {
  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  Cache want(*reference, c.spec, 6), got(candidate, c.spec, 6);
  const int64_t page = c.spec.page_tokens;
  Fill(want, got, 6 * page);
  for (int64_t p = 0; p < 6 * page; ++p) {  // a channel that is always 0 keeps norm 1
    want.Key(p, 0, 2) = got.Key(p, 0, 2) = 0;
  }
  // Of a channel whose other keys are finite.
  want.Key(page + 18, 0, 3) = got.Key(page + 18, 0, 3) = kHalfNaN;
  want.ComputeKeyNorm(*reference);
  got.ComputeKeyNorm(candidate);
  RETURN_IF_WRONG(Failed(candidate, "ComputeKeyNorm"));
  for (int64_t g = 0; g < c.spec.kv_heads; ++g) {
    for (int64_t d = 0; d < c.spec.head_dim; ++d) {
      const float expected = want.view().KeyNorm(1, g)[d], actual = got.view().KeyNorm(1, g)[d];
      const bool same = g == 0 && d == 3 ? std::isnan(expected) && std::isnan(actual)
                                         : expected == actual && actual > 0;
      if (!same) {
        return "ComputeKeyNorm " + c.name + " channel " + std::to_string(d) + ": expected " +
               std::to_string(expected) + ", got " + std::to_string(actual);
      }
      if (got.view().KeyNorm(0, g)[d] != 0) return "ComputeKeyNorm: wrote to another slot";
    }
  }
  if (want.view().KeyNorm(1, 0)[2] != 1.0f) return "ComputeKeyNorm: a zero channel needs norm 1";
  return "";
}

std::string CheckSeal(Backend& candidate, const CacheCase& c) {
  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  const int64_t pages = 8, tokens = pages * c.spec.page_tokens;
  const int64_t sealed_token = c.spec.page_tokens + 8;  // of a page that seals
  Cache want(*reference, c.spec, pages), got(candidate, c.spec, pages);
  Fill(want, got, tokens);
  for (int64_t p = sealed_token; p < sealed_token + 8; ++p) {  // all-zero groups, a huge outlier
    for (int64_t d = 0; d < c.spec.head_dim; ++d) {
      want.Value(p, 0, d) = got.Value(p, 0, d) = 0;
      want.Key(p, 0, d) = got.Key(p, 0, d) = 0;
    }
  }
  want.Value(sealed_token + 10, 0, 1) = got.Value(sealed_token + 10, 0, 1) = F32ToF16(10000.0f);
  const int64_t position = tokens - 1;
  want.SealUpTo(*reference, position);
  got.SealUpTo(candidate, position);
  RETURN_IF_WRONG(Failed(candidate, "Seal"));
  const PageRange sealed = want.layout.SealedPages(position);
  const KvLayerLayout& layer = want.layout.layer(0);
  for (int64_t page = 0; page < pages; ++page) {
    const bool is_sealed = page >= sealed.begin && page < sealed.end;
    for (int64_t g = 0; g < c.spec.kv_heads; ++g) {
      if (!is_sealed) {  // not one byte of it may change
        const std::byte* bytes = got.view().SealedHead(page, g);
        for (int64_t i = 0; i < layer.sealed_head_bytes; ++i) {
          if (bytes[i] != std::byte{0xff}) return "Seal " + c.name + ": wrote to another page";
        }
        continue;
      }
      for (int64_t t = 0; t < c.spec.page_tokens; ++t) {
        for (int64_t d = 0; d < c.spec.head_dim; ++d) {
          const float key = DecodeSealedKey(want.view(), page, g, t, d);
          const float value = DecodeSealedValue(want.view(), page, g, t, d);
          // Equal decodes of every element mean equal codes, scales and zeros.
          if (!(key == DecodeSealedKey(got.view(), page, g, t, d)) ||
              !(value == DecodeSealedValue(got.view(), page, g, t, d))) {
            return "Seal " + c.name + ": page " + std::to_string(page) + " token " +
                   std::to_string(t) + " channel " + std::to_string(d);
          }
        }
      }
    }
  }
  // Non-finite input must surface, from either side, whether it is quantized or kept as F16.
  for (const bool is_key : {true, false}) {
    for (const uint16_t bad : {kHalfInfinity, kHalfNaN}) {
      Cache cache(candidate, c.spec, pages), other(*reference, c.spec, pages);
      Fill(cache, other, tokens);
      for (Cache* each : {&cache, &other}) {
        (is_key ? each->Key(sealed_token, 0, 3) : each->Value(sealed_token, 0, 3)) = bad;
      }
      cache.SealUpTo(candidate, position);
      other.SealUpTo(*reference, position);
      const Result<void> result = candidate.Synchronize();
      CHECK(!reference->Synchronize().ok(), "the reference seals anything");
      if (result.ok() || result.error().code != ErrorCode::kInternal) {
        return "Seal " + c.name + ": a non-finite " + (is_key ? "key" : "value") +
               " went unnoticed";
      }
      // Of the sealed pages, the one with the token; all of them where a NaN got into the norm.
      const int64_t bad_item = sealed_token / c.spec.page_tokens - sealed.begin;
      const std::vector<int64_t> failed = reference->failed_seals();
      CHECK(std::count(failed.begin(), failed.end(), bad_item) == 1, "the reference errs");
      CHECK(is_key || failed.size() == 1, "the reference blames other pages");
      if (candidate.failed_seals() != failed) {
        return "Seal " + c.name + ": a non-finite " + (is_key ? "key" : "value") +
               " is blamed on other pages";
      }
      if (!candidate.Synchronize().ok() || !candidate.failed_seals().empty()) {
        return "Synchronize: the error was not cleared";
      }
    }
  }
  return "";
}

// Largest |key| and |value| that attention reads, and the same of keys as stored.
struct Extremes {
  double key_sum = 0;  // max over tokens of sum over channels of |stored key|
  double value = 0;
  double norm = 1;
};

std::string CheckAttention(Backend& candidate, const CacheCase& c) {
  std::mt19937_64 random(kSeed);
  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  const int64_t pages = 9, dim = c.spec.head_dim, heads = c.spec.kv_heads * c.group;
  // The last page has an unused tail of NaN.
  const int64_t tokens = pages * c.spec.page_tokens - 5;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  Cache want(*reference, c.spec, pages), got(candidate, c.spec, pages);
  Fill(want, got, tokens);
  want.SealUpTo(*reference, tokens - 1);
  got.SealUpTo(candidate, tokens - 1);
  // Rows: page borders, windows not full, full, just flushed.
  struct Chunk {
    int64_t first, rows;
  };
  for (const Chunk& chunk : std::vector<Chunk>{{0, 1},
                                               {30, 4},
                                               {127, 2},
                                               {155, 40},
                                               {159, 1},
                                               {160, 1},
                                               {tokens - 33, 33},
                                               {tokens - 1, 1}}) {
    const int64_t first = chunk.first, rows = chunk.rows;
    const std::vector<float> q = Normal(random, rows * heads * dim, 1.5f);
    const Shape shape{rows, heads * dim};
    Guarded expected(shape), actual(shape);
    const auto attend = [&](Backend& backend, Cache& cache, Guarded& out) {
      const std::vector<SequenceSlice> slices = {{0, rows, first, cache.table, 1, 0}};
      backend.Attention(
          {View(q, shape), cache.view(), &cache.layout, slices, heads, scale, out.view()});
    };
    attend(*reference, want, expected);
    attend(candidate, got, actual);
    RETURN_IF_WRONG(Failed(candidate, "Attention"));
    Extremes most;
    for (int64_t g = 0; g < c.spec.kv_heads; ++g) {
      for (int64_t p = 0; p < first + rows; ++p) {
        double sum = 0;
        for (int64_t d = 0; d < dim; ++d) {
          sum += std::fabs(F16ToF32(want.Key(p, g, d)));
          most.value = std::max<double>(most.value, std::fabs(F16ToF32(want.Value(p, g, d))));
        }
        most.key_sum = std::max(most.key_sum, sum);
      }
      for (int64_t d = 0; d < dim && want.layout.layer(0).normalize_keys; ++d) {
        most.norm = std::max<double>(most.norm, want.view().KeyNorm(1, g)[d]);
      }
    }
    // The contract: a query may be held in integers relative to its largest (normalized) element,
    // of 14, 13, 12 and 15 bits where it meets codes of 2, 3, 4 and 8 bits, probabilities likewise
    // relative to their page's largest. A score's error acts twice (numerator, sum).
    double q_max = 0;
    for (const float v : q) q_max = std::max<double>(q_max, std::fabs(v));
    const auto step = [](const QuantSpec& spec) {
      if (!spec.quantized()) return 0.0;
      return 1.0 / (127 << (spec.bits <= 4 ? 8 - spec.bits : 7));
    };
    const KvCacheSpec::Layer& layer = c.spec.layers[0];
    const double score_error = scale * q_max * most.norm * most.key_sum *
                               (step(layer.key) / 2 + 2 * static_cast<double>(dim) * kU);
    const double bound = 2 * most.value * (score_error + 32 * step(layer.value) / 2 + 64 * kU);
    RETURN_IF_WRONG(Compare(expected, actual, shape.num_elements(),
                            "Attention " + c.name + " at " + std::to_string(first),
                            [&](int64_t) { return bound; }));
    RETURN_IF_WRONG(CompareRms(expected, actual, shape.num_elements(),
                               step(layer.key) + step(layer.value),
                               "Attention " + c.name + " at " + std::to_string(first)));
  }
  return "";
}

}  // namespace

std::vector<CacheCase> CacheCases() {
  const auto spec = [](int64_t heads, int64_t dim, QuantSpec key, QuantSpec value, bool normalize,
                       int64_t sink = 32, int64_t recent = 96, int64_t page_tokens = 32) {
    KvCacheSpec s;
    s.kv_heads = heads;
    s.head_dim = dim;
    s.page_tokens = page_tokens;
    s.sink_tokens = sink;
    s.recent_tokens = recent;
    s.layers.push_back({key, value, normalize});
    return s;
  };
  using enum QuantMode;
  using enum QuantAxis;
  using enum QuantCodec;
  const QuantSpec f16{.bits = 16};
  const QuantSpec sym3{.bits = 3};
  const QuantSpec kivi{2, kAsymmetric, kOuter, 32, kPaper};
  return {
      {"fp16", spec(2, 64, f16, f16, false), 4},
      {"innerq_base", spec(2, 128, sym3, sym3, true), 4},
      {"innerq_hybrid", spec(1, 64, sym3, {2, kHybrid, kInner, 32, kFitted}, true), 8},
      {"paper hybrid",
       spec(2, 64, {3, kSymmetric, kInner, 32, kPaper}, {2, kHybrid, kInner, 32, kPaper}, true), 1},
      {"kivi", spec(2, 64, kivi, kivi, false, 0, 128), 2},
      {"kivi_sink, dim 48", spec(2, 48, kivi, {2, kAsymmetric, kOuter, 16, kPaper}, false), 2},
      {"int8, dim 80",
       spec(1, 80, {8, kSymmetric, kInner, 16, kPaper}, {8, kSymmetric, kInner, 32, kPaper}, true),
       3},
      {"int4 asymmetric, group 8, dim 8",
       spec(4, 8, {4, kAsymmetric, kInner, 8, kFitted}, {4, kAsymmetric, kInner, 8, kFitted}, true),
       2},
      {"keys 16, values 2", spec(1, 64, f16, {2, kSymmetric, kInner, 32, kFitted}, false), 4},
      {"keys 3, values 16", spec(1, 64, sym3, f16, true), 4},
      {"keys 4 asymmetric in groups of 64, values 8 hybrid",
       spec(1, 128, {4, kAsymmetric, kInner, 64, kFitted}, {8, kHybrid, kInner, 32, kFitted}, true),
       3},
      {"keys 2 hybrid in groups of 128, values 4",
       spec(1, 128, {2, kHybrid, kInner, 128, kFitted}, {4, kSymmetric, kInner, 32, kPaper}, true),
       1},
      {"keys 8, values 3 hybrid, pages and groups of 64, 12 heads",
       spec(1, 64, {8, kSymmetric, kInner, 64, kPaper}, {3, kHybrid, kInner, 64, kFitted}, true, 64,
            64, 64),
       12},
      {"keys 3, values 4 in groups of 64, pages of 64",
       spec(2, 128, sym3, {4, kSymmetric, kInner, 64, kFitted}, true, 64, 64, 64), 4},
      {"keys 2 asymmetric, values 8 in groups of 128, pages of 128, 16 heads",
       spec(1, 128, {2, kAsymmetric, kInner, 32, kFitted}, {8, kSymmetric, kInner, 128, kFitted},
            true, 128, 128, 128),
       16},
  };
}

const std::vector<CacheCheck>& CacheChecks() {
  using Layer = KvCacheSpec::Layer;
  const auto always = [](const Layer&) { return true; };
  const auto normalizes = [](const Layer& layer) { return layer.normalize_keys; };
  const auto seals = [](const Layer& layer) {
    return layer.key.quantized() || layer.value.quantized();
  };
  static const std::vector<CacheCheck> checks = {
      {"RopeAppend", CheckRopeAppend, always},
      {"ComputeKeyNorm", CheckComputeKeyNorm, normalizes},
      {"Seal", CheckSeal, seals},
      {"Attention", CheckAttention, always},
  };
  return checks;
}

std::string CheckAttentionRows(Backend& candidate, const CacheCase& c) {
  std::mt19937_64 random(kSeed);
  const int64_t tokens = 576, first = 500, rows = tokens - first;
  const int64_t width = c.spec.kv_heads * c.group * c.spec.head_dim;
  const int64_t pages = CeilDiv(tokens, c.spec.page_tokens);
  Cache cache(candidate, c.spec, pages), unused(candidate, c.spec, pages);
  Fill(cache, unused, tokens);
  cache.SealUpTo(candidate, tokens - 1);
  const std::vector<float> q = Normal(random, rows * width, 1.5f);
  // Rows of positions [begin, begin + count), each `copies` times, as so many sequences.
  const auto attend = [&](int64_t begin, int64_t count, int64_t copies) {
    std::vector<float> queries, out(static_cast<size_t>(copies * count * width));
    std::vector<SequenceSlice> slices;
    for (int64_t i = 0; i < copies; ++i) {
      const auto at = q.begin() + (begin - first) * width;
      queries.insert(queries.end(), at, at + count * width);
      slices.push_back({i * count, count, begin, cache.table, 1, 0});
    }
    const Shape shape{copies * count, width};
    candidate.Attention({View(queries, shape),
                         cache.view(),
                         &cache.layout,
                         slices,
                         c.spec.kv_heads * c.group,
                         0.125f,
                         {reinterpret_cast<std::byte*>(out.data()), DType::kF32, shape}});
    return out;
  };
  const std::vector<float> whole = attend(first, rows, 1);
  struct Part {
    int64_t begin, count, copies;
  };
  for (const Part& part : std::vector<Part>{{500, 1, 1},
                                            {511, 1, 3},
                                            {512, 1, 1},
                                            {575, 1, 1},
                                            {509, 5, 1},
                                            {543, 2, 2},
                                            {512, 33, 1}}) {
    const std::vector<float> out = attend(part.begin, part.count, part.copies);
    RETURN_IF_WRONG(Failed(candidate, "Attention"));
    for (int64_t i = 0; i < part.copies; ++i) {
      if (std::memcmp(out.data() + i * part.count * width,
                      whole.data() + (part.begin - first) * width,
                      static_cast<size_t>(part.count * width) * 4) != 0) {
        return c.name + ": rows from " + std::to_string(part.begin) + ", " +
               std::to_string(part.count) + " of " + std::to_string(part.copies) +
               " sequences, are not those of the whole";
      }
    }
  }
  return "";
}

}  // namespace innerq::conformance
