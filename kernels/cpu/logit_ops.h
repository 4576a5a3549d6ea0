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

struct WeighArgs {
  std::span<const float> logits;  // [V]
  float max = 0;                  // the largest
  float temperature = 1;
  std::span<float> weights;  // [V]
  std::span<double> sums;    // of blocks of kLogitBlock
};

struct LogitOps {
  // Of `logits` [V], V > 0.
  LargestLogit (*largest)(std::span<const float> logits);
  // weights[i] = exp((logits[i] - max) / temperature): 1 for the largest, 0 for -infinity. Relative
  // error below 1e-6. sums[b] is that of the weights [b * kLogitBlock, (b + 1) * kLogitBlock), in
  // double.
  void (*weigh)(const WeighArgs& args);
};

// Of a variant that this machine can run (CHECK).
LogitOps LogitOpsFor(CpuIsa isa);
// Of the best one.
const LogitOps& BestLogitOps();

}  // namespace innerq
