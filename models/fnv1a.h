// Fnv1a: FNV-1a of 64 bits (Fowler, Noll and Vo; draft-eastlake-fnv).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace innerq {

class Fnv1a {
 public:
  void Add(std::span<const std::byte> bytes) {
    for (const std::byte byte : bytes) {
      value_ = (value_ ^ static_cast<uint64_t>(byte)) * 0x100000001b3u;
    }
  }
  uint64_t value() const { return value_; }  // of all that was added, in order

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

}  // namespace innerq
