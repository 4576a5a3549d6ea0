// CUDA kernels on the CPU, thread by thread: what the language adds to C++, as far as our kernels
// use it. translate.py includes this file and turns kernel<<<grid, block, shared, stream>>>(x) into
// EmulateKernel. Blocks run one after another; the threads of a block are fibers that run from one
// barrier to the next. It shows whether indices, barriers and arithmetic are right, and whether
// asynchronous copies are waited for and aligned. It does not show races between barriers, other
// alignment, timing, or what the hardware rounds differently.
#pragma once

#include <cuda_runtime_api.h>

#include <bit>
#include <cmath>
#include <functional>

#include "tests/cuda_emulation/mma_fragments.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time, in one thread of the host
#define __grid_constant__
#define __launch_bounds__(...)

namespace innerq::emulation {

extern dim3 thread_index, block_index, block_extent;
extern std::byte* dynamic_shared;  // of the block

// What stands between <<< and >>>.
struct LaunchConfiguration {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;  // there is one
};

// Runs `kernel` for every thread of every block when the stream comes to it. Shared memory starts
// as NaN. Threads that wait for each other forever stop the program.
void EmulateKernel(const LaunchConfiguration& launch, std::function<void()> kernel);
void SyncBlock();
void SyncWarp();
// The value of the lane whose id differs by `mask`, and of lane `lane`.
float ShuffleXor(float value, int mask);
float Shuffle(float value, int lane);
// The product of the warp; see MultiplyAddFragments.
void MultiplyAdd(const MmaLane& lane);
void MultiplyAdd(const ByteMmaLane& lane);
// Four matrices of 8 x 8 halves, whose row g of matrix j lane 8j + g names; see
// kernels/cuda/ptx.cuh.
void LoadMatrices(const void* row, uint32_t (&words)[4]);
// Copies of 16 bytes by the thread, of which the first `bytes` are read and the others are zeros.
// They happen as late as they may: when it waits for them.
void CopyAsync(void* to, const void* from, int bytes);
void CommitCopies();
void WaitForCopies(size_t pending_groups);

}  // namespace innerq::emulation

#define threadIdx ::innerq::emulation::thread_index
#define blockIdx ::innerq::emulation::block_index
#define blockDim ::innerq::emulation::block_extent

inline void __syncthreads() { innerq::emulation::SyncBlock(); }
inline void __syncwarp() { innerq::emulation::SyncWarp(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return innerq::emulation::ShuffleXor(value, mask);
}
inline int __shfl_sync(unsigned, int value, int lane) {
  return std::bit_cast<int>(innerq::emulation::Shuffle(std::bit_cast<float>(value), lane));
}
inline int __shfl_xor_sync(unsigned, int value, int mask) {
  return std::bit_cast<int>(innerq::emulation::ShuffleXor(std::bit_cast<float>(value), mask));
}
inline int __any_sync(unsigned, int predicate) {
  float any = predicate != 0 ? 1.0f : 0.0f;
  for (int mask = 1; mask < 32; mask *= 2) any += innerq::emulation::ShuffleXor(any, mask);
  return any > 0;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline int atomicExch(int* address, int value) {
  const int before = *address;
  *address = value;
  return before;
}
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
using std::isfinite;
using std::isnan;
