// StepDriver: scheduler and model in lockstep, without the engine's thread; shows every row's
// logits.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "engine/scheduler.h"
#include "engine/step_model.h"
#include "gtest/gtest.h"

namespace innerq {

// Answers are greedy but for a twist: sequences of different seeds part ways. Each step checks that
// the oldest sequence moves, that every running one holds what it would hold without a cache, and
// the books of allocators and index.
class StepDriver {
 public:
  using OnRow =
      std::function<void(const Sequence&, int64_t position, std::span<const float> logits)>;
  using OnFinished = std::function<void(const Sequence&)>;

  // Either may be null.
  StepDriver(SchedulerLimits limits, std::unique_ptr<StepModel> model, OnRow on_row,
             OnFinished on_finished = nullptr)
      : model_(std::move(model)),
        on_row_(std::move(on_row)),
        on_finished_(std::move(on_finished)),
        scheduler_(limits, model_->layout()) {}

  // Valid until it has finished.
  Sequence* Add(Request request, bool exact_prefill = false) {
    const auto exact_before = exact_prefill ? static_cast<int64_t>(request.prompt.size()) : 0;
    auto sequence = std::make_unique<Sequence>(std::move(request),
                                               std::make_shared<ResponseStream>(0), exact_before);
    sequence->number = ++num_added_;
    Sequence* const added = sequence.get();
    scheduler_.Admit(std::move(sequence));
    return added;
  }

  void Step() {
    Collect();
    const Sequence* const oldest = Oldest();
    const ScheduledBatch batch = scheduler_.Schedule();
    scheduler_.CheckIntegrity();
    ASSERT_EQ(batch.chunks.empty(), oldest == nullptr);
    if (oldest != nullptr) {
      ASSERT_EQ(batch.chunks[0].sequence, oldest) << "the oldest makes no progress";
    }
    ForwardBatch forward = BuildForwardBatch(batch, model_->layout());
    forward.logit_rows.resize(forward.token_ids.size());
    std::iota(forward.logit_rows.begin(), forward.logit_rows.end(), 0);
    forward.num_top.clear();
    const auto stepped = model_->Step(forward);
    ASSERT_TRUE(stepped.ok());
    scheduler_.Commit(batch);
    CheckHeldPages();
    const auto width = static_cast<size_t>(model_->vocab_size());
    std::span<const float> rest = *stepped;
    for (const ScheduledChunk& chunk : batch.chunks) {
      Sequence& sequence = *chunk.sequence;
      std::span<const float> row;
      for (int64_t i = chunk.num_tokens; i > 0; --i) {
        row = rest.first(width);
        rest = rest.subspan(width);
        if (on_row_) on_row_(sequence, sequence.num_computed - i, row);
      }
      sequence.num_scored += chunk.num_scores;
      if (chunk.samples) {
        const auto best = std::max_element(row.begin(), row.end()) - row.begin();
        sequence.Append(static_cast<int32_t>(
            (static_cast<uint64_t>(best) + sequence.request.sampling.seed) % width));
      }
      if (sequence.num_generated() == sequence.request.max_tokens &&
          (chunk.samples || sequence.num_uncomputed() == 0)) {
        ASSERT_EQ(sequence.num_scored, sequence.num_to_score()) << "a position was not scored";
        sequence.End(FinishReason::kLength);
      }
    }
    Collect();
    ++num_steps_;
  }

  void RunToEnd() {
    while (!scheduler_.empty() && !testing::Test::HasFatalFailure()) Step();
    EXPECT_EQ(scheduler_.used(), PageCounts());
  }

  const KvLayout& layout() const { return model_->layout(); }
  int64_t vocab_size() const { return model_->vocab_size(); }
  const Scheduler& scheduler() const { return scheduler_; }
  int64_t num_steps() const { return num_steps_; }

 private:
  void Collect() {
    for (const auto& sequence : scheduler_.TakeFinished()) {
      if (on_finished_) on_finished_(*sequence);
    }
    scheduler_.CheckIntegrity();
  }

  const Sequence* Oldest() const {
    if (!scheduler_.running().empty()) return scheduler_.running().front().get();
    return scheduler_.waiting().empty() ? nullptr : scheduler_.waiting().front().get();
  }

  // Between steps a page has the form that the last row saw, and that form alone.
  void CheckHeldPages() const {
    const KvLayout& shape = model_->layout();
    std::set<int32_t> open, sealed, norms;
    for (const auto& sequence : scheduler_.running()) {
      const PageRange range = shape.SealedPages(sequence->num_computed - 1, sequence->exact_before);
      ASSERT_EQ(sequence->pages.num_pages(), CeilDiv(sequence->num_computed, shape.page_tokens()));
      for (int64_t i = 0; i < sequence->pages.num_pages(); ++i) {
        const PageRef page = sequence->pages.page(i);
        const bool is_sealed = i >= range.begin && i < range.end;
        ASSERT_EQ(page.sealed_id >= 0, is_sealed) << "page " << i;
        ASSERT_EQ(page.open_id >= 0, !is_sealed) << "page " << i;
        (is_sealed ? sealed : open).insert(is_sealed ? page.sealed_id : page.open_id);
      }
      ASSERT_EQ(static_cast<bool>(sequence->norm), shape.normalizes_keys() && range.size() > 0);
      if (sequence->norm) norms.insert(sequence->norm.id());
    }
    ASSERT_EQ(scheduler_.used(),
              (PageCounts{std::ssize(open), std::ssize(sealed), std::ssize(norms)}));
    for (const auto& sequence : scheduler_.waiting()) {
      ASSERT_EQ(sequence->pages.num_pages(), 0);
      ASSERT_EQ(sequence->num_computed, 0);
    }
  }

  const std::unique_ptr<StepModel> model_;
  const OnRow on_row_;
  const OnFinished on_finished_;
  Scheduler scheduler_;
  int64_t num_added_ = 0;
  int64_t num_steps_ = 0;
};

}  // namespace innerq
