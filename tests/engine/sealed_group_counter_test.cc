#include "engine/sealed_group_counter.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "tests/kernels/forwarding_backend.h"

namespace innerq {
namespace {

// A device whose memory the host cannot see, and which copies when it is waited for.
class LateCopies final : public ForwardingBackend {
 public:
  LateCopies() : ForwardingBackend(CreateReferenceBackend()) {}
  bool host_visible() const override { return false; }
  Result<void> Synchronize() override {
    ++num_waits;
    for (const Copy& copy : std::exchange(copies_, {})) {
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    return {};
  }

  int num_waits = 0;

 private:
  struct Copy {
    const std::byte* from;
    int64_t bytes;
    std::byte* to;
  };
  void DoReadToHost(const std::byte* from, int64_t bytes, std::byte* to) override {
    copies_.push_back({from, bytes, to});
  }

  std::vector<Copy> copies_;
};

constexpr int64_t kPages = 6;

// Three layers' sealed pages of random bytes.
struct RandomPages {
  explicit RandomPages(QuantMode mode) {
    KvCacheSpec spec;
    spec.kv_heads = 2;
    spec.head_dim = 64;
    const QuantSpec side{.bits = 3, .mode = mode, .group_size = 32};
    const QuantSpec symmetric{.bits = 3, .group_size = 32};
    spec.layers = {{.key = side, .value = symmetric},
                   {.key = symmetric, .value = symmetric},
                   {.key = {.bits = 16}, .value = side}};
    layout = KvLayout::Create(spec, CodeOrder::kRowMajor).value();
    std::mt19937 random(5);
    for (int64_t i = 0; i < layout.num_layers(); ++i) {
      const KvLayerLayout& layer = layout.layer(i);
      auto& pages = bytes.emplace_back(static_cast<size_t>(kPages * layer.sealed_page_bytes()));
      for (std::byte& byte : pages) byte = static_cast<std::byte>(random());
      views.push_back({.layout = &layer, .sealed_pages = pages.data()});
    }
  }

  KvLayout layout;
  std::vector<std::vector<std::byte>> bytes;
  std::vector<PagedKvView> views;
};

TEST(SealedGroupCounter, WaitsOnceForAStepWhereverItsPagesLie) {
  const RandomPages pages(QuantMode::kHybrid);
  const std::vector<SealItem> seals = {
      {.sealed_id = 4}, {.sealed_id = 0}, {.sealed_id = 5}, {.sealed_id = 2}, {.sealed_id = 1}};
  std::vector<LayerGroups> expected(pages.views.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    for (const SealItem& seal : seals) {
      const LayerGroups page = CountSealedGroups(pages.views[i], seal.sealed_id);
      expected[i].key.Add(page.key);
      expected[i].value.Add(page.value);
    }
  }
  ASSERT_GT(expected[0].key.asymmetric, 0);
  ASSERT_GT(expected[2].value.asymmetric, 0);
  const auto near = CreateReferenceBackend();
  for (const int64_t most_seals : {5, 2, 0}) {
    LateCopies distant;
    for (Backend* backend : {near.get(), static_cast<Backend*>(&distant)}) {
      auto counter = SealedGroupCounter::Create(backend, pages.views, most_seals).value();
      EXPECT_TRUE(counter.groups().empty());
      ASSERT_TRUE(counter.Add({}).ok());
      EXPECT_TRUE(counter.groups().empty()) << "nothing was sealed";
      ASSERT_TRUE(counter.Add(seals).ok());
      ASSERT_EQ(counter.groups().size(), expected.size());
      for (size_t i = 0; i < expected.size(); ++i) {
        EXPECT_EQ(counter.groups()[i].key.groups, expected[i].key.groups);
        EXPECT_EQ(counter.groups()[i].key.asymmetric, expected[i].key.asymmetric);
        EXPECT_EQ(counter.groups()[i].value.groups, expected[i].value.groups);
        EXPECT_EQ(counter.groups()[i].value.asymmetric, expected[i].value.asymmetric);
      }
    }
    // Of a room for fewer pages than a step turned out to seal, as often as it fills.
    EXPECT_EQ(distant.num_waits, most_seals == 5 ? 1 : most_seals == 2 ? 3 : 5);
  }
}

TEST(SealedGroupCounter, ReadsNothingWhereAllGroupsAreOfOneKind) {
  const RandomPages pages(QuantMode::kAsymmetric);
  LateCopies distant;
  auto counter = SealedGroupCounter::Create(&distant, pages.views, 8).value();
  ASSERT_TRUE(counter.Add(std::vector<SealItem>{{.sealed_id = 3}, {.sealed_id = 1}}).ok());
  EXPECT_EQ(distant.num_waits, 0);
  EXPECT_EQ(counter.groups()[0].key.groups, 2 * 2 * 32 * 64 / 32);
  EXPECT_EQ(counter.groups()[0].key.asymmetric, counter.groups()[0].key.groups);
}

}  // namespace
}  // namespace innerq
