// Text of templates: UTF-8 with Python's notions of characters, whitespace, case and repr.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "models/tokenizer.h"

namespace innerq::jinja {

// Bytes that remember which of them came from outside (messages, tools) and not from the template.
struct Text {
  std::string bytes;
  std::string untrusted;  // one 0 or 1 per byte; empty: all of it is trusted

  static Text From(std::string_view bytes, bool is_untrusted);
  bool any_untrusted() const { return !untrusted.empty(); }
  void Append(const Text& other);
  void Append(std::string_view more, bool is_untrusted);
  Text Sub(size_t begin, size_t end) const;   // bytes [begin, end)
  std::vector<TextSegment> Segments() const;  // neighbours differ in trust; none is empty
};

// Bytes of the first character; a byte that begins no valid character counts as one. 0 if empty.
size_t CharLength(std::string_view text);
int64_t CountChars(std::string_view text);
// Byte offset of each character, then the size.
std::vector<size_t> CharOffsets(std::string_view text);
// Code point of the first character; a stray byte gives 0xdc00 + byte, as Python's surrogateescape.
uint32_t DecodeChar(std::string_view text);
void AppendUtf8(std::string& out, uint32_t code);
// Where `part` begins in `text`, at or after `from`; npos if nowhere. In time linear in both, where
// std::string_view::find takes their product of texts made for it.
size_t FindPart(std::string_view text, std::string_view part, size_t from = 0);
// Bytes of the whitespace character (str.isspace) that the text begins with, or 0.
size_t SpaceLength(std::string_view text);

// Simple case mappings of one character.
uint32_t UpperChar(uint32_t code);
uint32_t LowerChar(uint32_t code);
// Python's methods, with simple case mappings and German sharp s; other characters that would
// become several stay, and a final sigma is an ordinary one.
std::string Upper(std::string_view text);
std::string Lower(std::string_view text);
std::string Capitalize(std::string_view text);
std::string Title(std::string_view text);        // str.title: after every non-letter
std::string TitleFilter(std::string_view text);  // Jinja's filter: after space, - ( { [ <

struct Sides {
  bool left = true;
  bool right = true;
};
// str.strip: removes whitespace, or the characters of *chars if that is not null. Sorts those, and
// looks each character of the text up.
Text Strip(const Text& text, const std::string* chars, Sides sides);
std::string_view TrimSpace(std::string_view text, Sides sides);

std::string ReprString(std::string_view text);
std::string FloatRepr(double value);
// A JSON string literal as json.dumps writes it.
std::string JsonString(std::string_view text, bool ensure_ascii);

}  // namespace innerq::jinja
