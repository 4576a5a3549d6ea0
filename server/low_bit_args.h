// LowBitArgs: how weights are coded, as options of a command say it.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/result.h"
#include "models/checkpoint.h"

namespace innerq {

struct LowBitArgs {
  std::string scheme;  // pow2, apot, uniform: as of LowBitSpec; empty: what is best for `bits`
  int bits = 4;
  int64_t group_size = 64;  // inputs of an output that share a scale; 0: all
  int activation_bits = 16;
};

// The bits of all schemes, in words.
std::string KnownLowBitBits();

// Errors: invalid argument, naming the option.
Result<LowBitSpec> SpecOf(const LowBitArgs& args);

}  // namespace innerq
