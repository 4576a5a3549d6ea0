#include "models/bpe_model.h"

#include <algorithm>
#include <bit>
#include <queue>

#include "models/utf8.h"

namespace innerq {
namespace {

uint64_t PairKey(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

Result<BpeModel> BpeModel::Create(const Vocabulary& vocabulary, const Merges& merges,
                                  const std::vector<bool>& barred, std::vector<int32_t> byte_ids,
                                  BpeOptions options) {
  BpeModel model;
  model.byte_ids_ = std::move(byte_ids);
  model.options_ = options;
  const auto is_barred = [&barred](int32_t id) { return barred[static_cast<size_t>(id)]; };
  model.ids_.reserve(vocabulary.size());
  model.ids_.insert(vocabulary.begin(), vocabulary.end());
  model.merges_.resize(std::bit_ceil(2 * merges.size() + 1));
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    const int32_t left_id = model.FindToken(left);
    const int32_t right_id = model.FindToken(right);
    const int32_t id = model.FindToken(left + right);
    for (const auto& [part, part_id] :
         {std::pair{left, left_id}, {right, right_id}, {left + right, id}}) {
      if (part_id >= 0) continue;
      return Error{ErrorCode::kDataLoss, "model.merges[" + std::to_string(rank) +
                                             "]: expected tokens of the vocabulary, found \"" +
                                             part.substr(0, 60) + '"'};
    }
    if (is_barred(id)) continue;
    model.AddMerge(PairKey(left_id, right_id), static_cast<uint32_t>(rank), id);
  }
  std::erase_if(model.ids_, [&](const auto& entry) { return is_barred(entry.second); });
  return model;
}

// Index of the pair's slot, or of the empty one where it would be.
size_t BpeModel::Slot(uint64_t pair) const {
  constexpr uint64_t kMultiplier = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio
  const size_t mask = merges_.size() - 1;
  size_t slot = (pair * kMultiplier) >> 32 & mask;
  while (merges_[slot].id >= 0 && merges_[slot].pair != pair) slot = (slot + 1) & mask;
  return slot;
}

void BpeModel::AddMerge(uint64_t pair, uint32_t rank, int32_t id) {
  merges_[Slot(pair)] = {pair, rank, id};
}

int32_t BpeModel::FindToken(std::string_view text) const {
  const auto at = ids_.find(text);
  return at == ids_.end() ? -1 : at->second;
}

std::vector<BpeModel::Symbol> BpeModel::SplitCharacters(std::string_view text) const {
  std::vector<Symbol> symbols;
  symbols.reserve(text.size());
  bool after_unknown = false;
  while (!text.empty()) {
    const std::string_view character = text.substr(0, std::max<size_t>(1, Utf8CharLength(text)));
    text.remove_prefix(character.size());
    const auto byte_id = [this](char byte) { return byte_ids_[static_cast<uint8_t>(byte)]; };
    if (const int32_t id = FindToken(character); id >= 0) {
      symbols.push_back({id});
      after_unknown = false;
    } else if (std::all_of(character.begin(), character.end(),
                           [&](char byte) { return byte_id(byte) >= 0; })) {
      for (const char byte : character) symbols.push_back({byte_id(byte)});
      after_unknown = false;
    } else if (options_.unk_id) {
      if (!after_unknown || !options_.fuse_unk) symbols.push_back({*options_.unk_id});
      after_unknown = true;
    }
  }
  for (size_t i = 0; i < symbols.size(); ++i) {
    symbols[i].prev = i == 0 ? kNone : static_cast<uint32_t>(i - 1);
    symbols[i].next = i + 1 == symbols.size() ? kNone : static_cast<uint32_t>(i + 1);
  }
  return symbols;
}

// Looks up what the symbol and the one after it make.
void BpeModel::FindMerge(std::vector<Symbol>& symbols, uint32_t at) const {
  Symbol& symbol = symbols[at];
  symbol.rank = kNone;
  if (symbol.next == kNone) return;
  const Merge& merge = merges_[Slot(PairKey(symbol.id, symbols[symbol.next].id))];
  if (merge.id < 0) return;
  symbol.rank = merge.rank;
  symbol.merged_id = merge.id;
}

void BpeModel::Encode(std::string_view text, std::vector<int32_t>& ids) const {
  CHECK(text.size() < uint64_t{1} << 31, "a piece of 2 GiB");
  if (const int32_t id = options_.ignore_merges ? FindToken(text) : -1; id >= 0) {
    ids.push_back(id);
    return;
  }
  std::vector<Symbol> symbols = SplitCharacters(text);
  // Candidates, best first: rank in the upper half, place in the lower. One is out of date if its
  // symbol's rank has changed since.
  std::vector<uint64_t> found;
  for (uint32_t i = 0; i < symbols.size(); ++i) {
    FindMerge(symbols, i);
    if (symbols[i].rank != kNone) found.push_back(uint64_t{symbols[i].rank} << 32 | i);
  }
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> queue(std::greater<>(),
                                                                             std::move(found));
  const auto update = [&](uint32_t at) {
    FindMerge(symbols, at);
    if (symbols[at].rank != kNone) queue.push(uint64_t{symbols[at].rank} << 32 | at);
  };
  while (!queue.empty()) {
    const auto rank = static_cast<uint32_t>(queue.top() >> 32);
    const auto at = static_cast<uint32_t>(queue.top());
    queue.pop();
    Symbol& left = symbols[at];
    if (left.rank != rank) continue;
    Symbol& right = symbols[left.next];
    right.rank = kNone;
    left.id = left.merged_id;
    left.next = right.next;
    if (left.next != kNone) symbols[left.next].prev = at;
    update(at);
    if (left.prev != kNone) update(left.prev);
  }
  for (uint32_t i = symbols.empty() ? kNone : 0; i != kNone; i = symbols[i].next) {
    ids.push_back(symbols[i].id);
  }
}

}  // namespace innerq
