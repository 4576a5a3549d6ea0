// TokenizerConfig: what tokenizer_config.json says about a model's tokens and its chat template.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "kernels/result.h"

namespace innerq {

// The defaults hold where the file is silent.
struct TokenizerConfig {
  // A token beside those of the vocabulary, or in the place of one.
  struct AddedToken {
    int32_t id = 0;       // in [0, 2^20)
    std::string content;  // not empty
    bool special = false;
  };
  bool add_bos = true;
  bool legacy = true;
  bool add_prefix_space = true;
  std::optional<std::string> bos_token;
  std::optional<std::string> eos_token;
  std::vector<AddedToken> added_tokens;
  // Jinja text, empty if there is none. A value of a form that is not known is an error only for
  // those who want to chat.
  Result<std::string> chat_template = std::string();
};

// Reads tokenizer_config.json of a model directory; gives the defaults if it is absent. Errors:
// data loss, naming file and key.
Result<TokenizerConfig> ReadTokenizerConfig(const std::filesystem::path& directory);

}  // namespace innerq
