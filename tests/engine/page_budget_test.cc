#include "engine/page_budget.h"

#include <algorithm>

#include "gtest/gtest.h"
#include "tests/engine/hash_model.h"

namespace innerq {
namespace {

std::vector<KvLayout> Layouts() {
  return {TestLayout(),
          TestLayout(/*quantized=*/false),
          TestLayout(true, 32),
          TestLayout(true, 96, /*norms=*/false),
          TestLayout(true, 64, true, /*sink_tokens=*/0),
          TestLayout(true, 32, true, /*sink_tokens=*/64)};
}

// What a sequence holds during the step that computes position p alone, page by page.
PageCounts HeldAt(const KvLayout& layout, int64_t position, int64_t exact_before) {
  PageCounts held;
  const PageRange now = layout.SealedPages(position, exact_before);
  for (int64_t page = 0; page <= layout.PageOf(position); ++page) {
    bool was_sealed = false;
    if (position > 0) {
      const PageRange before = layout.SealedPages(position - 1, exact_before);
      was_sealed = page >= before.begin && page < before.end;
    }
    held.open += was_sealed ? 0 : 1;  // the open copy stays until the end of the step
    held.sealed += page >= now.begin && page < now.end ? 1 : 0;
  }
  held.norms = layout.normalizes_keys() && held.sealed > 0 ? 1 : 0;
  return held;
}

PageCounts Max(const PageCounts& a, const PageCounts& b) {
  return {std::max(a.open, b.open), std::max(a.sealed, b.sealed), std::max(a.norms, b.norms)};
}

TEST(PageBudget, PeakIsTheMostThatTokenByTokenStepsHold) {
  for (const KvLayout& layout : Layouts()) {
    for (const int64_t exact_before : {0, 1, 31, 32, 33, 160, 191, 192, 193, 300, 420}) {
      PageCounts peak;
      for (int64_t positions = 1; positions <= 450; ++positions) {
        peak = Max(peak, HeldAt(layout, positions - 1, exact_before));
        ASSERT_EQ(PeakPages(layout, positions, exact_before), peak)
            << positions << " positions, exact before " << exact_before;
      }
    }
  }
}

TEST(PageBudget, WorstPeakCoversEverySplitIntoPromptAndAnswerAndNotMore) {
  for (const KvLayout& layout : Layouts()) {
    for (const int64_t positions : {1, 32, 33, 128, 160, 161, 192, 193, 400}) {
      PageCounts exact;
      for (int64_t prompt = 1; prompt <= positions; ++prompt) {
        exact = Max(exact, PeakPages(layout, positions, prompt));
      }
      PageCounts worst = WorstPeakPages(layout, positions, /*exact_prefill=*/true);
      EXPECT_EQ(worst, exact) << positions;
      EXPECT_EQ(WorstPeakPages(layout, positions, false), PeakPages(layout, positions, 0));
    }
  }
}

// Any way to cut a sequence into chunks takes the same pages in the end.
TEST(PageBudget, ChunksAddUpToWhatTheWholeTakes) {
  for (const KvLayout& layout : Layouts()) {
    for (const int64_t exact_before : {0, 100, 200}) {
      for (const int64_t chunk : {1, 31, 32, 33, 200, 500}) {
        PageCounts sum;
        for (int64_t begin = 0; begin < 500; begin += chunk) {
          sum =
              sum + ChunkPages(layout, begin, std::min<int64_t>(begin + chunk, 500), exact_before);
        }
        EXPECT_EQ(sum, ChunkPages(layout, 0, 500, exact_before)) << chunk;
        EXPECT_EQ(sum.open, CeilDiv(500, layout.page_tokens()));
        EXPECT_EQ(sum.sealed, layout.SealedPages(499).size());
      }
    }
  }
}

}  // namespace
}  // namespace innerq
