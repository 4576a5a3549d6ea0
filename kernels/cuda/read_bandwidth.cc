#include "kernels/cuda/read_bandwidth.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/launch.h"

namespace innerq::cuda {
namespace {

constexpr int64_t kReadBlocksPerSm = 8;  // of 256 threads: as many as a multiprocessor has at once

}  // namespace

// Many launches between two times of the host's clock, so that waiting for them costs little.
Result<std::optional<double>> MeasureReadBandwidth(cudaStream_t stream,
                                                   int64_t num_multiprocessors) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kBytes = int64_t{1} << 30;
  constexpr int kPasses = 8;
  constexpr int kRounds = 5;
  ASSIGN_OR_RETURN(Buffer memory, AllocateDevice(kBytes));
  ASSIGN_OR_RETURN(Buffer all_zero, AllocateDevice(sizeof(uint32_t)));
  const ReadLaunch launch{.quads = reinterpret_cast<uint4*>(memory.data()),
                          .num_quads = kBytes / static_cast<int64_t>(sizeof(uint4)),
                          .all_zero = reinterpret_cast<uint32_t*>(all_zero.data()),
                          .num_blocks = num_multiprocessors * kReadBlocksPerSm};
  RETURN_IF_CUDA_ERROR(LaunchFill(launch, stream), "filling memory");
  RETURN_IF_CUDA_ERROR(LaunchRead(launch, stream), "reading memory");
  double fastest = std::numeric_limits<double>::infinity();
  for (int round = 0; round < kRounds; ++round) {
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream), "reading memory");
    const Clock::time_point begin = Clock::now();
    for (int pass = 0; pass < kPasses; ++pass) {
      RETURN_IF_CUDA_ERROR(LaunchRead(launch, stream), "reading memory");
    }
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream), "reading memory");
    fastest = std::min(fastest, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return std::optional(static_cast<double>(kPasses * kBytes) / fastest);
}

}  // namespace innerq::cuda
