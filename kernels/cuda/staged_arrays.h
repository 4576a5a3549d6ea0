// StagedArrays: where the arrays that operations get in host memory (token ids, slices, page
// tables) lie on the device. Host only, without a CUDA header, so that it is tested where there is
// no GPU; launch_queue.h copies what has changed.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "kernels/paged_kv.h"

namespace innerq::cuda {

// One array of one operation.
enum class StagingSlot {
  kTokenIds,
  kPositions,
  kInverseFrequency,
  kGatherRows,
  kAppendTargets,
  kNormIds,
  kNormPages,
  kSealItems,
  kPages,
  kDecodeTiles,
  kDecodeItems,
  kPrefillTiles,
  kPrefillItems,
  kCount
};

// Places in a page-locked buffer and, at the same offsets, in its copy on the device. What a step
// stages in a slot first lies in the slot's first place, other contents in its second, and so on:
// steps that stage the same kinds of arrays find them at the same addresses, whatever is in them.
// Contents are remembered from step to step, so that only those that changed are copied. A place
// moves when it must grow, by powers of two.
class StagedArrays {
 public:
  // Bytes [begin, end) of both buffers.
  struct Range {
    int64_t begin = 0, end = 0;
  };

  // Takes buffers of `bytes` and forgets all places. Nothing may be under way to or from them.
  void Reset(std::byte* host, std::byte* device, int64_t bytes) {
    host_ = host;
    device_ = device;
    bytes_ = bytes;
    Reset();
  }
  void Reset() {
    used_ = 0;
    for (std::vector<Place>& places : slots_) {
      places.clear();
      places.reserve(kUsualPlaces);
    }
    changed_.clear();
    changed_.reserve(kUsualPlaces * slots_.size());
  }

  // Puts `items` into the host's buffer; `on_device` is where the device will see them, null when
  // there are none. False when there is no room.
  bool Stage(StagingSlot slot, std::span<const std::byte> items, const std::byte** on_device) {
    *on_device = nullptr;
    if (items.empty()) return true;
    const auto bytes = static_cast<int64_t>(items.size());
    std::vector<Place>& places = slots_[static_cast<size_t>(slot)];
    for (Place& place : places) {
      if (Holds(place, items)) {
        place.in_use = true;
        *on_device = device_ + place.at;
        return true;
      }
      if (place.in_use) continue;
      if (bytes > place.capacity && !Allocate(bytes, &place)) return false;
      *on_device = Write(items, place);
      return true;
    }
    Place place;
    if (!Allocate(bytes, &place)) return false;
    places.push_back(place);
    *on_device = Write(items, places.back());
    return true;
  }

  // What was written since the last call, ascending; ranges with little between them are joined.
  // What lies between is as on the device, or is written while it is copied: then it is copied
  // again before anyone reads it. Valid until the next call of any method.
  std::span<const Range> TakeChanged() {
    std::sort(changed_.begin(), changed_.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    size_t count = 0;
    for (const Range& range : changed_) {
      if (count > 0 && range.begin - joined_[count - 1].end <= kJoinedGap) {
        joined_[count - 1].end = std::max(joined_[count - 1].end, range.end);
      } else {
        if (count == joined_.size()) joined_.emplace_back();
        joined_[count++] = range;
      }
    }
    changed_.clear();
    return {joined_.data(), count};
  }

  // The next step may write to all places: the device has read them.
  void EndStep() {
    for (std::vector<Place>& places : slots_) {
      for (Place& place : places) place.in_use = false;
    }
  }

  // Takes it that the device has none of the contents. Places stay.
  void ForgetContents() {
    for (std::vector<Place>& places : slots_) {
      for (Place& place : places) place.bytes = 0;
    }
    changed_.clear();
  }

 private:
  static constexpr int64_t kLeastCapacity = 4096;
  // To copy so much takes less time than to start another copy.
  static constexpr int64_t kJoinedGap = int64_t{64} << 10;
  static constexpr size_t kUsualPlaces = 8;  // of a slot in a step; more take memory

  struct Place {
    int64_t at = 0;
    int64_t capacity = 0;
    int64_t bytes = 0;    // 0: contents unknown
    bool in_use = false;  // by this step
  };

  bool Holds(const Place& place, std::span<const std::byte> items) const {
    return place.bytes == static_cast<int64_t>(items.size()) &&
           std::memcmp(host_ + place.at, items.data(), items.size()) == 0;
  }

  // Gives the place memory for `bytes`; what it had is lost until Reset.
  bool Allocate(int64_t bytes, Place* place) {
    const auto capacity =
        static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(bytes, kLeastCapacity))));
    if (used_ + capacity > bytes_) return false;
    *place = {.at = used_, .capacity = capacity};
    used_ += capacity;
    return true;
  }

  const std::byte* Write(std::span<const std::byte> items, Place& place) {
    std::memcpy(host_ + place.at, items.data(), items.size());
    place.bytes = static_cast<int64_t>(items.size());
    place.in_use = true;
    changed_.push_back({place.at, place.at + place.bytes});
    return device_ + place.at;
  }

  std::byte *host_ = nullptr, *device_ = nullptr;
  int64_t bytes_ = 0, used_ = 0;
  std::array<std::vector<Place>, static_cast<size_t>(StagingSlot::kCount)> slots_;
  std::vector<Range> changed_, joined_;
};

}  // namespace innerq::cuda
