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

// Memory that can be used without swapping, in bytes, from /proc/meminfo; unlimited if unknown.
int64_t AvailableBytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  int64_t kib = 0;
  std::string rest;
  while (meminfo >> key >> kib && std::getline(meminfo, rest)) {
    if (key == "MemAvailable:") return kib * 1024;
  }
  return std::numeric_limits<int64_t>::max();
}

}  // namespace

Result<Buffer> AllocateHost(int64_t bytes) {
  CHECK(bytes >= 0, "negative size");
  const bool large = bytes >= kLargeBytes;
  // A system that overcommits grants any size and kills the process on use: look first.
  const bool fits = !large || bytes <= AvailableBytes();
  const int64_t alignment = large ? kHugePage : kCacheLine;
  const auto padded = static_cast<size_t>(RoundUp(std::max<int64_t>(bytes, 1), alignment));
  void* memory = fits ? std::aligned_alloc(static_cast<size_t>(alignment), padded) : nullptr;
  if (memory == nullptr) {
    return Error{ErrorCode::kResourceExhausted, "cannot allocate " + std::to_string(bytes) +
                                                    " bytes: not enough memory is available"};
  }
#if defined(__linux__)
  if (large) madvise(memory, padded, MADV_HUGEPAGE);  // advice: may fail
#endif
  std::memset(memory, 0, padded);
  return Buffer(static_cast<std::byte*>(memory), bytes, [](std::byte* data) { std::free(data); });
}

}  // namespace innerq
