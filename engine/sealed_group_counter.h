// SealedGroupCounter: how many groups of what was sealed are asymmetric.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/paged_kv.h"

namespace innerq {

// Counts the groups of pages as they are sealed, from the pages themselves. Where the host cannot
// read the cache, pages are copied first, a step's together. One thread.
class SealedGroupCounter {
 public:
  // `layers` are those of the cache whose pages are counted; it and `backend` must outlive this. A
  // step rarely seals more than `most_seals` pages (an exact prefill's last one does). Errors:
  // resource exhausted.
  static Result<SealedGroupCounter> Create(Backend* backend, std::span<const PagedKvView> layers,
                                           int64_t most_seals);

  // Adds pages that a step has sealed and waited for. Waits for the copies of all of them together,
  // or of as many as have room; for none where no layer has groups of either kind. Errors: those of
  // Synchronize.
  Result<void> Add(std::span<const SealItem> seals);
  // Of all pages, per layer; empty before the first.
  const std::vector<LayerGroups>& groups() const { return groups_; }

 private:
  SealedGroupCounter(Backend* backend, std::span<const PagedKvView> layers)
      : backend_(backend), layers_(layers) {}
  void Copy(const SealItem& seal, std::byte* to);
  void Count(const SealItem& seal, std::byte* copied);

  Backend* backend_;
  std::span<const PagedKvView> layers_;
  Buffer pages_;            // [room] of what must be copied of a page, for the host
  int64_t page_bytes_ = 0;  // of it; 0: nothing must
  int64_t room_ = 0;        // pages
  std::vector<LayerGroups> groups_;
};

}  // namespace innerq
