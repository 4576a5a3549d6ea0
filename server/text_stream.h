// TextStream: the tokens of one answer to text that may leave the server.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "models/tokenizer.h"
#include "server/utf8.h"

namespace innerq {

// Turns ids into text as they come. Only complete UTF-8 leaves; text that may be the beginning of a
// stop string is held back until it is known not to be. A stop string ends the answer and is not
// part of it. One thread at a time.
class TextStream {
 public:
  // `tokenizer` must outlive the stream. `stops` holds no empty strings.
  TextStream(const Tokenizer* tokenizer, std::vector<std::string> stops);

  // Adds a token; returns the text that may leave now. CHECK: not stopped, not flushed.
  std::string Push(int32_t token_id);
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

  const Tokenizer* tokenizer_;
  std::vector<std::string> stops_;
  Utf8Decoder decoder_;
  std::string held_;  // valid UTF-8 that may begin a stop string
  int64_t released_ = 0;
  bool stopped_ = false;
};

}  // namespace innerq
