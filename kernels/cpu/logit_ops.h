// LogitOps: passes over a row of logits on the host, which sampling takes.
//
// V vocabulary.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/cpu/cpu_isa.h"

namespace innerq {

// Logits whose weights are summed together.
constexpr int64_t kLogitBlock = 512;

struct LargestLogit {
  float value = 0;      // any number if a logit is NaN
  bool finite = false;  // all logits are
};

struct LogitOps {
  // Of `logits` [V], V > 0.
  LargestLogit (*largest)(std::span<const float> logits);
  // weights[i] = exp((logits[i] - max) / temperature), at most 1, for logits up to `max`; 0 for
  // -infinity. Relative error below 1e-6. sums[b] is the sum of the weights [b * kLogitBlock,
  // (b + 1) * kLogitBlock), in double.
  void (*weigh)(std::span<const float> logits, float max, float temperature,
                std::span<float> weights, std::span<double> sums);
};

// Of a variant that this machine can run (CHECK).
LogitOps LogitOpsFor(CpuIsa isa);
// Of the best one.
const LogitOps& BestLogitOps();

}  // namespace innerq
