// LoadBpeTokenizer: the Tokenizer of models that bring a Hugging Face tokenizer.json.
#pragma once

#include <filesystem>
#include <memory>

#include "kernels/result.h"
#include "models/tokenizer.h"

namespace innerq {

// Reads tokenizer.json (byte-level or byte-fallback BPE) and, where present,
// tokenizer_config.json: bos_token, eos_token, added_tokens_decoder (or the files that it
// replaced), add_bos_token, tokenizer_class.
//
// Ids are those of the Hugging Face library (tokenizers), except on purpose:
// - Added tokens are found in trusted text only. Those of white space alone are found in any text:
//   they cannot forge a turn.
// - Added tokens are found in the text as it stands, also "normalized" ones. The library looks for
//   their normalized form, which after a Prepend ("_</s>") next to no text holds.
// - Bytes that are not UTF-8, and in byte-fallback models the mark that stands for a space
//   (U+2581), become byte tokens, so that decoding gives the same bytes back.
// - Special tokens and, in byte-fallback models, tokens like <0x0A> are never the outcome of
// merges.
// - Decoding removes at most one space from the start of a text, and none from a byte token.
//
// A vocabulary that cannot express all bytes and has no unknown token is refused.
Result<std::shared_ptr<const Tokenizer>> LoadBpeTokenizer(const std::filesystem::path& directory);

}  // namespace innerq
