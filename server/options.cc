#include "server/options.h"

#include <charconv>
#include <nlohmann/json.hpp>

#include "models/files.h"
#include "server/config_schema.h"

namespace innerq {
namespace {

using OrderedJson = nlohmann::ordered_json;

// The schema has checked types, ranges and choices: these read what is known to be valid.

QuantMode ReadMode(const OrderedJson& json) {
  const std::string name = json.get<std::string>();
  if (name == "symmetric") return QuantMode::kSymmetric;
  return name == "asymmetric" ? QuantMode::kAsymmetric : QuantMode::kHybrid;
}

QuantAxis ReadAxis(const OrderedJson& json) {
  return json.get<std::string>() == "inner" ? QuantAxis::kInner : QuantAxis::kOuter;
}

QuantCodec ReadCodec(const OrderedJson& json) {
  return json.get<std::string>() == "paper" ? QuantCodec::kPaper : QuantCodec::kFitted;
}

QuantSpec ReadSpec(const OrderedJson& json) {
  return {.bits = json.at("bits").get<int>(),
          .mode = ReadMode(json.at("mode")),
          .axis = ReadAxis(json.at("axis")),
          .group_size = json.at("group_size").get<int>(),
          .codec = ReadCodec(json.at("codec"))};
}

QuantOverride ReadQuantOverride(const OrderedJson& json) {
  QuantOverride result;
  if (json.contains("bits")) result.bits = json["bits"].get<int>();
  if (json.contains("mode")) result.mode = ReadMode(json["mode"]);
  if (json.contains("axis")) result.axis = ReadAxis(json["axis"]);
  if (json.contains("group_size")) result.group_size = json["group_size"].get<int>();
  if (json.contains("codec")) result.codec = ReadCodec(json["codec"]);
  return result;
}

Result<KvLayerOverride> ReadLayer(const OrderedJson& json, const std::string& path) {
  KvLayerOverride layer;
  const std::string range = json.at("range").get<std::string>();
  const char* const end = range.data() + range.size();
  const auto first = std::from_chars(range.data(), end, layer.first_layer);
  layer.last_layer = layer.first_layer;
  if (first.ptr != end) std::from_chars(first.ptr + 1, end, layer.last_layer);
  if (layer.last_layer < layer.first_layer) {
    return InvalidArgument(path + ".range: " + range + " ends before it begins", path + ".range");
  }
  layer.key = ReadQuantOverride(json.at("key"));
  layer.value = ReadQuantOverride(json.at("value"));
  if (json.at("key").contains("normalize")) {
    layer.normalize_keys = json["key"]["normalize"] == "prompt";
  }
  return layer;
}

Result<KvCacheOptions> ReadKvCache(const OrderedJson& json) {
  KvCacheOptions options;
  if (const std::string memory = json.at("memory").get<std::string>(); memory != "auto") {
    ASSIGN_OR_RETURN(options.memory_bytes, ParseSize(memory));
  }
  options.page_tokens = json.at("page_tokens").get<int64_t>();
  options.sink_tokens = json.at("sink_tokens").get<int64_t>();
  options.recent_tokens = json.at("recent_tokens").get<int64_t>();
  options.exact_prefill = json.at("prefill") == "exact";
  options.prefix_cache = json.at("prefix_cache").get<bool>();
  options.key = ReadSpec(json.at("key"));
  options.value = ReadSpec(json.at("value"));
  options.normalize_keys = json["key"].at("normalize") == "prompt";
  const OrderedJson& layers = json.at("layers");
  for (size_t i = 0; i < layers.size(); ++i) {
    ASSIGN_OR_RETURN(KvLayerOverride layer,
                     ReadLayer(layers[i], "kv_cache.layers." + std::to_string(i)));
    options.layers.push_back(std::move(layer));
  }
  return options;
}

Result<BackendOptions> ReadBackend(const OrderedJson& json) {
  const std::string device = json.at("device").get<std::string>();
  const OrderedJson& deterministic = json.at("deterministic");
  const BackendOptions options{
      .device = device,
      .variant = json.at("variant").get<std::string>(),
      .threads = json.at("threads").get<int>(),
      .deterministic = deterministic == "auto" ? device != "cuda" : deterministic.get<bool>()};
  if (options.device != "cpu" && options.variant != "auto") {
    return InvalidArgument("backend.variant: the " + options.device +
                               " device has no variants, so \"" + options.variant +
                               "\" cannot be had",
                           "backend.variant");
  }
  if (options.device != "cpu" && options.threads > 1) {
    return InvalidArgument("backend.threads: the " + options.device +
                               " device has one thread, not " + std::to_string(options.threads),
                           "backend.threads");
  }
  return options;
}

Result<EngineOptions> ReadScheduler(const OrderedJson& json) {
  const EngineOptions options{.max_sequences = json.at("max_sequences").get<int64_t>(),
                              .max_batch_tokens = json.at("max_batch_tokens").get<int64_t>(),
                              .max_queue = json.at("max_queue").get<int64_t>(),
                              .max_context = json.at("max_context").get<int64_t>()};
  if (options.max_batch_tokens < options.max_sequences) {
    return InvalidArgument(
        "scheduler.max_batch_tokens: " + std::to_string(options.max_batch_tokens) +
            " is less than scheduler.max_sequences, " + std::to_string(options.max_sequences) +
            ": every running sequence needs a token of each step",
        "scheduler.max_batch_tokens");
  }
  return options;
}

std::optional<WeightFormat> ReadDtype(const std::string& name) {
  if (name == "bf16") return WeightFormat::kBF16;
  if (name == "f16") return WeightFormat::kF16;
  if (name == "f32") return WeightFormat::kF32;
  return std::nullopt;
}

// Reads a size in [low, high] bytes.
Result<int64_t> ReadSize(const OrderedJson& json, const std::string& path, int64_t low,
                         int64_t high) {
  ASSIGN_OR_RETURN(const int64_t bytes, ParseSize(json.get<std::string>()));
  if (bytes >= low && bytes <= high) return bytes;
  return InvalidArgument(path + ": " + json.get<std::string>() + " is not between " +
                             std::to_string(low) + " and " + std::to_string(high) + " bytes",
                         path);
}

Result<ServerOptions> ReadServer(const OrderedJson& json) {
  ServerOptions options;
  options.host = json.at("host").get<std::string>();
  options.port = json.at("port").get<int>();
  options.api_keys = json.at("api_keys").get<std::vector<std::string>>();
  options.api_key_file = json.at("api_key_file").get<std::string>();
  const OrderedJson& limits = json.at("key_limits");
  options.key_limits = {.requests_per_minute = limits.at("requests_per_minute").get<int64_t>(),
                        .concurrent_requests = limits.at("concurrent_requests").get<int64_t>()};
  const bool limited =
      options.key_limits.requests_per_minute > 0 || options.key_limits.concurrent_requests > 0;
  if (limited && options.api_keys.empty() && options.api_key_file.empty()) {
    return InvalidArgument("server.key_limits: there are no API keys to limit",
                           "server.key_limits");
  }
  options.cors_origins = json.at("cors_origins").get<std::vector<std::string>>();
  options.allowed_hosts = json.at("allowed_hosts").get<std::vector<std::string>>();
  options.max_connections = json.at("max_connections").get<int64_t>();
  ASSIGN_OR_RETURN(options.max_body_bytes,
                   ReadSize(json.at("max_body"), "server.max_body", 0, int64_t{1} << 30));
  ASSIGN_OR_RETURN(options.max_header_bytes,
                   ReadSize(json.at("max_header"), "server.max_header", 1 << 10, 1 << 20));
  const auto seconds = [&json](const char* key) {
    return std::chrono::seconds(json.at(key).get<int64_t>());
  };
  options.header_timeout = seconds("header_timeout_seconds");
  options.read_timeout = seconds("read_timeout_seconds");
  options.write_timeout = seconds("write_timeout_seconds");
  options.keep_alive_timeout = seconds("keep_alive_seconds");
  options.drain_timeout = seconds("drain_seconds");
  return options;
}

std::string DirectoryName(const std::filesystem::path& path) {
  const std::filesystem::path absolute = std::filesystem::absolute(path).lexically_normal();
  return (absolute.has_filename() ? absolute : absolute.parent_path()).filename().string();
}

// What a key of a configuration file in `directory` names: the first that is there, relative to the
// working directory, to `directory` and to its parent. Errors: not found, with the reason.
Result<std::filesystem::path> FindNamed(const std::string& key,
                                        const std::filesystem::path& written,
                                        const std::filesystem::path& directory) {
  std::string unseen;  // the first that cannot be looked at
  for (const auto& base : {std::filesystem::path(), directory, directory.parent_path()}) {
    const std::filesystem::path path = base / written;
    std::error_code error;
    const std::filesystem::file_status status = std::filesystem::status(path, error);
    if (std::filesystem::exists(status)) return path;
    if (status.type() == std::filesystem::file_type::none && unseen.empty()) {
      unseen = "cannot look at " + path.string() + ": " + error.message();
    }
  }
  std::string reason = "no " + written.string();
  if (!unseen.empty()) {
    reason = unseen;
  } else if (written.is_relative()) {
    reason += " in the working directory, in " + directory.string() + " or its parent";
  }
  return Error{ErrorCode::kNotFound, key + ": " + reason, key};
}

// Finds the model's directory and the file of keys.
Result<void> FindPaths(const std::filesystem::path& directory, Options* options) {
  ASSIGN_OR_RETURN(options->model.path, FindNamed("model.path", options->model.path, directory));
  std::error_code error;
  if (!std::filesystem::is_directory(options->model.path, error)) {
    return Error{ErrorCode::kNotFound,
                 "model.path: " + options->model.path.string() + " is not a directory",
                 "model.path"};
  }
  if (std::filesystem::path& keys = options->server.api_key_file; !keys.empty()) {
    ASSIGN_OR_RETURN(keys, FindNamed("server.api_key_file", keys, directory));
  }
  return {};
}

}  // namespace

Result<Options> ParseOptions(std::string_view text, const std::vector<std::string>& overrides) {
  ASSIGN_OR_RETURN(const std::string checked, ApplySchema(kConfigSchema, text, overrides));
  const OrderedJson json = OrderedJson::parse(checked);
  Options options;
  const OrderedJson& model = json.at("model");
  options.model.path = model.at("path").get<std::string>();
  options.model.alias = model.at("alias").get<std::string>();
  if (options.model.alias.empty()) options.model.alias = DirectoryName(options.model.path);
  options.model.chat_template = model.at("chat_template").get<std::string>();
  options.runner.dtype = ReadDtype(model.at("dtype").get<std::string>());
  ASSIGN_OR_RETURN(options.runner.backend, ReadBackend(json.at("backend")));
  ASSIGN_OR_RETURN(options.runner.kv_cache, ReadKvCache(json.at("kv_cache")));
  options.kv_cache_json = json.at("kv_cache").dump();
  ASSIGN_OR_RETURN(options.runner.engine, ReadScheduler(json.at("scheduler")));
  const KvCacheOptions& cache = options.runner.kv_cache;
  options.runner.engine.exact_prefill = cache.exact_prefill;
  options.runner.engine.prefix_cache = cache.prefix_cache && !cache.exact_prefill;
  const OrderedJson& self_check = json.at("self_check");
  options.self_check = {.enabled = self_check.at("enabled").get<bool>(),
                        .seconds = self_check.at("seconds").get<double>(),
                        .warn_kl = self_check.at("warn_kl").get<double>()};
  ASSIGN_OR_RETURN(options.server, ReadServer(json.at("server")));
  options.log.level = json.at("log").at("level").get<std::string>();
  options.log.json = json.at("log").at("format") == "json";
  return options;
}

Result<Options> LoadOptions(const std::filesystem::path& file,
                            const std::vector<std::string>& overrides) {
  const Result<std::string> text = ReadTextFile(file, kMaxTextFileBytes);
  if (!text) {
    return Error{ErrorCode::kNotFound, "cannot read configuration file " + text.error().message};
  }
  const auto in_file = [&file](Error error) {
    error.message = file.string() + ": " + error.message;
    return error;
  };
  auto parsed = ParseOptions(*text, overrides);
  if (!parsed) return in_file(parsed.error());
  Options options = std::move(parsed).value();
  const std::filesystem::path directory = std::filesystem::absolute(file).parent_path();
  if (const auto found = FindPaths(directory, &options); !found) return in_file(found.error());
  return options;
}

}  // namespace innerq
