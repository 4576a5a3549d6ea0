#include "engine/prefix_index.h"

#include <optional>

#include "gtest/gtest.h"
#include "tests/engine/engine_test_util.h"

namespace innerq {
namespace {

// Pools, an index over them, and sequences as they are after computing some tokens.
class PrefixIndexTest : public testing::Test {
 protected:
  struct Computed {
    std::vector<int32_t> tokens;
    BlockTable pages{};
    BlockRef norm{};
  };

  explicit PrefixIndexTest(KvLayout layout = TestLayout(true, /*recent_tokens=*/64))
      : layout_(std::move(layout)) {}

  // As a scheduler leaves it before it gives up the open copies of a step from `from` tokens on.
  Computed Compute(std::vector<int32_t> tokens, int64_t from = 0) {
    Computed computed{.tokens = std::move(tokens)};
    const auto size = std::ssize(computed.tokens);
    const PageRange sealed = layout_.SealedPages(size - 1);
    const PageRange before = layout_.SealedPages(std::max<int64_t>(from - 1, 0));
    for (int64_t page = 0; page < CeilDiv(size, 32); ++page) {
      computed.pages.AppendOpen(open_.Allocate());
      if (page < sealed.begin || page >= sealed.end) continue;
      computed.pages.Seal(page, sealed_.Allocate());
      if (from > 0 && page < before.end) computed.pages.ReleaseOpen(page);
    }
    if (sealed.size() > 0 && layout_.normalizes_keys()) computed.norm = norms_.Allocate();
    return computed;
  }
  PrefixIndex::Progress Of(const Computed& computed, const std::string& salt = "") {
    salt_ = salt;
    return {salt_, computed.tokens, computed.pages, computed.norm};
  }
  int64_t NumFound(const std::vector<int32_t>& tokens, const std::string& salt = "") {
    return index_.Find(salt, tokens, 1000).num_pages();
  }
  PageCounts idle() const { return {open_.num_idle(), sealed_.num_idle(), norms_.num_idle()}; }
  void TearDown() override {
    index_.CheckIntegrity();
    for (const auto* pool : {&open_, &sealed_, &norms_}) pool->CheckIntegrity();
  }

  const KvLayout layout_;
  BlockAllocator open_{100}, sealed_{100}, norms_{10};
  PrefixIndex index_{layout_};
  std::string salt_;
};

std::vector<int32_t> Join(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TEST_F(PrefixIndexTest, FindsNothingBeforeAnythingIsKept) {
  EXPECT_EQ(NumFound(PromptOf(100, 1)), 0);
  PrefixIndex::Match none = index_.Find("", PromptOf(100, 1), 1000);
  EXPECT_EQ(none.num_known_pages, 0);
  index_.Use(none);
  EXPECT_FALSE(index_.Evict({1, 1, 1}));
}

// Pages 0 (sink) and 5, 6, 7 open, 1 to 4 sealed: what a sequence of 8 pages holds.
TEST_F(PrefixIndexTest, RestoresTheStateAtTheBoundary) {
  std::optional<Computed> first = Compute(PromptOf(300, 1));
  index_.Keep(Of(*first), 8);
  EXPECT_EQ(idle(), PageCounts());
  BlockTable pages;
  BlockRef norm;
  const PrefixIndex::Match match = index_.Find("", first->tokens, 1000);
  ASSERT_EQ(match.num_pages(), 8);
  EXPECT_EQ(match.num_known_pages, 8);
  index_.Restore(match, &pages, &norm);
  ASSERT_EQ(pages.num_pages(), 8);
  EXPECT_EQ(pages.num_sealed(), 4);
  EXPECT_EQ(norm.id(), first->norm.id());
  for (int64_t page = 0; page < 8; ++page) {
    const bool sealed = page >= 1 && page < 5;
    EXPECT_EQ(pages.page(page).sealed_id, sealed ? first->pages.page(page).sealed_id : -1);
    EXPECT_EQ(pages.page(page).open_id, sealed ? -1 : first->pages.page(page).open_id);
  }
  first.reset();
  EXPECT_EQ(idle(), PageCounts()) << "the second sequence holds all that is left";
  pages.Clear();
  norm.Reset();
  EXPECT_EQ(idle(), (PageCounts{4, 4, 1}));
  EXPECT_EQ(open_.num_free(), 96);
}

TEST_F(PrefixIndexTest, FindsStatesAtCheckpointsAndWhereTheirPagesMakeOne) {
  const Computed first = Compute(PromptOf(300, 1));
  index_.Keep(Of(first), 8);
  const std::vector<int32_t>& tokens = first.tokens;
  EXPECT_EQ(NumFound({tokens.begin(), tokens.begin() + 256}), 8);
  EXPECT_EQ(NumFound({tokens.begin(), tokens.begin() + 255}), 1) << "of the rest it is the window";
  EXPECT_EQ(index_.Find("", tokens, 7).num_pages(), 1);
  EXPECT_EQ(index_.Find("", tokens, 7).num_known_pages, 7);
  index_.Keep(Of(first), 4);  // pages 0 to 3, all open
  for (int64_t page = 1; page <= 4; ++page) {
    EXPECT_EQ(index_.Find("", tokens, page).num_pages(), page);
  }
  EXPECT_EQ(index_.Find("", tokens, 5).num_pages(), 4);
}

TEST_F(PrefixIndexTest, OneTokenOrTheSaltMakesTheDifference) {
  const Computed first = Compute(PromptOf(120, 1));
  index_.Keep(Of(first, "salt"), 3);
  EXPECT_EQ(NumFound(first.tokens, "salt"), 3);
  EXPECT_EQ(NumFound(first.tokens), 0);
  EXPECT_EQ(NumFound(first.tokens, "salt2"), 0);
  for (size_t i = 0; i < 96; ++i) {
    std::vector<int32_t> other = first.tokens;
    ++other[i];
    EXPECT_EQ(NumFound(other, "salt"), static_cast<int64_t>(i) / 32);
  }
}

// The norm, and with it the sealed keys of pages 1 to 3, depends on page 3; that of page 4 on it,
// too, but page 4 comes after it.
TEST_F(PrefixIndexTest, SealedPagesOfTheNormsSpanBelongToThePathThroughIt) {
  const std::vector<int32_t> shared = PromptOf(96, 1);
  const Computed a = Compute(Join(shared, PromptOf(160, 2)));
  const Computed b = Compute(Join(shared, PromptOf(160, 3)));
  index_.Keep(Of(a), 8);
  index_.Keep(Of(b), 8);
  for (const Computed* computed : {&a, &b}) {
    BlockTable pages;
    BlockRef norm;
    index_.Restore(index_.Find("", computed->tokens, 8), &pages, &norm);
    EXPECT_EQ(norm.id(), computed->norm.id());
    for (int64_t page = 1; page < 5; ++page) {
      EXPECT_EQ(pages.page(page).sealed_id, computed->pages.page(page).sealed_id);
    }
    EXPECT_EQ(pages.page(0).open_id, a.pages.page(0).open_id) << "the sink is the same";
  }
}

TEST_F(PrefixIndexTest, APassingCheckpointGivesWayUnlessSomebodyUsedIt) {
  const Computed first = Compute(PromptOf(400, 1));
  index_.KeepPassing(Of(first), 6, 0);
  index_.KeepPassing(Of(first), 7, 6);
  EXPECT_EQ(index_.num_checkpoints(), 1);
  EXPECT_EQ(index_.Find("", first.tokens, 6).num_pages(), 1);
  index_.Use(index_.Find("", first.tokens, 7));
  index_.KeepPassing(Of(first), 8, 7);
  EXPECT_EQ(index_.num_checkpoints(), 2);
  index_.Keep(Of(first), 8);
  index_.KeepPassing(Of(first), 9, 8);
  index_.KeepPassing(Of(first), 9, 0);
  EXPECT_EQ(index_.num_checkpoints(), 3);
  EXPECT_EQ(index_.Find("", first.tokens, 8).num_pages(), 8);
}

TEST_F(PrefixIndexTest, EvictsTheLeastRecentlyUsedThatFreesWhatIsLacking) {
  std::optional<Computed> a = Compute(PromptOf(90, 1)), b = Compute(PromptOf(250, 2)),
                          c = Compute(PromptOf(90, 3));
  for (const auto* computed : {&*a, &*b, &*c}) {
    index_.Keep(Of(*computed), std::ssize(computed->tokens) / 32);
  }
  const std::vector<int32_t> first = a->tokens, second = b->tokens, third = c->tokens;
  a.reset();
  b.reset();
  index_.Use(index_.Find("", first, 2));
  EXPECT_EQ(idle(), (PageCounts{2 + 4, 3, 1}));
  // The third is in use, the first was used, sealed pages are the second's.
  EXPECT_TRUE(index_.Evict({0, 1, 0}));
  EXPECT_EQ(NumFound(second), 0);
  EXPECT_EQ(idle(), (PageCounts{2, 0, 0}));
  EXPECT_EQ(sealed_.num_free(), 100);
  EXPECT_EQ(norms_.num_free(), 10);
  EXPECT_TRUE(index_.Evict({1, 0, 0}));
  EXPECT_EQ(NumFound(first), 0);
  EXPECT_EQ(NumFound(third), 2) << "evicting it would have freed nothing";
  EXPECT_TRUE(index_.Evict({1, 0, 0})) << "but it can be had";
  EXPECT_FALSE(index_.Evict({1, 0, 0}));
  EXPECT_EQ(c->pages.num_pages(), 3) << "and its sequence goes on";
}

TEST_F(PrefixIndexTest, WhatTwoCheckpointsShareGoesWithTheLast) {
  const std::vector<int32_t> shared = PromptOf(256, 1);
  std::optional<Computed> a = Compute(Join(shared, PromptOf(64, 2)));
  index_.Keep(Of(*a), 10);
  const std::vector<int32_t> tokens = a->tokens;
  index_.Keep(Of(*a), 8);
  a.reset();
  EXPECT_EQ(idle(), (PageCounts{1 + 3 + 2, 6, 1}));
  EXPECT_TRUE(index_.Evict({1, 0, 0}));  // the one at 10, with pages 8 and 9
  EXPECT_EQ(index_.Find("", tokens, 10).num_known_pages, 8);
  EXPECT_EQ(NumFound(shared), 8);
  EXPECT_EQ(idle(), (PageCounts{1 + 3, 4, 1})) << "no sealed page is left that nothing needs";
  EXPECT_TRUE(index_.Evict({1, 0, 0}));
  EXPECT_EQ(idle(), PageCounts());
}

TEST_F(PrefixIndexTest, OfTwoCopiesTheOneInUseStays) {
  std::optional<Computed> a = Compute(PromptOf(250, 1)), b = Compute(PromptOf(250, 1));
  index_.Keep(Of(*a), 7);
  index_.Keep(Of(*b), 7);
  BlockTable pages;
  BlockRef norm;
  index_.Restore(index_.Find("", a->tokens, 7), &pages, &norm);
  EXPECT_EQ(norm.id(), a->norm.id());
  pages.Clear();
  norm.Reset();
  a.reset();
  EXPECT_EQ(idle(), (PageCounts{4, 3, 1}));
  index_.Keep(Of(*b), 7);
  EXPECT_EQ(idle(), PageCounts()) << "the idle copies have gone back";
}

class PlainPrefixIndexTest : public PrefixIndexTest {
 protected:
  PlainPrefixIndexTest() : PrefixIndexTest(TestLayout(/*quantized=*/false)) {}
};

TEST_F(PlainPrefixIndexTest, EveryPageOfAPrefixIsABoundary) {
  std::optional<Computed> first = Compute(PromptOf(300, 1));
  index_.Keep(Of(*first), 9);
  std::vector<int32_t> other =
      Join({first->tokens.begin(), first->tokens.begin() + 200}, PromptOf(100, 2));
  const PrefixIndex::Match match = index_.Find("", other, 1000);
  EXPECT_EQ(match.num_pages(), 6);
  EXPECT_EQ(match.num_known_pages, 6);
  index_.Use(match);  // and lives longer than what comes after it
  first.reset();
  EXPECT_TRUE(index_.Evict({1, 0, 0}));
  EXPECT_EQ(idle(), (PageCounts{6, 0, 0}));
  EXPECT_EQ(NumFound(other), 6);
}

}  // namespace
}  // namespace innerq
