#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

namespace innerq {
namespace {

bool Decodes(const Sequence& sequence) { return sequence.num_uncomputed() == 1; }

PageCounts KnownNeed(const KvLayout& layout, const Sequence& sequence) {
  return PeakPages(layout, sequence.num_to_compute(), sequence.exact_before);
}

// The first position of the sequence's next chunk that scores.
int64_t FirstScore(const Sequence& sequence) {
  return std::max(sequence.num_computed, sequence.num_scored);
}

// Positions that score in the sequence's next chunk if that ends at `end`.
int64_t NumScores(const Sequence& sequence, int64_t end) {
  const int64_t scores_end = std::min(end, sequence.num_to_score());
  return std::max<int64_t>(scores_end - FirstScore(sequence), 0);
}

}  // namespace

Scheduler::Scheduler(const SchedulerLimits& limits, const KvLayout& layout)
    : limits_(limits),
      layout_(layout),
      open_(limits.pools.open),
      sealed_(limits.pools.sealed),
      norms_(limits.pools.norms) {
  CHECK(limits.max_sequences > 0 && limits.max_batch_tokens > 0, "a step needs room");
  CHECK(limits.max_logit_rows >= std::min(limits.max_sequences, limits.max_batch_tokens),
        "every sequence may sample");
}

void Scheduler::Admit(std::unique_ptr<Sequence> sequence) {
  const int64_t positions = NumPositions(sequence->prompt_length(), sequence->request.max_tokens);
  CHECK(PeakPages(layout_, positions, sequence->exact_before).FitsIn(limits_.pools),
        "a sequence that can never fit must be refused");
  waiting_.push_back(std::move(sequence));
}

ScheduledBatch Scheduler::Schedule() {
  ScheduledBatch batch;
  const int64_t num_decodes = std::count_if(
      running_.begin(), running_.end(), [](const auto& sequence) { return Decodes(*sequence); });
  int64_t decode_rows = std::min(num_decodes, limits_.max_batch_tokens);
  int64_t prefill_rows = limits_.max_batch_tokens - decode_rows;
  int64_t logit_rows = limits_.max_logit_rows - decode_rows;  // of prefill; a decode wants one
  bool whole = true;                                          // no chunk had to shrink

  // Oldest first, so that whoever is preempted has not been planned yet.
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence* sequence = running_[i].get();
    const bool decodes = Decodes(*sequence);
    int64_t& rows = decodes ? decode_rows : prefill_rows;
    int64_t wanted = std::min(sequence->num_uncomputed(), rows);
    if (!decodes) wanted = ChunkWithin(*sequence, wanted, logit_rows);
    whole &= wanted == sequence->num_uncomputed();
    if (wanted == 0) continue;
    int64_t num_tokens = LongestChunk(*sequence, wanted);
    while (num_tokens == 0 && running_.size() > i + 1) {
      PreemptYoungest();
      num_tokens = LongestChunk(*sequence, wanted);
    }
    whole &= num_tokens == wanted;
    if (num_tokens == 0) continue;  // the youngest: waits for the older ones' pages
    rows -= num_tokens;
    batch.chunks.push_back(TakePages(sequence, num_tokens));
    if (!decodes) logit_rows -= batch.chunks.back().num_logit_rows();
  }

  int64_t rows = decode_rows + prefill_rows;
  logit_rows += decode_rows;
  while (!waiting_.empty() && rows > 0 && whole &&
         static_cast<int64_t>(running_.size()) < limits_.max_sequences) {
    Sequence* sequence = waiting_.front().get();
    const PageCounts need = CommittedPages() + KnownNeed(layout_, *sequence);
    if (!need.FitsIn(limits_.pools)) break;
    const int64_t wanted =
        ChunkWithin(*sequence, std::min(sequence->num_uncomputed(), rows), logit_rows);
    const int64_t num_tokens = LongestChunk(*sequence, wanted);
    if (num_tokens == 0) break;
    whole = num_tokens == sequence->num_uncomputed();
    rows -= num_tokens;
    batch.chunks.push_back(TakePages(sequence, num_tokens));
    logit_rows -= batch.chunks.back().num_logit_rows();
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
  CHECK(!batch.chunks.empty() || empty(), "a step without progress");
  return batch;
}

void Scheduler::Commit(const ScheduledBatch& batch) {
  for (const ScheduledChunk& chunk : batch.chunks) {
    Sequence& sequence = *chunk.sequence;
    sequence.num_computed += chunk.num_tokens;
    for (int64_t page = chunk.seals.begin; page < chunk.seals.end; ++page) {
      sequence.pages.ReleaseOpen(page);
    }
  }
}

std::vector<std::unique_ptr<Sequence>> Scheduler::TakeFinished() {
  std::vector<std::unique_ptr<Sequence>> finished;
  for (auto* line : {&running_, &waiting_}) {
    for (auto& sequence : *line) {
      if (!sequence->finish.has_value()) continue;
      sequence->pages.Clear();
      sequence->norm.Reset();
      finished.push_back(std::move(sequence));
    }
    std::erase(*line, nullptr);
  }
  return finished;
}

PageCounts Scheduler::used() const {
  return {open_.num_used(), sealed_.num_used(), norms_.num_used()};
}

void Scheduler::CheckIntegrity() const {
  open_.CheckIntegrity();
  sealed_.CheckIntegrity();
  norms_.CheckIntegrity();
}

int64_t Scheduler::LongestChunk(const Sequence& sequence, int64_t wanted) const {
  const int64_t begin = sequence.num_computed;
  const PageCounts room = free_pages();
  int64_t end = begin + wanted;
  // Needs change only where a row enters a page: try the end, then each page boundary before it.
  while (end > begin && !ChunkPages(layout_, begin, end, sequence.exact_before).FitsIn(room)) {
    end = (end - 1) / layout_.page_tokens() * layout_.page_tokens();
  }
  return std::max<int64_t>(end - begin, 0);
}

int64_t Scheduler::ChunkWithin(const Sequence& sequence, int64_t wanted, int64_t logit_rows) const {
  int64_t end = sequence.num_computed + wanted;
  // The row that samples is the last one, those before it score.
  if (end == sequence.num_tokens() && NumScores(sequence, end) + 1 > logit_rows) --end;
  end -= std::max<int64_t>(NumScores(sequence, end) - logit_rows, 0);
  return end - sequence.num_computed;
}

ScheduledChunk Scheduler::TakePages(Sequence* sequence, int64_t num_tokens) {
  const int64_t begin = sequence->num_computed;
  const int64_t end = begin + num_tokens;
  const PageCounts need = ChunkPages(layout_, begin, end, sequence->exact_before);
  ScheduledChunk chunk;
  chunk.sequence = sequence;
  chunk.num_tokens = num_tokens;
  for (int64_t i = 0; i < need.open; ++i) sequence->pages.AppendOpen(open_.Allocate());
  chunk.seals.end = layout_.SealedPages(end - 1, sequence->exact_before).end;
  chunk.seals.begin = chunk.seals.end - need.sealed;
  for (int64_t page = chunk.seals.begin; page < chunk.seals.end; ++page) {
    sequence->pages.Seal(page, sealed_.Allocate());
  }
  chunk.computes_norm = need.norms > 0;
  if (chunk.computes_norm) sequence->norm = norms_.Allocate();
  chunk.samples = end == sequence->num_tokens();
  chunk.first_score = FirstScore(*sequence);
  chunk.num_scores = NumScores(*sequence, end);
  return chunk;
}

void Scheduler::PreemptYoungest() {
  Sequence& sequence = *running_.back();
  sequence.pages.Clear();
  sequence.norm.Reset();
  sequence.num_computed = 0;
  waiting_.push_front(std::move(running_.back()));
  running_.pop_back();
  ++num_preemptions_;
}

PageCounts Scheduler::CommittedPages() const {
  PageCounts sum;
  for (const auto& sequence : running_) sum = sum + KnownNeed(layout_, *sequence);
  return sum;
}

ForwardBatch BuildForwardBatch(const ScheduledBatch& batch, const KvLayout& layout) {
  ForwardBatch forward;
  forward.page_tables.reserve(batch.chunks.size());
  forward.slices.reserve(batch.chunks.size());
  for (const ScheduledChunk& chunk : batch.chunks) {
    const Sequence& sequence = *chunk.sequence;
    const int64_t begin = sequence.num_computed;
    const int64_t end = begin + chunk.num_tokens;
    std::vector<PageRef>& pages = forward.page_tables.emplace_back();
    for (int64_t page = 0; page < sequence.pages.num_pages(); ++page) {
      pages.push_back(sequence.pages.page(page));
    }
    forward.slices.push_back({.row_begin = forward.num_rows(),
                              .num_rows = chunk.num_tokens,
                              .first_position = begin,
                              .pages = pages,
                              .norm_id = sequence.norm.id(),
                              .exact_before = sequence.exact_before});
    for (int64_t position = begin; position < end; ++position) {
      forward.token_ids.push_back(sequence.tokens[static_cast<size_t>(position)]);
      forward.positions.push_back(position);
    }
    const int64_t first_score_row = forward.num_rows() - end + chunk.first_score;
    for (int64_t i = 0; i < chunk.num_scores; ++i) {
      forward.logit_rows.push_back(first_score_row + i);
    }
    if (chunk.samples) forward.logit_rows.push_back(forward.num_rows() - 1);
    if (chunk.computes_norm) {
      KeyNormItem& item = forward.key_norms.emplace_back();
      item.norm_id = sequence.norm.id();
      const PageRange range = layout.KeyNormPages();
      for (int64_t page = range.begin; page < range.end; ++page) {
        item.open_ids.push_back(pages[static_cast<size_t>(page)].open_id);
      }
    }
    for (int64_t page = chunk.seals.begin; page < chunk.seals.end; ++page) {
      const PageRef ref = pages[static_cast<size_t>(page)];
      forward.seals.push_back({ref.open_id, ref.sealed_id, sequence.norm.id()});
    }
  }
  return forward;
}

}  // namespace innerq
