#include "kernels/cpu/read_bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

#include "kernels/cpu/host_memory.h"

namespace innerq {

Result<double> MeasureReadBandwidth([[maybe_unused]] int threads) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kBytes = int64_t{1} << 30;
  constexpr int64_t kSlices = 32;
  constexpr int kRounds = 3;
  constexpr int64_t kWords = kBytes / static_cast<int64_t>(sizeof(uint64_t));
  constexpr int64_t kSliceWords = kWords / kSlices;
  ASSIGN_OR_RETURN(Buffer memory, AllocateHost(kBytes));
  auto* const words = reinterpret_cast<uint64_t*>(memory.data());
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < kWords; ++i) words[i] = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15u;
  double fastest = std::numeric_limits<double>::infinity();
  uint64_t all = 0;
  for (int64_t run = 0; run < kRounds * kSlices; ++run) {
    const uint64_t* const slice = words + run % kSlices * kSliceWords;
    const Clock::time_point begin = Clock::now();
    uint64_t any = 0;
#pragma omp parallel for num_threads(threads) reduction(| : any)
    for (int64_t i = 0; i < kSliceWords; i += 32) {  // one word of each cache line
      any |= slice[i] | slice[i + 8] | slice[i + 16] | slice[i + 24];
    }
    all |= any;
    fastest = std::min(fastest, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  CHECK(all != 0, "what was read must be used");
  return static_cast<double>(kBytes / kSlices) / fastest;
}

}  // namespace innerq
