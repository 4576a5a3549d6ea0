// BlockAllocator, BlockRef, CachedBlock, BlockTable: who holds which page of a pool.
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
  friend class CachedBlock;
  BlockRef(BlockAllocator* allocator, int32_t id) : allocator_(allocator), id_(id) {}

  BlockAllocator* allocator_ = nullptr;
  int32_t id_ = -1;
};

// A cache's hold on one block, or on none: a block that nobody else holds is idle, and its
// allocator counts it as neither free nor used. A block is in a cache once. Engine thread only.
class CachedBlock {
 public:
  CachedBlock() = default;
  // CHECK: `ref` holds a block that is in no cache.
  explicit CachedBlock(const BlockRef& ref);
  CachedBlock(CachedBlock&&) noexcept = default;
  CachedBlock& operator=(CachedBlock&& other) noexcept {
    Reset();
    ref_ = std::move(other.ref_);
    return *this;
  }
  ~CachedBlock() { Reset(); }

  void Reset();
  const BlockRef& ref() const { return ref_; }  // copies of it share the block
  explicit operator bool() const { return static_cast<bool>(ref_); }
  bool idle() const;  // there is a block, and nobody else holds it

 private:
  BlockRef ref_;
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
  int64_t num_idle() const { return num_idle_; }  // held by a cache alone
  int64_t num_used() const { return size() - num_free() - num_idle(); }
  int64_t num_holders(int32_t id) const { return num_holders_[static_cast<size_t>(id)]; }

  // CHECKs that every id is either free, once and without holders, or held, and that idle ones are
  // counted. Linear in size().
  void CheckIntegrity() const;

 private:
  friend class BlockRef;
  friend class CachedBlock;
  void AddHolder(int32_t id);
  void RemoveHolder(int32_t id);
  bool IsIdle(int32_t id) const;
  void SetCached(int32_t id, bool cached);

  std::vector<int32_t> num_holders_;  // [size], a cache included
  std::vector<bool> is_cached_;       // [size]
  int64_t num_idle_ = 0;
  std::vector<int32_t> free_;  // a heap, smallest id on top
};

// The pages of one sequence, from logical page 0: where each is open, where sealed, or both during
// the step that seals it.
class BlockTable {
 public:
  int64_t num_pages() const { return static_cast<int64_t>(entries_.size()); }
  int64_t num_sealed() const { return num_sealed_; }

  void AppendOpen(BlockRef open) { entries_.push_back({std::move(open), {}}); }
  void AppendSealed(BlockRef sealed) {
    entries_.push_back({{}, std::move(sealed)});
    ++num_sealed_;
  }
  // CHECK: the page is open and not sealed.
  void Seal(int64_t page, BlockRef sealed);
  // Gives up the F16 copy. CHECK: the page is sealed and still open.
  void ReleaseOpen(int64_t page);
  void Clear() {
    entries_.clear();
    num_sealed_ = 0;
  }

  PageRef page(int64_t page) const {
    const Entry& entry = entries_[static_cast<size_t>(page)];
    return {entry.open.id(), entry.sealed.id()};
  }
  const BlockRef& open(int64_t page) const { return entries_[static_cast<size_t>(page)].open; }
  const BlockRef& sealed(int64_t page) const { return entries_[static_cast<size_t>(page)].sealed; }

 private:
  struct Entry {
    BlockRef open;
    BlockRef sealed;
  };
  std::vector<Entry> entries_;
  int64_t num_sealed_ = 0;
};

}  // namespace innerq
