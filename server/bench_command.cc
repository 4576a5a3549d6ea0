#include "server/bench_command.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "engine/benchmark.h"
#include "server/bench_shapes.h"
#include "server/cache_choice.h"
#include "server/eval_report.h"
#include "server/model_setup.h"
#include "server/options.h"
#include "server/output_file.h"
#include "server/progress_bar.h"

namespace innerq {
namespace {

using OrderedJson = nlohmann::ordered_json;
using Format = EvalColumn::Format;

constexpr uint64_t kSeed = 1;  // of weights and tokens

// What is measured on what, known to be possible before the weights are there.
struct BenchPlan {
  Options options;
  std::vector<CacheChoice> caches;
  std::vector<BenchLoad> loads;
  ModelConfig model;
  std::shared_ptr<const Checkpoint> checkpoint;  // null: random weights
  int64_t layers_of_model = 0;                   // of which `model` has the first
};

// Runs of one load through one cache.
struct Measurement {
  BenchLoad load;
  size_t cache = 0;  // its index
  std::vector<BenchRun> runs;
};

// What a benchmark found.
struct Measured {
  ModelReport model;
  std::optional<double> read_bandwidth;  // bytes per second; none: the device cannot tell
  std::vector<Measurement> measurements;
};

Result<void> RefuseUnused(const ConfigSource& source, const BenchArgs& args,
                          const std::vector<CacheChoice>& caches) {
  for (const CacheChoice& cache : caches) {
    for (const std::string& key : cache.replaced) {
      if (!key.starts_with("memory=")) continue;
      return InvalidArgument("kv_cache." + key +
                             ": a benchmark takes the memory that its sequences need");
    }
  }
  if (args.shape.empty()) return {};
  for (const std::string& text : source.overrides) {
    if (!text.starts_with("model.") || text.starts_with("model.dtype=")) continue;
    return InvalidArgument("--set " + text +
                           ": the configuration's model is not used with --shape");
  }
  return {};
}

Result<std::vector<BenchLoad>> MakeLoads(const BenchArgs& args, const EngineOptions& engine,
                                         const ModelConfig& model) {
  const int64_t longest = engine.max_context > 0 ? std::min(engine.max_context, model.max_positions)
                                                 : model.max_positions;
  std::vector<BenchLoad> loads;
  for (const int64_t depth : args.depths) {
    for (const int64_t batch : args.batches) {
      const BenchLoad& load =
          loads.emplace_back(BenchLoad{.batch = batch,
                                       .depth = depth,
                                       .prompt = args.prompt,
                                       .generate = args.generate,
                                       .seed = kSeed,
                                       .temperature = static_cast<float>(args.temperature)});
      if (batch > engine.max_sequences) {
        return InvalidArgument(
            fmt::format("--batch: {} sequences are more than run at once, "
                        "scheduler.max_sequences is {}",
                        batch, engine.max_sequences));
      }
      if (load.context() > longest) {
        return InvalidArgument(
            fmt::format("--depth, --prompt and --generate: {} + {} + {} tokens are more than the "
                        "longest context, {}",
                        depth, args.prompt, args.generate, longest));
      }
    }
  }
  return loads;
}

// How random weights of a shape are coded.
Result<void> ChooseCodes(const LowBitArgs& args, ModelConfig* model) {
  ASSIGN_OR_RETURN(const LowBitSpec spec, SpecOf(args));
  for (const int64_t inputs :
       {model->hidden_size, model->num_heads * model->head_dim, model->intermediate_size}) {
    if (spec.Divides(inputs)) continue;
    return InvalidArgument(fmt::format("--group-size: {} inputs are no multiple of {}", inputs,
                                       std::max(kLowBitUnit, spec.group_size)));
  }
  model->low_bit = spec;
  ASSIGN_OR_RETURN(model->low_bit_head, HeadSpecOf(args));
  return {};
}

Result<BenchPlan> MakePlan(const ConfigSource& source, const BenchArgs& args) {
  BenchPlan plan;
  ASSIGN_OR_RETURN(plan.options, LoadOptions(source.file, source.overrides));
  ASSIGN_OR_RETURN(plan.caches, ReadCacheChoices(plan.options, source, args.caches));
  RETURN_IF_ERROR(RefuseUnused(source, args, plan.caches));
  if (args.shape.empty()) {
    ASSIGN_OR_RETURN(plan.checkpoint, Checkpoint::Open(plan.options.model.path));
    plan.model = plan.checkpoint->config();
  } else {
    ASSIGN_OR_RETURN(plan.model, FindShape(args.shape));
  }
  plan.layers_of_model = plan.model.num_layers;
  if (args.layers > plan.layers_of_model) {
    return InvalidArgument(
        fmt::format("--layers: {} has {}, not {}", args.shape, plan.layers_of_model, args.layers));
  }
  if (args.layers > 0) plan.model.num_layers = args.layers;
  if (!args.weights.scheme.empty()) {
    RETURN_IF_ERROR(ChooseCodes(args.weights, &plan.model));
  }
  const ModelRunnerOptions& runner = plan.options.runner;
  ASSIGN_OR_RETURN(plan.loads, MakeLoads(args, runner.engine, plan.model));
  int64_t most_bytes = 0;
  for (const CacheChoice& cache : plan.caches) {
    for (const BenchLoad& load : plan.loads) {
      const auto bytes = PlanLoad(plan.model, runner.engine, cache.options, load);
      if (!bytes) return OfCache(cache, bytes.error());
      most_bytes = std::max(most_bytes, *bytes);
    }
  }
  RETURN_IF_ERROR(CheckMemory(plan.model, runner, most_bytes));
  return plan;
}

Result<std::unique_ptr<ModelRunner>> BringUp(const BenchPlan& plan,
                                             const std::function<bool()>& interrupted) {
  ASSIGN_OR_RETURN(const Options options, WithLeastCache(plan.options, plan.model));
  return plan.checkpoint != nullptr ? LoadWeights(options, plan.checkpoint, interrupted)
                                    : MakeRandomWeights(options, plan.model, kSeed, interrupted);
}

// The same sequences with a step's worth of prompts and a few answers: what a first run does once
// (pages of memory, kernels of a device) is not measured.
BenchLoad WarmUp(BenchLoad load, const EngineOptions& engine) {
  constexpr int64_t kSteps = 4;
  load.depth = 0;
  load.prompt = std::min(load.prompt, std::max<int64_t>(engine.max_batch_tokens / load.batch, 1));
  load.generate = std::min(load.generate, kSteps);
  return load;
}

// Caches take turns, so that a drift of the machine meets all of them.
Result<std::vector<Measurement>> MeasureAll(const BenchPlan& plan, const ModelRunner& runner,
                                            int64_t num_runs,
                                            const std::function<bool()>& interrupted) {
  const EngineOptions& engine = plan.options.runner.engine;
  int64_t total = 0;
  for (const BenchLoad& load : plan.loads) {
    total += static_cast<int64_t>(plan.caches.size()) *
             (WarmUp(load, engine).num_tokens() + num_runs * load.num_tokens());
  }
  ProgressBar bar("bench");
  int64_t done = 0;
  const EvalProgress progress = [&](int64_t more) {
    bar.Show(done += more, total);
    return !interrupted();
  };
  std::vector<Measurement> measurements;
  for (const BenchLoad& load : plan.loads) {
    const size_t first = measurements.size();
    for (size_t i = 0; i < plan.caches.size(); ++i) measurements.push_back({load, i, {}});
    for (int64_t run = -1; run < num_runs; ++run) {  // the first warms up
      for (size_t i = 0; i < plan.caches.size(); ++i) {
        const CacheChoice& cache = plan.caches[i];
        auto ran = RunLoad(runner, cache.options, run < 0 ? WarmUp(load, engine) : load, progress);
        if (!ran) {
          const bool cancelled = ran.error().code == ErrorCode::kCancelled;
          return cancelled ? ran.error() : OfCache(cache, ran.error());
        }
        if (run >= 0) measurements[first + i].runs.push_back(std::move(ran).value());
      }
    }
  }
  return measurements;
}

// Measures the bandwidth before and after: the faster reading is the floor.
Result<Measured> Measure(const BenchPlan& plan, int64_t num_runs,
                         const std::function<bool()>& interrupted) {
  ASSIGN_OR_RETURN(const auto runner, BringUp(plan, interrupted));
  ASSIGN_OR_RETURN(const auto before, runner->MeasureReadBandwidth());
  ASSIGN_OR_RETURN(auto measurements, MeasureAll(plan, *runner, num_runs, interrupted));
  ASSIGN_OR_RETURN(const auto after, runner->MeasureReadBandwidth());
  return Measured{.model = runner->report(),
                  .read_bandwidth = std::max(before, after),  // none is less than any
                  .measurements = std::move(measurements)};
}

std::string WeightsOf(const BenchPlan& plan) {
  const auto& dtype = plan.options.runner.dtype;
  const char* format = WeightFormatName(dtype.value_or(WeightFormat::kBF16));
  const bool random = plan.checkpoint == nullptr;
  const char* prefix = random ? "random " : "";
  if (const auto& low_bit = plan.model.low_bit) {
    if (dtype) return fmt::format("{}{} decoded", prefix, format);
    const auto& head = plan.model.low_bit_head;
    return fmt::format("{}{} {}-bit{}", prefix, LowBitSchemeName(low_bit->scheme), low_bit->bits,
                       head ? fmt::format(" ({}-bit head)", head->bits) : "");
  }
  return random || dtype ? fmt::format("{}{}", prefix, format) : "stored";
}

std::string Scope(const BenchPlan& plan, const BenchArgs& args, const Measured& measured,
                  const std::string& model) {
  std::string layers = fmt::format("{} layers", plan.model.num_layers);
  if (plan.model.num_layers < plan.layers_of_model) {
    layers += fmt::format(" of {}", plan.layers_of_model);
  }
  std::string scope = fmt::format(
      "bench of {}, {}, {} weights ({:.1f} MiB), on {} with {} thread{}: prompts of {} tokens in "
      "steps of up to {}, then {} steps, {}; {}",
      model, layers, WeightsOf(plan), static_cast<double>(measured.model.weight_bytes) / (1 << 20),
      measured.model.backend, measured.model.threads, measured.model.threads == 1 ? "" : "s",
      args.prompt, plan.options.runner.engine.max_batch_tokens, args.generate,
      args.temperature == 0 ? "greedy" : fmt::format("temperature {}", args.temperature),
      args.runs == 1 ? "one run" : fmt::format("medians of {} runs", args.runs));
  if (!measured.read_bandwidth) {
    return scope + "; no floor: this device cannot tell how fast its memory is read";
  }
  return scope + fmt::format(
                     "; \"of floor\": weights and cache of a decode step, read once at {:.1f} GB/s "
                     "(a loop that only reads, in this run), against the step",
                     *measured.read_bandwidth / 1e9);
}

EvalRow RowOf(const BenchPlan& plan, const Measured& measured, const Measurement& measurement) {
  const BenchLoad& load = measurement.load;
  const BenchRun& run = measurement.runs.front();
  const BenchSpeed speed = Summarize(load, measurement.runs);
  EvalRow row{.cache = plan.caches[measurement.cache].name,
              .sealed_bits = run.sealed_bits,
              .effective_bits = run.effective_bits};
  row.values = {static_cast<double>(load.batch),
                static_cast<double>(load.depth),
                speed.prefill_tokens_per_second,
                speed.decode_tokens_per_second,
                1000 * speed.step_seconds,
                speed.total_tokens_per_second,
                run.bytes_per_token,
                static_cast<double>(run.cache_bytes)};
  const int64_t weight_bytes = measured.model.step_weight_bytes;
  OrderedJson details = {{"step_weight_bytes", weight_bytes},
                         {"step_cache_bytes", run.step_cache_bytes}};
  if (measured.read_bandwidth) {
    const double floor =
        (static_cast<double>(weight_bytes) + run.step_cache_bytes) / *measured.read_bandwidth;
    row.values.push_back(floor / speed.step_seconds);
    details["floor_ms"] = 1000 * floor;
  }
  for (const BenchRun& each : measurement.runs) {
    details["runs"].push_back(
        {{"prefill_seconds", each.prefill_seconds}, {"step_seconds", each.step_seconds}});
  }
  row.details = details.dump();
  return row;
}

EvalReport MakeReport(const BenchPlan& plan, const BenchArgs& args, const Measured& measured,
                      const std::string& version) {
  const ModelReport& model = measured.model;
  EvalReport report{.task = "bench",
                    .model = args.shape.empty() ? plan.options.model.alias : args.shape,
                    .device = model.backend,
                    .scope = ""};
  report.scope = Scope(plan, args, measured, report.model);
  const ModelRunnerOptions& runner = plan.options.runner;
  report.settings = OrderedJson{{"weights", WeightsOf(plan)},
                                {"prompt", args.prompt},
                                {"generate", args.generate},
                                {"temperature", args.temperature},
                                {"runs", args.runs},
                                {"max_batch_tokens", runner.engine.max_batch_tokens},
                                {"deterministic", runner.backend.deterministic}}
                        .dump();
  const auto& bandwidth = measured.read_bandwidth;
  report.details = OrderedJson{{"version", version},
                               {"threads", model.threads},
                               {"layers", plan.model.num_layers},
                               {"layers_of_model", plan.layers_of_model},
                               {"parameters", model.parameters},
                               {"weight_bytes", model.weight_bytes},
                               {"read_bytes_per_second",
                                bandwidth ? OrderedJson(*bandwidth) : OrderedJson(nullptr)}}
                       .dump();
  report.columns = {{"batch", "batch", Format::kInteger},
                    {"depth", "depth", Format::kInteger},
                    {"prefill_tokens_per_second", "prefill t/s", Format::kCount},
                    {"decode_tokens_per_second", "decode t/s", Format::kCount},
                    {"step_ms", "ms/step", Format::kRatio},
                    {"total_tokens_per_second", "total t/s", Format::kCount},
                    {"bytes_per_token", "bytes/token", Format::kInteger},
                    {"cache_bytes", "cache MiB", Format::kMiB}};
  if (bandwidth) report.columns.push_back({"floor_share", "of floor", Format::kPercent});
  for (const Measurement& measurement : measured.measurements) {
    report.rows.push_back(RowOf(plan, measured, measurement));
  }
  return report;
}

}  // namespace

Result<void> Benchmark(const ConfigSource& source, const BenchArgs& args,
                       const std::string& version, const std::function<bool()>& interrupted) {
  ASSIGN_OR_RETURN(std::optional<OutputFile> json, OutputFile::OpenIfNamed(args.json));
  ASSIGN_OR_RETURN(const BenchPlan plan, MakePlan(source, args));
  ASSIGN_OR_RETURN(const Measured measured, Measure(plan, args.runs, interrupted));
  const EvalReport report = MakeReport(plan, args, measured, version);
  fmt::print("{}", FormatTable(report));
  if (json) RETURN_IF_ERROR(json->Write(FormatJson(report)));
  return {};
}

int BenchCommand(const ConfigSource& source, const BenchArgs& args, const std::string& version) {
  return RunUntilSignal([&](const Interruption& signals) {
    return Benchmark(source, args, version, signals.interrupted);
  });
}

}  // namespace innerq
