// The command `innerq quantize`.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "kernels/result.h"
#include "server/commands.h"
#include "server/low_bit_args.h"

namespace innerq {

struct QuantizeArgs {
  std::filesystem::path model;   // a directory
  std::filesystem::path output;  // a directory that is empty, or not there
  LowBitArgs weights;
  std::string scale = "free";                      // or pow2: T of groups are powers of two
  double prune = 0;                                // share of weights, in [0, 0.95]
  std::vector<std::string> prune_matrices;         // PATTERN=R, as of PruneRule
  std::vector<std::filesystem::path> calibration;  // texts, as of ReadTexts
  int64_t calibration_tokens = 8192;               // of them in all, at most
  std::vector<std::filesystem::path> evaluation;   // texts to measure on; see Quantize
  int64_t evaluation_tokens = 8192;
  int threads = 0;  // 0: one per core
};

// Makes a low-bit checkpoint of a float one and prints what became of the matrices. Then measures
// perplexity and KL divergence from the float model, both with F16 caches: on the texts for that;
// without any on what calibration left of its own, or on the same again if it left nothing; without
// these either not at all. The checkpoint is complete by then and stays whatever happens.
// An interruption ends it with the error "cancelled". Until the checkpoint is complete neither an
// error nor a second signal leaves anything behind. Errors: invalid argument, with the option;
// as of QuantizeCheckpoint and LoadWeights.
Result<void> Quantize(const QuantizeArgs& args, const Interruption& signals);

// The same until a signal; returns the exit code, 128 and the signal's number after one.
int QuantizeCommand(const QuantizeArgs& args);

}  // namespace innerq
