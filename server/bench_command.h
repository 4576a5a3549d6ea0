// The command `innerq bench`: how fast the scheduler, a model and its caches are on this machine.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "server/commands.h"
#include "server/low_bit_args.h"

namespace innerq {

// Every cache is measured at every depth with every batch.
struct BenchArgs {
  std::vector<std::string> caches;  // see ReadCacheChoices
  std::string shape;                // with random weights; empty: the configuration's model
  int64_t layers = 0;               // of the shape; 0: all
  LowBitArgs weights;               // of the shape's layers; without a scheme: floats
  std::vector<int64_t> batches = {1};
  std::vector<int64_t> depths = {0};  // tokens of each sequence that are cached before its prompt
  int64_t prompt = 512;               // tokens
  int64_t generate = 128;             // steps after the prompt's
  double temperature = 0;             // of sampling; 0: greedy
  int64_t runs = 3;                   // of which the median counts
  std::filesystem::path json;         // file to write; empty: none
};

// Measures, prints the table on standard output and writes the file. `interrupted` is asked again
// and again; true ends it with the error "cancelled" and without output.
Result<void> Benchmark(const ConfigSource& source, const BenchArgs& args,
                       const std::string& version, const std::function<bool()>& interrupted);

// The same until a signal; returns the exit code, 128 and the signal's number after one.
int BenchCommand(const ConfigSource& source, const BenchArgs& args, const std::string& version);

}  // namespace innerq
