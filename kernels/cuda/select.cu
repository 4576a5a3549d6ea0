// SelectTop: the largest elements of rows, by keys that order them.
//
// Blocks find the k largest keys of 4096 elements each; one block per row then does the same with
// what they found. k threads that have a largest key of at least T hold at least k keys that large,
// and only they hold such keys: with T the k-th largest of the threads' largest keys, few keys are
// left to be ranked by counting.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace innerq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPerThread = static_cast<int>(kSelectElements) / kThreads;
constexpr int kMaxK = static_cast<int>(kMaxTopLogits);
static_assert(kMaxK <= kThreads);
constexpr int kBlocksPerSm = 6;  // as many as keep their keys in registers

constexpr uint64_t kNoKey = 0;  // below all keys

// Larger for what SelectTop ranks higher: the rank of x above, the complement of its column below.
__device__ uint64_t KeyOf(float x, int64_t column) {
  constexpr uint32_t kSign = 0x80000000u, kExponent = 0x7f800000u;
  uint32_t bits = __float_as_uint(x);
  if (bits == kSign) bits = 0;  // zeros are equal
  uint32_t rank = (bits & kSign) != 0 ? ~bits : bits | kSign;
  if ((bits & kExponent) == kExponent) rank = 0xffffffffu;  // not finite
  return static_cast<uint64_t>(rank) << 32 | ~static_cast<uint32_t>(column);
}
__device__ int32_t ColumnOf(uint64_t key) {
  return static_cast<int32_t>(~static_cast<uint32_t>(key));
}

// How many of keys [0, count) are above `key`.
__device__ int RankOf(uint64_t key, const uint64_t* keys, int count) {
  int rank = 0;
  for (int i = 0; i < count; ++i) rank += keys[i] > key ? 1 : 0;
  return rank;
}

// Shared memory of SelectKeys.
struct Selection {
  uint64_t largest[kThreads];         // of each thread
  uint64_t left[kMaxK * kPerThread];  // keys of at least `threshold`
  uint64_t best[kMaxK];               // the result, descending; kNoKey where there are fewer
  uint64_t threshold;
  int num_left;
};

// The k largest of the block's keys, of which each thread has kPerThread, to `shared.best`. All
// keys but kNoKey differ, so that neither the order of atomics nor anything else shows in it.
__device__ void SelectKeys(const uint64_t (&keys)[kPerThread], int k, Selection& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t largest = kNoKey;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) largest = keys[i] > largest ? keys[i] : largest;
  shared.largest[thread] = largest;
  if (thread == 0) {
    shared.threshold = 1;  // unless k threads have a key: all but kNoKey
    shared.num_left = 0;
  }
  if (thread < k) shared.best[thread] = kNoKey;
  __syncthreads();
  if (largest != kNoKey && RankOf(largest, shared.largest, kThreads) == k - 1) {
    shared.threshold = largest;
  }
  __syncthreads();
  const uint64_t threshold = shared.threshold;
  if (largest >= threshold) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (keys[i] >= threshold) shared.left[atomicAdd(&shared.num_left, 1)] = keys[i];
    }
  }
  __syncthreads();
  for (int i = thread; i < shared.num_left; i += kThreads) {
    const uint64_t key = shared.left[i];
    const int rank = RankOf(key, shared.left, shared.num_left);
    if (rank < k) shared.best[rank] = key;
  }
  __syncthreads();
}

// Grid: parts of a row, rows. Block: 128 threads find the largest of 4096 elements. Shared: a
// Selection, 18 KiB.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    SelectPartsKernel(const SelectTopLaunch args) {
  __shared__ Selection shared;
  const float* x = args.x + blockIdx.y * args.width;
  const int64_t first = blockIdx.x * kSelectElements + threadIdx.x;
  float values[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {  // all on their way before the first is needed
    const int64_t column = first + i * kThreads;
    values[i] = column < args.width ? x[column] : 0;
  }
  uint64_t keys[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t column = first + i * kThreads;
    keys[i] = column < args.width ? KeyOf(values[i], column) : kNoKey;
  }
  const int k = static_cast<int>(args.k);
  SelectKeys(keys, k, shared);
  const int64_t part = blockIdx.y * SelectParts(args.width) + blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < k) args.keys[part * k + thread] = shared.best[thread];
}

// Grid: rows. Block: 128 threads find the largest of what its parts have found, in rounds of 4096
// keys: the best so far and as many more as fit. Shared: a Selection, 18 KiB.
__global__ void MergePartsKernel(const SelectTopLaunch args) {
  __shared__ Selection shared;
  const int thread = static_cast<int>(threadIdx.x), k = static_cast<int>(args.k);
  const int64_t num_keys = SelectParts(args.width) * k;
  const uint64_t* from = args.keys + blockIdx.x * num_keys;
  int num_best = 0;
  for (int64_t begin = 0; begin < num_keys;) {
    uint64_t keys[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = thread + i * kThreads;
      const int64_t next = begin + at - num_best;
      keys[i] = at < num_best ? shared.best[at] : next < num_keys ? from[next] : kNoKey;
    }
    __syncthreads();
    SelectKeys(keys, k, shared);
    begin += kSelectElements - num_best;
    num_best = k;
  }
  if (thread >= k) return;
  const int32_t column = ColumnOf(shared.best[thread]);
  args.out[blockIdx.x * args.k + thread] = {args.x[blockIdx.x * args.width + column], column};
}

}  // namespace

cudaError_t LaunchSelectTop(const SelectTopLaunch& launch, cudaStream_t stream) {
  const dim3 parts(static_cast<unsigned>(SelectParts(launch.width)),
                   static_cast<unsigned>(launch.rows));
  SelectPartsKernel<<<parts, kThreads, 0, stream>>>(launch);
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  MergePartsKernel<<<static_cast<unsigned>(launch.rows), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace innerq::cuda
