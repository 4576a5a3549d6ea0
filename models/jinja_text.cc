#include "models/jinja_text.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include "models/utf8.h"

namespace innerq::jinja {
namespace {

template <typename Map>
std::string MapChars(std::string_view text, Map map) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const size_t length = CharLength(text);
    const uint32_t code = DecodeChar(text);
    const uint32_t mapped = map(code);
    if (mapped == code) {
      out += text.substr(0, length);
    } else {
      AppendUtf8(out, mapped);
    }
    text.remove_prefix(length);
  }
  return out;
}

bool IsCased(uint32_t code) {
  return UpperChar(code) != code || LowerChar(code) != code || code == 0xdf;
}

// Characters that repr escapes: controls, separators but the space, formats, private use,
// surrogates. Unassigned characters are taken as printable.
bool IsPrintable(uint32_t c) {
  if (c < 0x20 || (c >= 0x7f && c <= 0xa0) || c == 0xad || c == 0x1680 || c == 0x3000) return false;
  if ((c >= 0x2000 && c <= 0x200f) || (c >= 0x2028 && c <= 0x202f)) return false;
  if ((c >= 0x205f && c <= 0x206f) || (c >= 0xd800 && c <= 0xf8ff)) return false;
  if (c == 0x180e || c == 0x061c || c == 0xfeff || (c >= 0xfff0 && c <= 0xfffb)) return false;
  return c != 0xfffe && c != 0xffff && c < 0xe0000;
}

std::string Hex(const char* prefix, uint32_t code, int width) {
  std::string out = prefix;
  for (int shift = 4 * (width - 1); shift >= 0; shift -= 4) {
    out += "0123456789abcdef"[code >> shift & 0xf];
  }
  return out;
}

}  // namespace

Text Text::From(std::string_view bytes, bool is_untrusted) {
  Text out;
  out.Append(bytes, is_untrusted);
  return out;
}

void Text::Append(const Text& other) {
  if (any_untrusted() || other.any_untrusted()) {
    untrusted.resize(bytes.size(), '\0');
    untrusted += other.untrusted;
    untrusted.resize(bytes.size() + other.bytes.size(), '\0');
  }
  bytes += other.bytes;
}

void Text::Append(std::string_view more, bool is_untrusted) {
  if (more.empty()) return;
  if (any_untrusted() || is_untrusted) {
    untrusted.resize(bytes.size(), '\0');
    untrusted.append(more.size(), is_untrusted ? '\1' : '\0');
  }
  bytes += more;
}

Text Text::Sub(size_t begin, size_t end) const {
  if (begin >= end) return {};
  Text out{bytes.substr(begin, end - begin), {}};
  if (any_untrusted()) {
    out.untrusted = untrusted.substr(begin, end - begin);
    if (out.untrusted.find('\1') == std::string::npos) out.untrusted.clear();
  }
  return out;
}

std::vector<TextSegment> Text::Segments() const {
  std::vector<TextSegment> out;
  if (bytes.empty()) return out;
  if (!any_untrusted()) return {{bytes, true}};
  for (size_t begin = 0; begin < bytes.size();) {
    const size_t end =
        std::min(untrusted.find(untrusted[begin] == 0 ? '\1' : '\0', begin), bytes.size());
    out.push_back({bytes.substr(begin, end - begin), untrusted[begin] == 0});
    begin = end;
  }
  return out;
}

size_t CharLength(std::string_view text) {
  if (text.empty()) return 0;
  const size_t length = Utf8CharLength(text);
  return length == 0 ? 1 : length;
}

int64_t CountChars(std::string_view text) {
  int64_t count = 0;
  for (; !text.empty(); text.remove_prefix(CharLength(text))) ++count;
  return count;
}

std::vector<size_t> CharOffsets(std::string_view text) {
  std::vector<size_t> out;
  size_t at = 0;
  for (; at < text.size(); at += CharLength(text.substr(at))) out.push_back(at);
  out.push_back(at);
  return out;
}

uint32_t DecodeChar(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  switch (Utf8CharLength(text)) {
    case 1:
      return byte(0);
    case 2:
      return (byte(0) & 0x1fu) << 6 | (byte(1) & 0x3fu);
    case 3:
      return (byte(0) & 0x0fu) << 12 | (byte(1) & 0x3fu) << 6 | (byte(2) & 0x3fu);
    case 4:
      return (byte(0) & 0x07u) << 18 | (byte(1) & 0x3fu) << 12 | (byte(2) & 0x3fu) << 6 |
             (byte(3) & 0x3fu);
  }
  return text.empty() ? 0 : 0xdc00u + byte(0);
}

void AppendUtf8(std::string& out, uint32_t code) {
  const auto tail = [&](int shift) { out += static_cast<char>(0x80 | (code >> shift & 0x3f)); };
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | code >> 6);
    tail(0);
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | code >> 12);
    tail(6);
    tail(0);
  } else {
    out += static_cast<char>(0xf0 | code >> 18);
    tail(12);
    tail(6);
    tail(0);
  }
}

size_t FindPart(std::string_view text, std::string_view part, size_t from) {
  if (from > text.size()) return std::string_view::npos;
  // glibc's is linear: two-way for parts of more than 256 bytes, so that the others' worst case,
  // their product, is bounded by a constant too.
  const void* found = memmem(text.data() + from, text.size() - from, part.data(), part.size());
  if (found == nullptr) return std::string_view::npos;
  return static_cast<size_t>(static_cast<const char*>(found) - text.data());
}

size_t SpaceLength(std::string_view text) {
  const uint32_t c = DecodeChar(text);
  const bool space = (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 ||
                     c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
                     c == 0x202f || c == 0x205f || c == 0x3000;
  return space ? CharLength(text) : 0;
}

std::string Upper(std::string_view text) {
  std::string out = MapChars(text, UpperChar);
  for (size_t at = 0; (at = out.find("\xc3\x9f", at)) != std::string::npos;) {
    out.replace(at, 2, "SS");
  }
  return out;
}

std::string Lower(std::string_view text) { return MapChars(text, LowerChar); }

std::string Capitalize(std::string_view text) {
  const size_t first = CharLength(text);
  std::string head = Upper(text.substr(0, first));
  if (head == "SS" && first == 2) head = "Ss";
  return head + Lower(text.substr(first));
}

std::string Title(std::string_view text) {
  bool inside = false;
  return MapChars(text, [&](uint32_t code) {
    const uint32_t mapped = inside ? LowerChar(code) : UpperChar(code);
    inside = IsCased(code);
    return mapped;
  });
}

std::string TitleFilter(std::string_view text) {
  std::string out;
  bool start = true;
  while (!text.empty()) {
    const size_t length = CharLength(text);
    const std::string_view one = text.substr(0, length);
    out += start ? Upper(one) : Lower(one);
    start = SpaceLength(one) > 0 || std::string_view("-({[<").find(one) != std::string_view::npos;
    text.remove_prefix(length);
  }
  return out;
}

std::string_view TrimSpace(std::string_view text, Sides sides) {
  if (sides.left) {
    while (const size_t length = SpaceLength(text)) text.remove_prefix(length);
  }
  while (sides.right && !text.empty()) {
    size_t length = 1;
    while (length < text.size() && length < 4 && (text[text.size() - length] & 0xc0) == 0x80) {
      ++length;
    }
    if (SpaceLength(text.substr(text.size() - length)) != length) break;
    text.remove_suffix(length);
  }
  return text;
}

Text Strip(const Text& text, const std::string* chars, Sides sides) {
  if (chars == nullptr) {
    const std::string_view kept = TrimSpace(text.bytes, sides);
    const size_t begin = kept.empty() ? 0 : static_cast<size_t>(kept.data() - text.bytes.data());
    return text.Sub(begin, begin + kept.size());
  }
  std::vector<uint32_t> set;
  for (std::string_view rest = *chars; !rest.empty(); rest.remove_prefix(CharLength(rest))) {
    set.push_back(DecodeChar(rest));
  }
  std::sort(set.begin(), set.end());
  const std::vector<size_t> at = CharOffsets(text.bytes);
  const auto drops = [&](size_t i) {
    const uint32_t one = DecodeChar(std::string_view(text.bytes).substr(at[i], at[i + 1] - at[i]));
    return std::binary_search(set.begin(), set.end(), one);
  };
  size_t begin = 0;
  size_t end = at.size() - 1;
  while (sides.left && begin < end && drops(begin)) ++begin;
  while (sides.right && begin < end && drops(end - 1)) --end;
  return text.Sub(at[begin], at[end]);
}

std::string ReprString(std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
  std::string out(1, quote);
  for (; !text.empty(); text.remove_prefix(CharLength(text))) {
    const uint32_t c = DecodeChar(text);
    if (c == static_cast<uint32_t>(quote) || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (IsPrintable(c)) {
      out += text.substr(0, CharLength(text));
    } else {
      out += c < 0x100 ? Hex("\\x", c, 2) : c < 0x10000 ? Hex("\\u", c, 4) : Hex("\\U", c, 8);
    }
  }
  return out + quote;
}

std::string FloatRepr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[64];
  const auto end =
      std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific);
  std::string text(buffer, end.ptr);
  const size_t e = text.find('e');
  const int exponent = std::stoi(text.substr(e + 1));
  if (exponent < -4 || exponent >= 16) return text;
  const auto fixed = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::fixed);
  text.assign(buffer, fixed.ptr);
  return text.find('.') == std::string::npos ? text + ".0" : text;
}

std::string JsonString(std::string_view text, bool ensure_ascii) {
  std::string out = "\"";
  for (; !text.empty(); text.remove_prefix(CharLength(text))) {
    const uint32_t c = DecodeChar(text);
    const size_t short_escape = std::string_view("\"\\\n\r\t\f\b").find(static_cast<char>(c));
    if (c < 0x80 && short_escape != std::string_view::npos) {
      out += '\\';
      out += "\"\\nrtfb"[short_escape];
    } else if (c < 0x20 || (ensure_ascii && c >= 0x7f && c < 0x10000)) {
      out += Hex("\\u", c, 4);
    } else if (ensure_ascii && c >= 0x10000) {
      out += Hex("\\u", 0xd800 + ((c - 0x10000) >> 10), 4);
      out += Hex("\\u", 0xdc00 + ((c - 0x10000) & 0x3ff), 4);
    } else {
      out += text.substr(0, CharLength(text));
    }
  }
  return out + "\"";
}

}  // namespace innerq::jinja
