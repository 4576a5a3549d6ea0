#include "server/eval_command.h"

#include <fmt/format.h>

#include <optional>
#include <utility>

#include "server/eval_data.h"
#include "server/eval_report.h"
#include "server/output_file.h"

namespace innerq {
namespace {

// Files that exist: under two names too. A device may be both.
Result<void> RefuseOneFile(const EvalOutputArgs& args) {
  std::error_code ignored;
  if (args.json.empty() || args.plot.empty() ||
      !std::filesystem::equivalent(args.json, args.plot, ignored) ||
      !std::filesystem::is_regular_file(args.json, ignored)) {
    return {};
  }
  return InvalidArgument("--json and --plot name the same file, " + args.json.string());
}

// The worked examples, which must not give solutions away.
Result<std::vector<Problem>> ReadShots(const ProblemArgs& args,
                                       const std::vector<Problem>& problems) {
  if (args.shots.empty() || args.num_shots == 0) return std::vector<Problem>();
  ASSIGN_OR_RETURN(std::vector<Problem> shots, ReadProblems(args.shots, args.num_shots));
  if (const auto found = static_cast<int64_t>(shots.size()); found < args.num_shots) {
    return InvalidArgument(fmt::format("--num-shots: {} has {} problems, not {}",
                                       args.shots.string(), found, args.num_shots));
  }
  for (const Problem& shot : shots) {
    for (const Problem& problem : problems) {
      if (shot.question != problem.question) continue;
      return InvalidArgument(fmt::format("--shots: {} shows how to solve a problem of --data: {}",
                                         args.shots.string(), problem.question));
    }
  }
  return shots;
}

// Reads what the task needs before it loads the model: what is wrong there shows at once.
Result<EvalReport> RunTask(const ConfigSource& source, const EvalArgs& args,
                           std::function<bool()> interrupted) {
  const auto prepare = [&] {
    return PrepareEvaluation(source, args.output.caches, std::move(interrupted));
  };
  switch (args.task) {
    case EvalArgs::Task::kPerplexity: {
      ASSIGN_OR_RETURN(const auto texts, ReadTexts(args.scoring.texts, args.scoring.limit));
      ASSIGN_OR_RETURN(const Evaluation evaluation, prepare());
      return EvaluatePerplexity(evaluation, args.scoring, texts);
    }
    case EvalArgs::Task::kKl: {
      ASSIGN_OR_RETURN(const auto texts, ReadTexts(args.scoring.texts, args.scoring.limit));
      ASSIGN_OR_RETURN(const Evaluation evaluation, prepare());
      return EvaluateDivergence(evaluation, args.scoring, texts);
    }
    case EvalArgs::Task::kGsm8k: {
      const ProblemArgs& problem_args = args.problems;
      ASSIGN_OR_RETURN(const auto problems, ReadProblems(problem_args.data, problem_args.limit));
      ASSIGN_OR_RETURN(const auto shots, ReadShots(problem_args, problems));
      ASSIGN_OR_RETURN(const Evaluation evaluation, prepare());
      return EvaluateProblems(evaluation, problem_args, problems, shots);
    }
    case EvalArgs::Task::kRecall: {
      ASSIGN_OR_RETURN(const Evaluation evaluation, prepare());
      return EvaluateRecall(evaluation, args.recall);
    }
    case EvalArgs::Task::kLonggen: {
      const LongAnswerArgs& long_args = args.long_answers;
      if (long_args.prompts.empty() && long_args.texts.empty()) {
        return InvalidArgument("--prompt or --text is required");
      }
      ASSIGN_OR_RETURN(const auto texts, ReadTexts(long_args.texts, long_args.limit));
      ASSIGN_OR_RETURN(const Evaluation evaluation, prepare());
      return EvaluateLongAnswers(evaluation, long_args, texts);
    }
  }
  return Error{ErrorCode::kInternal, "no such task"};
}

}  // namespace

Result<void> Evaluate(const ConfigSource& source, const EvalArgs& args,
                      std::function<bool()> interrupted) {
  ASSIGN_OR_RETURN(std::optional<OutputFile> json, OutputFile::OpenIfNamed(args.output.json));
  ASSIGN_OR_RETURN(std::optional<OutputFile> plot, OutputFile::OpenIfNamed(args.output.plot));
  RETURN_IF_ERROR(RefuseOneFile(args.output));
  ASSIGN_OR_RETURN(const EvalReport report, RunTask(source, args, std::move(interrupted)));
  fmt::print("{}", FormatTable(report));
  if (json) RETURN_IF_ERROR(json->Write(FormatJson(report)));
  if (plot) RETURN_IF_ERROR(plot->Write(FormatPlot(report)));
  return {};
}

int EvalCommand(const ConfigSource& source, const EvalArgs& args) {
  return RunUntilSignal(
      [&](const Interruption& signals) { return Evaluate(source, args, signals.interrupted); });
}

}  // namespace innerq
