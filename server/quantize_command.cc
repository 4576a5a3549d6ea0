#include "server/quantize_command.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <memory>
#include <numeric>
#include <system_error>
#include <utility>

#include "engine/evaluate.h"
#include "engine/model_runner.h"
#include "engine/page_budget.h"
#include "models/checkpoint.h"
#include "models/tokenizer.h"
#include "models/weight_quantizer.h"
#include "server/cache_choice.h"
#include "server/commands.h"
#include "server/eval_data.h"
#include "server/model_setup.h"
#include "server/options.h"
#include "server/output_directory.h"
#include "server/progress_bar.h"

namespace innerq {
namespace {

constexpr int64_t kContext = 2048;   // tokens of a window, unless the model has fewer
constexpr int64_t kLeastTokens = 2;  // of a window: one to begin with, one to score
constexpr double kLargestPrune = 0.95;

Result<void> CheckShare(double share, const std::string& option) {
  if (share >= 0 && share <= kLargestPrune) return {};
  return InvalidArgument(
      fmt::format("{}: expected a share in [0, {}], found {}", option, kLargestPrune, share));
}

// Reads PATTERN=R.
Result<PruneRule> ReadPruneRule(const std::string& text) {
  const size_t equals = text.rfind('=');
  PruneRule rule{.pattern = text.substr(0, std::min(equals, text.size()))};
  const std::string number = text.substr(rule.pattern.size());  // with the sign
  const char* const end = number.data() + number.size();
  const auto [read, failed] =
      std::from_chars(number.data() + (number.empty() ? 0 : 1), end, rule.share);
  if (rule.pattern.empty() || failed != std::errc() || read != end) {
    return InvalidArgument("--prune-matrix: expected PATTERN=R, R a number, found " + text);
  }
  RETURN_IF_ERROR(CheckShare(rule.share, "--prune-matrix " + text));
  return rule;
}

// All but what is known only when calibration is over.
Result<QuantizeOptions> QuantizeOptionsOf(const QuantizeArgs& args, const LowBitSpec& spec) {
  QuantizeOptions options{.spec = spec, .prune = args.prune};
  ASSIGN_OR_RETURN(options.head, HeadSpecOf(args.weights));
  const auto scale = FindLowBitScale(args.scale);
  if (!scale) return InvalidArgument("--scale: expected free or pow2, found " + args.scale);
  options.scale = *scale;
  for (const std::string& text : args.prune_matrices) {
    ASSIGN_OR_RETURN(PruneRule rule, ReadPruneRule(text));
    options.prune_matrices.push_back(std::move(rule));
  }
  return options;
}

Result<void> CheckNumbers(const QuantizeArgs& args, const LowBitSpec& spec) {
  if (HasStaticActivations(spec) && args.calibration.empty()) {
    return InvalidArgument(
        fmt::format("--activation-bits {} takes --calibration: its clip is learned from inputs",
                    spec.activation_bits));
  }
  RETURN_IF_ERROR(CheckShare(args.prune, "--prune"));
  if (args.calibration_tokens < kLeastTokens) {
    return InvalidArgument(
        fmt::format("--calibration-tokens: expected 2 or more, found {}", args.calibration_tokens));
  }
  if (args.evaluation_tokens < kLeastTokens) {
    return InvalidArgument(
        fmt::format("--evaluate-tokens: expected 2 or more, found {}", args.evaluation_tokens));
  }
  return {};
}

// The default configuration on the CPU, with a cache of F16.
Result<Options> OptionsOf(const QuantizeArgs& args, const ModelConfig& config) {
  ASSIGN_OR_RETURN(Options options, ParseOptions(R"({"model": {"path": "/"}})", {}));
  options.model.path = args.model;
  options.runner.backend.threads = args.threads;
  return WithLeastCache(std::move(options), config);
}

// Windows of texts and how many tokens they have.
struct Windows {
  std::vector<EvalText> texts;
  int64_t tokens = 0;

  void Add(EvalText text) {
    tokens += static_cast<int64_t>(text.tokens.size());
    texts.push_back(std::move(text));
  }
};

// Takes up to `limit` tokens of windows from all over them; the others go to `rest`. The last one
// that is taken is cut to fit, and what is cut off is lost.
Windows TakeSpread(const std::vector<EvalText>& windows, int64_t limit,
                   std::vector<EvalText>* rest) {
  const size_t count = windows.size();
  // Multiples of a step by the golden ratio spread well, however many there are.
  auto step = std::max<size_t>(1, static_cast<size_t>(0.618034 * static_cast<double>(count)));
  while (std::gcd(step, count) > 1) ++step;
  Windows taken;
  for (size_t i = 0; i < count; ++i) {
    EvalText window = windows[i * step % count];
    const int64_t room = limit - taken.tokens;
    if (room < kLeastTokens) {
      rest->push_back(std::move(window));
      continue;
    }
    window.tokens.resize(std::min(window.tokens.size(), static_cast<size_t>(room)));
    taken.Add(std::move(window));
  }
  return taken;
}

// What texts there are to run.
struct Material {
  Windows calibration;
  Windows evaluation;
  std::string evaluated;  // what `evaluation` is, in words
};

Result<Material> ReadMaterial(const QuantizeArgs& args, const ModelConfig& config) {
  Material material;
  if (args.calibration.empty() && args.evaluation.empty()) return material;
  ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(args.model));
  const int64_t context = std::min(kContext, config.max_positions);
  std::vector<EvalText> rest, unused;
  if (!args.calibration.empty()) {
    ASSIGN_OR_RETURN(const auto texts, ReadTexts(args.calibration, 0));
    material.calibration =
        TakeSpread(CutIntoWindows(*tokenizer, texts, context, 0), args.calibration_tokens, &rest);
    if (material.calibration.texts.empty()) {
      return InvalidArgument("--calibration: the texts give no tokens to run");
    }
  }
  if (!args.evaluation.empty()) {
    ASSIGN_OR_RETURN(const auto texts, ReadTexts(args.evaluation, 0));
    material.evaluation =
        TakeSpread(CutIntoWindows(*tokenizer, texts, context, 0), args.evaluation_tokens, &unused);
    material.evaluated = "the texts of --evaluate";
    if (material.evaluation.texts.empty()) {
      return InvalidArgument("--evaluate: the texts give no tokens to score");
    }
  } else if (!rest.empty()) {
    material.evaluation = TakeSpread(rest, args.evaluation_tokens, &unused);
    material.evaluated = "calibration texts that calibration did not use";
  } else {
    material.evaluation = material.calibration;
    material.evaluated = "the texts that calibration used";
  }
  return material;
}

Result<void> CheckQuantizeMemory(const Checkpoint& source, const QuantizeOptions& options,
                                 const Material& material) {
  CalibrationPlan plan{.runs = !material.evaluation.texts.empty(),
                       .calibrates = !material.calibration.texts.empty()};
  for (const EvalText& text : material.evaluation.texts) {
    const int64_t scored = std::ssize(text.tokens) - text.first_scored;
    plan.scored_rows = std::max<int64_t>(plan.scored_rows, scored);
  }
  const Result<void> fits = CheckMemoryToQuantize(source, options, plan);
  if (fits || !plan.runs) return fits;
  return Error{fits.error().code, fits.error().message +
                                      "; do without --calibration and --evaluate, or use a machine "
                                      "with more memory"};
}

// A runner on loaded weights for one sequence of a window, with a cache of F16.
Result<std::unique_ptr<ModelRunner>> RunnerOn(const ModelRunner& weights,
                                              const ModelConfig& config) {
  const int64_t context = std::min(kContext, config.max_positions);
  CacheChoice cache{"fp16", HalfPrecision()};
  ASSIGN_OR_RETURN(const KvLayout layout, LayoutOf(cache, config));
  const PageCounts longest = WorstPeakPages(layout, context, /*exact_prefill=*/false);
  cache.options.memory_bytes = layout.open_pool_bytes(longest.open);
  return weights.WithCache(cache.options, {.max_context = context, .max_sequences = 1});
}

// Runs texts for the sake of what is observed.
Result<void> RunTexts(ModelRunner& runner, const Windows& windows,
                      const std::function<bool()>& interrupted) {
  ProgressBar bar("calibrating");
  int64_t done = 0;
  const EvalProgress progress = [&](int64_t more) {
    bar.Show(done += more, windows.tokens);
    return !interrupted();
  };
  for (EvalText text : windows.texts) {
    text.first_scored = static_cast<int64_t>(text.tokens.size()) - 1;  // few logits
    const auto drop = [](int64_t, std::span<const float>) -> Result<void> { return {}; };
    RETURN_IF_ERROR(ScoreText(runner, text, drop, progress));
  }
  return {};
}

// The model to quantize, as far as it takes part.
struct FloatModel {
  std::unique_ptr<InputCollector> inputs;  // null: without calibration, or not needed any more
  std::unique_ptr<ModelRunner> weights;    // null: there is nothing to run
};

// Threads that a computation on the CPU takes. Reads no weights.
Result<int> ThreadsOf(const Options& options, const Checkpoint& source) {
  ASSIGN_OR_RETURN(const ModelPlan plan, PlanModel(source, options.runner));
  return plan.backend->threads();
}

// How long work may go on, and how wide.
struct WorkLimits {
  int threads = 1;
  const std::function<bool()>& interrupted;
};

// Fills `model`, which must outlive its weights' last step.
Result<void> LoadAndCalibrate(Options options, const std::shared_ptr<const Checkpoint>& source,
                              const Material& material, const WorkLimits& limits,
                              FloatModel* model) {
  if (material.evaluation.texts.empty()) return {};
  const bool calibrates = !material.calibration.texts.empty();
  if (calibrates) {
    ASSIGN_OR_RETURN(model->inputs, InputCollector::Create(source->config(), limits.threads));
    options.runner.observe = [model](std::span<const std::string> matrices, ConstTensorView x) {
      if (model->inputs) model->inputs->Add(matrices, x);
    };
  }
  ASSIGN_OR_RETURN(model->weights, LoadWeights(options, source, limits.interrupted));
  if (!calibrates) return {};
  ASSIGN_OR_RETURN(const auto runner, RunnerOn(*model->weights, source->config()));
  RETURN_IF_ERROR(RunTexts(*runner, material.calibration, limits.interrupted));
  return model->inputs->Check();
}

Result<QuantizedCheckpoint> Encode(const Checkpoint& source, QuantizeOptions options,
                                   const std::filesystem::path& directory,
                                   const std::function<bool()>& interrupted) {
  ProgressBar bar("quantizing");
  options.progress = [&](int64_t done, int64_t total) {
    bar.Show(done, total);
    return !interrupted();
  };
  return QuantizeCheckpoint(source, options, directory);
}

// The last part of a matrix's name: "q_proj".
std::string KindOf(const QuantizedMatrix& matrix) {
  return matrix.name.substr(matrix.name.rfind('.') + 1);
}

// The matrices of a kind, in all layers.
std::string TableRow(const std::string& kind, const QuantizedCheckpoint& result) {
  double count = 0, alpha = 0, zeros = 0, error = 0, worst = -1, input_alpha = 0;
  std::string worst_name;
  for (const QuantizedMatrix& matrix : result.matrices) {
    if (KindOf(matrix) != kind) continue;
    count += 1;
    alpha += matrix.alpha;
    zeros += matrix.zeros;
    error += matrix.error;
    input_alpha += matrix.input_alpha;
    if (matrix.error > worst) {
      worst = matrix.error;
      worst_name = matrix.name;
    }
  }
  return fmt::format("| {:<9} | {:8.0f} | {:6.3f} | {:>6} | {:5.1f} % | {:8.5f} | {:8.5f}, {} |\n",
                     kind, count, alpha / count,
                     input_alpha > 0 ? fmt::format("{:.3f}", input_alpha / count) : "",
                     100 * zeros / count, error / count, worst, worst_name);
}

void PrintMatrices(const QuantizedCheckpoint& result, const Windows& calibration) {
  const bool calibrated = !calibration.texts.empty();
  if (calibrated) {
    fmt::print("calibrated on {} tokens in {} windows\n", calibration.tokens,
               calibration.texts.size());
  }
  fmt::print(
      "means over layers; alpha: the clip in standard deviations, of weights before scales are "
      "refined and of static inputs; error: squared, relative, of {}\n\n",
      calibrated ? "the outputs (lm_head: of the weights)" : "the weights");
  fmt::print("| matrix    | matrices |  alpha | inputs |   zeros |    error | largest |\n");
  fmt::print("|-----------|---------:|-------:|-------:|--------:|---------:|---------|\n");
  std::vector<std::string> kinds;
  for (const QuantizedMatrix& matrix : result.matrices) {
    const std::string kind = KindOf(matrix);
    if (std::find(kinds.begin(), kinds.end(), kind) != kinds.end()) continue;
    kinds.push_back(kind);
    fmt::print("{}", TableRow(kind, result));
  }
  fmt::print(
      "\n{} weights in {:.3f} bits each, scales included; {:.1f} % are zero; {} bytes of "
      "tensors became a model.safetensors of {} bytes\n",
      result.num_weights,
      8 * static_cast<double>(result.low_bit_bytes) / static_cast<double>(result.num_weights),
      100 * result.zeros, result.source_bytes, result.file_bytes);
}

// What became of the shares that were asked of single matrices.
void PrintPruning(const QuantizedCheckpoint& result, const QuantizeOptions& options) {
  if (options.prune_matrices.empty()) return;
  fmt::print("\n| pruned                       | matrices |   asked |   zeros |\n");
  fmt::print("|------------------------------|---------:|--------:|--------:|\n");
  const auto print = [&](const std::string& name, double share, const PruneRule* rule) {
    int64_t matrices = 0, weights = 0;
    double zeros = 0;
    for (const QuantizedMatrix& matrix : result.matrices) {
      if (matrix.name == kHeadName) continue;
      if (FindPruneRule(options.prune_matrices, matrix.name) != rule) continue;
      ++matrices;
      weights += matrix.rows * matrix.cols;
      zeros += matrix.zeros * static_cast<double>(matrix.rows * matrix.cols);
    }
    const std::string reached =
        matrices == 0 ? "" : fmt::format("{:.1f} %", 100 * zeros / static_cast<double>(weights));
    fmt::print("| {:<28} | {:8} | {:5.1f} % | {:>7} |\n", name, matrices, 100 * share, reached);
  };
  for (const PruneRule& rule : options.prune_matrices) print(rule.pattern, rule.share, &rule);
  print("all others", options.prune, nullptr);
}

// Scores texts by both models and prints a table.
Result<void> MeasureModels(const QuantizeArgs& args, const Options& options,
                           const Material& material, const ModelRunner& float_weights,
                           const std::function<bool()>& interrupted) {
  ASSIGN_OR_RETURN(auto checkpoint, Checkpoint::Open(args.output));
  const ModelConfig config = checkpoint->config();
  ASSIGN_OR_RETURN(const auto low_bit_weights,
                   LoadWeights(options, std::move(checkpoint), interrupted));
  std::vector<std::unique_ptr<ModelRunner>> runners;
  const ModelRunner* const both[] = {&float_weights, low_bit_weights.get()};
  for (const ModelRunner* weights : both) {
    ASSIGN_OR_RETURN(auto runner, RunnerOn(*weights, config));
    runners.push_back(std::move(runner));
  }
  ProgressBar bar("measuring");
  int64_t done = 0;
  const int64_t total = 2 * material.evaluation.tokens;
  const EvalProgress progress = [&](int64_t more) {
    bar.Show(done += more, total);
    return !interrupted();
  };
  ASSIGN_OR_RETURN(const auto scores,
                   ScoreTexts(runners, material.evaluation.texts, /*compare=*/true, progress));
  const auto all = [](const TokenScore&) { return true; };
  const ScoreSummary before = Summarize(scores[0].tokens, all);
  const ScoreSummary after = Summarize(scores[1].tokens, all);
  fmt::print(
      "\n{} tokens of {}, in {} windows of up to {}; caches of F16, {}; KL divergence from the "
      "float model, nats\n\n",
      after.tokens, material.evaluated, material.evaluation.texts.size(),
      std::min(kContext, config.max_positions), runners[0]->report().backend);
  fmt::print("| weights   | perplexity | KL, mean            | 99th pct | top-1   |\n");
  fmt::print("|-----------|-----------:|--------------------:|---------:|--------:|\n");
  fmt::print("| float     | {:10.3f} | {:>19} | {:>8} | {:>7} |\n", before.perplexity, "0", "0",
             "100.0 %");
  fmt::print("| {:<9} | {:10.3f} | {:>19} | {:8.3g} | {:5.1f} % |\n",
             fmt::format("{} {}", LowBitSchemeName(config.low_bit->scheme), config.low_bit->bits),
             after.perplexity, fmt::format("{:.3g} +- {:.1g}", after.kl_mean, after.kl_error),
             after.kl_p99, 100 * after.top1_agreement);
  return {};
}

// While it lives, a second signal removes a directory before it ends the process.
class RemovedBeforeExit {
 public:
  RemovedBeforeExit(const Interruption& signals, OutputDirectory& output) : signals_(signals) {
    Set([&output] {
      if (output.Remove()) return;
      fmt::print(stderr, "innerq: {} could not be removed\n", output.path().string());
    });
  }
  ~RemovedBeforeExit() { Set({}); }
  RemovedBeforeExit(const RemovedBeforeExit&) = delete;
  RemovedBeforeExit& operator=(const RemovedBeforeExit&) = delete;

 private:
  void Set(std::function<void()> work) {
    if (signals_.set_before_exit) signals_.set_before_exit(std::move(work));
  }

  const Interruption& signals_;
};

}  // namespace

Result<void> Quantize(const QuantizeArgs& args, const Interruption& signals) {
  const std::function<bool()>& interrupted = signals.interrupted;
  ASSIGN_OR_RETURN(const LowBitSpec spec, SpecOf(args.weights));
  RETURN_IF_ERROR(CheckNumbers(args, spec));
  ASSIGN_OR_RETURN(QuantizeOptions quantize, QuantizeOptionsOf(args, spec));
  ASSIGN_OR_RETURN(const auto source, Checkpoint::Open(args.model));
  const ModelConfig& config = source->config();
  if (Result<void> possible = CheckQuantizable(*source, quantize); !possible) {
    const Error& error = possible.error();
    if (error.param == "prune_matrices") {
      return InvalidArgument("--prune-matrix: " + error.message);
    }
    if (error.param != "group_size") return possible;
    return InvalidArgument(
        fmt::format("--group-size {}: {}", args.weights.group_size, error.message));
  }
  ASSIGN_OR_RETURN(Options options, OptionsOf(args, config));
  ASSIGN_OR_RETURN(quantize.threads, ThreadsOf(options, *source));
  ASSIGN_OR_RETURN(Material material, ReadMaterial(args, config));
  RETURN_IF_ERROR(CheckQuantizeMemory(*source, quantize, material));
  ASSIGN_OR_RETURN(OutputDirectory output, OutputDirectory::Create(args.output, "OUT_DIR"));
  const RemovedBeforeExit removed(signals, output);

  FloatModel model;
  RETURN_IF_ERROR(
      LoadAndCalibrate(options, source, material, {quantize.threads, interrupted}, &model));
  quantize.inputs = model.inputs.get();
  ASSIGN_OR_RETURN(const QuantizedCheckpoint result,
                   Encode(*source, quantize, output.path(), interrupted));
  RETURN_IF_ERROR(output.Commit());
  PrintMatrices(result, material.calibration);
  PrintPruning(result, quantize);
  model.inputs.reset();
  if (model.weights == nullptr) return {};
  if (Result<void> measured = MeasureModels(args, options, material, *model.weights, interrupted);
      !measured) {
    Error error = measured.error();
    error.message = args.output.string() + " is complete, but was not measured: " + error.message;
    return error;
  }
  return {};
}

int QuantizeCommand(const QuantizeArgs& args) {
  return RunUntilSignal([&](const Interruption& signals) { return Quantize(args, signals); });
}

}  // namespace innerq
