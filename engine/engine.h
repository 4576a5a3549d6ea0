// Engine: the only door between the server and everything that computes.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/histogram.h"
#include "engine/request.h"
#include "engine/step_model.h"

namespace innerq {

// Limits of the scheduler (configuration: "scheduler", "kv_cache.prefill",
// "kv_cache.prefix_cache").
struct EngineOptions {
  int64_t max_sequences = 64;      // running at once
  int64_t max_batch_tokens = 512;  // rows of one step
  int64_t max_queue = 256;         // accepted and never run; preempted ones are not in it
  int64_t max_context = 0;         // prompt + answer, tokens; must be positive here
  bool exact_prefill = false;      // prompts attend to unquantized K and V; nothing is shared
  bool prefix_cache = true;        // prompts begin with what is cached of them
};

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

// Runs requests by continuous batching on one thread of its own. If the device is lost, every
// request in flight ends as an error (internal). All public methods may be called from any thread.
class Engine {
 public:
  // Starts the engine thread. Errors: invalid argument if the pools cannot hold one sequence of
  // max_context tokens, with the numbers.
  static Result<std::unique_ptr<Engine>> Create(const EngineOptions& options,
                                                std::unique_ptr<StepModel> model);
  // Stops at once: every request in flight ends as an error (unavailable).
  virtual ~Engine() = default;

  // Accepts all requests or none, atomically; each counts as one in the queue. Errors: invalid
  // argument (none or more than the queue ever holds, prompt empty, ids out of range, prompt +
  // max_tokens beyond the context), resource exhausted (queue full), unavailable (draining, device
  // lost).
  virtual Result<ResponseGroup> SubmitGroup(std::vector<Request> requests) = 0;
  // The same for one.
  Result<ResponseReader> Submit(Request request);

  // No new requests from now on; waits until all accepted ones have finished or the time is over,
  // then ends the rest as errors (unavailable). Returns whether all finished by themselves.
  virtual bool Drain(std::chrono::milliseconds timeout) = 0;

  virtual bool ready() const = 0;  // accepts requests
  virtual EngineStats Stats() const = 0;
  // The requests that run, oldest first, as of the latest step.
  virtual std::vector<RunningRequest> Running() const = 0;
  virtual const EngineOptions& options() const = 0;
};

}  // namespace innerq
