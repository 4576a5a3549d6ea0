#include "server/work_slots.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <memory>
#include <vector>

namespace innerq {
namespace {

using HeldSlot = std::unique_ptr<WorkSlots::Slot>;

// Asks for a slot on another thread.
std::future<HeldSlot> AskForSlot(WorkSlots& slots, size_t bytes) {
  return std::async(std::launch::async,
                    [&slots, bytes] { return std::make_unique<WorkSlots::Slot>(slots, bytes); });
}

bool StillWaits(const std::future<HeldSlot>& slot, int milliseconds = 20) {
  return slot.wait_for(std::chrono::milliseconds(milliseconds)) == std::future_status::timeout;
}

TEST(WorkSlots, AreSoManyAndNoMore) {
  WorkSlots slots(2, 100);
  HeldSlot first = AskForSlot(slots, 1).get();
  const HeldSlot second = AskForSlot(slots, 1).get();
  auto third = AskForSlot(slots, 1);
  EXPECT_TRUE(StillWaits(third));
  first.reset();
  EXPECT_NE(third.get(), nullptr);
}

TEST(WorkSlots, BoundTheBytesOfAllButTheOneThatIsAlone) {
  WorkSlots slots(64, 100);
  HeldSlot large = AskForSlot(slots, 1000).get();
  auto small = AskForSlot(slots, 1);
  EXPECT_TRUE(StillWaits(small));
  large.reset();
  HeldSlot held = small.get();
  HeldSlot rest = AskForSlot(slots, 99).get();
  auto none = AskForSlot(slots, 1);
  EXPECT_TRUE(StillWaits(none));
  rest.reset();
  EXPECT_NE(none.get(), nullptr);
}

TEST(WorkSlots, GoToWhoeverCameFirst) {
  WorkSlots slots(64, 100);
  HeldSlot held = AskForSlot(slots, 60).get();
  auto large = AskForSlot(slots, 80);
  EXPECT_TRUE(StillWaits(large, 300));  // its thread must have asked by then
  auto small = AskForSlot(slots, 20);   // would fit, and so would any number of its kind for ever
  EXPECT_TRUE(StillWaits(small));
  held.reset();
  const HeldSlot first = large.get(), second = small.get();
  EXPECT_TRUE(first && second);
}

}  // namespace
}  // namespace innerq
