// Limits of control groups, from trees of files as the kernel shows them.
#include "kernels/cpu/control_group.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/cpu/host_threads.h"

namespace innerq {
namespace {

class ControlGroup : public testing::Test {
 protected:
  ControlGroup()
      : root_(std::filesystem::path(testing::TempDir()) /
              ("control_group." + std::to_string(::getpid()))) {}
  ~ControlGroup() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& file, const std::string& text) {
    const std::filesystem::path path = root_ / file;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  void WriteMemory(const std::string& group, const std::string& limit, const std::string& used) {
    Write(group + "/memory.max", limit);
    Write(group + "/memory.current", used);
  }
  ControlGroupLimits Read() const { return ReadControlGroupLimits(root_); }

  const std::filesystem::path root_;
};

TEST_F(ControlGroup, WithoutFilesNothingIsLimited) {
  EXPECT_EQ(Read().memory_left, std::numeric_limits<int64_t>::max());
  EXPECT_EQ(Read().cores, std::numeric_limits<double>::infinity());
  Write("proc/self/cgroup", "0::/a\nnonsense\n");
  WriteMemory("sys/fs/cgroup/a", "max\n", "100\n");
  Write("sys/fs/cgroup/a/cpu.max", "max 100000\n");
  EXPECT_EQ(Read().memory_left, std::numeric_limits<int64_t>::max());
  EXPECT_EQ(Read().cores, std::numeric_limits<double>::infinity());
}

// A service's limit, or one of the slice it is in, whichever leaves less.
TEST_F(ControlGroup, TheLeastOfAllGroupsAboveCounts) {
  Write("proc/self/cgroup", "0::/system.slice/innerq.service\n");
  WriteMemory("sys/fs/cgroup/system.slice/innerq.service", "1000\n", "900\n");
  Write("sys/fs/cgroup/system.slice/innerq.service/memory.stat", "anon 5\ninactive_file 50\n");
  WriteMemory("sys/fs/cgroup/system.slice", "2000\n", "1000\n");
  Write("sys/fs/cgroup/system.slice/innerq.service/cpu.max", "400000 100000\n");
  Write("sys/fs/cgroup/system.slice/cpu.max", "150000 100000\n");
  EXPECT_EQ(Read().memory_left, 150);
  EXPECT_EQ(Read().cores, 1.5);
  WriteMemory("sys/fs/cgroup/system.slice", "2000\n", "2100\n");
  EXPECT_EQ(Read().memory_left, 0) << "more is used than allowed";
}

// A container sees its own group as the root of the tree, under whatever path the host gives it.
TEST_F(ControlGroup, AContainerSeesItsLimitsAtTheMount) {
  Write("proc/self/cgroup", "0::/docker/0123\n");
  WriteMemory("sys/fs/cgroup", "1000\n", "400\n");
  Write("sys/fs/cgroup/cpu.max", "200000 100000\n");
  EXPECT_EQ(Read().memory_left, 600);
  EXPECT_EQ(Read().cores, 2.0);
}

TEST_F(ControlGroup, ReadsVersionOne) {
  Write("proc/self/cgroup", "5:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123\n0::/\n");
  Write("sys/fs/cgroup/memory/docker/0123/memory.limit_in_bytes", "5000\n");
  Write("sys/fs/cgroup/memory/docker/0123/memory.usage_in_bytes", "4000\n");
  Write("sys/fs/cgroup/memory/docker/0123/memory.stat", "inactive_file 1\ntotal_inactive_file 7\n");
  Write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  Write("sys/fs/cgroup/memory/memory.usage_in_bytes", "123456\n");
  Write("sys/fs/cgroup/cpu/docker/0123/cpu.cfs_quota_us", "250000\n");
  Write("sys/fs/cgroup/cpu/docker/0123/cpu.cfs_period_us", "100000\n");
  Write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  Write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(Read().memory_left, 1007);
  EXPECT_EQ(Read().cores, 2.5);
}

TEST(HostThreads, RunsEveryTaskOnce) {
  EXPECT_GE(UsableCores(), 1);
  for (const int threads : {1, 2, 5}) {
    std::vector<int> runs(100);
    std::vector<int> of_thread(static_cast<size_t>(threads));
    RunInParallel(threads, 100, [&](int64_t task, int thread) {
      ++runs[static_cast<size_t>(task)];
      ++of_thread[static_cast<size_t>(thread)];
    });
    EXPECT_EQ(runs, std::vector<int>(100, 1));
    EXPECT_EQ(std::accumulate(of_thread.begin(), of_thread.end(), 0), 100);
    RunInParallel(threads, 0, [](int64_t, int) { FAIL(); });
  }
}

}  // namespace
}  // namespace innerq
