#include "tests/cuda_emulation/emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/result.h"

namespace innerq::emulation {

dim3 thread_index, block_index, block_extent;
std::byte* dynamic_shared = nullptr;

namespace {

constexpr size_t kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = size_t{256} << 10;

// Opens when all threads that have not ended wait at it.
struct Barrier {
  int waiting = 0, alive = 0, generation = 0;
  void OpenIfAllWait() {
    if (alive == 0 || waiting < alive) return;
    waiting = 0;
    ++generation;
  }
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<std::byte[]> stack;
  bool ended = false;
  const Barrier* barrier = nullptr;      // that it waits at
  int generation = 0;                    // of the barrier, when it came
  std::vector<Copy> copies;              // not committed
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

// The block that runs. One thread of the host emulates at a time.
struct Block {
  std::vector<Fiber> fibers;
  Barrier all, warps[kMaxThreads / kWarp];
  float shuffled[kMaxThreads];
  MmaLane products[kMaxThreads];
  ByteMmaLane byte_products[kMaxThreads];
  const void* matrix_rows[kMaxThreads];
  size_t current = 0;
  ucontext_t scheduler;
  const std::function<void()>* kernel = nullptr;
};
Block running;

void Pause() { swapcontext(&running.fibers[running.current].context, &running.scheduler); }

void Wait(Barrier& barrier) {
  Fiber& fiber = running.fibers[running.current];
  fiber.barrier = &barrier;
  fiber.generation = barrier.generation;
  ++barrier.waiting;
  barrier.OpenIfAllWait();
  if (barrier.generation == fiber.generation) Pause();
  fiber.barrier = nullptr;
}

void RunThread() {
  (*running.kernel)();
  running.fibers[running.current].ended = true;
  for (Barrier* barrier : {&running.all, &running.warps[running.current / kWarp]}) {
    --barrier->alive;
    barrier->OpenIfAllWait();
  }
  Pause();
}

void StartThreads(size_t count) {
  running.all = {0, static_cast<int>(count), 0};
  for (size_t warp = 0; warp * kWarp < count; ++warp) {
    running.warps[warp] = {0, static_cast<int>(std::min(kWarp, count - warp * kWarp)), 0};
  }
  if (running.fibers.size() < count) running.fibers.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = running.fibers[i];
    if (fiber.stack == nullptr) fiber.stack = std::make_unique<std::byte[]>(kStackBytes);
    fiber.ended = false;
    fiber.barrier = nullptr;
    fiber.copies.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, RunThread, 0);
  }
}

void RunBlock(size_t count) {
  StartThreads(count);
  for (size_t left = count; left > 0;) {
    bool moved = false;
    for (size_t i = 0; i < count; ++i) {
      Fiber& fiber = running.fibers[i];
      const bool held = fiber.barrier != nullptr && fiber.barrier->generation == fiber.generation;
      if (fiber.ended || held) continue;
      running.current = i;
      thread_index = dim3(static_cast<unsigned>(i), 0, 0);
      swapcontext(&running.scheduler, &fiber.context);
      moved = true;
      left -= fiber.ended ? 1 : 0;
    }
    CHECK(moved, "threads of a block wait at different barriers");
  }
}

void RunKernel(const LaunchConfiguration& launch, const std::function<void()>& kernel) {
  const auto [grid, block, shared_bytes, stream] = launch;
  running.kernel = &kernel;
  block_extent = block;
  // Sized to the byte, so that tools see what writes beyond it.
  const std::unique_ptr<std::byte[]> shared(new std::byte[shared_bytes]);
  static_assert(__STDCPP_DEFAULT_NEW_ALIGNMENT__ >= alignof(float4));
  dynamic_shared = shared.get();
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(dynamic_shared, 0xff, shared_bytes);
        block_index = dim3(x, y, z);
        RunBlock(block.x);
      }
    }
  }
}

}  // namespace

void EmulateKernel(const LaunchConfiguration& launch, std::function<void()> kernel) {
  CHECK(launch.block.y == 1 && launch.block.z == 1 && launch.block.x <= kMaxThreads,
        "blocks have one dimension");
  the_stream.Add([launch, kernel = std::move(kernel)] { RunKernel(launch, kernel); });
}

void SyncBlock() { Wait(running.all); }
void SyncWarp() { Wait(running.warps[running.current / kWarp]); }

float Shuffle(float value, int lane) {
  const size_t self = running.current;
  running.shuffled[self] = value;
  SyncWarp();
  const float other = running.shuffled[self / kWarp * kWarp + static_cast<size_t>(lane)];
  SyncWarp();
  return other;
}
float ShuffleXor(float value, int mask) {
  return Shuffle(value, static_cast<int>(running.current % kWarp) ^ mask);
}

namespace {

// `lanes`: of all threads of the block.
template <typename Lane>
void MultiplyAddOfWarp(const Lane& lane, Lane* lanes) {
  const size_t self = running.current, first = self / kWarp * kWarp;
  Barrier& warp = running.warps[self / kWarp];
  CHECK(warp.alive == kWarp, "a product takes a whole warp");
  lanes[self] = lane;
  // The last lane to come computes for all; the others' sums stay where they are until then.
  if (warp.waiting + 1 == warp.alive) {
    MultiplyAddFragments(std::span<const Lane, kWarp>(lanes + first, kWarp));
  }
  Wait(warp);
}

}  // namespace

void MultiplyAdd(const MmaLane& lane) { MultiplyAddOfWarp(lane, running.products); }
void MultiplyAdd(const ByteMmaLane& lane) { MultiplyAddOfWarp(lane, running.byte_products); }

void LoadMatrices(const void* row, uint32_t (&words)[4]) {
  const size_t self = running.current, lane = self % kWarp, first = self - lane;
  CHECK(running.warps[self / kWarp].alive == kWarp, "LoadMatrices takes a whole warp");
  CHECK(reinterpret_cast<uintptr_t>(row) % 16 == 0, "LoadMatrices: a row must be aligned");
  running.matrix_rows[self] = row;
  SyncWarp();
  for (size_t j = 0; j < 4; ++j) {
    const void* from = running.matrix_rows[first + 8 * j + lane / 4];
    std::memcpy(&words[j], static_cast<const std::byte*>(from) + lane % 4 * 4, 4);
  }
  SyncWarp();
}

void CopyAsync(void* to, const void* from, int bytes) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  CHECK(aligned(to) && aligned(from), "CopyAsync: addresses must be multiples of 16");
  CHECK(bytes >= 0 && bytes <= 16, "CopyAsync: copies at most 16 bytes");
  running.fibers[running.current].copies.push_back({to, from, static_cast<size_t>(bytes)});
}
void CommitCopies() {
  Fiber& fiber = running.fibers[running.current];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
void WaitForCopies(size_t pending_groups) {
  Fiber& fiber = running.fibers[running.current];
  for (; fiber.groups.size() > pending_groups; fiber.groups.pop_front()) {
    for (const Copy& copy : fiber.groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

}  // namespace innerq::emulation
