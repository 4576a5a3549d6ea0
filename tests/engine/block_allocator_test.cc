#include "engine/block_allocator.h"

#include <optional>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace innerq {
namespace {

TEST(BlockAllocator, HandsOutTheSmallestFreeId) {
  BlockAllocator blocks(4);
  BlockRef a = blocks.Allocate(), b = blocks.Allocate(), c = blocks.Allocate();
  EXPECT_EQ(a.id(), 0);
  EXPECT_EQ(b.id(), 1);
  EXPECT_EQ(c.id(), 2);
  b.Reset();
  a.Reset();
  EXPECT_EQ(blocks.num_free(), 3);
  EXPECT_EQ(blocks.Allocate().id(), 0);
  const BlockRef again = blocks.Allocate();
  const BlockRef next = blocks.Allocate();
  EXPECT_EQ(again.id(), 0);
  EXPECT_EQ(next.id(), 1);
}

TEST(BlockAllocator, CopiesShareABlockAndTheLastOneReturnsIt) {
  BlockAllocator blocks(1);
  BlockRef a = blocks.Allocate();
  BlockRef b = a;
  BlockRef c = std::move(a);
  EXPECT_FALSE(a);  // NOLINT: a moved-from reference holds nothing
  EXPECT_EQ(a.id(), -1);
  EXPECT_EQ(blocks.num_holders(0), 2);
  const BlockRef& itself = b;
  b = itself;  // changes nothing
  EXPECT_EQ(blocks.num_holders(0), 2);
  c.Reset();
  EXPECT_EQ(blocks.num_free(), 0);
  b = BlockRef();
  EXPECT_EQ(blocks.num_free(), 1);
  blocks.CheckIntegrity();
}

TEST(BlockAllocator, WhatOnlyACacheHoldsIsNeitherFreeNorUsed) {
  BlockAllocator blocks(3);
  BlockRef a = blocks.Allocate();
  BlockRef b = blocks.Allocate();
  CachedBlock cached(a);
  EXPECT_FALSE(cached.idle());
  EXPECT_EQ(blocks.num_used(), 2);
  a.Reset();
  EXPECT_TRUE(cached.idle());
  EXPECT_EQ(blocks.num_used(), 1);
  EXPECT_EQ(blocks.num_idle(), 1);
  EXPECT_EQ(blocks.num_free(), 1);
  blocks.CheckIntegrity();
  a = cached.ref();
  EXPECT_FALSE(cached.idle());
  EXPECT_EQ(blocks.num_used(), 2);
  a.Reset();
  cached = CachedBlock(b);  // the idle block returns
  EXPECT_EQ(blocks.num_free(), 2);
  EXPECT_EQ(blocks.num_idle(), 0);
  CachedBlock moved = std::move(cached);
  b.Reset();
  EXPECT_TRUE(moved.idle());
  moved.Reset();
  EXPECT_EQ(blocks.num_free(), 3);
  blocks.CheckIntegrity();
}

TEST(BlockAllocatorDeathTest, ABlockIsCachedOnce) {
  BlockAllocator blocks(1);
  const BlockRef block = blocks.Allocate();
  const CachedBlock cached(block);
  EXPECT_DEATH(CachedBlock{block}, "twice");
}

// Random operations against a plain count per id.
TEST(BlockAllocator, KeepsItsBooksUnderRandomOperations) {
  constexpr int64_t kSize = 37;
  std::mt19937 random(1);
  BlockAllocator blocks(kSize);
  std::vector<BlockRef> refs;
  std::vector<int> holders(kSize, 0);
  int exhausted = 0;
  for (int step = 0; step < 20000; ++step) {
    // Phases of growth and decline, so that the pool is seen full and empty.
    const bool growing = step / 500 % 2 == 0;
    const auto pick = [&] { return random() % refs.size(); };
    if (growing ? random() % 3 != 0 : random() % 3 == 0) {
      if (!refs.empty() && random() % 3 == 0) {
        refs.push_back(refs[pick()]);
        ++holders[static_cast<size_t>(refs.back().id())];
      } else if (blocks.num_free() > 0) {
        const auto smallest = std::find(holders.begin(), holders.end(), 0) - holders.begin();
        refs.push_back(blocks.Allocate());
        ASSERT_EQ(refs.back().id(), smallest);
        ++holders[static_cast<size_t>(smallest)];
      } else {
        ++exhausted;
      }
    } else if (!refs.empty()) {
      const size_t i = pick();
      --holders[static_cast<size_t>(refs[i].id())];
      std::swap(refs[i], refs.back());
      refs.pop_back();
    }
    blocks.CheckIntegrity();
    ASSERT_EQ(blocks.num_used(), kSize - std::count(holders.begin(), holders.end(), 0));
  }
  EXPECT_GT(exhausted, 100) << "the pool was never full";
  refs.clear();
  EXPECT_EQ(blocks.num_free(), kSize);
}

TEST(BlockAllocatorDeathTest, RefusesToDieWithBlocksOut) {
  EXPECT_DEATH(
      {
        BlockRef survivor;
        BlockAllocator blocks(2);
        survivor = blocks.Allocate();
        blocks.~BlockAllocator();
      },
      "outlive their allocator");
}

TEST(BlockAllocatorDeathTest, RefusesToHandOutMoreThanItHas) {
  BlockAllocator blocks(0);
  EXPECT_DEATH(blocks.Allocate(), "no free block");
}

TEST(BlockTable, KnowsBothFormsOfAPageWhileItIsSealed) {
  BlockAllocator open(2), sealed(2);
  BlockTable table;
  table.AppendOpen(open.Allocate());
  table.AppendOpen(open.Allocate());
  table.Seal(1, sealed.Allocate());
  EXPECT_EQ(table.page(1).open_id, 1);
  EXPECT_EQ(table.page(1).sealed_id, 0);
  table.ReleaseOpen(1);
  EXPECT_EQ(table.page(1).open_id, -1);
  EXPECT_EQ(table.page(1).sealed_id, 0);
  EXPECT_EQ(table.page(0).open_id, 0);
  EXPECT_EQ(table.page(0).sealed_id, -1);
  EXPECT_EQ(open.num_used(), 1);
  EXPECT_DEATH(table.ReleaseOpen(0), "just sealed");
  EXPECT_DEATH(table.Seal(1, sealed.Allocate()), "only once");
  table.Clear();
  EXPECT_EQ(open.num_used() + sealed.num_used(), 0);
}

}  // namespace
}  // namespace innerq
