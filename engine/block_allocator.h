// BlockAllocator, BlockRef, BlockTable: who holds which page of a pool.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/paged_kv.h"
#include "kernels/result.h"

namespace innerq {

class BlockAllocator;

// A counted handle to one block, or to none. Copies share the block; the last one to go returns it
// to its allocator, which must outlive them all. Engine thread only.
class BlockRef {
 public:
  BlockRef() = default;
  BlockRef(const BlockRef& other);
  BlockRef(BlockRef&& other) noexcept
      : allocator_(std::exchange(other.allocator_, nullptr)), id_(std::exchange(other.id_, -1)) {}
  BlockRef& operator=(BlockRef other) noexcept {
    std::swap(allocator_, other.allocator_);
    std::swap(id_, other.id_);
    return *this;
  }
  ~BlockRef() { Reset(); }

  void Reset();
  int32_t id() const { return id_; }  // -1 if it holds none
  explicit operator bool() const { return id_ >= 0; }

 private:
  friend class BlockAllocator;
  BlockRef(BlockAllocator* allocator, int32_t id) : allocator_(allocator), id_(id) {}

  BlockAllocator* allocator_ = nullptr;
  int32_t id_ = -1;
};

// Hands out the ids [0, size) of one pool, smallest free id first, and counts their holders. It
// knows nothing of memory. Engine thread only. Destroying it while blocks are out is a CHECK.
class BlockAllocator {
 public:
  explicit BlockAllocator(int64_t size);
  ~BlockAllocator();
  BlockAllocator(const BlockAllocator&) = delete;
  BlockAllocator& operator=(const BlockAllocator&) = delete;

  // CHECK: num_free() > 0. Logarithmic in num_free().
  BlockRef Allocate();

  int64_t size() const { return static_cast<int64_t>(num_holders_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_used() const { return size() - num_free(); }
  int64_t num_holders(int32_t id) const { return num_holders_[static_cast<size_t>(id)]; }

  // CHECKs that every id is either free, once and without holders, or held. Linear in size().
  void CheckIntegrity() const;

 private:
  friend class BlockRef;
  void AddHolder(int32_t id);
  void RemoveHolder(int32_t id);

  std::vector<int32_t> num_holders_;  // [size]
  std::vector<int32_t> free_;         // a heap, smallest id on top
};

// The pages of one sequence, from logical page 0: where each is open, where sealed, or both during
// the step that seals it.
class BlockTable {
 public:
  int64_t num_pages() const { return static_cast<int64_t>(entries_.size()); }

  void AppendOpen(BlockRef open) { entries_.push_back({std::move(open), {}}); }
  // CHECK: the page is open and not sealed.
  void Seal(int64_t page, BlockRef sealed);
  // Gives up the F16 copy. CHECK: the page is sealed and still open.
  void ReleaseOpen(int64_t page);
  void Clear() { entries_.clear(); }

  PageRef page(int64_t page) const {
    const Entry& entry = entries_[static_cast<size_t>(page)];
    return {entry.open.id(), entry.sealed.id()};
  }

 private:
  struct Entry {
    BlockRef open;
    BlockRef sealed;
  };
  std::vector<Entry> entries_;
};

}  // namespace innerq
