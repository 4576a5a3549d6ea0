#include "server/utf8.h"

#include <cstdio>

namespace innerq {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Bytes of a character by its first one; 0 if none begins so (Unicode, table 3-7).
size_t SequenceLength(uint8_t first) {
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return 2;
  if (first >= 0xE0 && first <= 0xEF) return 3;
  if (first >= 0xF0 && first <= 0xF4) return 4;
  return 0;
}

// Whether `byte` may follow the valid beginning `prefix`: rules out overlong forms, surrogates and
// code points beyond U+10FFFF.
bool Continues(std::string_view prefix, uint8_t byte) {
  uint8_t low = 0x80, high = 0xBF;
  if (prefix.size() == 1) {
    switch (static_cast<uint8_t>(prefix[0])) {
      case 0xE0:
        low = 0xA0;
        break;
      case 0xED:
        high = 0x9F;
        break;
      case 0xF0:
        low = 0x90;
        break;
      case 0xF4:
        high = 0x8F;
        break;
    }
  }
  return byte >= low && byte <= high;
}

}  // namespace

std::string Utf8Decoder::Push(std::string_view bytes) {
  std::string text;
  for (const char c : bytes) {
    const auto byte = static_cast<uint8_t>(c);
    if (!pending_.empty()) {
      if (Continues(pending_, byte)) {
        pending_ += c;
        if (pending_.size() == SequenceLength(static_cast<uint8_t>(pending_[0]))) {
          text += pending_;
          pending_.clear();
        }
        continue;
      }
      text += kReplacement;
      pending_.clear();
    }
    const size_t length = SequenceLength(byte);
    if (length == 0) {
      text += kReplacement;
    } else if (length == 1) {
      text += c;
    } else {
      pending_ += c;
    }
  }
  return text;
}

std::string Utf8Decoder::Flush() {
  if (pending_.empty()) return "";
  pending_.clear();
  return std::string(kReplacement);
}

std::string ReplaceInvalidUtf8(std::string_view bytes) {
  Utf8Decoder decoder;
  std::string text = decoder.Push(bytes);
  return text + decoder.Flush();
}

std::string ShortenUtf8(std::string_view text, size_t max_bytes) {
  if (text.size() <= max_bytes) return std::string(text);
  size_t end = max_bytes;
  while (end > 0 && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80) --end;
  return std::string(text.substr(0, end)) + "...";
}

int64_t CountCharacters(std::string_view text) {
  int64_t count = 0;
  for (const char c : text) count += (static_cast<uint8_t>(c) & 0xC0) != 0x80;
  return count;
}

std::string QuoteJson(std::string_view text) {
  std::string quoted = "\"";
  for (const char c : ReplaceInvalidUtf8(text)) {
    switch (c) {
      case '"':
        quoted += "\\\"";
        break;
      case '\\':
        quoted += "\\\\";
        break;
      case '\n':
        quoted += "\\n";
        break;
      default:
        if (static_cast<uint8_t>(c) < 0x20) {
          char escape[8];
          std::snprintf(escape, sizeof(escape), "\\u%04x", c);
          quoted += escape;
        } else {
          quoted += c;
        }
    }
  }
  return quoted + '"';
}

}  // namespace innerq
