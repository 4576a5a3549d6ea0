// KvLayout: what it refuses, its sizes, its addresses and the rule of which page is sealed.
#include "kernels/paged_kv.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <string>
#include <vector>

#include "kernels/float16.h"
#include "tests/kernels/attention_case.h"

namespace innerq {
namespace {

constexpr CodeOrder kOrders[] = {CodeOrder::kRowMajor, CodeOrder::kPanel16,
                                 CodeOrder::kMmaFragment};

KvCacheSpec Spec(QuantSpec key, QuantSpec value, int64_t head_dim = 128) {
  KvCacheSpec spec;
  spec.kv_heads = 2;
  spec.head_dim = head_dim;
  spec.layers = {{key, value, false}};
  return spec;
}

const QuantSpec kSym3{3, kSym, kIn, 32};

TEST(PagedKv, RefusesWhatCannotBeStoredAndNamesTheValue) {
  struct Refusal {
    std::function<void(KvCacheSpec&)> change;
    std::string value;  // must stand in the message
    std::string param;
  };
  const std::vector<Refusal> refusals = {
      {[](auto& s) { s.page_tokens = 48; }, "48", "kv_cache.page_tokens"},
      {[](auto& s) { s.page_tokens = 0; }, "not 0", "kv_cache.page_tokens"},
      {[](auto& s) { s.page_tokens = 256; }, "256", "kv_cache.page_tokens"},
      {[](auto& s) { s.sink_tokens = -32; }, "-32", "kv_cache.sink_tokens"},
      {[](auto& s) { s.sink_tokens = 33; }, "33", "kv_cache.sink_tokens"},
      {[](auto& s) { s.recent_tokens = 0; }, "not 0", "kv_cache.recent_tokens"},
      {[](auto& s) { s.recent_tokens = 100; }, "100", "kv_cache.recent_tokens"},
      {[](auto& s) { s.kv_heads = 0; }, "with 0", ""},
      {[](auto& s) { s.kv_heads = -3; }, "with -3", ""},
      {[](auto& s) { s.head_dim = 0; }, "not 0", ""},
      {[](auto& s) { s.head_dim = 100; }, "not 100", ""},
      {[](auto& s) { s.head_dim = 264; }, "not 264", ""},
      {[](auto& s) { s.layers.clear(); }, "layer", ""},
      {[](auto& s) { s.layers[0].key.bits = 5; }, "not 5", "kv_cache.key.bits"},
      {[](auto& s) { s.layers[0].key.bits = 0; }, "not 0", "kv_cache.key.bits"},
      {[](auto& s) { s.layers[0].key.bits = 32; }, "not 32", "kv_cache.key.bits"},
      {[](auto& s) { s.layers[0].value.bits = 1; }, "not 1", "kv_cache.value.bits"},
      {[](auto& s) { s.layers[0].value.bits = 17; }, "not 17", "kv_cache.value.bits"},
      {[](auto& s) { s.layers[0].key.group_size = 4; }, "not 4", "kv_cache.key.group_size"},
      {[](auto& s) { s.layers[0].key.group_size = 24; }, "not 24", "kv_cache.key.group_size"},
      {[](auto& s) { s.layers[0].key.group_size = 256; }, "not 256", "kv_cache.key.group_size"},
      {[](auto& s) { s.layers[0].value.group_size = 0; }, "not 0", "kv_cache.value.group_size"},
      // The grouped axis of a page: channels of inner keys, tokens of inner values, and the others.
      {[](auto& s) { s.head_dim = 48; }, "group_size 32 does not divide 48",
       "kv_cache.key.group_size"},
      {[](auto& s) { s.layers[0].value.group_size = 64; }, "64 does not divide 32",
       "kv_cache.value.group_size"},
      {[](auto& s) {
         s.layers[0].key = {2, kAsym, kOut, 64};
       },
       "64 does not divide 32", "kv_cache.key.group_size"},
      {[](auto& s) {
         s.head_dim = 96;
         s.layers[0].value = {2, kAsym, kOut, 64};
       },
       "64 does not divide 96", "kv_cache.value.group_size"},
      // Every layer counts.
      {[](auto& s) {
         s.layers.push_back({{.bits = 7}, kSym3, false});
       },
       "not 7", "kv_cache.key.bits"},
  };
  for (size_t i = 0; i < refusals.size(); ++i) {
    SCOPED_TRACE(i);
    KvCacheSpec spec = Spec(kSym3, kSym3);
    ASSERT_TRUE(KvLayout::Create(spec, CodeOrder::kRowMajor).ok());
    refusals[i].change(spec);
    const Result<KvLayout> layout = KvLayout::Create(spec, CodeOrder::kRowMajor);
    ASSERT_FALSE(layout.ok());
    EXPECT_EQ(layout.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(layout.error().message.find(refusals[i].value), std::string::npos)
        << layout.error().message;
    EXPECT_EQ(layout.error().param, refusals[i].param);
  }
}

TEST(PagedKv, SealedBitsOfThePresetsAreThoseOfThePaper) {
  const QuantSpec kivi{2, kAsym, kOut, 32}, half{.bits = 16};
  struct Preset {
    QuantSpec key, value;
    double bits;
  };
  for (const CodeOrder order : kOrders) {
    for (const Preset& p : {Preset{kSym3, kSym3, 3.5},             // base
                            {kSym3, {2, kSym, kIn, 32}, 3.0},      // small
                            {kSym3, {2, kHybrid, kIn, 32}, 3.25},  // hybrid
                            {kivi, kivi, 3.0},
                            {half, half, 16.0}}) {
      const Result<KvLayout> layout = KvLayout::Create(Spec(p.key, p.value), order);
      ASSERT_TRUE(layout.ok());
      EXPECT_EQ(layout->sealed_bits_per_element(), p.bits);
      EXPECT_EQ(layout->layer(0).open_page_bytes(), 2 * 32 * 128 * 2 * 2);
    }
  }
}

TEST(PagedKv, EffectiveBitsCountTheWindows) {
  const KvLayout layout = *KvLayout::Create(Spec(kSym3, kSym3), CodeOrder::kRowMajor);
  EXPECT_EQ(layout.effective_bits_per_element(0), 0);
  EXPECT_EQ(layout.effective_bits_per_element(160), 16);     // nothing is sealed
  EXPECT_EQ(layout.effective_bits_per_element(1), 16 * 32);  // one open page for one token
  // 10 pages: 5 sealed, 5 open.
  EXPECT_EQ(layout.effective_bits_per_element(320), (5 * 3.5 + 5 * 16) / 10);
  KvCacheSpec normalized = Spec(kSym3, kSym3);
  for (auto& layer : normalized.layers) layer.normalize_keys = true;
  const KvLayout with_norm = *KvLayout::Create(normalized, CodeOrder::kRowMajor);
  EXPECT_EQ(with_norm.effective_bits_per_element(160), 16);
  // A word for each channel of a key, over the tokens and the two elements of each.
  EXPECT_EQ(with_norm.effective_bits_per_element(320), (5 * 3.5 + 5 * 16) / 10 + 32.0 / (320 * 2));
}

TEST(PagedKv, PagesSealByPositionAlone) {
  struct Row {
    int64_t position, begin, end;  // of the sealed pages
  };
  const KvLayout layout = *KvLayout::Create(Spec(kSym3, kSym3), CodeOrder::kRowMajor);
  for (const Row& row : {Row{0, 1, 1},
                         {31, 1, 1},
                         {127, 1, 1},
                         {159, 1, 1},  // page 4: pages 1 to 4 are recent
                         {160, 1, 2},  // page 5: the first seals
                         {191, 1, 2},
                         {192, 1, 3},
                         {1024, 1, 29}}) {
    const PageRange sealed = layout.SealedPages(row.position);
    EXPECT_EQ(sealed.begin, row.begin) << row.position;
    EXPECT_EQ(sealed.end, row.end) << row.position;
  }
  // Queries of an exact prompt see everything as F16; those after it do not.
  EXPECT_EQ(layout.SealedPages(199, 200).size(), 0);
  EXPECT_EQ(layout.SealedPages(200, 200).size(), 2);
  EXPECT_EQ(layout.KeyNormPages().begin, 1);
  EXPECT_EQ(layout.KeyNormPages().end, 5);  // positions [32, 160)

  KvCacheSpec kivi = Spec({2, kAsym, kOut, 32}, {2, kAsym, kOut, 32});
  kivi.sink_tokens = 0;
  kivi.recent_tokens = 128;
  const KvLayout no_sink = *KvLayout::Create(kivi, CodeOrder::kRowMajor);
  EXPECT_EQ(no_sink.SealedPages(159).size(), 0);
  EXPECT_EQ(no_sink.SealedPages(160).begin, 0);
  EXPECT_EQ(no_sink.SealedPages(160).end, 1);

  const QuantSpec half{.bits = 16};
  const KvLayout open = *KvLayout::Create(Spec(half, half), CodeOrder::kRowMajor);
  EXPECT_FALSE(open.quantized());
  EXPECT_EQ(open.SealedPages(100000).size(), 0);
}

// Every index of [0, size) is hit exactly once.
void ExpectBijection(int64_t tokens, int64_t width, const std::string& what,
                     const std::function<int64_t(int64_t, int64_t)>& index) {
  std::vector<int> hits(static_cast<size_t>(tokens * width));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < width; ++d) {
      const int64_t i = index(t, d);
      ASSERT_TRUE(i >= 0 && i < tokens * width) << what << " " << t << " " << d;
      EXPECT_EQ(++hits[static_cast<size_t>(i)], 1) << what << " " << t << " " << d;
    }
  }
}

TEST(PagedKv, IndexFunctionsAreBijections) {
  for (const CodeOrder order : kOrders) {
    for (const int64_t dim : {8, 48, 64, 80, 128}) {
      for (const int64_t tokens : {32, 128}) {
        const int size = dim % 32 == 0 ? 32 : 8;
        KvCacheSpec spec = Spec({3, kSym, kIn, size}, {3, kSym, kIn, size}, dim);
        spec.page_tokens = spec.sink_tokens = spec.recent_tokens = tokens;
        const KvLayout layout = *KvLayout::Create(spec, order);
        const KvLayerLayout& layer = layout.layer(0);
        const auto check = [&](int64_t width, const std::string& what,
                               int64_t (KvLayerLayout::*index)(int64_t, int64_t) const) {
          ExpectBijection(tokens, width, what,
                          [&](int64_t t, int64_t d) { return (layer.*index)(t, d); });
        };
        check(dim, "key code", &KvLayerLayout::KeyCodeIndex);
        check(layer.padded_dim(), "value code", &KvLayerLayout::ValueCodeIndex);
        check(dim, "open key", &KvLayerLayout::OpenKeyIndex);
        check(layer.padded_dim(), "open value", &KvLayerLayout::OpenValueIndex);
      }
    }
  }
}

TEST(PagedKv, FragmentsAreForTheShapesThatTheyServe) {
  const QuantSpec half{.bits = 16}, small{3, kSym, kIn, 16}, outer{2, kAsym, kOut, 32};
  struct Row {
    QuantSpec key, value;
    int64_t head_dim;
    bool served;
  };
  for (const Row& row : {Row{kSym3, kSym3, 128, true},
                         {kSym3, {2, kHybrid, kIn, 32}, 64, true},
                         {{8, kSym, kIn, 64}, kSym3, 64, true},
                         {{8, kSym, kIn, 64}, half, 64, false},
                         {half, half, 128, true},
                         {kSym3, kSym3, 96, false},
                         {kSym3, kSym3, 256, false},
                         {small, kSym3, 128, false},
                         {kSym3, small, 128, false},
                         {outer, kSym3, 128, false},
                         {half, outer, 64, false}}) {
    const KvLayout layout =
        *KvLayout::Create(Spec(row.key, row.value, row.head_dim), CodeOrder::kMmaFragment);
    EXPECT_EQ(layout.order(), CodeOrder::kMmaFragment);
    EXPECT_EQ(layout.layer(0).order, row.served ? CodeOrder::kMmaFragment : CodeOrder::kRowMajor);
  }
}

// Every bit of a lane is that of one code.
TEST(PagedKv, FragmentFieldsFillALanesWords) {
  for (const int bits : {2, 3, 4, 8}) {
    std::vector<uint8_t> square(kSquareCodes * bits / 8, 0xff);
    for (int64_t i = 0; i < kSquareCodes; ++i) {
      EXPECT_EQ(ReadFragmentCode(square.data(), bits, i), (1u << bits) - 1u);
    }
    std::vector<int> readers(kSquareCodes * bits);  // of each bit
    for (int64_t bit = 0; bit < kSquareCodes * bits; ++bit) {
      std::fill(square.begin(), square.end(), uint8_t{0});
      square[static_cast<size_t>(bit / 8)] = static_cast<uint8_t>(1u << (bit % 8));
      const int64_t lane = bits == 3 && bit / 32 >= 64 ? bit / 32 - 64
                           : bits == 3                 ? bit / 64
                                                       : bit / 32 / bits;
      for (int64_t i = lane * 32; i < lane * 32 + 32; ++i) {
        readers[static_cast<size_t>(bit)] +=
            std::popcount(ReadFragmentCode(square.data(), bits, i));
      }
    }
    EXPECT_EQ(readers, std::vector<int>(readers.size(), 1)) << bits << " bits";
  }
}

TEST(PagedKv, EveryScaleServesOneGroupAndPartsOfAPageDoNotOverlap) {
  constexpr int64_t kDim = 48, kTokens = 32, kPadded = 48;
  for (const CodeOrder order : kOrders) {
    for (const QuantAxis axis : {kIn, kOut}) {
      const QuantSpec side{2, kAsym, axis, 16};
      const KvLayout layout = *KvLayout::Create(Spec(side, side, kDim), order);
      const KvLayerLayout& layer = layout.layer(0);
      std::vector<int> keys(kTokens * kDim / 16), values(keys.size());
      for (int64_t t = 0; t < kTokens; ++t) {
        for (int64_t d = 0; d < kDim; ++d) {
          ++keys.at(static_cast<size_t>(layer.KeyScaleIndex(t, d)));
          ++values.at(static_cast<size_t>(layer.ValueScaleIndex(t, d)));
        }
      }
      EXPECT_EQ(keys, std::vector<int>(keys.size(), 16));
      EXPECT_EQ(values, std::vector<int>(values.size(), 16));
      // Neighbours along the grouped axis share a scale.
      EXPECT_EQ(layer.KeyScaleIndex(0, 0) == layer.KeyScaleIndex(0, 1), axis == kIn);
      EXPECT_EQ(layer.ValueScaleIndex(0, 0) == layer.ValueScaleIndex(1, 0), axis == kIn);
      const int64_t codes = kTokens * kPadded * 2 / 8, scales = kTokens * kPadded / 16 * 2;
      EXPECT_EQ(layer.key_codes, 0);
      EXPECT_EQ(layer.key_scales, codes);
      EXPECT_EQ(layer.key_zeros, codes + scales);
      EXPECT_EQ(layer.value_codes, codes + 2 * scales);
      EXPECT_EQ(layer.value_scales, 2 * codes + 2 * scales);
      EXPECT_EQ(layer.value_zeros, 2 * codes + 3 * scales);
      EXPECT_EQ(layer.sealed_head_bytes, 2 * codes + 4 * scales);
    }
  }
}

// Marks three groups of each side as asymmetric, in a page whose padding is all zero.
TEST(PagedKv, HybridGroupsCountAsAsymmetricByTheirZero) {
  for (const CodeOrder order : kOrders) {
    for (const QuantAxis axis : {kIn, kOut}) {
      const QuantSpec side{2, kHybrid, axis, 8};
      const KvLayout layout = *KvLayout::Create(Spec(side, side, /*head_dim=*/40), order);
      const KvLayerLayout& layer = layout.layer(0);
      std::vector<std::byte> pages(static_cast<size_t>(2 * layer.sealed_page_bytes()));
      const PagedKvView kv{.layout = &layer, .sealed_pages = pages.data()};
      const auto set = [&](int64_t head, int64_t scales, int64_t zeros, int64_t at, float zero) {
        std::byte* page = kv.SealedHead(/*sealed_id=*/1, head);
        reinterpret_cast<uint16_t*>(page + scales)[at] = F32ToF16(0.5f);
        reinterpret_cast<uint16_t*>(page + zeros)[at] = F32ToF16(zero);
      };
      for (int64_t head = 0; head < 2; ++head) {
        for (int64_t t = 0; t < 32; ++t) {
          for (int64_t d = 0; d < 40; ++d) {
            set(head, layer.key_scales, layer.key_zeros, layer.KeyScaleIndex(t, d), -1.0f);
            set(head, layer.value_scales, layer.value_zeros, layer.ValueScaleIndex(t, d), -1.0f);
          }
        }
      }
      EXPECT_EQ(CountSealedGroups(kv, 1).key.asymmetric, 0);
      EXPECT_EQ(CountSealedGroups(kv, 1).value.asymmetric, 0);
      for (const int64_t i : {0, 16, 39}) {  // of three groups, whatever the axis
        const int64_t t = std::min<int64_t>(i, 31);
        set(1, layer.key_scales, layer.key_zeros, layer.KeyScaleIndex(t, i), -1.25f);
        set(0, layer.value_scales, layer.value_zeros, layer.ValueScaleIndex(t, i), 0.0f);
      }
      const LayerGroups groups = CountSealedGroups(kv, 1);
      EXPECT_EQ(groups.key.groups, 2 * 32 * 40 / 8);
      EXPECT_EQ(groups.key.asymmetric, 3);
      EXPECT_EQ(groups.value.groups, 2 * 32 * 40 / 8);
      EXPECT_EQ(groups.value.asymmetric, 3);
    }
  }
}

}  // namespace
}  // namespace innerq
