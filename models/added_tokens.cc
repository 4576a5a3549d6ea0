#include "models/added_tokens.h"

#include <algorithm>

namespace innerq {
namespace {

// Bytes of the white space character that `text` begins with, or 0.
size_t SpaceLength(std::string_view text) {
  constexpr std::array<std::string_view, 25> kSpaces = {" ",
                                                        "\t",
                                                        "\n",
                                                        "\v",
                                                        "\f",
                                                        "\r",
                                                        "\xc2\x85",
                                                        "\xc2\xa0",
                                                        "\xe1\x9a\x80",
                                                        "\xe2\x80\x80",
                                                        "\xe2\x80\x81",
                                                        "\xe2\x80\x82",
                                                        "\xe2\x80\x83",
                                                        "\xe2\x80\x84",
                                                        "\xe2\x80\x85",
                                                        "\xe2\x80\x86",
                                                        "\xe2\x80\x87",
                                                        "\xe2\x80\x88",
                                                        "\xe2\x80\x89",
                                                        "\xe2\x80\x8a",
                                                        "\xe2\x80\xa8",
                                                        "\xe2\x80\xa9",
                                                        "\xe2\x80\xaf",
                                                        "\xe2\x81\x9f",
                                                        "\xe3\x80\x80"};
  for (const std::string_view space : kSpaces) {
    if (text.starts_with(space)) return space.size();
  }
  return 0;
}

}  // namespace

size_t SpaceAtEnd(std::string_view text) {
  size_t length = 0;
  for (size_t step = 1; step > 0;) {
    const std::string_view rest = text.substr(0, text.size() - length);
    step = 0;
    for (size_t tail = 1; tail <= 3 && tail <= rest.size(); ++tail) {
      if (SpaceLength(rest.substr(rest.size() - tail)) == tail) step = tail;
    }
    length += step;
  }
  return length;
}

size_t SpaceAtStart(std::string_view text) {
  size_t length = 0;
  while (const size_t step = SpaceLength(text.substr(length))) length += step;
  return length;
}

size_t BytesBesideSpace(std::string_view text) {
  size_t bytes = 0;
  while (true) {
    text.remove_prefix(SpaceAtStart(text));
    if (text.empty()) return bytes;
    text.remove_prefix(1);
    ++bytes;
  }
}

void AddedTokens::Add(AddedToken token) { tokens_.push_back(std::move(token)); }

void AddedTokens::Sort() {
  std::stable_sort(tokens_.begin(), tokens_.end(),
                   [](const AddedToken& a, const AddedToken& b) { return a.content < b.content; });
  for (const AddedToken& token : tokens_) {
    begins_[static_cast<uint8_t>(token.content.front())] = true;
  }
}

const AddedToken* AddedTokens::Find(std::string_view text) const {
  if (text.empty() || !begins_[static_cast<uint8_t>(text.front())]) return nullptr;
  const AddedToken* longest = nullptr;
  auto first = tokens_.begin();
  auto last = tokens_.end();
  for (size_t length = 1; first != last && length <= text.size(); ++length) {
    // Narrow to the tokens that share `length` bytes with the text; shorter ones come first.
    const auto byte = [length](const AddedToken& token) {
      return static_cast<uint8_t>(token.content[length - 1]);
    };
    const auto wanted = static_cast<uint8_t>(text[length - 1]);
    first = std::lower_bound(first, last, wanted,
                             [&](const AddedToken& t, uint8_t b) { return byte(t) < b; });
    last = std::upper_bound(first, last, wanted,
                            [&](uint8_t b, const AddedToken& t) { return b < byte(t); });
    if (first != last && first->content.size() == length) longest = &*first++;
  }
  return longest;
}

}  // namespace innerq
