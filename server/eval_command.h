// The command `innerq eval`.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "server/commands.h"
#include "server/eval_tasks.h"

namespace innerq {

// What every task takes.
struct EvalOutputArgs {
  std::vector<std::string> caches;  // see ParseCacheChoice; none: the configuration's own
  std::filesystem::path json;       // files to write; empty: none
  std::filesystem::path plot;
};

struct EvalArgs {
  enum class Task { kPerplexity, kKl, kGsm8k, kRecall, kLonggen };

  Task task = Task::kPerplexity;
  EvalOutputArgs output;
  ScoringArgs scoring;   // perplexity and kl
  ProblemArgs problems;  // gsm8k
  RecallArgs recall;
  LongAnswerArgs long_answers;
};

// Measures, prints the table on standard output and writes the files. `interrupted` is asked again
// and again; true ends it with the error "cancelled" and without output.
Result<void> Evaluate(const ConfigSource& source, const EvalArgs& args,
                      std::function<bool()> interrupted);

// The same until a signal; returns the exit code, 128 and the signal's number after one.
int EvalCommand(const ConfigSource& source, const EvalArgs& args);

}  // namespace innerq
