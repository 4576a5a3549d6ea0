// EngineStats: what an engine counts and measures of its requests, steps and pages.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "engine/histogram.h"
#include "engine/page_budget.h"
#include "engine/request.h"
#include "kernels/paged_kv.h"

namespace innerq {

class Scheduler;
struct Sequence;

// Counters since start and gauges of now; a consistent-enough snapshot for metrics.
struct EngineStats {
  int64_t accepted = 0;  // requests taken by Submit
  int64_t finished = 0;  // of those, ended; accepted - finished are in flight
  std::map<FinishReason, int64_t> finished_by_reason;
  int64_t running = 0;
  int64_t waiting = 0;  // to start, or to go on after a preemption
  int64_t preemptions = 0;
  int64_t recomputed_tokens = 0;       // of prompts and answers, lost by preemption and not cached
  int64_t prompt_tokens = 0;           // of prompts, once each when it is complete, cached or not
  int64_t prompt_tokens_computed = 0;  // not cached, and again after a preemption
  int64_t prefix_cache_queries = 0;    // prompt tokens looked up
  int64_t prefix_cache_hits = 0;       // of those, found
  int64_t prefix_cache_evictions = 0;  // states given up for others' pages
  int64_t generation_tokens = 0;
  int64_t steps = 0;
  int64_t open_pages_used = 0;    // by requests
  int64_t open_pages_cached = 0;  // kept for their tokens alone, free for whoever needs them
  int64_t open_pages = 0;
  int64_t sealed_pages_used = 0;
  int64_t sealed_pages_cached = 0;
  int64_t sealed_pages = 0;
  double finish_per_second = 0;  // requests, over the last minute: for Retry-After

  // Of finished requests: the phases that each went through, time lost to preemption included.
  Histogram queue_seconds = RequestSeconds();    // accepted, to the first step with it
  Histogram prefill_seconds = RequestSeconds();  // from there to its first token
  Histogram decode_seconds = RequestSeconds();   // from there to its last one
  Histogram request_prompt_tokens = RequestTokens();
  Histogram request_generation_tokens = RequestTokens();
  Histogram step_tokens = StepTokens();      // computed by a step
  std::vector<LayerGroups> sealed_groups{};  // per layer; empty if nothing was sealed
};

// How far a running request has come. Nothing of what it says.
struct RunningRequest {
  int64_t number = 0;  // by arrival, from 1
  int64_t prompt_tokens = 0;
  int64_t computed_tokens = 0;  // of prompt and answer, in the cache
  int64_t generated_tokens = 0;
  int64_t max_tokens = 0;  // of the answer
  int64_t pages = 0;       // of the cache, F16 or quantized
};

// Nothing has happened yet.
EngineStats EmptyStats(const PageCounts& pools);
// Sets the gauges and counters that the scheduler keeps.
void ReadScheduler(const Scheduler& scheduler, EngineStats* stats);
// Oldest first.
void ReadRunning(const Scheduler& scheduler, std::vector<RunningRequest>* running);
// Adds a finished request's lengths, and the phases that it went through.
void ObserveFinished(const Sequence& sequence, EngineStats* stats);
// The length of a prompt that needs no more computing for the first time, else 0.
int64_t NewlyComplete(Sequence* sequence);

}  // namespace innerq
