// Evaluation: a model and the caches to measure it through.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/evaluate.h"
#include "engine/model_runner.h"
#include "server/commands.h"
#include "server/eval_report.h"
#include "server/model_setup.h"
#include "server/options.h"

namespace innerq {

// A cache and what tables call it, in UTF-8.
struct CacheChoice {
  std::string name;
  KvCacheOptions options;
};

// Reads "FILE[,key=value...]": the section kv_cache of a configuration, with keys of that section
// replaced ("key.bits=2"). A comma begins a replacement where a key and "=" follow. Named by the
// file's stem and the replacements. Errors: as of ParseOptions.
Result<CacheChoice> ParseCacheChoice(std::string_view text);

// What an evaluation needs. The weights are loaded once, for all caches.
struct Evaluation {
  Options options;
  std::vector<CacheChoice> caches;  // the first keeps F16: the reference
  ModelParts parts;                 // its runner has a small F16 cache
  std::function<bool()> interrupted;

  // The longest context that the model and the configuration allow.
  int64_t max_context() const;
  // A runner through caches[index], for so many sequences of up to `context` tokens. Errors: as of
  // the cache's options, with its name.
  Result<std::unique_ptr<ModelRunner>> RunnerFor(size_t index, int64_t num_sequences,
                                                 int64_t context) const;
  // The same for every cache and one sequence.
  Result<std::vector<std::unique_ptr<ModelRunner>>> RunnersFor(int64_t context) const;
  // A report without columns and rows.
  EvalReport Report(const std::string& task) const;
};

// Checks all caches against the model, then loads it. Without `choices` the configuration's own
// cache is measured. An F16 cache called "fp16" is added as the reference unless one of them keeps
// F16; it has the memory of the configuration's own cache, and at least what the longest sequence
// needs. Errors: as of the parts; invalid argument for two
// caches of one name, and for a replaced key of a kv_cache section that is not used; cancelled.
Result<Evaluation> PrepareEvaluation(const ConfigSource& source,
                                     const std::vector<std::string>& choices,
                                     std::function<bool()> interrupted);

}  // namespace innerq
