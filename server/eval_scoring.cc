#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "server/eval_data.h"
#include "server/eval_tasks.h"
#include "server/progress_bar.h"

namespace innerq {
namespace {

using OrderedJson = nlohmann::ordered_json;
using Format = EvalColumn::Format;

constexpr int64_t kDefaultContext = 2048;

OrderedJson ToJson(const ScoreSummary& summary) {
  return {{"tokens", summary.tokens},
          {"mean_nll", summary.mean_nll},
          {"perplexity", summary.perplexity},
          {"kl_mean", summary.kl_mean},
          {"kl_error", summary.kl_error},
          {"kl_median", summary.kl_median},
          {"kl_p99", summary.kl_p99},
          {"kl_max", summary.kl_max},
          {"top1_agreement", summary.top1_agreement}};
}

// Likelihoods alone: no reference was compared.
OrderedJson ToPlainJson(const ScoreSummary& summary) {
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

// The perplexity of `scores` where `cache`, which scored the same tokens, reads quantized pages; 1
// if it reads none.
double PerplexityWhere(const std::vector<TokenScore>& cache, const std::vector<TokenScore>& scores,
                       int64_t skip) {
  double sum = 0;
  int64_t count = 0;
  for (size_t i = 0; i < cache.size(); ++i) {
    if (cache[i].position < skip || !cache[i].reads_sealed) continue;
    sum += scores[i].nll;
    ++count;
  }
  return std::exp(sum / static_cast<double>(std::max<int64_t>(count, 1)));
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
  const std::vector<EvalText> windows =
      CutIntoWindows(*evaluation.parts.tokenizer, texts, context, args.limit);
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
  const OrderedJson settings = {{"documents", texts.size()},
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
  report.scope +=
      "; \"quantized\": those predicted from the cache's quantized pages, increase over the "
      "reference on the same ones";
  report.columns = {{"perplexity", "perplexity", Format::kRatio},
                    {"increase", "increase", Format::kPercent},
                    {"perplexity_quantized", "quantized", Format::kRatio},
                    {"increase_quantized", "increase", Format::kPercent}};
  const double reference = SummarizeFrom(scored.scores[0], args.skip).all.perplexity;
  for (size_t i = 0; i < scored.scores.size(); ++i) {
    const Summaries summaries = SummarizeFrom(scored.scores[i], args.skip);
    EvalRow& row = report.rows.emplace_back();
    row.cache = evaluation.caches[i].name;
    row.sealed_bits = scored.sealed_bits[i];
    row.effective_bits = scored.scores[i].effective_bits;
    const double same =
        PerplexityWhere(scored.scores[i].tokens, scored.scores[0].tokens, args.skip);
    row.values = {summaries.all.perplexity, summaries.all.perplexity / reference - 1,
                  If(summaries.sealed, summaries.sealed.perplexity),
                  If(summaries.sealed, summaries.sealed.perplexity / same - 1)};
    row.details = OrderedJson{{"all", ToPlainJson(summaries.all)},
                              {"quantized", ToPlainJson(summaries.sealed)}}
                      .dump();
  }
  return report;
}

Result<EvalReport> EvaluateDivergence(const Evaluation& evaluation, const ScoringArgs& args,
                                      const std::vector<std::string>& texts) {
  ASSIGN_OR_RETURN(Scored scored, ScoreWindows(evaluation, "kl", args, texts));
  EvalReport report = std::move(scored.report);
  report.scope += fmt::format(
      "; KL(reference || cache) in nats, the reference is {}; \"+-\": the mean's standard error "
      "over "
      "windows; \"quantized\": tokens predicted from quantized pages",
      evaluation.caches[0].name);
  report.columns = {{"kl_mean", "KL mean", Format::kSmall},
                    {"kl_error", "+-", Format::kSmall},
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
                  all.kl_error,
                  all.kl_median,
                  all.kl_p99,
                  all.top1_agreement,
                  If(sealed, sealed.kl_mean),
                  If(sealed, sealed.top1_agreement),
                  all.perplexity};
    row.details = OrderedJson{{"all", ToJson(all)}, {"quantized", ToJson(sealed)}}.dump();
  }
  return report;
}

namespace {

// What the reference writes after each prompt.
Result<std::vector<EvalText>> WriteAnswers(const Evaluation& evaluation, const LongAnswerArgs& args,
                                           const std::vector<std::vector<int32_t>>& prompts) {
  std::vector<EvalText> texts;
  std::vector<Request> requests;
  int64_t longest = 0;
  for (const std::vector<int32_t>& prompt : prompts) {
    const auto length = static_cast<int64_t>(prompt.size());
    longest = std::max(longest, length + args.tokens);
    texts.push_back({.tokens = prompt,
                     .first_scored = length,
                     .prompt_length = length,
                     .never_chosen = evaluation.parts.stop_token_ids});
    Request& request = requests.emplace_back();
    request.prompt = prompt;
    request.sampling.temperature = args.temperature;
    request.sampling.seed = args.seed;
    request.max_tokens = request.min_tokens = args.tokens;
    request.stop_token_ids = evaluation.parts.stop_token_ids;
  }
  if (longest > evaluation.max_context()) {
    return InvalidArgument(
        fmt::format("a prompt and {} tokens are {} tokens; the longest context is {}", args.tokens,
                    longest, evaluation.max_context()));
  }
  const auto count = static_cast<int64_t>(prompts.size());
  ASSIGN_OR_RETURN(
      auto runner,
      evaluation.RunnerFor(0, std::min(count, evaluation.options.runner.engine.max_sequences),
                           longest));
  ProgressBar bar("the reference writes");
  int64_t done = 0;
  const auto take = [&](size_t index, const TokenEvent& event) {
    texts[index].tokens.push_back(event.token_id);
    bar.Show(++done, count * args.tokens);
    return true;
  };
  const auto progress = [&](int64_t) { return !evaluation.interrupted(); };
  RETURN_IF_ERROR(AnswerAll(std::move(runner), std::move(requests), take, progress));
  return texts;
}

// Tokens at the beginning of each answer that the cache would have written too; mean over answers.
double MeanAgreement(const std::vector<TokenScore>& scores, const std::vector<EvalText>& texts) {
  std::vector<int64_t> lengths;
  for (const EvalText& text : texts) {
    lengths.push_back(static_cast<int64_t>(text.tokens.size()) - text.prompt_length);
  }
  for (const TokenScore& score : scores) {
    int64_t& length = lengths[static_cast<size_t>(score.text)];
    const int64_t index = score.position - texts[static_cast<size_t>(score.text)].prompt_length;
    if (!score.chosen) length = std::min(length, index);
  }
  double sum = 0;
  for (const int64_t length : lengths) sum += static_cast<double>(length);
  return sum / static_cast<double>(lengths.size());
}

constexpr int64_t kMaxColumns = 4;
constexpr int64_t kMaxStretches = 16;

// Cuts [0, tokens) into at most `count` parts [begin, end) of nearly the same length.
std::vector<std::pair<int64_t, int64_t>> Stretches(int64_t tokens, int64_t count) {
  count = std::min(count, tokens);
  std::vector<std::pair<int64_t, int64_t>> stretches;
  for (int64_t i = 0; i < count; ++i) {
    stretches.emplace_back(tokens * i / count, tokens * (i + 1) / count);
  }
  return stretches;
}

// Scores of the answers' tokens [begin, end).
ScoreSummary SummarizeAnswers(const CacheScores& scores, const std::vector<EvalText>& texts,
                              int64_t begin, int64_t end) {
  return Summarize(scores.tokens, [&](const TokenScore& score) {
    const int64_t index = score.position - texts[static_cast<size_t>(score.text)].prompt_length;
    return index >= begin && index < end;
  });
}

Result<std::vector<std::vector<int32_t>>> EncodePrompts(const Tokenizer& tokenizer,
                                                        const LongAnswerArgs& args,
                                                        const std::vector<std::string>& documents) {
  std::vector<std::vector<int32_t>> prompts;
  for (const std::string& prompt : args.prompts) prompts.push_back(tokenizer.Encode(prompt, {}));
  for (const std::string& document : documents) {
    std::vector<int32_t>& prompt = prompts.emplace_back(tokenizer.Encode(document, {}));
    prompt.resize(std::min(prompt.size(), static_cast<size_t>(args.prompt_tokens)));
  }
  for (const auto& prompt : prompts) {
    if (prompt.empty()) return InvalidArgument("a prompt has no tokens");
  }
  return prompts;
}

// A report without rows.
EvalReport LongAnswerReport(const Evaluation& evaluation, const LongAnswerArgs& args,
                            size_t num_prompts) {
  EvalReport report = evaluation.Report("longgen");
  report.scope = fmt::format(
      "longgen of {} on {}: {} tokens that the reference {} wrote after each of {} prompts; KL("
      "reference || cache) in nats along them{}",
      report.model, report.device, args.tokens, evaluation.caches[0].name, num_prompts,
      args.temperature == 0
          ? "; \"same for\": tokens until the first that the cache would not have chosen"
          : "");
  const OrderedJson settings = {{"prompts", num_prompts},
                                {"tokens", args.tokens},
                                {"temperature", args.temperature},
                                {"seed", args.seed},
                                {"reference", evaluation.caches[0].name}};
  report.settings = settings.dump();
  report.columns = {{"kl_mean", "KL mean", Format::kSmall},
                    {"kl_p99", "99th pct", Format::kSmall},
                    {"top1_agreement", "top-1", Format::kPercent},
                    {"same_tokens", "same for", Format::kCount}};
  for (const auto& [begin, end] : Stretches(args.tokens, kMaxColumns)) {
    report.columns.push_back({fmt::format("kl_mean_{}_{}", begin, end),
                              fmt::format("KL {}-{}", begin, end - 1), Format::kSmall});
  }
  report.plot_log = true;
  return report;
}

// A cache's row of it, but for its name and bits.
EvalRow LongAnswerRow(const CacheScores& scores, const LongAnswerArgs& args,
                      const std::vector<EvalText>& texts) {
  const ScoreSummary all = SummarizeAnswers(scores, texts, 0, args.tokens);
  EvalRow row{.cache = "", .effective_bits = scores.effective_bits};
  // What would have been sampled the scores do not say.
  const std::optional<double> same =
      args.temperature == 0 ? std::optional(MeanAgreement(scores.tokens, texts)) : std::nullopt;
  row.values = {all.kl_mean, all.kl_p99, all.top1_agreement, same};
  for (const auto& [begin, end] : Stretches(args.tokens, kMaxColumns)) {
    row.values.push_back(SummarizeAnswers(scores, texts, begin, end).kl_mean);
  }
  OrderedJson stretches = OrderedJson::array();
  for (const auto& [begin, end] : Stretches(args.tokens, kMaxStretches)) {
    OrderedJson stretch = ToJson(SummarizeAnswers(scores, texts, begin, end));
    stretch["begin"] = begin;
    stretch["end"] = end;
    stretches.push_back(std::move(stretch));
  }
  row.details = OrderedJson{{"all", ToJson(all)}, {"by_position", std::move(stretches)}}.dump();
  return row;
}

}  // namespace

Result<EvalReport> EvaluateLongAnswers(const Evaluation& evaluation, const LongAnswerArgs& args,
                                       const std::vector<std::string>& documents) {
  ASSIGN_OR_RETURN(const auto prompts, EncodePrompts(*evaluation.parts.tokenizer, args, documents));
  ASSIGN_OR_RETURN(const std::vector<EvalText> texts, WriteAnswers(evaluation, args, prompts));
  int64_t longest = 0;
  int64_t total = 0;
  for (const EvalText& text : texts) {
    const auto length = static_cast<int64_t>(text.tokens.size());
    longest = std::max(longest, length);
    total += length;
  }
  ASSIGN_OR_RETURN(const auto runners, evaluation.RunnersFor(longest));
  ProgressBar bar("longgen");
  int64_t done = 0;
  const EvalProgress progress = [&](int64_t more) {
    bar.Show(done += more, total * static_cast<int64_t>(runners.size()));
    return !evaluation.interrupted();
  };
  ASSIGN_OR_RETURN(const auto scores, ScoreTexts(runners, texts, /*compare=*/true, progress));

  EvalReport report = LongAnswerReport(evaluation, args, texts.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    EvalRow& row = report.rows.emplace_back(LongAnswerRow(scores[i], args, texts));
    row.cache = evaluation.caches[i].name;
    row.sealed_bits = runners[i]->layout().sealed_bits_per_element();
  }
  return report;
}

}  // namespace innerq
