// Staging: takes what operations get in host memory (token ids, slices, page tables) to the device,
// in order with the stream and without an allocation.
#pragma once

#include <array>
#include <cstring>
#include <span>

#include "kernels/cuda/cuda_memory.h"
#include "kernels/paged_kv.h"

namespace innerq::cuda {

// One array of one operation. Its last contents are remembered: the layers of a step ask for the
// same arrays, which travel once.
enum class StagingSlot {
  kTokenIds,
  kPositions,
  kInverseFrequency,
  kGatherRows,
  kAppendTargets,
  kNormIds,
  kNormPages,
  kSealItems,
  kSlices,
  kPages,
  kDecodeTiles,
  kDecodeItems,
  kPrefillTiles,
  kPrefillItems,
  kCount
};

// A page-locked buffer and its copy on the device, filled from the start after each Reset. When it
// is full it waits for the stream and begins again: what is enqueued has been read by then. Arrays
// of one operation that are uploaded within Begin and the launch stay valid together.
class Staging {
 public:
  Result<void> Reserve(int64_t bytes) {
    if (bytes <= host_.bytes()) return {};
    Reset();
    ASSIGN_OR_RETURN(host_, AllocatePinned(bytes));
    ASSIGN_OR_RETURN(device_, AllocateDevice(bytes));
    return {};
  }

  // Forgets everything; the stream must be idle.
  void Reset() {
    used_ = 0;
    last_ = {};
  }

  // Makes sure that `bytes` and the alignment of up to `num_arrays` arrays fit.
  cudaError_t Begin(int64_t bytes, int64_t num_arrays, cudaStream_t stream) {
    const int64_t most = bytes + num_arrays * kAlignment;
    CHECK(most <= host_.bytes(), "a step larger than reserved: " + std::to_string(most) +
                                     " bytes of arguments, " + std::to_string(host_.bytes()) +
                                     " reserved");
    if (used_ + most <= host_.bytes()) return cudaSuccess;
    const cudaError_t status = cudaStreamSynchronize(stream);
    Reset();
    return status;
  }

  // The device's copy of `items`. Null when there are none.
  template <typename T>
  cudaError_t Upload(StagingSlot slot, std::span<const T> items, cudaStream_t stream,
                     const T** on_device) {
    static_assert(std::is_trivially_copyable_v<T>);
    *on_device = nullptr;
    if (items.empty()) return cudaSuccess;
    Last& last = last_[static_cast<size_t>(slot)];
    const auto bytes = static_cast<int64_t>(items.size_bytes());
    const bool same = last.bytes == bytes &&
                      std::memcmp(host_.data() + last.at, items.data(), items.size_bytes()) == 0;
    if (!same) {
      CHECK(used_ + bytes <= host_.bytes(), "Upload without Begin");
      last = {used_, bytes};
      std::memcpy(host_.data() + last.at, items.data(), items.size_bytes());
      used_ = RoundUp(used_ + bytes, kAlignment);
      const cudaError_t status =
          cudaMemcpyAsync(device_.data() + last.at, host_.data() + last.at, items.size_bytes(),
                          cudaMemcpyHostToDevice, stream);
      if (status != cudaSuccess) return status;
    }
    *on_device = reinterpret_cast<const T*>(device_.data() + last.at);
    return cudaSuccess;
  }

 private:
  static constexpr int64_t kAlignment = 256;
  struct Last {
    int64_t at = 0;
    int64_t bytes = 0;
  };

  Buffer host_, device_;
  int64_t used_ = 0;
  std::array<Last, static_cast<size_t>(StagingSlot::kCount)> last_{};
};

}  // namespace innerq::cuda
