#include "server/model_setup.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <string_view>
#include <utility>

#include "server/progress_bar.h"

namespace innerq {
namespace {

constexpr double kMiB = 1 << 20;

const char* Name(QuantMode mode) {
  switch (mode) {
    case QuantMode::kSymmetric:
      return "symmetric";
    case QuantMode::kAsymmetric:
      return "asymmetric";
    case QuantMode::kHybrid:
      return "hybrid";
  }
  return "?";
}

std::string Describe(const QuantSpec& spec) {
  if (!spec.quantized()) return "F16";
  return fmt::format("{}-bit {} {} groups of {} ({})", spec.bits, Name(spec.mode),
                     spec.axis == QuantAxis::kInner ? "inner" : "outer", spec.group_size,
                     spec.codec == QuantCodec::kPaper ? "paper" : "fitted");
}

std::string Describe(const KvLayerLayout& layer) {
  return fmt::format("keys {}{}, values {}", Describe(layer.key),
                     layer.normalize_keys ? " normalized" : "", Describe(layer.value));
}

// The ids that end an answer: those of generation_config.json or config.json, the tokenizer's end
// of sequence, and what the chat template writes after an answer. Errors: one that the model does
// not have; every request would be refused for it.
Result<std::vector<int32_t>> StopTokens(const ModelFiles& model) {
  std::vector<int32_t> ids = model.config.eos_token_ids;
  const auto add = [&](const std::string& role, std::optional<int32_t> id) -> Result<void> {
    if (!id || std::find(ids.begin(), ids.end(), *id) != ids.end()) return {};
    if (*id >= model.config.vocab_size) {
      return InvalidArgument(
          fmt::format(
              "model.path: {}: expected a token id below vocab_size {} (config.json), found "
              "{}",
              role, model.config.vocab_size, *id),
          "model.path");
    }
    ids.push_back(*id);
    return {};
  };
  RETURN_IF_ERROR(add("the tokenizer's eos_token", model.tokenizer->eos_id()));
  if (model.chat_template != nullptr) {
    RETURN_IF_ERROR(
        add(fmt::format("the end of a turn in the chat template {}", model.chat_template->name()),
            model.chat_template->end_of_turn()));
  }
  return ids;
}

// The runner's options with a bar that shows how far it has come, and warnings on standard error
// where they do not go to a log.
ModelRunnerOptions WithReports(const Options& options, const std::function<bool()>& interrupted,
                               ProgressBar* bar) {
  ModelRunnerOptions runner_options = options.runner;
  runner_options.progress = [&interrupted, bar](int64_t done, int64_t total) {
    bar->Show(done, total);
    return !interrupted();
  };
  if (!runner_options.backend.warn) {
    runner_options.backend.warn = [](std::string_view text) {
      fmt::print(stderr, "innerq: warning: {}\n", text);
    };
  }
  return runner_options;
}

}  // namespace

std::vector<std::string> DescribeCache(const KvLayout& layout) {
  std::vector<std::string> lines;
  for (int64_t begin = 0; begin < layout.num_layers();) {
    const std::string text = Describe(layout.layer(begin));
    int64_t end = begin + 1;
    while (end < layout.num_layers() && Describe(layout.layer(end)) == text) ++end;
    const std::string range = end - begin == 1 ? fmt::format("layer {}", begin)
                                               : fmt::format("layers {}-{}", begin, end - 1);
    lines.push_back(range + ": " + text);
    begin = end;
  }
  return lines;
}

std::string DescribeLowBit(const ModelConfig& config) {
  CHECK(config.low_bit.has_value(), "a model without codes");
  const LowBitSpec& spec = *config.low_bit;
  const std::string groups =
      spec.group_size == 0 ? "whole rows" : fmt::format("groups of {}", spec.group_size);
  const char* const scales =
      config.low_bit_scale == LowBitScale::kPow2 ? ", scales powers of two" : "";
  const auto& head = config.low_bit_head;
  return fmt::format(
      "{} {}-bit, {}{}, activations {}-bit ({:.2f} bits per weight){}",
      LowBitSchemeName(spec.scheme), spec.bits, groups, scales, spec.activation_bits,
      8 * static_cast<double>(config.low_bit_bytes()) /
          static_cast<double>(config.num_layer_weights()),
      head ? fmt::format("; head {} {}-bit", LowBitSchemeName(head->scheme), head->bits) : "");
}

std::string DescribeLowBit(const Options& options, const ModelConfig& config) {
  const std::string stored = DescribeLowBit(config);
  const auto& dtype = options.runner.dtype;
  if (!dtype) return stored;
  return fmt::format("{}, decoded to {} (model.dtype), activations not rounded to bits", stored,
                     WeightFormatName(*dtype));
}

Result<KvLayout> PlanLayout(const Options& options, const ModelConfig& config) {
  ASSIGN_OR_RETURN(const KvCacheSpec spec, ResolveKvCacheSpec(options.runner.kv_cache, config));
  return KvLayout::Create(spec, CodeOrder::kRowMajor);
}

Result<ModelFiles> OpenModel(const Options& options) {
  const auto open = [&]() -> Result<ModelFiles> {
    ModelFiles files;
    ASSIGN_OR_RETURN(files.tokenizer, Tokenizer::Load(options.model.path));
    ASSIGN_OR_RETURN(
        files.chat_template,
        ChatTemplate::Load(options.model.path, options.model.chat_template, files.tokenizer));
    ASSIGN_OR_RETURN(files.checkpoint, Checkpoint::Open(options.model.path));
    files.config = files.checkpoint->config();
    ASSIGN_OR_RETURN(files.stop_token_ids, StopTokens(files));
    return files;
  };
  Result<ModelFiles> files = open();
  if (files || !files.error().param.empty()) return files;
  // Files that are damaged are not the configuration's fault.
  const ErrorCode code = files.error().code;
  if (code != ErrorCode::kInvalidArgument && code != ErrorCode::kNotFound) return files;
  return Error{code, files.error().message, "model.path"};
}

Result<ModelParts> LoadParts(const Options& options, const std::function<bool()>& interrupted) {
  ModelParts parts;
  ASSIGN_OR_RETURN(static_cast<ModelFiles&>(parts), OpenModel(options));
  ASSIGN_OR_RETURN(parts.runner,
                   LoadWeights(options, std::exchange(parts.checkpoint, nullptr), interrupted));
  return parts;
}

Result<std::unique_ptr<ModelRunner>> LoadWeights(const Options& options,
                                                 std::shared_ptr<const Checkpoint> checkpoint,
                                                 const std::function<bool()>& interrupted) {
  ProgressBar bar("loading weights");
  auto runner = ModelRunner::Create(std::move(checkpoint), WithReports(options, interrupted, &bar));
  if (runner) return runner;
  Error error = runner.error();
  if (error.code == ErrorCode::kResourceExhausted && error.param.empty()) {
    error.message = "model.path: the weights: " + error.message;
    error.param = "model.path";
  }
  return error;
}

Result<std::unique_ptr<ModelRunner>> MakeRandomWeights(const Options& options,
                                                       const ModelConfig& shape, uint64_t seed,
                                                       const std::function<bool()>& interrupted) {
  ProgressBar bar("making weights");
  return ModelRunner::CreateRandom(shape, seed, WithReports(options, interrupted, &bar));
}

Result<LoadedModel> LoadModel(const Options& options) {
  ASSIGN_OR_RETURN(ModelParts parts, LoadParts(options));
  return StartModel(std::move(parts));
}

Result<LoadedModel> StartModel(ModelParts parts) {
  std::unique_ptr<ModelRunner> runner = std::move(parts.runner);
  LoadedModel model{.config = std::move(parts.config),
                    .tokenizer = std::move(parts.tokenizer),
                    .chat_template = std::move(parts.chat_template),
                    .stop_token_ids = std::move(parts.stop_token_ids),
                    .report = runner->report(),
                    .cache = {},
                    .engine = nullptr};
  model.cache = {
      .capacity_tokens = model.report.pools.tokens_that_fit,
      .sealed_bits = model.report.sealed_bits_per_element,
      .effective_bits = runner->layout().effective_bits_per_element(model.report.max_context),
      .open_page_bytes = model.report.open_page_bytes,
      .sealed_page_bytes = model.report.sealed_page_bytes,
      .layers = {}};
  const KvLayout& layout = runner->layout();
  const auto mode = [](const QuantSpec& spec) {
    return spec.quantized() ? std::optional(spec.mode) : std::nullopt;
  };
  for (int64_t i = 0; i < layout.num_layers(); ++i) {
    model.cache.layers.push_back({mode(layout.layer(i).key), mode(layout.layer(i).value)});
  }
  const EngineOptions engine_options = runner->engine_options();
  ASSIGN_OR_RETURN(model.engine, Engine::Create(engine_options, std::move(runner)));
  return model;
}

std::vector<std::string> DescribeModel(const Options& options, const ModelConfig& config,
                                       const ModelReport& report) {
  std::vector<std::string> lines;
  lines.push_back(fmt::format("model {}: {:.1f} M parameters, {:.1f} MiB of weights, from {}",
                              options.model.alias, static_cast<double>(report.parameters) / 1e6,
                              static_cast<double>(report.weight_bytes) / kMiB,
                              options.model.path.string()));
  if (config.low_bit) lines.push_back("weights: " + DescribeLowBit(options, config));
  lines.push_back(fmt::format("backend {}{}", report.backend,
                              options.runner.backend.deterministic ? ", deterministic" : ""));
  const KvCacheOptions& kv = options.runner.kv_cache;
  if (const auto layout = PlanLayout(options, config)) {
    for (const std::string& line : DescribeCache(*layout)) lines.push_back("cache " + line);
    lines.push_back(fmt::format(
        "cache {} sink and {} recent tokens in F16, pages of {}; {:.2f} bits per element "
        "quantized, "
        "{:.2f} with the windows at {} tokens",
        kv.sink_tokens, kv.recent_tokens, kv.page_tokens, report.sealed_bits_per_element,
        layout->effective_bits_per_element(report.max_context), report.max_context));
  }
  lines.push_back(fmt::format(
      "cache {:.1f} MiB: {} F16 pages ({:.0f} bytes per token), {} quantized pages ({:.0f} bytes "
      "per token); one sequence could hold {} tokens",
      static_cast<double>(report.pools.bytes) / kMiB, report.pools.open_pages,
      report.open_bytes_per_token, report.pools.sealed_pages, report.sealed_bytes_per_token,
      report.pools.tokens_that_fit));
  lines.push_back(fmt::format("context {} tokens, up to {} sequences at once, prefill {}",
                              report.max_context, options.runner.engine.max_sequences,
                              kv.exact_prefill ? "exact" : "served"));
  lines.push_back(fmt::format(
      "prefix cache {}{}", options.runner.engine.prefix_cache ? "on" : "off",
      kv.prefix_cache && kv.exact_prefill ? ": nothing can be shared with prefill exact" : ""));
  return lines;
}

}  // namespace innerq
