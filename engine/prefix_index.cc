#include "engine/prefix_index.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace innerq {

bool PrefixIndex::TokenOrder::operator()(std::span<const int32_t> a,
                                         std::span<const int32_t> b) const {
  return std::lexicographical_compare(a.begin(), a.end(), b.begin(), b.end());
}

PrefixIndex::PrefixIndex(const KvLayout& layout)
    : layout_(layout), norm_end_(layout.normalizes_keys() ? layout.KeyNormPages().end : 0) {}

PrefixIndex::~PrefixIndex() {
  // One by one from the leaves: long paths must not be destroyed by recursion.
  while (!by_use_.empty()) RemoveCheckpoint(by_use_.begin()->second);
}

std::vector<PrefixIndex::Node*> PrefixIndex::PathTo(Node* node) {
  std::vector<Node*> path;
  for (; node->parent != nullptr; node = node->parent) path.push_back(node);
  std::reverse(path.begin(), path.end());
  return path;
}

PrefixIndex::Slot& PrefixIndex::SealedSlot(std::span<Node* const> path, int64_t page) const {
  if (page >= norm_end_) return path[static_cast<size_t>(page)]->sealed;
  Node& last = *path[static_cast<size_t>(norm_end_ - 1)];
  return last.span_sealed[static_cast<size_t>(page - layout_.KeyNormPages().begin)];
}

template <typename Visit>
void PrefixIndex::ForEachBlock(std::span<Node* const> path, Visit visit) const {
  const auto num_pages = static_cast<int64_t>(path.size());
  const PageRange sealed = layout_.SealedPages(num_pages * layout_.page_tokens() - 1);
  for (int64_t page = 0; page < num_pages; ++page) {
    if (page >= sealed.begin && page < sealed.end) {
      visit(SealedSlot(path, page), Kind::kSealed, page);
    } else {
      visit(path[static_cast<size_t>(page)]->open, Kind::kOpen, page);
    }
  }
  if (norm_end_ > 0 && sealed.size() > 0) {
    visit(path[static_cast<size_t>(norm_end_ - 1)]->norm, Kind::kNorm, norm_end_ - 1);
  }
}

PrefixIndex::Match PrefixIndex::Find(const std::string& salt, std::span<const int32_t> tokens,
                                     int64_t max_pages) const {
  Match match;
  const auto root = roots_.find(salt);
  if (root == roots_.end()) return match;
  const int64_t page_tokens = layout_.page_tokens();
  const int64_t num_full = static_cast<int64_t>(tokens.size()) / page_tokens;
  std::vector<Node*> path;
  size_t num_complete = 0;
  const std::map<std::vector<int32_t>, std::unique_ptr<Node>, TokenOrder>* children =
      &root->second.children;
  int64_t open_end = 0;                       // pages [0, open_end) are open
  int64_t sealed_end = layout_.sink_pages();  // pages [sinks, sealed_end) are sealed
  int64_t open_begin = 0;                     // pages [open_begin, end of path) are open
  for (int64_t page = 0; page < std::min(num_full, max_pages); ++page) {
    const auto child = children->find(
        tokens.subspan(static_cast<size_t>(page * page_tokens), static_cast<size_t>(page_tokens)));
    if (child == children->end()) break;
    path.push_back(child->second.get());
    children = &path.back()->children;
    if (!path.back()->open.block) {
      open_begin = page + 1;
    } else if (open_end == page) {
      ++open_end;
    }
    const PageRange sealed = layout_.SealedPages((page + 1) * page_tokens - 1);
    while (sealed_end < sealed.end && SealedSlot(path, sealed_end).block) ++sealed_end;
    const bool complete =
        sealed.size() == 0
            ? open_begin == 0
            : open_end >= sealed.begin && sealed_end >= sealed.end && open_begin <= sealed.end;
    if (complete) num_complete = path.size();
  }
  match.num_known_pages = static_cast<int64_t>(path.size());
  path.resize(num_complete);
  match.path = std::move(path);
  return match;
}

void PrefixIndex::Restore(const Match& match, BlockTable* pages, BlockRef* norm) const {
  CHECK(pages->num_pages() == 0 && !*norm, "only an empty sequence can begin with a prefix");
  ForEachBlock(match.path, [&](const Slot& slot, Kind kind, int64_t) {
    CHECK(slot.block, "a state that is not there");
    switch (kind) {
      case Kind::kOpen:
        return pages->AppendOpen(slot.block.ref());
      case Kind::kSealed:
        return pages->AppendSealed(slot.block.ref());
      case Kind::kNorm:
        *norm = slot.block.ref();
    }
  });
}

void PrefixIndex::Use(const Match& match) {
  if (match.path.empty()) return;
  Node* const node = match.path.back();
  if (node->last_use == 0) AddCheckpoint(match.path);
  node->passing = false;
  Touch(node);
}

PrefixIndex::Node* PrefixIndex::Insert(const Progress& progress, int64_t num_pages, bool passing) {
  CHECK(num_pages > 0, "a checkpoint needs a page");
  const auto page_tokens = static_cast<size_t>(layout_.page_tokens());
  std::vector<Node*> path;
  Node* node = &roots_[progress.salt];
  for (size_t page = 0; page < static_cast<size_t>(num_pages); ++page) {
    const std::span<const int32_t> tokens =
        progress.tokens.subspan(page * page_tokens, page_tokens);
    auto child = node->children.find(tokens);
    if (child == node->children.end()) {
      child =
          node->children
              .emplace(std::vector<int32_t>(tokens.begin(), tokens.end()), std::make_unique<Node>())
              .first;
      child->second->parent = node;
      child->second->tokens = &child->first;
      child->second->num_pages = node->num_pages + 1;
      if (child->second->num_pages == norm_end_) {
        child->second->span_sealed.resize(static_cast<size_t>(layout_.KeyNormPages().size()));
      }
    }
    node = child->second.get();
    path.push_back(node);
  }
  // Of two copies the one that a sequence holds: an idle one returns to its pool.
  ForEachBlock(path, [&](Slot& slot, Kind kind, int64_t page) {
    if (slot.block && !slot.block.idle()) return;
    const BlockRef& held = kind == Kind::kNorm   ? progress.norm
                           : kind == Kind::kOpen ? progress.pages.open(page)
                                                 : progress.pages.sealed(page);
    slot.block = CachedBlock(held);
  });
  if (node->last_use == 0) {
    AddCheckpoint(path);
    node->passing = passing;
  }
  if (!passing) node->passing = false;
  Touch(node);
  return node;
}

void PrefixIndex::KeepPassing(const Progress& progress, int64_t num_pages, int64_t replaced) {
  Node* node = Insert(progress, num_pages, /*passing=*/true);
  if (replaced == 0) return;
  CHECK(replaced < num_pages, "a checkpoint that takes the place of a later one");
  for (int64_t page = num_pages; page > replaced; --page) node = node->parent;
  if (node->passing) RemoveCheckpoint(node);
}

void PrefixIndex::AddCheckpoint(std::span<Node* const> path) {
  ForEachBlock(path, [](Slot& slot, Kind, int64_t) { ++slot.users; });
  for (Node* node : path) ++node->num_checkpoints;
}

void PrefixIndex::RemoveCheckpoint(Node* node) {
  by_use_.erase(std::exchange(node->last_use, 0));
  node->passing = false;
  std::vector<Node*> path = PathTo(node);
  const Node* const root = path.front()->parent;
  ForEachBlock(path, [](Slot& slot, Kind, int64_t) {
    if (--slot.users == 0) slot.block.Reset();
  });
  for (; !path.empty(); path.pop_back()) {
    Node* const last = path.back();
    if (--last->num_checkpoints > 0) continue;
    auto& siblings = last->parent->children;
    siblings.erase(siblings.find(*last->tokens));
  }
  if (!root->children.empty()) return;
  std::erase_if(roots_, [root](const auto& salted) { return &salted.second == root; });
}

void PrefixIndex::Touch(Node* node) {
  if (node->last_use > 0) by_use_.erase(node->last_use);
  node->last_use = ++num_uses_;
  by_use_.emplace(node->last_use, node);
}

bool PrefixIndex::Frees(const Node* node, const PageCounts& lack) const {
  const auto sealed_pages = [this](const Node* end) {
    return layout_.SealedPages(end->num_pages * layout_.page_tokens() - 1);
  };
  const auto frees = [](const Slot& slot, int64_t lacking) {
    return lacking > 0 && slot.users == 1 && slot.block.idle();
  };
  const PageRange sealed = sealed_pages(node);
  // A checkpoint at or below a node has all pages before the node's window in the same form.
  int64_t in_common = 0;
  for (; node->num_pages > in_common; node = node->parent) {
    if (in_common == 0 && node->num_checkpoints > 1) {
      in_common = layout_.quantized() ? sealed_pages(node).end : node->num_pages;
    }
    const int64_t page = node->num_pages - 1;
    const bool is_sealed = page >= sealed.begin && page < sealed.end;  // in the span: see below
    if (is_sealed ? frees(node->sealed, lack.sealed) : frees(node->open, lack.open)) return true;
    if (page != norm_end_ - 1 || sealed.size() == 0) continue;
    if (frees(node->norm, lack.norms)) return true;
    const auto num_sealed =
        static_cast<size_t>(std::min(sealed.end, norm_end_) - layout_.KeyNormPages().begin);
    for (size_t i = 0; i < num_sealed; ++i) {
      if (frees(node->span_sealed[i], lack.sealed)) return true;
    }
  }
  return false;
}

bool PrefixIndex::Evict(const PageCounts& lack) {
  if (by_use_.empty()) return false;
  const auto freeing = std::find_if(by_use_.begin(), by_use_.end(), [&](const auto& checkpoint) {
    return Frees(checkpoint.second, lack);
  });
  RemoveCheckpoint((freeing == by_use_.end() ? by_use_.begin() : freeing)->second);
  return true;
}

void PrefixIndex::CheckIntegrity() const {
  std::map<const Slot*, int64_t> users;
  std::map<const Node*, int64_t> checkpoints;
  for (const auto& [use, node] : by_use_) {
    CHECK(node->last_use == use, "a checkpoint that stands elsewhere in the order of use");
    const std::vector<Node*> path = PathTo(node);
    ForEachBlock(path, [&](const Slot& slot, Kind, int64_t) { ++users[&slot]; });
    for (const Node* on_path : path) ++checkpoints[on_path];
    PageCounts frees;
    ForEachBlock(path, [&](const Slot& slot, Kind kind, int64_t) {
      if (slot.users > 1 || !slot.block.idle()) return;
      ++(kind == Kind::kOpen ? frees.open : kind == Kind::kSealed ? frees.sealed : frees.norms);
    });
    CHECK(Frees(node, {1, 0, 0}) == (frees.open > 0) &&
              Frees(node, {0, 1, 0}) == (frees.sealed > 0) &&
              Frees(node, {0, 0, 1}) == (frees.norms > 0),
          "a checkpoint frees other blocks than it says");
  }
  std::vector<const Node*> nodes;
  for (const auto& [salt, root] : roots_) nodes.push_back(&root);
  const auto check = [&](const Slot& slot) {
    const auto counted = users.find(&slot);
    CHECK(slot.users == (counted == users.end() ? 0 : counted->second), "a miscounted block");
    CHECK((slot.users > 0) == static_cast<bool>(slot.block), "a block without use, or lost");
  };
  while (!nodes.empty()) {
    const Node& node = *nodes.back();
    nodes.pop_back();
    check(node.open);
    check(node.sealed);
    check(node.norm);
    for (const Slot& slot : node.span_sealed) check(slot);
    for (const auto& [tokens, child] : node.children) nodes.push_back(child.get());
    const bool has_span = norm_end_ > 0 && node.num_pages == norm_end_;
    CHECK(std::ssize(node.span_sealed) == (has_span ? layout_.KeyNormPages().size() : 0),
          "the span's sealed pages hang at another node than its last");
    if (node.parent == nullptr) continue;
    CHECK(node.num_checkpoints > 0 && checkpoints[&node] == node.num_checkpoints,
          "a node has other checkpoints than it counts");
  }
}

}  // namespace innerq
