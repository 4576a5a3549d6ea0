// TokenizerConfig: what tokenizer_config.json, and the files that older ones have beside them, say
// about a model's tokens and its chat template.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "kernels/result.h"
#include "models/added_tokens.h"

namespace innerq {

// The defaults hold where the file is silent.
struct TokenizerConfig {
  // A text and what it is called.
  struct Named {
    std::string name;
    std::string text;
  };
  // Whether texts begin with BOS, if this file decides: by add_bos_token unless it names a class
  // that is none of transformers' for Llama, and by such a class, which adds it by default.
  std::optional<bool> add_bos;
  bool legacy = true;
  bool add_prefix_space = true;
  std::optional<std::string> bos_token;
  std::optional<std::string> eos_token;
  std::vector<AddedToken> added_tokens;  // beside those of the vocabulary, or in the place of one
  // What chat templates know by name: the keys *_token, bos_token and eos_token among them, and
  // those of extra_special_tokens.
  std::vector<Named> special_tokens;
  std::vector<std::string> additional_special_tokens;
  // Jinja texts, empty if there are none; a single one is called "default". A value of a form that
  // is not known is an error only for those who want to chat.
  Result<std::vector<Named>> chat_templates = std::vector<Named>();
};

// Reads tokenizer_config.json of a model directory. Without "added_tokens_decoder", which
// transformers writes since autumn 2023, what is missing comes from special_tokens_map.json (names
// of tokens, which are special) and added_tokens.json (texts and ids). Files may be absent. Errors:
// data loss, naming file and key; invalid argument for an add_eos_token of true: a prompt that ends
// with EOS leaves nothing to complete.
Result<TokenizerConfig> ReadTokenizerConfig(const std::filesystem::path& directory);

}  // namespace innerq
