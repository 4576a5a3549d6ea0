// What an engine accepts when memory runs out on the way. Replaces the program's allocation.
#include <cstdlib>
#include <new>
#include <vector>

#include "engine/engine.h"
#include "gtest/gtest.h"
#include "tests/engine/engine_test_util.h"

namespace innerq {
namespace {

// Allocations that this thread may still make; negative: any number.
thread_local int64_t allocations_left = -1;

void* AllocateOrNull(size_t size) {
  if (allocations_left == 0) return nullptr;
  if (allocations_left > 0) --allocations_left;
  return std::malloc(size > 0 ? size : 1);
}

}  // namespace
}  // namespace innerq

// Inlined on one side only, they would look mismatched to the compiler.
[[gnu::noinline]] void* operator new(size_t size) {
  void* const memory = innerq::AllocateOrNull(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return innerq::AllocateOrNull(size);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, const std::nothrow_t&) noexcept {
  std::free(memory);
}

namespace innerq {
namespace {

TEST(EngineOutOfMemory, AGroupIsAcceptedAsAWholeOrNotAtAll) {
  EngineOptions options;
  options.max_context = 600;
  const auto engine =
      Engine::Create(options, std::make_unique<HashModel>(TestLayout(), PageCounts{400, 400, 64}))
          .value();
  const std::vector<Request> requests(100, RequestOf(2, 2));
  bool accepted = false;
  int64_t enough = 0;  // allocations
  for (; !accepted; ++enough) {
    std::vector<Request> group = requests;
    allocations_left = enough;
    try {
      accepted = engine->SubmitGroup(std::move(group)).ok();
    } catch (const std::bad_alloc&) {
    }
    allocations_left = -1;
    ASSERT_EQ(engine->Stats().accepted, accepted ? 100 : 0) << enough << " allocations";
  }
  EXPECT_GT(enough, 2 * 100) << "they cannot have failed everywhere";
  EXPECT_TRUE(engine->Drain(kLong));
  EXPECT_EQ(engine->Stats().finished, 100);
}

}  // namespace
}  // namespace innerq
