#include "engine/scheduler.h"

#include <algorithm>
#include <set>
#include <utility>

namespace innerq {
namespace {

// The reserve follows SGLang's new_token_ratio (schedule_batch.py, retract_decode): a preemption
// raises it to what running answers have used of their max_tokens, steps let it decay. It differs
// in that it starts at 0 and ends there, for most answers stop long before max_tokens; and in
// taking half, for some end while others grow.
constexpr int64_t kWholeReserve = 1 << 16;  // all that is yet to come
constexpr int64_t kReserveSteps = 32;       // from one decay to the next, to 15/16

bool Decodes(const Sequence& sequence) { return sequence.num_uncomputed() == 1; }

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
      norms_(limits.pools.norms),
      prefixes_(layout) {
  CHECK(limits.max_sequences > 0 && limits.max_batch_tokens > 0, "a step needs room");
  CHECK(limits.max_logit_rows >= std::min(limits.max_sequences, limits.max_batch_tokens),
        "every sequence may sample");
}

void Scheduler::Admit(std::unique_ptr<Sequence> sequence) {
  const int64_t positions = NumPositions(sequence->prompt_length(), sequence->request.max_tokens);
  CHECK(PeakPages(layout_, positions, sequence->exact_before).FitsIn(limits_.pools),
        "a sequence that can never fit must be refused");
  if (waiting_.empty()) blocked_ = false;
  waiting_.push_back(std::move(sequence));
}

ScheduledBatch Scheduler::Schedule() {
  ScheduledBatch batch;
  if (++num_steps_ % kReserveSteps == 0 && reserve_ > 0) {
    reserve_ = reserve_ * 15 / 16;
    blocked_ = false;
  }
  const int64_t num_decodes = std::count_if(
      running_.begin(), running_.end(), [](const auto& sequence) { return Decodes(*sequence); });
  int64_t decode_rows = std::min(num_decodes, limits_.max_batch_tokens);
  int64_t prefill_rows = limits_.max_batch_tokens - decode_rows;
  int64_t logit_rows = limits_.max_logit_rows - decode_rows;  // of prefill; a decode wants one
  bool whole = true;                                          // no chunk had to shrink

  // Oldest first, so that whoever is preempted has not been planned yet.
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence* sequence = running_[i].get();
    if (sequence->num_uncomputed() == 0) continue;
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
  while (!waiting_.empty() && !blocked_ && rows > 0 && whole &&
         static_cast<int64_t>(running_.size()) < limits_.max_sequences) {
    Sequence* sequence = waiting_.front().get();
    ++num_start_attempts_;
    const PrefixIndex::Match prefix = FindPrefix(*sequence);
    prefixes_.Restore(prefix, &sequence->pages, &sequence->norm);
    sequence->num_computed = prefix.num_pages() * layout_.page_tokens();
    const int64_t wanted =
        ChunkWithin(*sequence, std::min(sequence->num_uncomputed(), rows), logit_rows);
    const bool fits = CommittedPages(*sequence).FitsIn(limits_.pools);
    const int64_t num_tokens = fits ? LongestChunk(*sequence, wanted) : 0;
    if (num_tokens == 0) {
      GiveUpPages(sequence);
      blocked_ = wanted > 0;  // rows with logits may be there in the next step
      break;
    }
    Start(prefix);
    whole = num_tokens == sequence->num_uncomputed();
    rows -= num_tokens;
    batch.chunks.push_back(TakePages(sequence, num_tokens));
    logit_rows -= batch.chunks.back().num_logit_rows();
  }
  CHECK(!batch.chunks.empty() || empty(), "a step without progress");
  return batch;
}

void Scheduler::Commit(const ScheduledBatch& batch) {
  for (const ScheduledChunk& chunk : batch.chunks) {
    Sequence& sequence = *chunk.sequence;
    if (Shares(sequence)) KeepCheckpoints(chunk);
    num_recomputed_ +=
        std::clamp<int64_t>(sequence.max_computed - sequence.num_computed, 0, chunk.num_tokens);
    sequence.num_computed += chunk.num_tokens;
    sequence.max_computed = std::max(sequence.max_computed, sequence.num_computed);
    for (int64_t page = chunk.seals.begin; page < chunk.seals.end; ++page) {
      sequence.pages.ReleaseOpen(page);
      blocked_ = false;
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
      blocked_ = false;
    }
    std::erase(*line, nullptr);
  }
  return finished;
}

PageCounts Scheduler::used() const {
  return {open_.num_used(), sealed_.num_used(), norms_.num_used()};
}

PageCounts Scheduler::cached() const {
  return {open_.num_idle(), sealed_.num_idle(), norms_.num_idle()};
}

void Scheduler::CheckIntegrity() const {
  open_.CheckIntegrity();
  sealed_.CheckIntegrity();
  norms_.CheckIntegrity();
  prefixes_.CheckIntegrity();
}

int64_t Scheduler::LongestChunk(const Sequence& sequence, int64_t wanted) const {
  const int64_t begin = sequence.num_computed;
  const PageCounts room = free_pages();
  int64_t end = begin + wanted;
  // Needs change only where a row enters a page, or is the first of an exact prompt's sequence to
  // see sealed ones, all at once: try the end, then each such place before it.
  while (end > begin && !ChunkPages(layout_, begin, end, sequence.exact_before).FitsIn(room)) {
    const int64_t boundary = (end - 1) / layout_.page_tokens() * layout_.page_tokens();
    end = sequence.exact_before < end ? std::max(boundary, sequence.exact_before) : boundary;
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
  MakeRoom(need);
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

PrefixIndex::Match Scheduler::FindPrefix(const Sequence& sequence) const {
  if (!Shares(sequence)) return {};
  // What comes next needs the last row, and what scores needs its own.
  int64_t most = sequence.num_to_compute() - 1;
  if (sequence.num_scored < sequence.num_to_score()) most = std::min(most, sequence.num_scored);
  return prefixes_.Find(sequence.request.cache_salt, sequence.tokens, most / layout_.page_tokens());
}

void Scheduler::Start(const PrefixIndex::Match& prefix) {
  Sequence& sequence = *waiting_.front();
  prefixes_.Use(prefix);
  sequence.passing_pages = 0;
  sequence.branch_pages = prefix.num_known_pages > prefix.num_pages() ? prefix.num_known_pages : 0;
  if (!sequence.num_cached) {
    sequence.num_cached = sequence.num_computed;
    const bool asked = Shares(sequence) && sequence.num_to_score() == 0;
    num_prefix_queries_ += asked ? sequence.prompt_length() : 0;
    num_prefix_hits_ += sequence.num_computed;
  }
  running_.push_back(std::move(waiting_.front()));
  waiting_.pop_front();
}

void Scheduler::MakeRoom(const PageCounts& need) {
  const auto lack = [&] {
    return need - PageCounts{open_.num_free(), sealed_.num_free(), norms_.num_free()};
  };
  while (!lack().FitsIn({})) {
    CHECK(prefixes_.Evict(lack()), "planned pages are not there");
    ++num_prefix_evictions_;
  }
}

void Scheduler::GiveUpPages(Sequence* sequence) {
  sequence->pages.Clear();
  sequence->norm.Reset();
  sequence->num_computed = 0;
}

void Scheduler::PreemptYoungest() {
  int64_t generated = 0, at_most = 1;
  for (const auto& sequence : running_) {
    generated += sequence->num_generated();
    at_most += sequence->request.max_tokens;
  }
  reserve_ = std::max(reserve_, kWholeReserve / 2 * generated / at_most);
  GiveUpPages(running_.back().get());
  waiting_.push_front(std::move(running_.back()));
  running_.pop_back();
  blocked_ = false;
  ++num_preemptions_;
}

void Scheduler::KeepCheckpoints(const ScheduledChunk& chunk) {
  Sequence& sequence = *chunk.sequence;
  const int64_t before = sequence.num_computed / layout_.page_tokens();
  const int64_t last = (sequence.num_computed + chunk.num_tokens) / layout_.page_tokens();
  if (last == before) return;  // no boundary was passed
  const PrefixIndex::Progress progress{sequence.request.cache_salt, sequence.tokens, sequence.pages,
                                       sequence.norm};
  const int64_t prompt_pages = (sequence.prompt_length() - 1) / layout_.page_tokens();
  for (const int64_t pages : {sequence.branch_pages, prompt_pages}) {
    if (pages > before && pages <= last) prefixes_.Keep(progress, pages);
  }
  prefixes_.KeepPassing(progress, last, sequence.passing_pages);
  sequence.passing_pages = last;
  blocked_ = false;
}

PageCounts Scheduler::ExpectedNeed(const Sequence& sequence) const {
  const int64_t known = sequence.num_to_compute();
  const int64_t most = NumPositions(sequence.prompt_length(), sequence.request.max_tokens);
  return PeakPages(layout_, known + (most - known) * reserve_ / kWholeReserve,
                   sequence.exact_before);
}

PageCounts Scheduler::CommittedPages(const Sequence& newcomer) const {
  // Today's pages, shared ones once, and what each sequence will take in addition. But windows are
  // shared for a while only: of those everyone needs its own.
  PageCounts sum = used();
  if (layout_.quantized()) sum.open = 0;
  std::set<int32_t> sinks;
  const auto add = [&](const Sequence& sequence) {
    const BlockTable& pages = sequence.pages;
    const PageCounts need = ExpectedNeed(sequence);
    sum = sum + need - PageCounts{0, pages.num_sealed(), sequence.norm ? 1 : 0};
    if (!layout_.quantized()) sum.open -= pages.num_pages();
    for (int64_t i = 0; layout_.quantized() && i < layout_.sink_pages(); ++i) {
      if (i < pages.num_pages() && !sinks.insert(pages.page(i).open_id).second) --sum.open;
    }
  };
  for (const auto& sequence : running_) add(*sequence);
  add(newcomer);
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
    pages.reserve(static_cast<size_t>(sequence.pages.num_pages()));
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
      forward.num_top.push_back(0);
    }
    if (chunk.samples) {
      forward.logit_rows.push_back(forward.num_rows() - 1);
      forward.num_top.push_back(NumTopLogits(sequence.request.sampling, sequence.masked()));
    }
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
