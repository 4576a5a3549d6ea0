#include "engine/self_check.h"

#include <algorithm>
#include <memory>
#include <optional>
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

// The check as it goes on. One cache at a time has memory, and steps are small, so that the
// deadline is looked at often.
class Check {
 public:
  Check(const ModelRunner& runner, const ModelConfig& model, const SelfCheckArgs& args)
      : runner_(runner), model_(model), args_(args), deadline_(args.now() + args.seconds) {}

  int64_t num_layers() const { return model_.num_layers; }
  const KvCacheOptions& kv_cache() const { return args_.kv_cache; }
  double seconds_left() const { return deadline_ - args_.now(); }

  // Computes the text through an F16 cache: first of all. Errors: cancelled at the deadline.
  Result<void> ComputeReference() {
    ASSIGN_OR_RETURN(text_, Text());
    const KvCacheOptions half = Only(kv_cache(), num_layers(), {0, num_layers() - 1}, false, false);
    ASSIGN_OR_RETURN(const auto scores, Score(half));
    return {};
  }

  // Compares another cache with it. Errors: cancelled at the deadline.
  Result<ScoreSummary> Compare(const KvCacheOptions& cache) {
    ASSIGN_OR_RETURN(const auto scores, Score(cache));
    return Summarize(scores, [](const TokenScore&) { return true; });
  }

 private:
  // Scores what is predicted from quantized pages. Under exact prefill too: all but the first token
  // counts as answer.
  Result<EvalText> Text() const {
    ASSIGN_OR_RETURN(const KvCacheSpec spec, ResolveKvCacheSpec(kv_cache(), model_));
    ASSIGN_OR_RETURN(const KvLayout layout, KvLayout::Create(spec, CodeOrder::kRowMajor));
    EvalText text{.tokens = args_.tokens, .prompt_length = 1};
    const auto last = static_cast<int64_t>(text.tokens.size()) - 1;
    while (text.first_scored < last && layout.SealedPages(text.first_scored - 1, 1).size() == 0) {
      ++text.first_scored;
    }
    return text;
  }

  Result<std::vector<TokenScore>> Score(const KvCacheOptions& cache) {
    constexpr int64_t kStepRows = 32;
    const auto length = static_cast<int64_t>(text_.tokens.size());
    ASSIGN_OR_RETURN(const auto runner, runner_.WithCache(cache, {.max_context = length,
                                                                  .max_sequences = 1,
                                                                  .max_batch_tokens = kStepRows}));
    return ScoreTokens(*runner, text_, &reference_,
                       [this](int64_t) { return args_.now() < deadline_; });
  }

  const ModelRunner& runner_;
  const ModelConfig& model_;
  const SelfCheckArgs& args_;
  const double deadline_;
  EvalText text_;
  std::optional<ReferenceLogits> reference_;
};

// Fills in what is known of layers, in as many groups as `num_runs` runs allow. Errors: cancelled
// at the deadline.
Result<void> FindLayers(Check& check, double num_runs, SelfCheckReport* report) {
  const int64_t num_layers = check.num_layers();
  // Keys and values take a run each.
  const double affordable = std::min(num_runs - 2, static_cast<double>(num_layers));
  if (affordable < 1) return {};
  const auto groups = static_cast<int64_t>(affordable);
  const auto damage = [&](const LayerDamage& layers, bool keys, bool values) -> Result<double> {
    ASSIGN_OR_RETURN(const ScoreSummary summary,
                     check.Compare(Only(check.kv_cache(), num_layers, layers, keys, values)));
    return summary.kl_mean;
  };
  const LayerDamage everything{0, num_layers - 1};
  ASSIGN_OR_RETURN(report->keys, damage(everything, true, false));
  ASSIGN_OR_RETURN(report->values, damage(everything, false, true));
  std::vector<LayerDamage> layers;
  for (int64_t i = 0; i < groups; ++i) {
    layers.push_back({num_layers * i / groups, num_layers * (i + 1) / groups - 1});
    ASSIGN_OR_RETURN(layers.back().kl_mean, damage(layers.back(), true, true));
  }
  report->layers = std::move(layers);
  return {};
}

}  // namespace

Result<SelfCheckReport> CheckCache(const ModelRunner& runner, const ModelConfig& model,
                                   const SelfCheckArgs& args) {
  Check check(runner, model, args);
  const double begin = check.seconds_left();
  RETURN_IF_ERROR(check.ComputeReference());
  SelfCheckReport report;
  ASSIGN_OR_RETURN(report.all, check.Compare(args.kv_cache));
  report.too_different = !(report.all.kl_mean <= args.max_kl);
  if (!report.too_different) return report;
  const double left = check.seconds_left();
  const double seconds_per_run = std::max((begin - left) / 2, 1e-6);
  constexpr double kMargin = 0.8;  // runs do not all take the same time
  const auto found = FindLayers(check, kMargin * left / seconds_per_run, &report);
  if (!found && found.error().code != ErrorCode::kCancelled) return found.error();
  return report;
}

}  // namespace innerq
