// Engine: the only door between the server and everything that computes.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/engine_stats.h"
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
