#include "server/eval_setup.h"

#include <algorithm>
#include <utility>

#include "engine/page_budget.h"

namespace innerq {
namespace {

// The longest context that the model and the configuration allow.
int64_t LongestContext(const Options& options, const ModelConfig& config) {
  const int64_t wanted = options.runner.engine.max_context;
  return wanted > 0 ? std::min(wanted, config.max_positions) : config.max_positions;
}

// Puts the reference first.
Result<void> AddReference(const Options& options, const ModelConfig& config,
                          std::vector<CacheChoice>* caches) {
  for (auto it = caches->begin(); it != caches->end(); ++it) {
    ASSIGN_OR_RETURN(const KvLayout layout, LayoutOf(*it, config));
    if (layout.quantized()) continue;
    std::rotate(caches->begin(), it, it + 1);
    return {};
  }
  CacheChoice reference{"fp16", HalfPrecision()};
  ASSIGN_OR_RETURN(const KvLayout layout, LayoutOf(reference, config));
  const PageCounts longest =
      WorstPeakPages(layout, LongestContext(options, config), /*exact_prefill=*/false);
  if (const auto memory = options.runner.kv_cache.memory_bytes) {
    reference.options.memory_bytes = std::max(*memory, layout.open_pool_bytes(longest.open));
  }
  caches->insert(caches->begin(), std::move(reference));
  return {};
}

}  // namespace

int64_t Evaluation::max_context() const { return LongestContext(options, parts.config); }

Result<std::unique_ptr<ModelRunner>> Evaluation::RunnerFor(size_t index, int64_t num_sequences,
                                                           int64_t context) const {
  const CacheChoice& cache = caches[index];
  auto runner = parts.runner->WithCache(cache.options,
                                        {.max_context = context, .max_sequences = num_sequences});
  if (!runner) return OfCache(cache, runner.error());
  return runner;
}

Result<std::vector<std::unique_ptr<ModelRunner>>> Evaluation::RunnersFor(int64_t context) const {
  std::vector<std::unique_ptr<ModelRunner>> runners;
  for (size_t i = 0; i < caches.size(); ++i) {
    ASSIGN_OR_RETURN(auto runner, RunnerFor(i, 1, context));
    runners.push_back(std::move(runner));
  }
  return runners;
}

EvalReport Evaluation::Report(const std::string& task) const {
  return {.task = task,
          .model = options.model.alias,
          .device = parts.runner->report().backend,
          .scope = ""};
}

Result<Evaluation> PrepareEvaluation(const ConfigSource& source,
                                     const std::vector<std::string>& choices,
                                     std::function<bool()> interrupted) {
  Evaluation evaluation;
  evaluation.interrupted = std::move(interrupted);
  ASSIGN_OR_RETURN(evaluation.options, LoadOptions(source.file, source.overrides));
  Options& options = evaluation.options;
  ASSIGN_OR_RETURN(evaluation.caches, ReadCacheChoices(options, source, choices));
  ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(options.model.path));
  const ModelConfig& config = checkpoint->config();
  RETURN_IF_ERROR(AddReference(options, config, &evaluation.caches));
  for (const CacheChoice& cache : evaluation.caches) {
    RETURN_IF_ERROR(LayoutOf(cache, config));
  }
  ASSIGN_OR_RETURN(const Options load, WithLeastCache(options, config));
  ASSIGN_OR_RETURN(evaluation.parts, LoadParts(load, evaluation.interrupted));
  return evaluation;
}

}  // namespace innerq
