// LoadSentencePieceTokenizer: the Tokenizer of models that bring a SentencePiece tokenizer.model.
#pragma once

#include <filesystem>
#include <memory>

#include "kernels/result.h"
#include "models/tokenizer.h"

namespace innerq {

// Reads tokenizer.model and, where present, tokenizer_config.json: add_bos_token (true if absent),
// bos_token, eos_token, added_tokens_decoder (or the files that it replaced), legacy,
// add_prefix_space.
//
// A model with a dummy prefix puts a space before each text. Where special tokens cut a text into
// runs, every run gets it if "legacy" (the default, as in Meta's code), else only a run that begins
// the text, unless "add_prefix_space" is false (transformers, LlamaTokenizer).
//
// Encoding is lossless for models with byte fallback and no normalization, which all of the Llama
// family are: U+2581, SentencePiece's own mark for a space, and bytes that are not UTF-8 become
// byte tokens; transformers would turn the first into a space and the second into U+FFFD.
Result<std::shared_ptr<const Tokenizer>> LoadSentencePieceTokenizer(
    const std::filesystem::path& directory);

}  // namespace innerq
