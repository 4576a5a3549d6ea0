#include "server/eval_setup.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>

#include "engine/page_budget.h"
#include "server/utf8.h"

namespace innerq {
namespace {

// Whether `text` begins with a key and "=".
bool BeginsOverride(std::string_view text) {
  const size_t end = text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_.");
  return end != std::string_view::npos && end > 0 && text[end] == '=';
}

// Cuts at the commas that begin an override.
std::vector<std::string> SplitChoice(std::string_view text) {
  std::vector<std::string> parts(1);
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == ',' && BeginsOverride(text.substr(i + 1))) {
      parts.emplace_back();
    } else {
      parts.back() += text[i];
    }
  }
  return parts;
}

Error OfCache(const std::string& name, Error error) {
  error.message = "cache " + name + ": " + error.message;
  return error;
}

KvCacheOptions HalfPrecision() {
  KvCacheOptions options;
  options.sink_tokens = options.recent_tokens = options.page_tokens;
  options.key.bits = options.value.bits = 16;
  options.normalize_keys = false;
  return options;
}

Result<KvLayout> LayoutOf(const CacheChoice& cache, const ModelConfig& config) {
  const auto spec = ResolveKvCacheSpec(cache.options, config);
  if (!spec) return OfCache(cache.name, spec.error());
  auto layout = KvLayout::Create(*spec, CodeOrder::kRowMajor);
  if (!layout) return OfCache(cache.name, layout.error());
  return layout;
}

Result<std::vector<CacheChoice>> ReadChoices(const Options& options, const ConfigSource& source,
                                             const std::vector<std::string>& choices) {
  if (choices.empty()) {
    return std::vector<CacheChoice>{
        {ReplaceInvalidUtf8(source.file.stem().string()), options.runner.kv_cache}};
  }
  for (const std::string& text : source.overrides) {
    const bool one_key = text.starts_with("kv_cache.");
    if (!one_key && !text.starts_with("kv_cache=")) continue;
    return InvalidArgument(
        "--set " + text +
        ": the configuration's own kv_cache is not used beside --cache; write --cache FILE," +
        (one_key ? text.substr(std::string_view("kv_cache.").size()) : "key=value"));
  }
  std::vector<CacheChoice> caches;
  for (const std::string& text : choices) {
    ASSIGN_OR_RETURN(CacheChoice cache, ParseCacheChoice(text));
    for (const CacheChoice& other : caches) {
      if (other.name == cache.name) {
        return InvalidArgument("--cache: two caches are called " + cache.name);
      }
    }
    caches.push_back(std::move(cache));
  }
  return caches;
}

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
  reference.options.memory_bytes =
      std::max(options.runner.kv_cache.memory_bytes, layout.open_pool_bytes(longest.open));
  caches->insert(caches->begin(), std::move(reference));
  return {};
}

}  // namespace

Result<CacheChoice> ParseCacheChoice(std::string_view text) {
  std::vector<std::string> parts = SplitChoice(text);
  const std::filesystem::path file = parts[0];
  CacheChoice choice{.name = ReplaceInvalidUtf8(file.stem().string()), .options = {}};
  std::vector<std::string> overrides;
  for (size_t i = 1; i < parts.size(); ++i) {
    choice.name += "," + parts[i];
    overrides.push_back("kv_cache." + parts[i]);
  }
  std::error_code ignored;
  std::ifstream stream(file, std::ios::binary);
  if (!stream.is_open() || std::filesystem::is_directory(file, ignored)) {
    return Error{ErrorCode::kNotFound, "--cache: cannot read configuration file " + file.string()};
  }
  const std::string content{std::istreambuf_iterator<char>(stream), {}};
  const auto options = ParseOptions(content, overrides);
  if (!options) {
    Error error = options.error();
    error.message = file.string() + ": " + error.message;
    return error;
  }
  choice.options = options->runner.kv_cache;
  return choice;
}

int64_t Evaluation::max_context() const { return LongestContext(options, parts.config); }

Result<std::unique_ptr<ModelRunner>> Evaluation::RunnerFor(size_t index, int64_t num_sequences,
                                                           int64_t context) const {
  const CacheChoice& cache = caches[index];
  auto runner = parts.runner->WithCache(cache.options,
                                        {.max_context = context, .max_sequences = num_sequences});
  if (!runner) return OfCache(cache.name, runner.error());
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
  ASSIGN_OR_RETURN(evaluation.caches, ReadChoices(options, source, choices));
  ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(options.model.path));
  const ModelConfig& config = checkpoint->config();
  RETURN_IF_ERROR(AddReference(options, config, &evaluation.caches));
  for (const CacheChoice& cache : evaluation.caches) {
    RETURN_IF_ERROR(LayoutOf(cache, config));
  }
  // The runner that holds the weights has a cache that is never used.
  Options load = options;
  KvCacheOptions& least = load.runner.kv_cache = HalfPrecision();
  ASSIGN_OR_RETURN(const KvLayout layout, LayoutOf({"fp16", least}, config));
  least.memory_bytes = layout.open_pool_bytes(1);
  load.runner.engine.max_context = std::min(config.max_positions, least.page_tokens);
  ASSIGN_OR_RETURN(evaluation.parts, LoadParts(load, evaluation.interrupted));
  return evaluation;
}

}  // namespace innerq
