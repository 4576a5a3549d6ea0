// UTF-8: decoding of untrusted bytes, whole or in pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace innerq {

// Turns bytes that arrive in pieces into valid UTF-8. A character whose bytes are not all there yet
// is held back; each maximal part of an ill-formed sequence becomes one U+FFFD, as the Unicode
// standard (section 3.9) recommends and Python's errors="replace" does.
class Utf8Decoder {
 public:
  // The complete characters that `bytes` adds.
  std::string Push(std::string_view bytes);
  // The end of the text: U+FFFD if a character was left incomplete, else nothing.
  std::string Flush();

 private:
  std::string pending_;  // the first bytes of a character, valid so far; at most 3
};

// `bytes` with every ill-formed part replaced by U+FFFD.
std::string ReplaceInvalidUtf8(std::string_view bytes);

// As many characters of valid UTF-8 as fit into `max_bytes`, with an ellipsis if some do not.
std::string ShortenUtf8(std::string_view text, size_t max_bytes);

// Number of characters (code points) of valid UTF-8.
int64_t CountCharacters(std::string_view text);

// `text` as a JSON string, quotes included; ill-formed UTF-8 is replaced.
std::string QuoteJson(std::string_view text);

}  // namespace innerq
