#include "server/commands.h"

#include <fmt/format.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <system_error>

#include "server/access.h"
#include "server/model_setup.h"
#include "server/openai_api.h"
#include "server/options.h"
#include "server/signals.h"
#include "server/text_stream.h"

namespace innerq {
namespace {

constexpr int64_t kContexts[] = {512, 2048, 8192, 32768, 131072};

void PrintModel(const ModelConfig& config) {
  fmt::print(
      "{}: {} layers, hidden {}, intermediate {}, {} query and {} key/value heads of {}, "
      "vocabulary {}, context {}\n",
      config.architecture, config.num_layers, config.hidden_size, config.intermediate_size,
      config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size,
      config.max_positions);
  fmt::print("parameters: {}\n", config.num_parameters());
}

void PrintCache(const KvLayout& layout) {
  for (const std::string& line : DescribeCache(layout)) fmt::print("cache {}\n", line);
  const auto tokens = static_cast<double>(layout.page_tokens());
  fmt::print("cache bytes per token: {:.1f} in F16 pages",
             static_cast<double>(layout.open_page_bytes()) / tokens);
  if (!layout.quantized()) {
    fmt::print("\n");
    return;
  }
  fmt::print(", {:.1f} in quantized pages\n",
             static_cast<double>(layout.sealed_page_bytes()) / tokens);
  fmt::print("cache bits per element: {:.3f} without the F16 windows; with them",
             layout.sealed_bits_per_element());
  const char* separator = "";
  for (const int64_t context : kContexts) {
    fmt::print("{} {:.3f} at {} tokens", separator, layout.effective_bits_per_element(context),
               context);
    separator = ",";
  }
  fmt::print("\n");
}

// Everything that LoadModel does, but for taking memory and reading weights.
Result<void> PrintConfig(const Options& options) {
  RETURN_IF_ERROR(LoadApiKeys(options.server));
  ASSIGN_OR_RETURN(const ModelFiles model, OpenModel(options));
  const ModelConfig& config = model.config;
  const Result<ModelPlan> plan = PlanModel(*model.checkpoint, options.runner);
  // Memory is no error: a server that runs already may hold what this one is to have.
  const bool lacks_memory = !plan && !options.runner.kv_cache.memory_bytes &&
                            plan.error().code == ErrorCode::kResourceExhausted;
  if (!plan && !lacks_memory) return plan.error();
  fmt::print("the configuration is valid; it would serve {} as {} on {}:{}\n",
             options.model.path.string(), options.model.alias, options.server.host,
             options.server.port);
  PrintModel(config);
  fmt::print("vocabulary of the tokenizer: {}; chat template: {}\n", model.tokenizer->vocab_size(),
             model.chat_template ? model.chat_template->name() : "none");
  if (config.low_bit) fmt::print("weights: {}\n", DescribeLowBit(options, config));
  const auto warn = [](const Error& error) {
    fmt::print(stderr, "innerq: warning: at the moment {}\n", error.message);
  };
  if (!plan) {
    warn(plan.error());
    return {};
  }
  fmt::print("backend: {}\n", plan->backend->name());
  for (const std::string& line : DescribeCache(plan->layout)) fmt::print("cache {}\n", line);
  fmt::print(
      "cache memory: {} bytes, {} F16 and {} quantized pages; one sequence could hold {} tokens\n",
      plan->pools.bytes, plan->pools.open_pages, plan->pools.sealed_pages,
      plan->pools.tokens_that_fit);
  if (const auto fits = CheckMemory(*plan); !fits) warn(fits.error());
  return {};
}

// A value of a file's metadata for people: shares as percents, all else in quotes, for it may hold
// anything.
std::string MetadataText(const std::string& value) {
  double share = 0;
  const char* const end = value.data() + value.size();
  const auto [read, error] = std::from_chars(value.data(), end, share);
  if (error == std::errc() && read == end && share >= 0 && share <= 1) {
    return fmt::format("{:.4g} %", 100 * share);
  }
  return nlohmann::json(value).dump();
}

Result<void> PrintInspection(const Options& options) {
  ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(options.model.path));
  ASSIGN_OR_RETURN(const KvLayout layout, PlanLayout(options, checkpoint->config()));
  PrintModel(checkpoint->config());
  int64_t bytes = 0;
  for (const CheckpointTensor& tensor : checkpoint->tensors()) bytes += tensor.view.bytes();
  fmt::print("weights: {} tensors, {} bytes as stored\n", checkpoint->tensors().size(), bytes);
  if (checkpoint->config().low_bit) {
    fmt::print("weights: {}\n", DescribeLowBit(checkpoint->config()));
    for (const char* key : {"prune", "prune_matrices", "zeros", "source"}) {
      const auto found = checkpoint->metadata().find(key);
      if (found == checkpoint->metadata().end()) continue;
      fmt::print("weights: {} {}\n", key, MetadataText(found->second));
    }
  }
  PrintCache(layout);
  return {};
}

Result<void> PrintAnswer(const Options& options, const GenerateArgs& args) {
  ASSIGN_OR_RETURN(const LoadedModel model, LoadModel(options));
  Request request;
  if (!args.chat) {
    request.prompt = model.tokenizer->Encode(args.prompt, {});
  } else if (model.chat_template) {
    ASSIGN_OR_RETURN(request.prompt, EncodeChat({{.role = "user", .content = args.prompt}},
                                                *model.tokenizer, *model.chat_template));
  } else {
    return InvalidArgument("--chat: the model has no chat template");
  }
  request.sampling.temperature = args.temperature;
  request.sampling.seed = args.seed;
  request.max_tokens = args.max_tokens;
  request.stop_token_ids = model.stop_token_ids;
  ASSIGN_OR_RETURN(const ResponseReader reader, model.engine->Submit(std::move(request)));
  TextStream text(model.tokenizer.get(), {});
  while (!reader->finish()) {
    for (const TokenEvent& event : reader->NextBatch(std::chrono::hours(24))) {
      if (!event.is_stop) std::fputs(text.Push(event.token_id).c_str(), stdout);
    }
    std::fflush(stdout);
  }
  fmt::print("{}\n", text.Flush());
  if (const auto finish = reader->finish(); finish->error) return *finish->error;
  return {};
}

template <typename Print>
int RunWithOptions(const Result<Options>& options, Print print) {
  if (!options) return ReportError(options.error());
  if (const Result<void> done = print(*options); !done) return ReportError(done.error());
  return 0;
}

}  // namespace

int ReportError(const Error& error) {
  const bool named = error.message.find(error.param) != std::string::npos;
  fmt::print(stderr, "innerq: {}{}\n", named ? "" : error.param + ": ", error.message);
  // What can be blamed on a key is the configuration's fault, lack of memory or device included.
  const bool usage = error.code == ErrorCode::kInvalidArgument ||
                     error.code == ErrorCode::kNotFound || !error.param.empty();
  return usage ? 2 : 1;
}

int RunUntilSignal(const std::function<Result<void>(const Interruption&)>& work) {
  Signals signals;
  signals.Catch();
  const auto caught = [&signals] { return signals.Wait(std::chrono::milliseconds(0)); };
  const Result<void> done =
      work({[&caught] { return caught() != 0; },
            [&signals](auto before_exit) { signals.SetBeforeExit(std::move(before_exit)); }});
  if (done) return 0;
  const int code = ReportError(done.error());
  return done.error().code == ErrorCode::kCancelled ? 128 + caught() : code;
}

int GenerateCommand(const ConfigSource& source, const GenerateArgs& args) {
  return RunWithOptions(LoadOptions(source.file, source.overrides),
                        [&](const Options& options) { return PrintAnswer(options, args); });
}

int CheckConfigCommand(const ConfigSource& source) {
  return RunWithOptions(LoadOptions(source.file, source.overrides), PrintConfig);
}

int InspectCommand(const std::filesystem::path& path, const std::vector<std::string>& overrides) {
  std::error_code unseen;  // LoadOptions says why
  if (!std::filesystem::is_directory(path, unseen)) {
    return RunWithOptions(LoadOptions(path, overrides), PrintInspection);
  }
  // The default configuration on that model.
  auto options = ParseOptions(R"({"model": {"path": "/"}})", overrides);
  if (options && options->model.path != "/") {
    return ReportError(InvalidArgument(
        "model.path: cannot be set, for the model is in " + path.string(), "model.path"));
  }
  if (options) options->model.path = path;
  return RunWithOptions(options, PrintInspection);
}

}  // namespace innerq
