#include "server/work_slots.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <vector>

namespace innerq {
namespace {

using HeldSlot = std::unique_ptr<WorkSlots::Slot>;

// Asks for a slot on another thread.
std::future<HeldSlot> AskForSlot(WorkSlots& slots, size_t bytes) {
  return std::async(std::launch::async,
                    [&slots, bytes] { return std::make_unique<WorkSlots::Slot>(slots, bytes); });
}

// Until so many wait; false: not within ten seconds.
bool WaitUntilWaiting(const WorkSlots& slots, int64_t count) {
  for (int i = 0; i < 10000 && slots.num_waiting() != count; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return slots.num_waiting() == count;
}

TEST(WorkSlots, AreSoManyAndNoMore) {
  WorkSlots slots(2, 100);
  HeldSlot first = AskForSlot(slots, 1).get();
  const HeldSlot second = AskForSlot(slots, 1).get();
  auto third = AskForSlot(slots, 1);
  ASSERT_TRUE(WaitUntilWaiting(slots, 1));
  first.reset();
  EXPECT_NE(third.get(), nullptr);
}

TEST(WorkSlots, BoundTheBytesOfAllButTheOneThatIsAlone) {
  WorkSlots slots(64, 100);
  HeldSlot large = AskForSlot(slots, 1000).get();
  auto small = AskForSlot(slots, 1);
  ASSERT_TRUE(WaitUntilWaiting(slots, 1));
  large.reset();
  HeldSlot held = small.get();
  HeldSlot rest = AskForSlot(slots, 99).get();
  auto none = AskForSlot(slots, 1);
  ASSERT_TRUE(WaitUntilWaiting(slots, 1));
  rest.reset();
  EXPECT_NE(none.get(), nullptr);
}

TEST(WorkSlots, GoToWhoeverCameFirst) {
  WorkSlots slots(64, 100);
  HeldSlot held = AskForSlot(slots, 60).get();
  auto large = AskForSlot(slots, 80);
  ASSERT_TRUE(WaitUntilWaiting(slots, 1));
  auto small = AskForSlot(slots, 20);  // would fit, and so would any number of its kind for ever
  ASSERT_TRUE(WaitUntilWaiting(slots, 2));
  held.reset();
  const HeldSlot first = large.get(), second = small.get();
  EXPECT_TRUE(first && second);
}

}  // namespace
}  // namespace innerq
