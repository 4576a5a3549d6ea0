// The configuration's JSON Schema and a validator for the part of JSON Schema that it uses.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/result.h"

namespace innerq {

// Text of configs/schema.json: every key with its type, range, default and meaning.
extern const char* const kConfigSchema;

// Checks `config` (JSON text) against `schema` after applying `overrides` ("a.b.c=value"; the value
// is JSON or, failing that, a string; a number addresses an element of an array, one past the end
// appends). Returns the configuration as JSON text with all defaults filled in.
//
// Understood: type, enum, minimum, maximum, minLength, pattern, maxItems, properties, required,
// additionalProperties: false, items, default, format: size or "size or auto", and writeOnly for
// values that messages must not show. Errors: invalid argument, with the key's path
// ("kv_cache.key.bits") in the message and in `param`.
Result<std::string> ApplySchema(std::string_view schema, std::string_view config,
                                const std::vector<std::string>& overrides);

// Bytes of "512B", "64KiB", "1GiB", "2GB". Errors: invalid argument, also beyond 2^63 - 1.
Result<int64_t> ParseSize(std::string_view text);

}  // namespace innerq
