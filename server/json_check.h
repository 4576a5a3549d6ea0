// JSON text from outside, checked before a tree is made of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels/result.h"

namespace innerq {

// A tree's copies, comparisons and output recurse once per level.
constexpr int kMaxJsonLevels = 64;

// How the path of an element is written: "layers.0.key" or "messages[0].role".
enum class IndexStyle { kDots, kBrackets };

// Errors: invalid argument for what is not JSON, for more than kMaxJsonLevels levels of nesting,
// and for a key that stands twice in one object; only then `param` is set: the key's path.
Result<void> CheckJson(std::string_view text, IndexStyle style);

// The integer that a number written with a fraction or an exponent is (1.0, 2e3): JSON makes no
// difference. None if it is not one, or beyond 2^53, where a double does not tell it.
std::optional<int64_t> WholeNumber(double number);

}  // namespace innerq
