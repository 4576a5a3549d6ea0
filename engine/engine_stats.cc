#include "engine/engine_stats.h"

#include <chrono>
#include <utility>

#include "engine/scheduler.h"
#include "engine/sequence.h"

namespace innerq {

EngineStats EmptyStats(const PageCounts& pools) {
  EngineStats stats;
  stats.open_pages = pools.open;
  stats.sealed_pages = pools.sealed;
  return stats;
}

void ReadScheduler(const Scheduler& scheduler, EngineStats* stats) {
  const PageCounts used = scheduler.used();
  const PageCounts cached = scheduler.cached();
  stats->running = static_cast<int64_t>(scheduler.running().size());
  stats->waiting = static_cast<int64_t>(scheduler.waiting().size());
  stats->preemptions = scheduler.num_preemptions();
  stats->recomputed_tokens = scheduler.num_recomputed();
  stats->open_pages_used = used.open;
  stats->sealed_pages_used = used.sealed;
  stats->open_pages_cached = cached.open;
  stats->sealed_pages_cached = cached.sealed;
  stats->prefix_cache_queries = scheduler.num_prefix_queries();
  stats->prefix_cache_hits = scheduler.num_prefix_hits();
  stats->prefix_cache_evictions = scheduler.num_prefix_evictions();
}

void ReadRunning(const Scheduler& scheduler, std::vector<RunningRequest>* running) {
  running->clear();
  for (const auto& sequence : scheduler.running()) {
    running->push_back({.number = sequence->number,
                        .prompt_tokens = sequence->prompt_length(),
                        .computed_tokens = sequence->num_computed,
                        .generated_tokens = sequence->num_generated(),
                        .max_tokens = sequence->request.max_tokens,
                        .pages = sequence->pages.num_pages()});
  }
}

void ObserveFinished(const Sequence& sequence, EngineStats* stats) {
  const auto observe = [](Histogram* histogram, Sequence::TimePoint from, Sequence::TimePoint to) {
    histogram->Observe(std::chrono::duration<double>(to - from).count());
  };
  if (sequence.started_at) {
    observe(&stats->queue_seconds, sequence.accepted_at, *sequence.started_at);
  }
  if (sequence.first_token_at) {
    observe(&stats->prefill_seconds, *sequence.started_at, *sequence.first_token_at);
    observe(&stats->decode_seconds, *sequence.first_token_at, *sequence.last_token_at);
  }
  stats->request_prompt_tokens.Observe(static_cast<double>(sequence.prompt_length()));
  stats->request_generation_tokens.Observe(static_cast<double>(sequence.num_generated()));
}

int64_t NewlyComplete(Sequence* sequence) {
  if (sequence->num_uncomputed() > 0 || std::exchange(sequence->prompt_counted, true)) return 0;
  return sequence->prompt_length();
}

}  // namespace innerq
