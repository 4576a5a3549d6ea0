// CacheChoice: a cache that a command measures on a loaded model, and what tables call it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "engine/kv_cache.h"
#include "server/commands.h"
#include "server/options.h"

namespace innerq {

struct CacheChoice {
  std::string name;
  KvCacheOptions options;
  std::vector<std::string> replaced = {};  // keys of the section kv_cache: "key.bits=2"
};

// Reads "FILE[,key=value...]": the section kv_cache of a configuration, with keys of that section
// replaced ("key.bits=2"). A comma begins a replacement where a key and "=" follow. Named by the
// file's stem and the replacements. Errors: as of ParseOptions.
Result<CacheChoice> ParseCacheChoice(std::string_view text);

// The same for all values of --cache; without any, the configuration's own cache. Errors: as above;
// invalid argument for two caches of one name, and for a replaced key of a kv_cache section that is
// not used.
Result<std::vector<CacheChoice>> ReadCacheChoices(const Options& options,
                                                  const ConfigSource& source,
                                                  const std::vector<std::string>& texts);

// The error with the cache's name before it.
Error OfCache(const CacheChoice& cache, Error error);

// The cache's layout over a model. Errors: as of the cache's options, with its name.
Result<KvLayout> LayoutOf(const CacheChoice& cache, const ModelConfig& config);

// F16 in all layers.
KvCacheOptions HalfPrecision();

// The options with an F16 cache of one page: of a runner that holds the weights for others.
Result<Options> WithLeastCache(Options options, const ModelConfig& config);

}  // namespace innerq
