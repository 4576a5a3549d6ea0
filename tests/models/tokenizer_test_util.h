// Helpers of the tests of tokenizers.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "models/tokenizer.h"
#include "tests/models/test_files.h"

namespace innerq {

using Ids = std::vector<int32_t>;

constexpr EncodeOptions kPlain{.add_bos = false, .parse_special = false};
constexpr EncodeOptions kSpecial{.add_bos = false, .parse_special = true};

inline std::filesystem::path Llama2() { return SharedPath("assets/tokenizers/llama2"); }

}  // namespace innerq
