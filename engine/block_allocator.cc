#include "engine/block_allocator.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

namespace innerq {

BlockRef::BlockRef(const BlockRef& other) : allocator_(other.allocator_), id_(other.id_) {
  if (allocator_ != nullptr) allocator_->AddHolder(id_);
}

void BlockRef::Reset() {
  if (allocator_ != nullptr) allocator_->RemoveHolder(id_);
  allocator_ = nullptr;
  id_ = -1;
}

CachedBlock::CachedBlock(const BlockRef& ref) : ref_(ref) {
  CHECK(ref_, "there is no block to keep");
  ref_.allocator_->SetCached(ref_.id_, true);
}

void CachedBlock::Reset() {
  if (!ref_) return;
  ref_.allocator_->SetCached(ref_.id_, false);
  ref_.Reset();
}

bool CachedBlock::idle() const { return ref_ && ref_.allocator_->IsIdle(ref_.id_); }

BlockAllocator::BlockAllocator(int64_t size) {
  CHECK(size >= 0 && size <= std::numeric_limits<int32_t>::max(), "block ids are 32-bit");
  num_holders_.resize(static_cast<size_t>(size));
  is_cached_.resize(static_cast<size_t>(size));
  free_.resize(static_cast<size_t>(size));
  std::iota(free_.begin(), free_.end(), 0);  // ascending: a heap already
}

BlockAllocator::~BlockAllocator() {
  CHECK(num_free() == size(),
        std::to_string(size() - num_free()) + " blocks outlive their allocator");
}

BlockRef BlockAllocator::Allocate() {
  CHECK(!free_.empty(), "no free block among " + std::to_string(size()));
  std::pop_heap(free_.begin(), free_.end(), std::greater<>());
  const int32_t id = free_.back();
  free_.pop_back();
  num_holders_[static_cast<size_t>(id)] = 1;
  return BlockRef(this, id);
}

void BlockAllocator::AddHolder(int32_t id) {
  if (IsIdle(id)) --num_idle_;
  ++num_holders_[static_cast<size_t>(id)];
}

void BlockAllocator::RemoveHolder(int32_t id) {
  int32_t& holders = num_holders_[static_cast<size_t>(id)];
  CHECK(holders > 0, "block " + std::to_string(id) + " returned twice");
  --holders;
  if (IsIdle(id)) ++num_idle_;
  if (holders > 0) return;
  free_.push_back(id);
  std::push_heap(free_.begin(), free_.end(), std::greater<>());
}

bool BlockAllocator::IsIdle(int32_t id) const {
  return is_cached_[static_cast<size_t>(id)] && num_holders_[static_cast<size_t>(id)] == 1;
}

void BlockAllocator::SetCached(int32_t id, bool cached) {
  CHECK(is_cached_[static_cast<size_t>(id)] != cached,
        "block " + std::to_string(id) + " enters or leaves a cache twice");
  if (IsIdle(id)) --num_idle_;
  is_cached_[static_cast<size_t>(id)] = cached;
  if (IsIdle(id)) ++num_idle_;
}

void BlockAllocator::CheckIntegrity() const {
  std::vector<bool> is_free(num_holders_.size());
  for (const int32_t id : free_) {
    CHECK(id >= 0 && id < size(), "free block " + std::to_string(id) + " outside the pool");
    CHECK(!is_free[static_cast<size_t>(id)], "block " + std::to_string(id) + " free twice");
    is_free[static_cast<size_t>(id)] = true;
  }
  int64_t idle = 0;
  for (size_t id = 0; id < num_holders_.size(); ++id) {
    CHECK(is_free[id] == (num_holders_[id] == 0),
          "block " + std::to_string(id) + " has " + std::to_string(num_holders_[id]) +
              " holders and is " + (is_free[id] ? "free" : "not free"));
    CHECK(num_holders_[id] > 0 || !is_cached_[id], "a free block is in a cache");
    if (IsIdle(static_cast<int32_t>(id))) ++idle;
  }
  CHECK(idle == num_idle_,
        std::to_string(idle) + " blocks are idle, not " + std::to_string(num_idle_));
}

void BlockTable::Seal(int64_t page, BlockRef sealed) {
  Entry& entry = entries_[static_cast<size_t>(page)];
  CHECK(entry.open && !entry.sealed, "only an open page can be sealed, and only once");
  entry.sealed = std::move(sealed);
  ++num_sealed_;
}

void BlockTable::ReleaseOpen(int64_t page) {
  Entry& entry = entries_[static_cast<size_t>(page)];
  CHECK(entry.open && entry.sealed, "only a page just sealed gives up its open copy");
  entry.open.Reset();
}

}  // namespace innerq
