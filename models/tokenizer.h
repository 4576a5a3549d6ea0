// Tokenizer: text to token ids and back.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/result.h"

namespace innerq {

// A stretch of text. The texts of special tokens count as those tokens only where it is trusted.
struct TextSegment {
  std::string text;
  bool trusted = false;
};

struct EncodeOptions {
  bool add_bos = true;         // put the model's BOS first where its tokenizer says so
  bool parse_special = false;  // turn the text of special tokens (<s>, <|im_start|>) into their
                               // ids; false treats them as ordinary text (untrusted input)
};

// A model's vocabulary. Immutable after loading; any thread may call it.
class Tokenizer {
 public:
  // Loads the tokenizer of a model directory: tokenizer.json (Hugging Face, BPE), as transformers
  // prefers it, else tokenizer.model (SentencePiece), with tokenizer_config.json where present.
  // Errors: not found, data loss, invalid argument, naming the file and what is wrong in it.
  static Result<std::shared_ptr<const Tokenizer>> Load(const std::filesystem::path& directory);
  virtual ~Tokenizer() = default;

  virtual int64_t vocab_size() const = 0;
  // Invalid UTF-8 is encoded byte by byte (byte fallback) or as the unknown token.
  virtual std::vector<int32_t> Encode(std::string_view text,
                                      const EncodeOptions& options) const = 0;
  // Encodes one text made of segments: the same ids as for the joined text, except that untrusted
  // segments cannot make special tokens. The default encodes each segment by itself.
  virtual std::vector<int32_t> EncodeSegments(std::span<const TextSegment> segments,
                                              bool add_bos) const;
  // How many tokens these segments make at least, BOS not counted: found in the time it takes to
  // read them, so that a text that is far too long is known before it is encoded. 0 if tokens of
  // this vocabulary may stand for any amount of text.
  virtual int64_t MinTokens(std::span<const TextSegment> segments) const;
  // The bytes that a token adds to a text; may be part of a UTF-8 character. Special tokens give
  // their text if `special`, else nothing. `first` is true at the start of a text, where
  // SentencePiece models drop the leading space they had added. Ids from vocab_size on (rows that
  // pad a model's matrices) give nothing. CHECK: id not negative.
  virtual std::string TokenBytes(int32_t id, bool first, bool special) const = 0;
  // The text of a token sequence: the concatenation of TokenBytes, where tokens that give nothing
  // because they are special do not end the start of the text.
  std::string Decode(const std::vector<int32_t>& ids, bool special) const;

  virtual bool IsSpecial(int32_t id) const = 0;
  // Id of the token with exactly this text (special tokens and pieces), or nullopt.
  virtual std::optional<int32_t> TokenId(std::string_view text) const = 0;
  virtual std::optional<int32_t> bos_id() const = 0;
  virtual std::optional<int32_t> eos_id() const = 0;
};

}  // namespace innerq
