// LaunchRecord, GraphCache: what a run of launches is, byte for byte, and which such runs have come
// before. Host only, without a CUDA header, so that it is tested where there is no GPU;
// launch_queue.h does the launching.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/result.h"

namespace innerq::cuda {

// Launches that have not happened yet: each a function that launches (a pointer, which also says
// what kind of launch it is) and the bytes of its argument. Two equal records do the same work on
// the same memory. Arguments that a caller may compare must have no indeterminate padding.
template <typename Function>
class LaunchRecord {
 public:
  struct Launch {
    Function function = nullptr;
    const char* what = nullptr;  // for errors
    size_t at = 0;               // of the argument, see ArgumentOf
  };

  // Memory for so much, so that Add takes none.
  void Reserve(size_t launches, size_t argument_bytes) {
    launches_.reserve(launches);
    bytes_.reserve(launches * kAlignment + argument_bytes);
  }

  void Add(Function function, const char* what, std::span<const std::byte> argument) {
    const size_t at = bytes_.size();
    launches_.push_back({function, what, at});
    bytes_.resize(at + (argument.size() + kAlignment - 1) / kAlignment * kAlignment);
    std::memcpy(bytes_.data() + at, argument.data(), argument.size());
    Mix(reinterpret_cast<uintptr_t>(function));
    for (size_t i = at; i < bytes_.size(); i += sizeof(uint64_t)) {
      uint64_t word;
      std::memcpy(&word, bytes_.data() + i, sizeof(word));
      Mix(word);
    }
  }

  void Clear() {
    launches_.clear();
    bytes_.clear();
    hash_ = 0;
  }

  int64_t num_launches() const { return static_cast<int64_t>(launches_.size()); }
  std::span<const Launch> launches() const { return launches_; }
  // Aligned to 16 bytes.
  const std::byte* ArgumentOf(const Launch& launch) const { return bytes_.data() + launch.at; }
  uint64_t hash() const { return hash_; }

  bool operator==(const LaunchRecord& other) const {
    if (hash_ != other.hash_ || launches_.size() != other.launches_.size()) return false;
    for (size_t i = 0; i < launches_.size(); ++i) {
      const Launch &a = launches_[i], &b = other.launches_[i];
      if (a.function != b.function || a.at != b.at) return false;
    }
    return bytes_ == other.bytes_;
  }

 private:
  static constexpr size_t kAlignment = 16;
  static_assert(__STDCPP_DEFAULT_NEW_ALIGNMENT__ >= kAlignment);

  void Mix(uint64_t word) {
    hash_ = (hash_ ^ word) * 0x9e3779b97f4a7c15;  // 2^64 divided by the golden ratio, odd
    hash_ ^= hash_ >> 32;
  }

  std::vector<Launch> launches_;
  std::vector<std::byte> bytes_;
  uint64_t hash_ = 0;
};

// Graphs by the records that they were made of. Bounded by the number of launches in them all;
// those that were used longest ago go first.
template <typename Record, typename Graph>
class GraphCache {
 public:
  explicit GraphCache(int64_t max_launches) : max_launches_(max_launches) {}

  // Null if there is none.
  Graph* Find(const Record& record) {
    const auto found = entries_.find(record.hash());
    if (found == entries_.end() || !(found->second.record == record)) return nullptr;
    found->second.last_use = ++now_;
    return &found->second.graph;
  }

  // Whether a record without a graph should get one: whether it was asked for before, as far as is
  // remembered.
  bool Recurs(const Record& record) {
    const uint64_t hash = record.hash();
    if (entries_.contains(hash)) return false;  // the place of another record
    return std::exchange(seen_[hash % kSeen], hash) == hash;
  }

  Graph* Insert(const Record& record, Graph graph) {
    const auto [entry, is_new] =
        entries_.try_emplace(record.hash(), Entry{record, std::move(graph), ++now_});
    CHECK(is_new, "a graph for a record that has one");
    num_launches_ += record.num_launches();
    return &entry->second.graph;
  }

  // Drops graphs beyond the bound. None of them may run.
  void Trim() {
    while (num_launches_ > max_launches_) {
      auto oldest = entries_.begin();
      for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
        if (entry->second.last_use < oldest->second.last_use) oldest = entry;
      }
      num_launches_ -= oldest->second.record.num_launches();
      entries_.erase(oldest);
    }
  }

  // Likewise drops all, and what was seen.
  void Clear() {
    entries_.clear();
    num_launches_ = 0;
    seen_ = {};
  }

  int64_t size() const { return static_cast<int64_t>(entries_.size()); }

 private:
  static constexpr size_t kSeen = 4096;  // hashes remembered, the last one of each remainder

  struct Entry {
    Record record;
    Graph graph;
    uint64_t last_use = 0;
  };

  const int64_t max_launches_;
  std::unordered_map<uint64_t, Entry> entries_;  // by the record's hash
  int64_t num_launches_ = 0;                     // in all graphs
  uint64_t now_ = 0;
  std::array<uint64_t, kSeen> seen_{};
};

}  // namespace innerq::cuda
