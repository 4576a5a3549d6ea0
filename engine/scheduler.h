// Scheduler: which sequences compute how many tokens in a step, and in which pages.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "engine/block_allocator.h"
#include "engine/page_budget.h"
#include "engine/prefix_index.h"
#include "engine/sequence.h"
#include "models/forward_batch.h"

namespace innerq {

// What a step may use.
struct SchedulerLimits {
  int64_t max_sequences = 64;      // running at once
  int64_t max_batch_tokens = 512;  // rows of one step
  PageCounts pools;                // sizes
  int64_t max_logit_rows = 512;    // rows of one step whose logits are wanted
  bool prefix_cache = true;        // prompts begin with what is cached of them
};

// One sequence's part of a step: positions [num_computed, num_computed + num_tokens).
struct ScheduledChunk {
  Sequence* sequence = nullptr;  // owned by the scheduler
  int64_t num_tokens = 0;
  PageRange seals;             // logical pages that this step seals
  bool computes_norm = false;  // before it seals
  bool samples = false;        // reaches the end of the tokens: its last row yields the next one
  int64_t first_score = 0;     // positions [first_score, first_score + num_scores), for the first
  int64_t num_scores = 0;      // time here, score the prompt token after them

  int64_t num_logit_rows() const { return num_scores + (samples ? 1 : 0); }
};

// The decisions of one step. Pages are already held.
struct ScheduledBatch {
  std::vector<ScheduledChunk> chunks;  // oldest sequence first
};

// Decides, first come first served. No I/O, no model, no clock: equal calls give equal schedules.
// Engine thread only.
//
// All sequences stand in one line by arrival: the running ones in front, the waiting ones behind.
//   - Running sequences with one token left to compute ("decodes") get theirs first; the rest of
//     the step's rows goes to prefill chunks, oldest first, so neither starves the other.
//   - A chunk shrinks to what free pages and rows with logits allow. If the pages do not hold one
//     token, the youngest running sequence is preempted: it gives up all pages, becomes the first
//     of the waiting and computes its tokens again later.
//   - A waiting sequence starts if rows are left, no chunk had to shrink, and the pools hold the
//     tokens known today of all running ones and its own, and the reserve: a share of the tokens
//     that each of them may still take, 0 unless sequences have been preempted lately. So only the
//     youngest running one can be in the middle of a prefill. It starts where its longest cached
//     prefix ends, in the state of a sequence that has computed as much: with its last token and
//     all that it has yet to score before it.
//   - A running sequence without a token to compute keeps its pages and is passed over.
//   - Pages that only the index of prefixes holds are free pages: whoever needs one takes it.
// Hence the oldest sequence computes at least one token in every step, provided that each sequence
// would fit alone (PeakPages), and every sequence becomes the oldest: once all others are preempted
// what it does not hold is free, cached or not, and what it holds is no more than without a cache.
//
// The index learns from a step when it is committed. There is a checkpoint where a prompt ends (one
// page boundary before its last token), where a prompt leaves those known before it, and one that
// goes with each sequence: after its last full page, wherever it ends or is preempted.
class Scheduler {
 public:
  // `layout` must outlive the scheduler.
  Scheduler(const SchedulerLimits& limits, const KvLayout& layout);

  // Puts a sequence at the end of the line. CHECK: it fits alone.
  void Admit(std::unique_ptr<Sequence> sequence);
  // Plans the next step and takes its pages. Not empty unless there are no sequences; CHECK: if
  // there are, one has a token to compute. Must be followed by Commit, unless all its sequences
  // have ended.
  ScheduledBatch Schedule();
  // The step was computed: counts its tokens, lets the index keep what it may, and releases the
  // open copies of what it sealed.
  void Commit(const ScheduledBatch& batch);
  // Removes all sequences with a `finish`, wherever they stand; their pages are free afterwards.
  std::vector<std::unique_ptr<Sequence>> TakeFinished();

  bool empty() const { return running_.empty() && waiting_.empty(); }
  const std::deque<std::unique_ptr<Sequence>>& running() const { return running_; }
  const std::deque<std::unique_ptr<Sequence>>& waiting() const { return waiting_; }
  int64_t num_preemptions() const { return num_preemptions_; }
  // Tokens, of prompts and answers, computed by committed steps though their sequence had been past
  // them before.
  int64_t num_recomputed() const { return num_recomputed_; }
  PageCounts used() const;    // held by sequences; what several share counts once
  PageCounts cached() const;  // held by the index alone
  // Prompt tokens of sequences that looked for a prefix at their first start, and those found.
  int64_t num_prefix_queries() const { return num_prefix_queries_; }
  int64_t num_prefix_hits() const { return num_prefix_hits_; }
  int64_t num_prefix_evictions() const { return num_prefix_evictions_; }  // of checkpoints
  int64_t num_start_attempts() const { return num_start_attempts_; }      // of waiting sequences
  // CHECKs the three allocators and the index.
  void CheckIntegrity() const;

 private:
  PageCounts free_pages() const { return limits_.pools - used(); }
  // The longest chunk of up to `wanted` tokens that the free pages allow; may be 0.
  int64_t LongestChunk(const Sequence& sequence, int64_t wanted) const;
  // The longest chunk of up to `wanted` tokens that wants at most `logit_rows` rows with logits.
  int64_t ChunkWithin(const Sequence& sequence, int64_t wanted, int64_t logit_rows) const;
  // Whether the sequence's pages are what any sequence with these tokens computes.
  bool Shares(const Sequence& sequence) const {
    return limits_.prefix_cache && sequence.exact_before == 0;
  }
  PrefixIndex::Match FindPrefix(const Sequence& sequence) const;
  // Starts the first of the waiting at the end of `prefix`, whose state it is in.
  void Start(const PrefixIndex::Match& prefix);
  // Frees that many blocks of those that only the index holds. CHECK: there are enough.
  void MakeRoom(const PageCounts& need);
  ScheduledChunk TakePages(Sequence* sequence, int64_t num_tokens);
  void GiveUpPages(Sequence* sequence);
  void PreemptYoungest();
  // Lets the index keep what the sequence has computed, to the end of its chunk.
  void KeepCheckpoints(const ScheduledChunk& chunk);
  // What a sequence will need for its tokens known today and the reserve.
  PageCounts ExpectedNeed(const Sequence& sequence) const;
  // The sum over all running sequences and `newcomer`, which holds its prefix already.
  PageCounts CommittedPages(const Sequence& newcomer) const;

  const SchedulerLimits limits_;
  const KvLayout& layout_;
  BlockAllocator open_, sealed_, norms_;  // before the index and the sequences, which hold blocks
  PrefixIndex prefixes_;                  // empty without a prefix cache
  std::deque<std::unique_ptr<Sequence>> running_;  // by arrival
  std::deque<std::unique_ptr<Sequence>> waiting_;  // by arrival; all younger than the running
  // The first of the waiting cannot start before a sequence leaves or is preempted, a page is
  // freed, the reserve falls or the index learns. All else that happens makes the room for it no
  // larger.
  bool blocked_ = false;
  int64_t reserve_ = 0;    // share of tokens to come, times kWholeReserve
  int64_t num_steps_ = 0;  // planned
  int64_t num_preemptions_ = 0;
  int64_t num_recomputed_ = 0;
  int64_t num_start_attempts_ = 0;
  int64_t num_prefix_queries_ = 0;
  int64_t num_prefix_hits_ = 0;
  int64_t num_prefix_evictions_ = 0;
};

// Lays a step out for the model.
ForwardBatch BuildForwardBatch(const ScheduledBatch& batch, const KvLayout& layout);

}  // namespace innerq
