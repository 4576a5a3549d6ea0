// Self-check: whether a cache changes what its model says, and where.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "engine/divergence.h"
#include "engine/evaluate.h"
#include "engine/model_runner.h"

namespace innerq {

// Layers and what quantizing them alone does.
struct LayerDamage {
  int64_t first_layer = 0;
  int64_t last_layer = 0;  // inclusive
  double kl_mean = 0;      // nats
};

struct SelfCheckReport {
  // Against an F16 cache, of tokens predicted from quantized pages.
  ScoreSummary all;
  // The rest only if `all.kl_mean` exceeds the limit.
  bool too_different = false;
  std::vector<LayerDamage> layers;  // in order; empty if there was no time
  double keys = 0;                  // mean KL of quantizing keys alone, all layers; with `layers`
  double values = 0;                // likewise
};

struct SelfCheckArgs {
  KvCacheOptions kv_cache;      // of `runner`
  std::vector<int32_t> tokens;  // a text that is longer than the F16 windows
  double max_kl = 0;            // nats
  double seconds = 0;           // that it may take; a step of 32 rows may end later
  std::function<double()> now;  // seconds, since whenever
};

// Compares the cache with an F16 one on the text. Where the mean KL divergence exceeds `max_kl` it
// quantizes keys, values and then layers alone, in as many groups as there is time for by what the
// first runs took. Errors: cancelled if the time is over before `all` is known; those of ScoreText.
Result<SelfCheckReport> CheckCache(const ModelRunner& runner, const ModelConfig& model,
                                   const SelfCheckArgs& args);

}  // namespace innerq
