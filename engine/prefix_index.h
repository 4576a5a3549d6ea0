// PrefixIndex: finds the cached pages of a prompt's prefix.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/block_allocator.h"
#include "engine/page_budget.h"

namespace innerq {

// Remembers, by their tokens, pages that sequences have computed, and hands them to others that
// begin alike. T tokens of a page.
//
// It keeps checkpoints. The checkpoint at boundary P is the state of a sequence that has computed
// the positions [0, P*T) and no more: the pages that it then holds, each in the form in which it
// holds it, and its key norm. Whoever continues from there is in that state exactly, so nothing
// that is true of sequences needs an exception, and what it computes is the same to the bit.
//
// Pages hang in a tree, a node per page below the node of the page before it; a path from the root
// is a prefix. Tokens are compared, not hashed: what differs is never taken for the same. A page's
// open form, and its sealed form, depend on the tokens up to its end; but sealed keys of the pages
// that define the key norm, and the norm, depend on all of these pages, so they hang at the last of
// them. Every block is held for the checkpoints that contain it, and a node stays as long as there
// is one at or below it. So at least as many blocks as nodes are held.
//
// Blocks that nobody else holds are idle (CachedBlock): they are there for whoever needs room,
// least recently used checkpoints first. Engine thread only. No clock: equal calls, equal results.
class PrefixIndex {
  struct Node;

 public:
  // `layout` must outlive it.
  explicit PrefixIndex(const KvLayout& layout);
  ~PrefixIndex();
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  // What is known of a prefix. Valid until the index changes.
  struct Match {
    int64_t num_pages() const { return static_cast<int64_t>(path.size()); }

    int64_t num_known_pages = 0;  // of the tokens' prefix that is in the tree
    std::vector<Node*> path;      // the longest part of it whose state is there
  };
  // Looks among prefixes of the same salt, for at most `max_pages` pages.
  Match Find(const std::string& salt, std::span<const int32_t> tokens, int64_t max_pages) const;
  // Brings an empty table and norm into the state at the end of `match`.
  void Restore(const Match& match, BlockTable* pages, BlockRef* norm) const;
  // Makes the end of a match a checkpoint, unless it is one, and the most recently used.
  void Use(const Match& match);

  // A sequence that has just computed its tokens up to some position, the open copies of pages that
  // it sealed in the last step not yet given up.
  struct Progress {
    const std::string& salt;
    std::span<const int32_t> tokens;
    const BlockTable& pages;
    const BlockRef& norm;
  };
  // Makes boundary `num_pages`, which the last step passed, a checkpoint, unless it is one, and the
  // most recently used.
  void Keep(const Progress& progress, int64_t num_pages) { Insert(progress, num_pages, false); }
  // The same for a while: it gives way to the sequence's next such checkpoint, unless somebody has
  // used it or keeps it. This one takes the place of that at `replaced` pages; 0: of none.
  void KeepPassing(const Progress& progress, int64_t num_pages, int64_t replaced);

  // Gives up the least recently used checkpoint of those that free any of the `lack`ing blocks;
  // where each needs others to go as well, the least recently used of all. False: there is none.
  bool Evict(const PageCounts& lack);

  int64_t num_checkpoints() const { return static_cast<int64_t>(by_use_.size()); }
  // CHECKs that exactly what checkpoints contain is held. Linear in their pages.
  void CheckIntegrity() const;

 private:
  // A block and the number of checkpoints that contain it.
  struct Slot {
    CachedBlock block{};
    int64_t users = 0;
  };
  struct TokenOrder {
    using is_transparent = void;
    bool operator()(std::span<const int32_t> a, std::span<const int32_t> b) const;
  };
  struct Node {
    Node* parent = nullptr;                        // null for a root
    const std::vector<int32_t>* tokens = nullptr;  // [T], the key in the parent's children
    std::map<std::vector<int32_t>, std::unique_ptr<Node>, TokenOrder> children{};
    Slot open{};
    Slot sealed{};
    std::vector<Slot> span_sealed{};  // at the last page of the norm's span: the span's pages
    Slot norm{};                      // there, too
    int64_t num_checkpoints = 0;      // at or below it
    int64_t last_use = 0;             // of the checkpoint here; 0: there is none
    bool passing = false;             // see KeepPassing
  };
  enum class Kind { kOpen, kSealed, kNorm };

  static std::vector<Node*> PathTo(Node* node);
  // The sealed form of a page; `path` reaches to where it hangs.
  Slot& SealedSlot(std::span<Node* const> path, int64_t page) const;
  // Calls visit(slot, kind, page) for all that the checkpoint at the end of a path contains.
  template <typename Visit>
  void ForEachBlock(std::span<Node* const> path, Visit visit) const;
  Node* Insert(const Progress& progress, int64_t num_pages, bool passing);
  void AddCheckpoint(std::span<Node* const> path);
  void RemoveCheckpoint(Node* node);
  void Touch(Node* node);
  bool Frees(Node* node, const PageCounts& lack) const;

  const KvLayout& layout_;
  // Where the span of the key norm ends, in pages; 0 if keys are not normalized.
  const int64_t norm_end_;
  std::map<std::string, Node> roots_;  // by salt
  std::map<int64_t, Node*> by_use_;    // the checkpoints, least recently used first
  int64_t num_uses_ = 0;
};

}  // namespace innerq
