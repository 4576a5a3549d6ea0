// TextStream: the tokens of one answer to text that may leave the server. PromptEcho: the same for
// a prompt.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "models/tokenizer.h"
#include "server/utf8.h"

namespace innerq {

// Turns ids into text as they come. Only complete UTF-8 leaves; text that may be the beginning of a
// stop string is held back until it is known not to be. A stop string ends the answer. One thread
// at a time.
class TextStream {
 public:
  struct Options {
    std::vector<std::string> stops;  // none empty
    bool include_stop = false;       // the stop string is part of the answer
    bool special = false;            // special tokens give their text, not nothing
  };

  // `tokenizer` must outlive the stream.
  TextStream(const Tokenizer* tokenizer, Options options);

  // Adds a token; returns the text that may leave now. Stop strings are looked for from the first
  // token on that `may_stop`; what came before it does not begin one. CHECK: not stopped, not
  // flushed.
  std::string Push(int32_t token_id, bool may_stop = true);
  // The end of the answer: returns what was held back (nothing once stopped).
  std::string Flush();

  // A stop string was found: text after it does not exist, further tokens are not wanted.
  bool stopped() const { return stopped_; }
  // Characters returned so far.
  int64_t released_characters() const { return released_; }
  // Characters of the answer's text before the next token: where that token's text will start. If
  // its first bytes complete a character that an earlier token began, where that character starts.
  int64_t next_offset() const { return released_ + CountCharacters(held_); }

 private:
  std::string Release();
  std::string Take(size_t size);

  const Tokenizer* tokenizer_;
  const Options options_;
  Utf8Decoder decoder_;
  std::string held_;  // valid UTF-8 that may begin a stop string
  int64_t released_ = 0;
  bool stopped_ = false;
};

// A prompt as the text that an answer may begin with.
struct PromptEcho {
  struct Token {
    int32_t id = 0;
    bool first = false;  // nothing of the text comes before it; see Tokenizer::TokenBytes
    int64_t offset = 0;  // characters of the text before it
  };

  std::string text;  // valid UTF-8
  std::vector<Token> tokens;
};

// The text of `ids`; special tokens are part of it if `special`. Where the client sent a text,
// `given`, that is what is echoed, whatever a tokenizer has added or normalized; `special` then
// says that it may spell special tokens.
PromptEcho EchoPrompt(const Tokenizer& tokenizer, std::span<const int32_t> ids,
                      const std::optional<std::string>& given, bool special);

}  // namespace innerq
