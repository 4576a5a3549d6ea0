#include "engine/self_check.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace innerq {
namespace {

constexpr QuantOverride kHalf{.bits = 16};

// The options with the rest of the cache in F16: all but layers [first, last], and all keys or
// values if they are not `keys` or `values`.
KvCacheOptions Only(KvCacheOptions options, int64_t num_layers, const LayerDamage& layers,
                    bool keys, bool values) {
  const auto add = [&options](int64_t first, int64_t last, bool half_keys, bool half_values) {
    if (first > last) return;
    KvLayerOverride layer{.first_layer = first, .last_layer = last};
    if (half_keys) layer.key = kHalf;
    if (half_keys) layer.normalize_keys = false;
    if (half_values) layer.value = kHalf;
    options.layers.push_back(layer);
  };
  add(0, layers.first_layer - 1, true, true);
  add(layers.last_layer + 1, num_layers - 1, true, true);
  if (!keys || !values) add(layers.first_layer, layers.last_layer, !keys, !values);
  return options;
}

// Scores the text through an F16 cache and each of `caches`. Errors: cancelled at the deadline.
Result<std::vector<ScoreSummary>> Compare(const ModelRunner& runner, const ModelConfig& model,
                                          const SelfCheckArgs& args, double deadline,
                                          std::vector<KvCacheOptions> caches) {
  const LayerDamage everything{0, model.num_layers - 1};
  caches.insert(caches.begin(), Only(args.kv_cache, model.num_layers, everything, false, false));
  const auto length = static_cast<int64_t>(args.tokens.size());
  std::vector<std::unique_ptr<ModelRunner>> runners;
  for (const KvCacheOptions& cache : caches) {
    const KvCacheOptions small =
        WithoutSpareMemory(cache, model, 1, length, runner.engine_options().max_batch_tokens);
    ASSIGN_OR_RETURN(auto created, runner.WithCache(small, length));
    runners.push_back(std::move(created));
  }
  // Under exact prefill too: all but the first token counts as answer.
  const std::vector<EvalText> texts = {{.tokens = args.tokens, .prompt_length = 1}};
  ASSIGN_OR_RETURN(const auto scores, ScoreTexts(runners, texts, /*compare=*/true,
                                                 [&](int64_t) { return args.now() < deadline; }));
  std::vector<ScoreSummary> summaries;
  for (size_t i = 1; i < scores.size(); ++i) {
    summaries.push_back(
        Summarize(scores[i].tokens, [](const TokenScore& score) { return score.reads_sealed; }));
  }
  return summaries;
}

// Fills in what is known of layers, in as many groups as `num_runs` runs allow. Errors: cancelled
// at the deadline.
Result<void> FindLayers(const ModelRunner& runner, const ModelConfig& model,
                        const SelfCheckArgs& args, double deadline, double num_runs,
                        SelfCheckReport* report) {
  // The F16 cache, keys and values take a run each.
  const double affordable = std::min(num_runs - 3, static_cast<double>(model.num_layers));
  if (affordable < 1) return {};
  const auto groups = static_cast<int64_t>(affordable);
  const int64_t num_layers = model.num_layers;
  const LayerDamage everything{0, num_layers - 1};
  std::vector<KvCacheOptions> caches = {Only(args.kv_cache, num_layers, everything, true, false),
                                        Only(args.kv_cache, num_layers, everything, false, true)};
  std::vector<LayerDamage> layers;
  for (int64_t i = 0; i < groups; ++i) {
    layers.push_back({num_layers * i / groups, num_layers * (i + 1) / groups - 1});
    caches.push_back(Only(args.kv_cache, num_layers, layers.back(), true, true));
  }
  ASSIGN_OR_RETURN(const auto summaries, Compare(runner, model, args, deadline, std::move(caches)));
  report->keys = summaries[0].kl_mean;
  report->values = summaries[1].kl_mean;
  for (size_t i = 0; i < layers.size(); ++i) layers[i].kl_mean = summaries[i + 2].kl_mean;
  report->layers = std::move(layers);
  return {};
}

}  // namespace

Result<SelfCheckReport> CheckCache(const ModelRunner& runner, const ModelConfig& model,
                                   const SelfCheckArgs& args) {
  const double begin = args.now();
  const double deadline = begin + args.seconds;
  SelfCheckReport report;
  const auto all = Compare(runner, model, args, deadline, {args.kv_cache});
  if (!all) return all.error();
  report.all = all->front();
  report.too_different = !(report.all.kl_mean <= args.max_kl);
  if (!report.too_different) return report;
  const double now = args.now();
  const double seconds_per_run = std::max((now - begin) / 2, 1e-6);
  constexpr double kMargin = 0.8;  // runs do not all take the same time
  const auto found = FindLayers(runner, model, args, deadline,
                                kMargin * (deadline - now) / seconds_per_run, &report);
  if (!found && found.error().code != ErrorCode::kCancelled) return found.error();
  return report;
}

}  // namespace innerq
