// TokenizerJson: what a Hugging Face tokenizer.json says.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/result.h"
#include "models/added_tokens.h"
#include "models/pretokenizer.h"

namespace innerq {

// Replaces `from` by `to` in a token.
struct DecodeReplace {
  std::string from;  // not empty
  std::string to;
};
// Gives the bytes of tokens like <0x0A>.
struct DecodeByteFallback {};
// Removes up to `start` and `stop` times `content` from the ends of a token.
struct DecodeStrip {
  std::string content;  // not empty
  int64_t start = 0;
  int64_t stop = 0;
};
// Turns the characters of ByteAlphabet into the bytes they stand for.
struct DecodeByteAlphabet {};

using DecodeStep = std::variant<DecodeReplace, DecodeByteFallback, DecodeStrip, DecodeByteAlphabet>;

// The parts of a tokenizer.json with a BPE model. Ids are in [0, 2^20). "truncation" and "padding"
// are left out: transformers resets both in each call that does not ask for them.
struct TokenizerJson {
  std::vector<AddedToken> added_tokens;
  std::vector<TextStep> text_steps;      // normalizer, then pre-tokenizer
  std::vector<DecodeStep> decode_steps;  // of each token, in order
  std::string text_start;       // removed once in decoding from the start of a text, or empty
  std::vector<int32_t> prefix;  // ids that the post-processor puts before a text
  // Set if it puts any after a text, which leaves nothing to complete: says which.
  std::optional<Error> appends;
  // Model.
  std::vector<std::pair<std::string, int32_t>> vocabulary;  // no text or id twice
  std::vector<std::pair<std::string, std::string>> merges;  // in order of rank
  std::optional<std::string> unk_token;
  bool byte_fallback = false;
  bool ignore_merges = false;
  bool fuse_unk = false;
};

// Reads tokenizer.json. Errors name the file, the place in it, and what was expected there: data
// loss for damage, invalid argument for components and options that are not supported.
Result<TokenizerJson> ReadTokenizerJson(const std::filesystem::path& path);

}  // namespace innerq
