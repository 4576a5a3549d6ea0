// PageCounts: how many pages a sequence needs, for one step and at worst. All resource arithmetic
// of scheduling, admission and memory planning.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/paged_kv.h"

namespace innerq {

// An amount of each kind of cache memory.
struct PageCounts {
  int64_t open = 0;    // F16 pages
  int64_t sealed = 0;  // quantized pages
  int64_t norms = 0;   // key norm slots

  bool FitsIn(const PageCounts& room) const {
    return open <= room.open && sealed <= room.sealed && norms <= room.norms;
  }
  PageCounts operator+(const PageCounts& other) const {
    return {open + other.open, sealed + other.sealed, norms + other.norms};
  }
  PageCounts operator-(const PageCounts& other) const {
    return {open - other.open, sealed - other.sealed, norms - other.norms};
  }
  bool operator==(const PageCounts&) const = default;
};

// "4 open pages, 7 sealed pages, 1 key norm"
std::string ToString(const PageCounts& counts);

// What a step that computes positions [begin, end) takes in addition to what the sequence holds
// after [0, begin): open pages for its tokens, sealed pages for those that its last row sees as
// sealed, a key norm with the first of them. Open copies of the pages it seals go back after it.
PageCounts ChunkPages(const KvLayout& layout, int64_t begin, int64_t end, int64_t exact_before);

// The most that a sequence holds at any time while it computes positions [0, num_positions) in
// steps as small as they need to be. Where this fits, a sequence that has the pools to itself never
// gets stuck.
PageCounts PeakPages(const KvLayout& layout, int64_t num_positions, int64_t exact_before);

// The componentwise worst case of PeakPages over all ways to split `num_positions` into prompt and
// answer.
PageCounts WorstPeakPages(const KvLayout& layout, int64_t num_positions, bool exact_prefill);

// Open pages of a sequence that has sealed some, while it seals the next: sinks, recent pages, the
// page being written and the page being sealed.
int64_t OpenWindowPages(const KvLayout& layout);

}  // namespace innerq
