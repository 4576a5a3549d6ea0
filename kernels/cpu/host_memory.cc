#include "kernels/cpu/host_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/cpu/control_group.h"
#include "kernels/cpu/host_threads.h"
#include "kernels/paged_kv.h"

namespace innerq {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kLargeBytes = 2 * kHugePage;

// MemAvailable of /proc/meminfo, in KiB; -1 if there is none.
int64_t AvailableKiB() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  int64_t number = 0;
  while (file >> key >> number && std::getline(file, unit)) {
    if (key == "MemAvailable:") return number;
  }
  return -1;
}

}  // namespace

int64_t AvailableHostBytes() {
  int64_t available = std::numeric_limits<int64_t>::max();
  const int64_t kib = AvailableKiB();
  if (kib >= 0) available = kib * 1024;
  return std::min(available, ReadControlGroupLimits().memory_left);
}

Result<Buffer> AllocateHost(int64_t bytes) {
  CHECK(bytes >= 0, "negative size");
  const bool large = bytes >= kLargeBytes;
  // A system that overcommits grants any size and kills the process on use: look first.
  const int64_t available = large ? AvailableHostBytes() : bytes;
  const bool fits = bytes <= available;
  const int64_t alignment = large ? kHugePage : kCacheLine;
  const auto padded = static_cast<size_t>(RoundUp(std::max<int64_t>(bytes, 1), alignment));
  void* memory = fits ? std::aligned_alloc(static_cast<size_t>(alignment), padded) : nullptr;
  if (memory == nullptr) {
    return Error{ErrorCode::kResourceExhausted,
                 "cannot allocate " + std::to_string(bytes) + " bytes: " +
                     (fits ? "the system refuses them"
                           : "only " + std::to_string(available) + " are available")};
  }
#if defined(__linux__)
  if (large) madvise(memory, padded, MADV_HUGEPAGE);  // advice: may fail
#endif
  // Each thread touches its own first, so that a machine of several memory nodes shares the load.
  const size_t chunk = large ? static_cast<size_t>(kHugePage) : padded;
  const auto clear = [memory, chunk](int64_t i, int) {
    std::memset(static_cast<std::byte*>(memory) + static_cast<size_t>(i) * chunk, 0, chunk);
  };
  RunInParallel(large ? UsableCores() : 1, static_cast<int64_t>(padded / chunk), clear);
  return Buffer(static_cast<std::byte*>(memory), bytes, [](std::byte* data) { std::free(data); });
}

}  // namespace innerq
