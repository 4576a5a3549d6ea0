// The host's part of CUDA graphs: what counts as the same launches, and where arrays lie.
#include "kernels/cuda/launch_record.h"

#include <gtest/gtest.h>

#include <memory>
#include <numeric>

#include "kernels/cuda/staged_arrays.h"

namespace innerq::cuda {
namespace {

using Function = int (*)(int);
int First(int x) { return x; }
int Second(int x) { return x + 1; }

using Record = LaunchRecord<Function>;

struct Call {
  Function function;
  std::vector<uint32_t> argument;
};

Record RecordOf(const std::vector<Call>& calls) {
  Record record;
  for (const Call& call : calls) {
    record.Add(call.function, "call", std::as_bytes(std::span(call.argument)));
  }
  return record;
}

TEST(LaunchRecord, IsEqualWhereEveryByteIs) {
  const std::vector<Call> calls = {{First, {1, 2, 3}}, {Second, {4}}, {First, {5, 6, 7, 8, 9}}};
  const Record record = RecordOf(calls);
  EXPECT_EQ(record, RecordOf(calls));
  EXPECT_EQ(record.num_launches(), 3);
  for (size_t i = 0; i < calls.size(); ++i) {
    for (size_t j = 0; j < calls[i].argument.size(); ++j) {
      std::vector<Call> changed = calls;
      changed[i].argument[j] ^= 0x40000000;
      EXPECT_FALSE(record == RecordOf(changed));
      EXPECT_NE(record.hash(), RecordOf(changed).hash());
    }
  }
  EXPECT_FALSE(record == RecordOf({{First, {1, 2, 3}}, {First, {4}}, calls[2]}));
  EXPECT_FALSE(record == RecordOf({calls[0], calls[1]}));
  EXPECT_FALSE(record == RecordOf({calls[1], calls[0], calls[2]}));
}

TEST(LaunchRecord, KeepsArgumentsAlignedAndStartsOver) {
  Record record = RecordOf({{First, {1, 2, 3}}, {Second, {4, 5}}});
  const auto& second = record.launches()[1];
  EXPECT_EQ(second.function, &Second);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(record.ArgumentOf(second)) % 16, 0u);
  uint32_t argument[2];
  std::memcpy(argument, record.ArgumentOf(second), sizeof(argument));
  EXPECT_EQ(argument[0], 4u);
  EXPECT_EQ(argument[1], 5u);
  record.Clear();
  EXPECT_EQ(record, Record());
}

using Graphs = GraphCache<Record, std::unique_ptr<int>>;

TEST(GraphCache, FindsRecordsThatRecur) {
  Graphs graphs(100);
  const Record one = RecordOf({{First, {1}}}), other = RecordOf({{First, {2}}});
  EXPECT_EQ(graphs.Find(one), nullptr);
  EXPECT_FALSE(graphs.Recurs(one));
  EXPECT_FALSE(graphs.Recurs(other));
  EXPECT_TRUE(graphs.Recurs(one));
  EXPECT_TRUE(graphs.Recurs(one)) << "until it has a graph";
  graphs.Insert(one, std::make_unique<int>(11));
  graphs.Insert(other, std::make_unique<int>(22));
  EXPECT_FALSE(graphs.Recurs(one));
  EXPECT_EQ(**graphs.Find(one), 11);
  EXPECT_EQ(**graphs.Find(other), 22);
  graphs.Clear();
  EXPECT_EQ(graphs.Find(one), nullptr);
  EXPECT_FALSE(graphs.Recurs(one));
}

TEST(GraphCache, DropsTheLongestUnusedBeyondItsBoundWhenToldTo) {
  Graphs graphs(4);
  std::vector<Record> records;
  for (uint32_t i = 0; i < 4; ++i) {
    records.push_back(RecordOf({{First, {i}}, {Second, {i}}}));
    graphs.Insert(records.back(), std::make_unique<int>(static_cast<int>(i)));
  }
  EXPECT_EQ(graphs.size(), 4) << "a step's graphs may run until it ends";
  ASSERT_NE(graphs.Find(records[0]), nullptr);
  graphs.Trim();
  EXPECT_EQ(graphs.size(), 2);
  EXPECT_NE(graphs.Find(records[0]), nullptr);
  EXPECT_EQ(graphs.Find(records[1]), nullptr);
  EXPECT_EQ(graphs.Find(records[2]), nullptr);
  EXPECT_NE(graphs.Find(records[3]), nullptr);
}

// Staged arrays over memory, with a device that copies what has changed.
class Staging {
 public:
  explicit Staging(size_t bytes) : host_(bytes), device_(bytes) {
    arrays.Reset(host_.data(), device_.data(), static_cast<int64_t>(bytes));
  }
  // Where the array is on the device; null if there is no room.
  const std::byte* Stage(StagingSlot slot, const std::vector<int32_t>& items) {
    const std::byte* at = nullptr;
    return arrays.Stage(slot, std::as_bytes(std::span(items)), &at) ? at : nullptr;
  }
  // Bytes copied.
  int64_t Copy() {
    int64_t bytes = 0, end = -1;
    for (const StagedArrays::Range& range : arrays.TakeChanged()) {
      EXPECT_GT(range.begin, end);
      end = range.end;
      bytes += range.end - range.begin;
      std::memcpy(device_.data() + range.begin, host_.data() + range.begin,
                  static_cast<size_t>(range.end - range.begin));
    }
    return bytes;
  }
  static bool Has(const std::byte* at, const std::vector<int32_t>& items) {
    return std::memcmp(at, items.data(), items.size() * sizeof(int32_t)) == 0;
  }

  StagedArrays arrays;

 private:
  std::vector<std::byte> host_, device_;
};

std::vector<int32_t> Count(size_t n, int32_t from = 0) {
  std::vector<int32_t> items(n);
  std::iota(items.begin(), items.end(), from);
  return items;
}

constexpr StagingSlot kIds = StagingSlot::kTokenIds, kPages = StagingSlot::kPages;

TEST(StagedArrays, LieWhereTheyLayInTheStepBefore) {
  Staging staging(1 << 20);
  const std::byte* ids = staging.Stage(kIds, Count(10));
  const std::byte* pages = staging.Stage(kPages, Count(20));
  const std::byte* others = staging.Stage(kPages, Count(20, 5));
  EXPECT_NE(pages, others) << "a kernel may still want the first";
  EXPECT_EQ(staging.Stage(kPages, Count(20)), pages) << "the same array of the next layer";
  EXPECT_EQ(staging.Stage(kPages, Count(20, 5)), others);
  EXPECT_GT(staging.Copy(), 0);
  EXPECT_EQ(staging.Copy(), 0);
  for (int32_t step = 1; step < 300; ++step) {
    staging.arrays.EndStep();
    const std::vector<int32_t> table = Count(20 + static_cast<size_t>(step), step);
    EXPECT_EQ(staging.Stage(kIds, Count(10, step)), ids);
    EXPECT_EQ(staging.Stage(kPages, table), pages);
    EXPECT_EQ(staging.Stage(kPages, Count(20, -step)), others);
    staging.Copy();
    EXPECT_TRUE(Staging::Has(ids, Count(10, step)));
    EXPECT_TRUE(Staging::Has(pages, table));
    EXPECT_TRUE(Staging::Has(others, Count(20, -step)));
  }
}

TEST(StagedArrays, CopyOnlyWhatChanged) {
  Staging staging(1 << 20);
  staging.Stage(kIds, Count(10));
  const std::byte* pages = staging.Stage(kPages, Count(100'000));
  EXPECT_GE(staging.Copy(), 400'000);
  staging.arrays.EndStep();
  staging.Stage(kIds, Count(10, 1));
  EXPECT_EQ(staging.Stage(kPages, Count(100'000)), pages);
  EXPECT_EQ(staging.Copy(), 40);
  staging.arrays.EndStep();
  staging.arrays.ForgetContents();
  staging.Stage(kIds, Count(10, 1));
  EXPECT_EQ(staging.Stage(kPages, Count(100'000)), pages);
  EXPECT_GE(staging.Copy(), 400'000) << "the device may not have what was staged before";
}

TEST(StagedArrays, SmallOnesAreCopiedAtOnce) {
  Staging staging(1 << 20);
  for (const StagingSlot slot : {kIds, kPages, StagingSlot::kSealItems, StagingSlot::kPositions}) {
    staging.Stage(slot, Count(10));
  }
  EXPECT_EQ(staging.arrays.TakeChanged().size(), 1u);
}

TEST(StagedArrays, MoveOnlyToGrowAndSayWhenThereIsNoRoom) {
  Staging staging(60'000);
  const std::byte* before = staging.Stage(kPages, Count(1));
  int moves = 0;
  for (size_t n = 1; n <= 4096; ++n) {
    staging.arrays.EndStep();
    const std::byte* at = staging.Stage(kPages, Count(n));
    ASSERT_NE(at, nullptr);
    moves += at != before ? 1 : 0;
    before = at;
  }
  EXPECT_EQ(moves, 2) << "to 8192 and to 16384 bytes";
  staging.arrays.EndStep();
  EXPECT_EQ(staging.Stage(kPages, Count(4096, 1)), before);
  EXPECT_EQ(staging.Stage(kPages, Count(8192)), nullptr);
  EXPECT_EQ(staging.Stage(kPages, Count(4096, 1)), before) << "nothing was lost";
  staging.arrays.Reset();
  EXPECT_NE(staging.Stage(kPages, Count(8192)), nullptr);
  EXPECT_EQ(staging.Stage(kPages, Count(8192, 1)), nullptr);
}

TEST(StagedArrays, NothingIsNowhere) {
  Staging staging(1 << 16);
  const std::byte* at = reinterpret_cast<const std::byte*>(&staging);
  EXPECT_TRUE(staging.arrays.Stage(kIds, {}, &at));
  EXPECT_EQ(at, nullptr);
}

}  // namespace
}  // namespace innerq::cuda
