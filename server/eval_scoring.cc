#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "server/eval_data.h"
#include "server/eval_tasks.h"
#include "server/progress_bar.h"

namespace innerq {
namespace {

using Json = nlohmann::ordered_json;
using Format = EvalColumn::Format;

constexpr int64_t kDefaultContext = 2048;

Json ToJson(const ScoreSummary& summary) {
  return {{"tokens", summary.tokens},         {"mean_nll", summary.mean_nll},
          {"perplexity", summary.perplexity}, {"kl_mean", summary.kl_mean},
          {"kl_median", summary.kl_median},   {"kl_p99", summary.kl_p99},
          {"kl_max", summary.kl_max},         {"top1_agreement", summary.top1_agreement}};
}

// Likelihoods alone: no reference was compared.
Json ToPlainJson(const ScoreSummary& summary) {
  return {{"tokens", summary.tokens},
          {"mean_nll", summary.mean_nll},
          {"perplexity", summary.perplexity}};
}

// A cache's scores: of all tokens that count, and of those predicted from quantized pages.
struct Summaries {
  ScoreSummary all;
  ScoreSummary sealed;
};

Summaries SummarizeFrom(const CacheScores& scores, int64_t skip) {
  return {Summarize(scores.tokens, [skip](const auto& s) { return s.position >= skip; }),
          Summarize(scores.tokens,
                    [skip](const auto& s) { return s.position >= skip && s.reads_sealed; })};
}

// Null where no token counts.
std::optional<double> If(const ScoreSummary& summary, double value) {
  return summary.tokens > 0 ? std::optional(value) : std::nullopt;
}

// What was scored: caches[i]'s scores at i, and a report that says so.
struct Scored {
  std::vector<CacheScores> scores;
  std::vector<double> sealed_bits;
  EvalReport report;
};

// A prompt under exact prefill never meets the quantized cache: it would measure F16.
Result<void> RefuseExactPrefill(const Evaluation& evaluation) {
  for (size_t i = 1; i < evaluation.caches.size(); ++i) {
    if (!evaluation.caches[i].options.exact_prefill) continue;
    return InvalidArgument("cache " + evaluation.caches[i].name +
                           ": with prefill exact a text that is read as a prompt never meets the "
                           "quantized cache; longgen, gsm8k and recall measure it");
  }
  return {};
}

Result<Scored> ScoreWindows(const Evaluation& evaluation, const std::string& task,
                            const ScoringArgs& args, const std::vector<std::string>& texts) {
  RETURN_IF_ERROR(RefuseExactPrefill(evaluation));
  const int64_t longest = evaluation.max_context();
  if (args.context > longest) {
    return InvalidArgument(fmt::format("--context: {} tokens are more than the longest context, {}",
                                       args.context, longest));
  }
  const int64_t context = args.context > 0 ? args.context : std::min(longest, kDefaultContext);
  const std::vector<EvalText> windows = CutIntoWindows(*evaluation.parts.tokenizer, texts, context);
  int64_t tokens = 0;
  size_t size = 0;
  for (const EvalText& window : windows) {
    tokens += static_cast<int64_t>(window.tokens.size());
    size = std::max(size, window.tokens.size());
  }
  if (windows.empty() || args.skip >= static_cast<int64_t>(size)) {
    return InvalidArgument("no token is left to score");
  }
  ASSIGN_OR_RETURN(const auto runners, evaluation.RunnersFor(static_cast<int64_t>(size)));

  Scored scored{.scores = {}, .sealed_bits = {}, .report = evaluation.Report(task)};
  const int64_t total = tokens * static_cast<int64_t>(runners.size());
  ProgressBar bar(task);
  int64_t done = 0;
  const EvalProgress progress = [&](int64_t more) {
    bar.Show(done += more, total);
    return !evaluation.interrupted();
  };
  ASSIGN_OR_RETURN(scored.scores, ScoreTexts(runners, windows, task == "kl", progress));
  for (const auto& runner : runners) {
    scored.sealed_bits.push_back(runner->layout().sealed_bits_per_element());
  }
  scored.report.scope = fmt::format(
      "{} of {} on {}: {} documents in {} windows of up to {} tokens; {} tokens scored, at "
      "positions from {}",
      task, scored.report.model, scored.report.device, texts.size(), windows.size(), context,
      SummarizeFrom(scored.scores[0], args.skip).all.tokens, args.skip);
  const Json settings = {{"documents", texts.size()},
                         {"windows", windows.size()},
                         {"context", context},
                         {"skip", args.skip},
                         {"reference", evaluation.caches[0].name}};
  scored.report.settings = settings.dump();
  return scored;
}

}  // namespace

Result<EvalReport> EvaluatePerplexity(const Evaluation& evaluation, const ScoringArgs& args,
                                      const std::vector<std::string>& texts) {
  ASSIGN_OR_RETURN(Scored scored, ScoreWindows(evaluation, "perplexity", args, texts));
  EvalReport report = std::move(scored.report);
  report.scope += "; \"quantized\": those predicted from quantized pages";
  report.columns = {{"perplexity", "perplexity", Format::kRatio},
                    {"increase", "increase", Format::kPercent},
                    {"perplexity_quantized", "quantized", Format::kRatio}};
  std::optional<double> reference;
  for (size_t i = 0; i < scored.scores.size(); ++i) {
    const Summaries summaries = SummarizeFrom(scored.scores[i], args.skip);
    if (!reference) reference = summaries.all.perplexity;
    EvalRow& row = report.rows.emplace_back();
    row.cache = evaluation.caches[i].name;
    row.sealed_bits = scored.sealed_bits[i];
    row.effective_bits = scored.scores[i].effective_bits;
    row.values = {summaries.all.perplexity, summaries.all.perplexity / *reference - 1,
                  If(summaries.sealed, summaries.sealed.perplexity)};
    row.details =
        Json{{"all", ToPlainJson(summaries.all)}, {"quantized", ToPlainJson(summaries.sealed)}}
            .dump();
  }
  return report;
}

Result<EvalReport> EvaluateDivergence(const Evaluation& evaluation, const ScoringArgs& args,
                                      const std::vector<std::string>& texts) {
  ASSIGN_OR_RETURN(Scored scored, ScoreWindows(evaluation, "kl", args, texts));
  EvalReport report = std::move(scored.report);
  report.scope += fmt::format(
      "; KL(reference || cache) in nats, the reference is {}; \"quantized\": tokens predicted from "
      "quantized pages",
      evaluation.caches[0].name);
  report.columns = {{"kl_mean", "KL mean", Format::kSmall},
                    {"kl_median", "median", Format::kSmall},
                    {"kl_p99", "99th pct", Format::kSmall},
                    {"top1_agreement", "top-1", Format::kPercent},
                    {"kl_mean_quantized", "quantized: KL", Format::kSmall},
                    {"top1_agreement_quantized", "top-1", Format::kPercent},
                    {"perplexity", "perplexity", Format::kRatio}};
  report.plot_log = true;
  for (size_t i = 0; i < scored.scores.size(); ++i) {
    const auto [all, sealed] = SummarizeFrom(scored.scores[i], args.skip);
    EvalRow& row = report.rows.emplace_back();
    row.cache = evaluation.caches[i].name;
    row.sealed_bits = scored.sealed_bits[i];
    row.effective_bits = scored.scores[i].effective_bits;
    row.values = {all.kl_mean,
                  all.kl_median,
                  all.kl_p99,
                  all.top1_agreement,
                  If(sealed, sealed.kl_mean),
                  If(sealed, sealed.top1_agreement),
                  all.perplexity};
    row.details = Json{{"all", ToJson(all)}, {"quantized", ToJson(sealed)}}.dump();
  }
  return report;
}

}  // namespace innerq
