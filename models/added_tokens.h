// AddedTokens: the tokens of a model that are found in a text by their spelling.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace innerq {

// The largest that files may give a token.
constexpr int32_t kMaxTokenId = (1 << 20) - 1;

struct AddedToken {
  int32_t id = 0;
  std::string content;      // 1 to 1000 bytes
  bool lstrip = false;      // takes the white space before it
  bool rstrip = false;      // takes the white space after it
  bool normalized = false;  // searched for after those that are not
  bool special = false;
};

// Bytes of Unicode white space (White_Space) at the start and at the end of a text.
size_t SpaceAtStart(std::string_view text);
size_t SpaceAtEnd(std::string_view text);

// Those that are left of a text without it, wherever it stands: no fewer are met by tokens of which
// some take white space.
size_t BytesBesideSpace(std::string_view text);

// A set of added tokens, by their texts. Filled, then sorted, then searched by any thread.
class AddedTokens {
 public:
  void Add(AddedToken token);  // of several of the same text, the first is found
  void Sort();
  // The longest token that `text` begins with, or null. O(length of the token * log(tokens)).
  const AddedToken* Find(std::string_view text) const;

 private:
  std::vector<AddedToken> tokens_;  // by text
  std::array<bool, 256> begins_{};  // by the first byte of their texts
};

}  // namespace innerq
