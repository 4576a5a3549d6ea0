// BpeModel: merges the characters of a piece of text into tokens, pair by pair.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/result.h"

namespace innerq {

struct BpeOptions {
  std::optional<int32_t> unk_id = std::nullopt;  // for characters without tokens
  bool fuse_unk = false;                         // neighbouring unknown characters make one unk_id
  bool ignore_merges = false;  // a piece that is a token is not merged from its characters
};

// The byte-pair encoding of Hugging Face tokenizers (models/bpe): starts from the tokens of single
// characters and replaces, while there is one, the pair whose merge ranks first, the leftmost of
// several. Immutable; any thread may call it.
class BpeModel {
 public:
  using Vocabulary = std::vector<std::pair<std::string, int32_t>>;
  using Merges = std::vector<std::pair<std::string, std::string>>;

  // `barred` [id]: tokens that no text may become. `merges` in order of rank, the last one counts
  // of those for the same pair. `byte_ids` [256]: what bytes become where a character has no token
  // (-1: none; a character takes its bytes only if all have one). Errors: data loss for a merge of
  // unknown tokens.
  static Result<BpeModel> Create(const Vocabulary& vocabulary, const Merges& merges,
                                 const std::vector<bool>& barred, std::vector<int32_t> byte_ids,
                                 BpeOptions options);

  // Appends the ids of UTF-8 text of less than 2^31 bytes. Characters for which there is nothing,
  // not even unk_id, are left out. Time O(n log n), memory O(n).
  void Encode(std::string_view text, std::vector<int32_t>& ids) const;

 private:
  struct Symbol {
    int32_t id = 0;
    uint32_t next = 0;  // index of the neighbours; kNone at the ends
    uint32_t prev = 0;
    uint32_t rank = 0;       // of the merge with the next one; kNone if there is none
    int32_t merged_id = -1;  // what that merge gives
  };
  struct Merge {
    uint64_t pair = 0;
    uint32_t rank = 0;
    int32_t id = -1;  // -1: an empty slot
  };
  struct TextHash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
  };
  static constexpr uint32_t kNone = ~uint32_t{0};

  void AddMerge(uint64_t pair, uint32_t rank, int32_t id);
  size_t Slot(uint64_t pair) const;
  int32_t FindToken(std::string_view text) const;
  std::vector<Symbol> SplitCharacters(std::string_view text) const;
  void FindMerge(std::vector<Symbol>& symbols, uint32_t at) const;

  std::unordered_map<std::string, int32_t, TextHash, std::equal_to<>> ids_;  // of tokens not barred
  std::vector<Merge> merges_;  // hash table by pair, a power of two of slots, at most half full
  std::vector<int32_t> byte_ids_;
  BpeOptions options_;
};

}  // namespace innerq
