// Benchmark: how long a model and a cache take for a batch, in the steps that would serve it: the
// scheduler's, sampling included, one after another on the calling thread.
//
// B sequences of a batch, P tokens of each prompt, N decode steps.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/evaluate.h"
#include "engine/kv_cache.h"
#include "engine/model_runner.h"

namespace innerq {

// What is computed. Every sequence has random tokens, and so pages, of its own.
struct BenchLoad {
  int64_t batch = 1;     // B
  int64_t depth = 0;     // tokens of each sequence that are cached before its prompt; not timed
  int64_t prompt = 1;    // P
  int64_t generate = 1;  // N; prompts yield the first tokens of the answers, these steps the others
  uint64_t seed = 1;     // of the tokens
  float temperature = 0;  // of sampling: 0 takes the largest logit, else all logits are weighed

  int64_t context() const { return depth + prompt + generate; }  // positions of a sequence
  int64_t num_tokens() const { return batch * context(); }       // computed in all
};

// How long it took, and through which cache.
struct BenchRun {
  double prefill_seconds = 0;        // of all B prompts: scheduled as they come, in whole steps
  std::vector<double> step_seconds;  // [N], each of B tokens

  int64_t cache_bytes = 0;      // of both pools and the key norms
  double sealed_bits = 0;       // per element of sealed pages, scales included
  double effective_bits = 0;    // per cached element at the end, F16 windows included
  double bytes_per_token = 0;   // the same, of all layers
  double step_cache_bytes = 0;  // that a decode step must read; mean over the steps

  double decode_seconds() const;  // of all steps
};

// Median speeds of several runs of one load.
struct BenchSpeed {
  double prefill_tokens_per_second = 0;
  double decode_tokens_per_second = 0;  // of all sequences together
  double step_seconds = 0;              // mean of a run's decode steps, those that seal pages too
  double total_tokens_per_second = 0;   // prompts and answers, over both times
};

// The memory that a run's cache takes, which is what its pages take and no more, whatever
// kv_cache.memory says. `engine` is of the runner that RunLoad would be given. Errors: as of
// RunLoad.
Result<int64_t> PlanLoad(const ModelConfig& config, const EngineOptions& engine,
                         const KvCacheOptions& kv_cache, const BenchLoad& load);

// Runs a load once on the weights of `model`, from an empty cache of its own. Progress is told in
// tokens. Errors: invalid argument, with the numbers, for more sequences or a longer context than
// the model runs; as of ModelRunner::WithCache and steps; cancelled.
Result<BenchRun> RunLoad(const ModelRunner& model, const KvCacheOptions& kv_cache,
                         const BenchLoad& load, const EvalProgress& progress);

// CHECK: there is a run.
BenchSpeed Summarize(const BenchLoad& load, std::span<const BenchRun> runs);

}  // namespace innerq
