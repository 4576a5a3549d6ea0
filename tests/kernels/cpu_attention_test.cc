// CpuAttention of every supported variant against the reference backend, and against itself: a row
// must not change by a bit whatever stands beside it.
#include "kernels/cpu/cpu_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/float16.h"
#include "tests/kernels/attention_case.h"

namespace innerq {
namespace {

constexpr uint64_t kSeed = 20260211;

QuantSpec Spec(int bits, QuantMode mode, QuantAxis axis, int group_size,
               QuantCodec codec = QuantCodec::kFitted) {
  return {bits, mode, axis, group_size, codec};
}

constexpr QuantCodec kPaper = QuantCodec::kPaper;

std::vector<Case> AllCases() {
  const QuantSpec half;
  const QuantSpec s3 = Spec(3, kSym, kIn, 32);
  return {
      {"half", half, half},
      {"base", s3, s3},
      {"base_d128", s3, s3, 128, 2, 8},
      {"base_one_query_head", s3, s3, 64, 2, 2},
      {"base_sixteen_query_heads", s3, s3, 64, 1, 16},
      {"base_three_query_heads", s3, s3, 96, 1, 3},
      {"small_paper", Spec(3, kSym, kIn, 32, kPaper), Spec(2, kSym, kIn, 32, kPaper)},
      {"hybrid", s3, Spec(2, kHybrid, kIn, 32)},
      {"hybrid_paper", Spec(3, kHybrid, kIn, 16, kPaper), Spec(3, kHybrid, kIn, 16, kPaper)},
      {"int8", Spec(8, kSym, kIn, 32), Spec(8, kSym, kIn, 32)},
      {"int8_asymmetric", Spec(8, kAsym, kIn, 64), Spec(8, kAsym, kIn, 8)},
      {"int4", Spec(4, kSym, kIn, 64), Spec(4, kAsym, kIn, 16)},
      {"all_inner_asymmetric", Spec(3, kAsym, kIn, 64), Spec(4, kAsym, kIn, 32), 128, 2, 12},
      {"int8_wide_groups", Spec(8, kSym, kIn, 128), Spec(8, kHybrid, kIn, 32), 256, 1, 5},
      {"two_query_heads", Spec(4, kAsym, kIn, 64), Spec(4, kSym, kIn, 32), 128, 2, 4},
      {"four_query_heads", Spec(2, kSym, kIn, 64), Spec(8, kHybrid, kIn, 32), 64, 2, 8},
      {"mixed_bits", Spec(8, kAsym, kIn, 32), Spec(2, kSym, kIn, 32), 96, 3, 9},
      {"kivi", Spec(2, kAsym, kOut, 32), Spec(2, kAsym, kOut, 32), 64, 2, 8, 32, 0, 128, false},
      {"kivi_group_8", Spec(2, kAsym, kOut, 8), Spec(4, kHybrid, kOut, 8), 48, 2, 4},
      {"outer_symmetric", Spec(3, kSym, kOut, 16), Spec(8, kSym, kOut, 16), 80, 1, 4},
      {"inner_keys_outer_values", s3, Spec(3, kAsym, kOut, 64), 64, 2, 8, 64, 64, 64},
      {"outer_keys_inner_values", Spec(4, kAsym, kOut, 128), s3, 64, 1, 4, 128, 0, 128},
      {"half_keys", half, s3},
      {"half_values", s3, half},
      {"dim_8", Spec(3, kSym, kIn, 8), Spec(3, kSym, kIn, 32), 8, 2, 4},
      {"dim_48_group_16", Spec(3, kSym, kIn, 16), s3, 48, 2, 8},
      {"dim_256_page_128", Spec(4, kSym, kIn, 128), Spec(4, kSym, kIn, 128), 256, 1, 2, 128},
      {"outer_dim_8", Spec(8, kAsym, kOut, 8), Spec(8, kSym, kOut, 8), 8, 1, 4},
  };
}

std::unique_ptr<CpuAttention> Create(CpuIsa isa, int threads, int64_t max_rows = 512) {
  auto attention = CpuAttention::Create(isa, threads);
  CHECK(attention->Reserve({.max_rows = max_rows}).ok(), "Reserve");
  return attention;
}

class CpuAttentionTest : public testing::TestWithParam<CpuIsa> {};

TEST_P(CpuAttentionTest, AgreesWithTheReferenceOverConfigurationsAndPositions) {
  auto attention = Create(GetParam(), 2);
  const auto reference = CreateReferenceBackend();
  for (const Case& raw : AllCases()) {
    const Case c = Normalized(raw);
    SCOPED_TRACE(c.name);
    // Three sealed pages, and a last page with some of its tokens.
    const int64_t window_pages = (c.sink_tokens + c.recent_tokens) / c.page_tokens;
    const int64_t num_pages = window_pages + 4;
    const int64_t tokens = (num_pages - 1) * c.page_tokens + 3;
    Input input = RandomInput(c, tokens, kSeed);
    const std::vector<PageRef> pages = Pages(num_pages, 0, 1);
    Cache row_major(c, CodeOrder::kRowMajor, num_pages);
    Cache panels(c, CodeOrder::kPanel16, num_pages);
    std::vector<float> q, q_panels;
    Fill(*reference, row_major, input, pages, 1, q);
    Fill(*attention, panels, input, pages, 1, q_panels);
    ASSERT_TRUE(reference->Synchronize().ok());
    const float rotation_bound = 3e-7f * Largest(q);
    for (size_t i = 0; i < q.size(); ++i) {
      const bool near = std::fabs(q[i] - q_panels[i]) <= rotation_bound;
      ASSERT_TRUE(near) << "q at " << i;
    }
    // First token, one page -1/0/+1, the first sealed page appears, the last rows across a page.
    const int64_t page = c.page_tokens, first_sealed = (window_pages + 1) * page;
    const std::vector<Rows> spans = {{0, 1},
                                     {page - 1, page + 1},
                                     {first_sealed - 1, first_sealed + 1},
                                     {(num_pages - 1) * page - 1, tokens}};
    double squares = 0, errors = 0;
    for (const Rows rows : spans) {
      const std::vector<float> expected = Attend(*reference, row_major, q, c.heads, pages, 1, rows);
      const std::vector<float> actual = Attend(*attention, panels, q, c.heads, pages, 1, rows);
      const double bound = ErrorBound(row_major, c, input, q, pages, rows.end - 1);
      ASSERT_GT(Largest(expected), 0.1f) << "inputs too easy";
      for (size_t i = 0; i < expected.size(); ++i) {
        const double difference = std::fabs(static_cast<double>(actual[i]) - expected[i]);
        const bool near = difference <= bound;
        ASSERT_TRUE(near) << "rows from " << rows.begin << ", element " << i << ": " << actual[i]
                          << " instead of " << expected[i] << ", bound " << bound;
        squares += static_cast<double>(expected[i]) * expected[i];
        errors += difference * difference;
      }
    }
    // Rounding errors of independent sign add as squares: a few half units, within F16's unit.
    const double relative = std::sqrt(errors / squares);
    const double units =
        (c.key.quantized() ? HalfUnit(c.key) : 0) + (c.value.quantized() ? HalfUnit(c.value) : 0);
    const bool small = relative <= std::min(1.5e-4 + 4.5 * units, 0x1p-10);
    EXPECT_TRUE(small) << "relative RMS error " << relative;
    RecordProperty(c.name, std::to_string(relative));
  }
}

TEST_P(CpuAttentionTest, SealsTheCodesAndScalesOfTheReference) {
  auto attention = Create(GetParam(), 2);
  const auto reference = CreateReferenceBackend();
  for (const Case& raw : AllCases()) {
    const Case c = Normalized(raw);
    SCOPED_TRACE(c.name);
    const int64_t num_pages = (c.sink_tokens + c.recent_tokens) / c.page_tokens + 2;
    const int64_t tokens = num_pages * c.page_tokens;
    Input input = RandomInput(c, tokens, kSeed + 1);
    std::fill(input.cos.begin(), input.cos.end(), 1.0f);  // exact rotation, so equal F16 inputs
    std::fill(input.sin.begin(), input.sin.end(), 0.0f);
    const std::vector<PageRef> pages = Pages(num_pages, 0, 1);
    Cache row_major(c, CodeOrder::kRowMajor, num_pages);
    Cache panels(c, CodeOrder::kPanel16, num_pages);
    std::vector<float> q;
    Fill(*reference, row_major, input, pages, 0, q);
    Fill(*attention, panels, input, pages, 0, q);
    if (c.normalize && c.key.quantized()) {
      for (int64_t i = 0; i < c.kv_heads * c.head_dim; ++i) {
        ASSERT_EQ(row_major.norms[static_cast<size_t>(i)], panels.norms[static_cast<size_t>(i)]);
      }
    }
    const PageRange sealed = panels.layout.SealedPages(tokens - 1);
    for (int64_t p = sealed.begin; p < sealed.end; ++p) {
      const int32_t id = pages[static_cast<size_t>(p)].sealed_id;
      for (int64_t g = 0; g < c.kv_heads; ++g) {
        for (int64_t t = 0; t < c.page_tokens; ++t) {
          for (int64_t d = 0; d < c.head_dim; ++d) {
            ASSERT_EQ(DecodeSealedKey(row_major.View(), id, g, t, d),
                      DecodeSealedKey(panels.View(), id, g, t, d))
                << "key, head " << g << " token " << t << " channel " << d;
            ASSERT_EQ(DecodeSealedValue(row_major.View(), id, g, t, d),
                      DecodeSealedValue(panels.View(), id, g, t, d))
                << "value, head " << g << " token " << t << " channel " << d;
          }
        }
      }
    }
  }
}

TEST_P(CpuAttentionTest, GivesARowTheSameBitsWhateverStandsBesideIt) {
  for (const Case& raw : AllCases()) {
    const Case c = Normalized(raw);
    SCOPED_TRACE(c.name);
    const int64_t num_pages = (c.sink_tokens + c.recent_tokens) / c.page_tokens + 3;
    const int64_t tokens = num_pages * c.page_tokens - 5;
    auto one = Create(GetParam(), 1, 2 * tokens);
    auto two = Create(GetParam(), 2, 2 * tokens);
    Cache cache(c, CodeOrder::kPanel16, 2 * num_pages);
    const std::vector<PageRef> pages[2] = {Pages(num_pages, 0, 2), Pages(num_pages, 1, 2)};
    Input inputs[2] = {RandomInput(c, tokens, kSeed + 2), RandomInput(c, tokens, kSeed + 3)};
    std::vector<float> q[2];
    for (int32_t s = 0; s < 2; ++s) Fill(*one, cache, inputs[s], pages[s], s, q[s]);
    const std::vector<float> all = Attend(*one, cache, q[0], c.heads, pages[0], 0, {0, tokens});
    const int64_t width = c.heads * c.head_dim;
    const auto same = [&](const std::vector<float>& part, int64_t first) {
      return std::memcmp(part.data(), all.data() + first * width, part.size() * 4) == 0;
    };
    for (const int64_t chunk : {int64_t{1}, int64_t{32}, int64_t{33}, tokens}) {
      for (int64_t at = 0; at < tokens; at += chunk) {
        const Rows rows{at, std::min(at + chunk, tokens)};
        ASSERT_TRUE(same(Attend(*two, cache, q[0], c.heads, pages[0], 0, rows), at))
            << "chunk of " << chunk << " at " << at;
      }
    }
    // In one step with the other sequence's rows before and after.
    const Rows first{tokens - 40, tokens - 7}, middle{tokens - 37, tokens}, last{0, 9};
    std::vector<float> mixed;
    const auto add = [&](const std::vector<float>& from, Rows rows) {
      mixed.insert(mixed.end(), from.begin() + rows.begin * width, from.begin() + rows.end * width);
    };
    add(q[1], first);
    add(q[0], middle);
    add(q[1], last);
    const SequenceSlice slices[3] = {
        {0, first.size(), first.begin, pages[1], 1, 0},
        {first.size(), middle.size(), middle.begin, pages[0], 0, 0},
        {first.size() + middle.size(), last.size(), last.begin, pages[1], 1, 0}};
    std::vector<float> out(mixed.size(), kNaN);
    const int64_t num_rows = first.size() + middle.size() + last.size();
    two->Attention({View(mixed, num_rows), cache.View(), &cache.layout, slices, c.heads,
                    1.0f / std::sqrt(static_cast<float>(c.head_dim)), View(out, num_rows)});
    ASSERT_TRUE(same(
        {out.begin() + first.size() * width, out.begin() + (first.size() + middle.size()) * width},
        middle.begin));
  }
}

// Products with codes are exact and floats are added in one order, so attention in one pass and by
// single functions, with tiles, byte products or neither, are the same function.
TEST(CpuAttentionVariants, WithVectorsOfOneWidthGiveTheSameBits) {
  const std::vector<CpuIsa> isas = SupportedCpuIsas();
  if (isas.front() <= CpuIsa::kAvx512) {
    GTEST_SKIP() << "this machine has no AVX-512 with VNNI to compare with AVX-512 without it";
  }
  for (const Case& raw : AllCases()) {
    const Case c = Normalized(raw);
    SCOPED_TRACE(c.name);
    const int64_t num_pages = (c.sink_tokens + c.recent_tokens) / c.page_tokens + 4;
    const int64_t tokens = num_pages * c.page_tokens;
    auto plain = Create(CpuIsa::kAvx512, 1);
    Cache cache(c, CodeOrder::kPanel16, num_pages);
    const std::vector<PageRef> pages = Pages(num_pages, 0, 1);
    Input input = RandomInput(c, tokens, kSeed + 10);
    std::vector<float> q;
    Fill(*plain, cache, input, pages, 0, q);
    for (const int64_t num_rows : {int64_t{1}, c.page_tokens}) {
      const Rows rows{tokens - num_rows, tokens};
      const std::vector<float> expected = Attend(*plain, cache, q, c.heads, pages, 0, rows);
      ASSERT_GT(Largest(expected), 0.1f);
      for (const CpuIsa isa : isas) {
        if (isa <= CpuIsa::kAvx512) continue;
        const std::vector<float> out = Attend(*Create(isa, 1), cache, q, c.heads, pages, 0, rows);
        EXPECT_EQ(std::memcmp(out.data(), expected.data(), out.size() * 4), 0)
            << CpuIsaName(isa) << ", " << num_rows << " rows";
      }
    }
  }
}

TEST_P(CpuAttentionTest, GivesALongSequenceTheSameBitsOnAnyNumberOfThreads) {
  Case c{"long", Spec(3, kSym, kIn, 16), Spec(3, kSym, kIn, 32), 16, 1, 2};
  const int64_t tokens = 9 * 1024 + 17, num_pages = CeilDiv(tokens, c.page_tokens);
  Cache cache(c, CodeOrder::kPanel16, num_pages);
  const std::vector<PageRef> pages = Pages(num_pages, 0, 1);
  Input input = RandomInput(c, tokens, kSeed + 4);
  std::vector<float> q;
  auto two = Create(GetParam(), 2);
  Fill(*two, cache, input, pages, 0, q);
  const std::vector<float> expected =
      Attend(*two, cache, q, c.heads, pages, 0, {tokens - 400, tokens});  // by tile
  ASSERT_GT(Largest(expected), 0.01f);
  const int64_t width = c.heads * c.head_dim;
  for (const int threads : {1, 2, 3, 8}) {
    auto attention = Create(GetParam(), threads);
    for (const int64_t rows : {1, 18}) {  // by segment
      const std::vector<float> out =
          Attend(*attention, cache, q, c.heads, pages, 0, {tokens - rows, tokens});
      EXPECT_EQ(std::memcmp(out.data(), expected.data() + (400 - rows) * width, out.size() * 4), 0)
          << threads << " threads, " << rows << " rows";
    }
  }
}

TEST_P(CpuAttentionTest, ReadsNothingThatTheVisibilityRuleHides) {
  const Case c{"base", Spec(3, kSym, kIn, 32), Spec(3, kSym, kIn, 32)};
  auto attention = Create(GetParam(), 2);
  const int64_t num_pages = 8, tokens = 7 * 32 + 9;
  Cache cache(c, CodeOrder::kPanel16, num_pages);
  const std::vector<PageRef> pages = Pages(num_pages, 0, 1);
  Input input = RandomInput(c, tokens, kSeed + 5);
  std::vector<float> q;
  Fill(*attention, cache, input, pages, 0, q);
  const Rows rows{tokens - 1, tokens};
  const std::vector<float> expected = Attend(*attention, cache, q, c.heads, pages, 0, rows);
  // Spoils the open form of sealed pages, and the sealed form of open ones.
  const PageRange sealed = cache.layout.SealedPages(tokens - 1);
  ASSERT_EQ(sealed.begin, 1);
  ASSERT_EQ(sealed.end, 4);
  const KvLayerLayout& layer = cache.layout.layer(0);
  for (int64_t p = 0; p < num_pages; ++p) {
    const PageRef page = pages[static_cast<size_t>(p)];
    const bool is_sealed = p >= sealed.begin && p < sealed.end;
    std::byte* hidden = is_sealed
                            ? cache.open.data() + page.open_id * layer.open_page_bytes()
                            : cache.sealed.data() + page.sealed_id * layer.sealed_page_bytes();
    const int64_t bytes = is_sealed ? layer.open_page_bytes() : layer.sealed_page_bytes();
    std::fill(hidden, hidden + bytes, std::byte{0x7e});
  }
  const std::vector<float> spoiled = Attend(*attention, cache, q, c.heads, pages, 0, rows);
  EXPECT_EQ(std::memcmp(spoiled.data(), expected.data(), expected.size() * 4), 0);
  EXPECT_FALSE(std::isnan(expected[0]));
}

TEST_P(CpuAttentionTest, ReadsAnExactPromptAsHalf) {
  Case c{"base", Spec(3, kSym, kIn, 32), Spec(3, kSym, kIn, 32)};
  auto attention = Create(GetParam(), 2);
  const int64_t num_pages = 8, tokens = 7 * 32 + 9, prompt = 6 * 32 + 11;
  Cache cache(c, CodeOrder::kPanel16, num_pages);
  const std::vector<PageRef> pages = Pages(num_pages, 0, 1);
  Input input = RandomInput(c, tokens, kSeed + 6);
  std::vector<float> q;
  Fill(*attention, cache, input, pages, 0, q);
  c.key = c.value = QuantSpec{};
  Cache half(c, CodeOrder::kPanel16, num_pages);
  Fill(*attention, half, input, pages, 0, q);
  const Rows rows{prompt - 5, prompt + 5};  // across the end of the prompt, within one page
  const std::vector<float> exact = Attend(*attention, half, q, c.heads, pages, 0, rows);
  const std::vector<float> served = Attend(*attention, cache, q, c.heads, pages, 0, rows);
  const std::vector<float> out = Attend(*attention, cache, q, c.heads, pages, 0, rows, prompt);
  const auto half_bytes = static_cast<ptrdiff_t>(out.size() / 2);
  EXPECT_TRUE(std::equal(out.begin(), out.begin() + half_bytes, exact.begin()));
  EXPECT_TRUE(std::equal(out.begin() + half_bytes, out.end(), served.begin() + half_bytes));
  EXPECT_FALSE(std::equal(served.begin(), served.begin() + half_bytes, exact.begin()));
}

TEST_P(CpuAttentionTest, PassesANonFiniteQueryOnAndKeepsTheOtherRows) {
  const Case c{"base", Spec(3, kSym, kIn, 32), Spec(3, kSym, kIn, 32)};
  auto attention = Create(GetParam(), 1);
  const int64_t num_pages = 8, tokens = num_pages * 32;
  Cache cache(c, CodeOrder::kPanel16, num_pages);
  const std::vector<PageRef> pages = Pages(num_pages, 0, 1);
  Input input = RandomInput(c, tokens, kSeed + 7);
  std::vector<float> q;
  Fill(*attention, cache, input, pages, 0, q);
  const Rows rows{tokens - 3, tokens};
  const std::vector<float> clean = Attend(*attention, cache, q, c.heads, pages, 0, rows);
  const auto width = static_cast<size_t>(c.heads * c.head_dim);
  q[q.size() - 2 * width + 5] = kNaN;  // head 0 of the middle row
  const std::vector<float> out = Attend(*attention, cache, q, c.heads, pages, 0, rows);
  for (size_t i = 0; i < out.size(); ++i) {
    const bool spoiled = i >= width && i < width + static_cast<size_t>(c.head_dim);
    ASSERT_EQ(std::isnan(out[i]), spoiled) << i;
    if (!spoiled) {
      ASSERT_EQ(out[i], clean[i]) << i;
    }
  }
}

TEST_P(CpuAttentionTest, HugeScoresStillWeighTheLargest) {
  const Case c{"base", Spec(3, kSym, kIn, 32), Spec(3, kSym, kIn, 32)};
  auto attention = Create(GetParam(), 1);
  const int64_t num_pages = 8, tokens = num_pages * 32;
  Cache cache(c, CodeOrder::kPanel16, num_pages);
  const std::vector<PageRef> pages = Pages(num_pages, 0, 1);
  Input input = RandomInput(c, tokens, kSeed + 9);
  std::vector<float> q;
  Fill(*attention, cache, input, pages, 0, q);
  for (const float factor : {1e4f, 1e9f, 1e20f}) {
    std::vector<float> large = q;
    for (float& x : large) x *= factor;
    const std::vector<float> out =
        Attend(*attention, cache, large, c.heads, pages, 0, {tokens - 32, tokens});
    EXPECT_GT(Largest(out), 0.5f) << factor;
    for (const float x : out) ASSERT_LE(std::fabs(x), 8.0f) << factor;  // a mean of values
  }
}

TEST_P(CpuAttentionTest, RefusesToSealNonFiniteValues) {
  const Case c{"base", Spec(3, kSym, kIn, 32), Spec(3, kSym, kIn, 32), 64, 2, 8, 32, 32, 96, false};
  auto attention = Create(GetParam(), 2);
  Cache cache(c, CodeOrder::kPanel16, 2);
  const std::vector<PageRef> pages = Pages(2, 0, 1);
  for (const bool key : {true, false}) {
    for (const float bad : {kNaN, 1e30f, 1.0f}) {  // 1e30 is infinite in F16
      Input input = RandomInput(c, 64, kSeed + 8);
      std::vector<float> q;
      Fill(*attention, cache, input, pages, 0, q);
      const KvLayerLayout& layer = cache.layout.layer(0);
      uint16_t* memory = key ? cache.View().OpenKeys(0, 1) + layer.OpenKeyIndex(31, 63)
                             : cache.View().OpenValues(0, 1) + layer.OpenValueIndex(31, 63);
      *memory = F32ToF16(bad);
      const std::vector<SealItem> items = {{1, 1, -1}, {0, 0, -1}};
      EXPECT_EQ(attention->Seal({cache.View(), items}),
                bad == 1.0f ? std::vector<int64_t>() : std::vector<int64_t>{1})
          << key << " " << bad;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Variants, CpuAttentionTest, testing::ValuesIn(SupportedCpuIsas()),
                         [](const auto& variant) {
                           return std::string(CpuIsaName(variant.param));
                         });

}  // namespace
}  // namespace innerq
