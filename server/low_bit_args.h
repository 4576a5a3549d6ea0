// LowBitArgs: how weights are coded, as options of a command say it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/result.h"
#include "models/checkpoint.h"

namespace innerq {

struct LowBitArgs {
  std::string scheme;  // pow2, apot, uniform: as of LowBitSpec; empty: what is best for `bits`
  int bits = 4;
  int64_t group_size = 64;  // inputs of an output that share a scale; 0: all
  int activation_bits = 16;
  int head_bits = 0;  // of the matrix of logits; 0: it stays as it is
};

// The bits of all schemes, in words.
std::string KnownLowBitBits();

// Errors: invalid argument, naming the option.
Result<LowBitSpec> SpecOf(const LowBitArgs& args);

// The same of the matrix of logits: by the best scheme for its bits, with inputs of 16 bits;
// nothing if it stays as it is.
Result<std::optional<LowBitSpec>> HeadSpecOf(const LowBitArgs& args);

}  // namespace innerq
