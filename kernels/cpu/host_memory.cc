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

#include "kernels/paged_kv.h"

namespace innerq {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kLargeBytes = 2 * kHugePage;

// The number behind `name` at the start of a line of a file; -1 if there is none.
int64_t Field(const char* path, const std::string& name) {
  std::ifstream file(path);
  std::string key, rest;
  int64_t number = 0;
  while (file >> key >> number && std::getline(file, rest)) {
    if (key == name) return number;
  }
  return -1;
}

}  // namespace

int64_t AvailableHostBytes() {
  int64_t available = std::numeric_limits<int64_t>::max();
  const int64_t kib = Field("/proc/meminfo", "MemAvailable:");
  if (kib >= 0) available = kib * 1024;
  int64_t limit = 0, used = 0;  // the limit may read "max"
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit &&
      std::ifstream("/sys/fs/cgroup/memory.current") >> used) {
    // Pages of files that were read count as used but make way.
    const int64_t cached = Field("/sys/fs/cgroup/memory.stat", "inactive_file");
    available = std::min(available, limit - used + std::max<int64_t>(cached, 0));
  }
  return available;
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
  std::memset(memory, 0, padded);
  return Buffer(static_cast<std::byte*>(memory), bytes, [](std::byte* data) { std::free(data); });
}

}  // namespace innerq
