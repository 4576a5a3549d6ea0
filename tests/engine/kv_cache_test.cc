#include "engine/kv_cache.h"

#include <algorithm>
#include <limits>

#include "engine/page_budget.h"
#include "gtest/gtest.h"

namespace innerq {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

ModelConfig OneBillion() {
  ModelConfig config;
  config.num_layers = 16;
  config.num_heads = 32;
  config.num_kv_heads = 8;
  config.head_dim = 64;
  return config;
}

KvLayout LayoutOf(const KvCacheOptions& options, const ModelConfig& model,
                  CodeOrder order = CodeOrder::kRowMajor) {
  return KvLayout::Create(ResolveKvCacheSpec(options, model).value(), order).value();
}

KvCacheOptions Unquantized() {
  KvCacheOptions options;
  options.key.bits = 16;
  options.value.bits = 16;
  return options;
}

int64_t Bytes(const KvLayout& layout, int64_t open, int64_t sealed, int64_t norms) {
  return layout.open_pool_bytes(open) +
         (layout.quantized() ? layout.sealed_pool_bytes(sealed) : 0) +
         norms * layout.key_norm_bytes();
}

// Grows a sequence token by token through both pools; the number of tokens it reaches. Under exact
// prefill the worst of an all-prompt and a one-token-prompt sequence.
int64_t Grow(const KvLayout& layout, const KvPoolPlan& plan, int64_t exact_before) {
  for (int64_t position = 0;; ++position) {
    const int64_t sealed_before =
        position == 0 ? 0 : layout.SealedPages(position - 1, exact_before).size();
    const int64_t open = layout.PageOf(position) + 1 - sealed_before;
    const int64_t sealed = layout.SealedPages(position, exact_before).size();
    const int64_t norms = layout.normalizes_keys() && sealed > 0 ? 1 : 0;
    if (open > plan.open_pages || sealed > plan.sealed_pages || norms > plan.norm_slots) {
      return position;
    }
  }
}

TEST(ResolveKvCacheSpec, AppliesOverridesInOrderAndKeyByKey) {
  KvCacheOptions options;
  options.key.mode = QuantMode::kHybrid;
  options.layers = {{.first_layer = 0, .last_layer = 1, .key = {.bits = 8}, .value = {}},
                    {.first_layer = 1,
                     .last_layer = 2,
                     .key = {.group_size = 16},
                     .normalize_keys = false,
                     .value = {.axis = QuantAxis::kOuter}}};
  const KvCacheSpec spec = ResolveKvCacheSpec(options, OneBillion()).value();
  ASSERT_EQ(spec.layers.size(), 16u);
  EXPECT_EQ(spec.kv_heads, 8);
  EXPECT_EQ(spec.layers[0].key.bits, 8);
  EXPECT_EQ(spec.layers[0].key.group_size, 32);
  EXPECT_EQ(spec.layers[0].key.mode, QuantMode::kHybrid);
  EXPECT_EQ(spec.layers[1].key.bits, 8);
  EXPECT_EQ(spec.layers[1].key.group_size, 16);
  EXPECT_TRUE(spec.layers[0].normalize_keys);
  EXPECT_FALSE(spec.layers[1].normalize_keys);
  EXPECT_EQ(spec.layers[2].key.bits, 3);
  EXPECT_EQ(spec.layers[2].value.axis, QuantAxis::kOuter);
  EXPECT_EQ(spec.layers[3].key, options.key);
  EXPECT_EQ(spec.layers[3].value, options.value);
}

TEST(ResolveKvCacheSpec, RefusesLayersThatTheModelLacks) {
  for (const auto& [first, last] : {std::pair{0, 16}, {-1, 2}, {3, 2}}) {
    KvCacheOptions options;
    options.layers = {{}, {}};
    options.layers[1].first_layer = first;
    options.layers[1].last_layer = last;
    const auto result = ResolveKvCacheSpec(options, OneBillion());
    ASSERT_FALSE(result.ok()) << first << "-" << last;
    EXPECT_EQ(result.error().code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(result.error().param, "kv_cache.layers.1.range");
  }
}

TEST(ResolveKvCacheSpec, ALayerThatCannotBeStoredIsBlamedOnTheKeyThatShapedIt) {
  const auto blamed = [](const KvCacheOptions& options) {
    const auto result = ResolveKvCacheSpec(options, OneBillion());
    return result.ok() ? "" : result.error().param;
  };
  KvCacheOptions options;
  EXPECT_EQ(blamed(options), "");
  options.layers = {{.first_layer = 2, .last_layer = 3, .key = {.group_size = 128}},
                    {.first_layer = 3, .last_layer = 3, .value = {.bits = 8}}};
  EXPECT_EQ(blamed(options), "kv_cache.layers.0.key.group_size") << "128 does not divide 64";
  options.layers[0].key = {};
  options.layers[1].value.bits = 5;
  EXPECT_EQ(blamed(options), "kv_cache.layers.1.value.bits");
  options.layers[1].value.bits = 8;
  options.layers[1].value.group_size = 64;
  EXPECT_EQ(blamed(options), "kv_cache.layers.1.value.group_size") << "a page has 32 tokens";
  options.layers.clear();
  options.value.group_size = 64;
  EXPECT_EQ(blamed(options), "kv_cache.value.group_size");
  options.sink_tokens = 33;
  EXPECT_EQ(blamed(options), "kv_cache.sink_tokens");
}

// All memory sizes from "one sequence just fits" up, every kind of cache.
TEST(PlanKvPools, KeepsToTheMemoryAndReportsWhatASequenceReaches) {
  std::vector<KvCacheOptions> caches{KvCacheOptions(), Unquantized(), KvCacheOptions(),
                                     KvCacheOptions(), KvCacheOptions()};
  caches[4].prefix_cache = false;
  caches[2].exact_prefill = true;
  caches[3].normalize_keys = false;
  caches[3].recent_tokens = 32;
  for (KvCacheOptions& options : caches) {
    const KvLayout layout = LayoutOf(options, OneBillion());
    for (const int64_t max_sequences : {1, 64}) {
      for (const int64_t min_context : {1, 192, 193, 1000}) {
        const PageCounts need = WorstPeakPages(layout, min_context, options.exact_prefill);
        const int64_t least = Bytes(layout, need.open, need.sealed, need.norms);
        for (const int64_t memory :
             {least, least + 1, least + 300000, 8 * kMiB, 64 * kMiB, 1024 * kMiB}) {
          options.memory_bytes = memory;
          const auto planned = PlanKvPools(layout, options, max_sequences, 512, min_context);
          ASSERT_EQ(planned.ok(), memory >= least) << memory;
          if (!planned.ok()) continue;
          const KvPoolPlan plan = planned.value();
          EXPECT_LE(plan.bytes, memory);
          EXPECT_EQ(plan.bytes, Bytes(layout, plan.open_pages, plan.sealed_pages, plan.norm_slots));
          EXPECT_GE(plan.tokens_that_fit, min_context);
          const bool shares = options.prefix_cache && !options.exact_prefill;
          const int64_t states = memory / layout.open_page_bytes() / (OpenWindowPages(layout) - 1);
          EXPECT_LE(plan.norm_slots, std::max(need.norms, shares ? states : max_sequences));
          const int64_t grown = Grow(layout, plan, 0);
          const int64_t all_prompt =
              options.exact_prefill ? Grow(layout, plan, std::numeric_limits<int64_t>::max() / 2)
                                    : grown;
          EXPECT_EQ(plan.tokens_that_fit, std::min(grown, all_prompt))
              << memory << " bytes, at least " << min_context << " tokens";
          // Nothing is left over that another page could have used.
          const int64_t unit =
              layout.quantized() ? layout.sealed_page_bytes() : layout.open_page_bytes();
          EXPECT_LT(memory - plan.bytes, unit);
        }
      }
    }
  }
}

TEST(PlanKvPools, GivesEverySequenceItsWindowBeforeItBuysSealedPages) {
  KvCacheOptions options;
  options.memory_bytes = 1024 * kMiB;
  options.prefix_cache = false;
  const KvLayout layout = LayoutOf(options, OneBillion());
  EXPECT_EQ(layout.open_page_bytes(), kMiB);
  const KvPoolPlan plan = PlanKvPools(layout, options, 64, 512, 192).value();
  EXPECT_EQ(plan.open_pages, 64 * 6 + 512 / 32);
  EXPECT_EQ(plan.norm_slots, 64);
  EXPECT_GT(plan.tokens_that_fit, 80000);
}

TEST(PlanKvPools, GivesCachedPrefixesAQuarterOfWhatTheWindowsLeave) {
  KvCacheOptions options;
  options.memory_bytes = 1024 * kMiB;
  const KvLayout layout = LayoutOf(options, OneBillion());
  const KvPoolPlan plan = PlanKvPools(layout, options, 1, 512, 192).value();
  const int64_t windows = 6 + 512 / 32;
  EXPECT_EQ(plan.norm_slots, 204) << "a state has five open pages of 1 MiB";
  EXPECT_EQ(plan.open_pages, windows + (1024 - 204 / 32 - 1 - windows) / 4);
  EXPECT_GT(plan.tokens_that_fit, 100000);
  // But not more than half: the windows of 64 sequences leave 617 MiB.
  EXPECT_EQ(PlanKvPools(layout, options, 64, 512, 192).value().open_pages, 1017 / 2);
  // Contexts that must fit come first.
  const int64_t long_context = 140000;
  EXPECT_LT(plan.tokens_that_fit, long_context);
  EXPECT_GE(PlanKvPools(layout, options, 1, 512, long_context).value().tokens_that_fit,
            long_context);
}

TEST(PlanKvPools, ShrinksBothPoolsWhenMemoryIsShort) {
  KvCacheOptions options;
  options.memory_bytes = 64 * kMiB;
  const KvLayout layout = LayoutOf(options, OneBillion());
  const KvPoolPlan plan = PlanKvPools(layout, options, 64, 512, 192).value();
  EXPECT_EQ(plan.open_pages, 31);
  EXPECT_GT(plan.sealed_pages, 140);
  EXPECT_GT(plan.tokens_that_fit, 4000);
}

TEST(PlanKvPools, SaysWhatIsMissing) {
  KvCacheOptions options;
  options.memory_bytes = 4 * kMiB;
  const KvLayout layout = LayoutOf(options, OneBillion());
  const auto plan = PlanKvPools(layout, options, 64, 512, 192);
  ASSERT_FALSE(plan.ok());
  EXPECT_EQ(plan.error().code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(plan.error().param, "kv_cache.memory");
  EXPECT_NE(plan.error().message.find("4194304"), std::string::npos) << plan.error().message;
}

TEST(KvCache, GivesEachLayerItsOwnPartOfThePools) {
  const auto backend = CreateReferenceBackend();
  ModelConfig model = OneBillion();
  model.num_layers = 3;
  KvCacheOptions options;
  options.memory_bytes = 8 * kMiB;
  options.layers = {{.first_layer = 1, .last_layer = 1, .key = {.bits = 8}, .value = {}}};
  options.layers[0].normalize_keys = false;
  KvLayout layout = LayoutOf(options, model, backend->code_order());
  const KvPoolPlan plan = PlanKvPools(layout, options, 2, 64, 192).value();
  const auto cache = KvCache::Create(backend.get(), std::move(layout), plan).value();
  ASSERT_EQ(cache->layers().size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    const PagedKvView& view = cache->layers()[i];
    EXPECT_EQ(view.layout, &cache->layout().layer(static_cast<int64_t>(i)));
    EXPECT_EQ(view.key_norms != nullptr, i != 1);
    if (i == 2) break;
    // One layer ends where the next begins.
    const PagedKvView& next = cache->layers()[i + 1];
    EXPECT_EQ(reinterpret_cast<std::byte*>(view.OpenKeys(plan.open_pages, 0)), next.open_pages);
    EXPECT_EQ(view.SealedHead(plan.sealed_pages, 0), next.sealed_pages);
  }
  EXPECT_EQ(cache->layers()[2].key_norms - cache->layers()[0].key_norms,
            2 * plan.norm_slots * 8 * 64);
  // Zeroed to the last byte, and writable there.
  const PagedKvView& last = cache->layers()[2];
  std::byte* end = last.SealedHead(plan.sealed_pages - 1, 7) + last.layout->sealed_head_bytes;
  EXPECT_EQ(end[-1], std::byte{0});
  end[KvLayout::kPoolSlackBytes - 1] = std::byte{1};
  EXPECT_EQ(cache->plan().bytes, plan.bytes);
}

}  // namespace
}  // namespace innerq
