#include "server/cache_choice.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "models/files.h"
#include "server/utf8.h"

namespace innerq {
namespace {

constexpr std::string_view kSection = "kv_cache.";

// Whether `text` begins with a key and "=".
bool BeginsOverride(std::string_view text) {
  const size_t end = text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_.");
  return end != std::string_view::npos && end > 0 && text[end] == '=';
}

// Cuts at the commas that begin an override.
std::vector<std::string> SplitChoice(std::string_view text) {
  std::vector<std::string> parts(1);
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == ',' && BeginsOverride(text.substr(i + 1))) {
      parts.emplace_back();
    } else {
      parts.back() += text[i];
    }
  }
  return parts;
}

}  // namespace

Result<CacheChoice> ParseCacheChoice(std::string_view text) {
  std::vector<std::string> parts = SplitChoice(text);
  const std::filesystem::path file = parts[0];
  CacheChoice choice{.name = ReplaceInvalidUtf8(file.stem().string()), .options = {}};
  std::vector<std::string> overrides;
  for (size_t i = 1; i < parts.size(); ++i) {
    choice.name += "," + parts[i];
    choice.replaced.push_back(parts[i]);
    overrides.push_back(std::string(kSection) + parts[i]);
  }
  const Result<std::string> content = ReadTextFile(file, kMaxTextFileBytes);
  if (!content) {
    return Error{ErrorCode::kNotFound,
                 "--cache: cannot read configuration file " + content.error().message};
  }
  const auto options = ParseOptions(*content, overrides);
  if (!options) {
    Error error = options.error();
    error.message = file.string() + ": " + error.message;
    return error;
  }
  choice.options = options->runner.kv_cache;
  return choice;
}

Result<std::vector<CacheChoice>> ReadCacheChoices(const Options& options,
                                                  const ConfigSource& source,
                                                  const std::vector<std::string>& texts) {
  CacheChoice own{.name = ReplaceInvalidUtf8(source.file.stem().string()),
                  .options = options.runner.kv_cache};
  for (const std::string& text : source.overrides) {
    if (text.starts_with(kSection)) own.replaced.push_back(text.substr(kSection.size()));
  }
  if (texts.empty()) return std::vector<CacheChoice>{std::move(own)};
  for (const std::string& text : source.overrides) {
    const bool one_key = text.starts_with(kSection);
    if (!one_key && !text.starts_with("kv_cache=")) continue;
    return InvalidArgument(
        "--set " + text +
        ": the configuration's own kv_cache is not used beside --cache; write --cache FILE," +
        (one_key ? text.substr(kSection.size()) : "key=value"));
  }
  std::vector<CacheChoice> caches;
  for (const std::string& text : texts) {
    ASSIGN_OR_RETURN(CacheChoice cache, ParseCacheChoice(text));
    for (const CacheChoice& other : caches) {
      if (other.name == cache.name) {
        return InvalidArgument("--cache: two caches are called " + cache.name);
      }
    }
    caches.push_back(std::move(cache));
  }
  return caches;
}

Error OfCache(const CacheChoice& cache, Error error) {
  error.message = "cache " + cache.name + ": " + error.message;
  return error;
}

Result<KvLayout> LayoutOf(const CacheChoice& cache, const ModelConfig& config) {
  const auto spec = ResolveKvCacheSpec(cache.options, config);
  if (!spec) return OfCache(cache, spec.error());
  auto layout = KvLayout::Create(*spec, CodeOrder::kRowMajor);
  if (!layout) return OfCache(cache, layout.error());
  return layout;
}

KvCacheOptions HalfPrecision() {
  KvCacheOptions options;
  options.sink_tokens = options.recent_tokens = options.page_tokens;
  options.key.bits = options.value.bits = 16;
  options.normalize_keys = false;
  return options;
}

Result<Options> WithLeastCache(Options options, const ModelConfig& config) {
  KvCacheOptions& least = options.runner.kv_cache = HalfPrecision();
  ASSIGN_OR_RETURN(const KvLayout layout, LayoutOf({"fp16", least}, config));
  least.memory_bytes = layout.open_pool_bytes(1);
  options.runner.engine.max_context = std::min(config.max_positions, least.page_tokens);
  return options;
}

}  // namespace innerq
