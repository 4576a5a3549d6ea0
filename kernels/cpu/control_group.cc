#include "kernels/cpu/control_group.h"

#include <algorithm>
#include <fstream>
#include <string>

namespace innerq {
namespace {

using std::filesystem::path;

// The files of one version.
struct MemoryFiles {
  const char* limit;
  const char* used;
  const char* cached;  // in memory.stat
};
constexpr MemoryFiles kMemoryV1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                   "total_inactive_file"};
constexpr MemoryFiles kMemoryV2 = {"memory.max", "memory.current", "inactive_file"};

// The number behind `name` in lines of "name number"; 0 if there is none.
int64_t Field(const path& file, const std::string& name) {
  std::ifstream stream(file);
  std::string key;
  int64_t number = 0;
  while (stream >> key >> number) {
    if (key == name) return number;
  }
  return 0;
}

void LimitMemory(const path& group, const MemoryFiles& files, ControlGroupLimits* limits) {
  int64_t limit = 0, used = 0;  // a limit may read "max"
  if (!(std::ifstream(group / files.limit) >> limit)) return;
  if (!(std::ifstream(group / files.used) >> used)) return;
  const int64_t left = limit - used + Field(group / "memory.stat", files.cached);
  limits->memory_left = std::min(limits->memory_left, std::max<int64_t>(left, 0));
}

void LimitCores(double quota, double period, ControlGroupLimits* limits) {
  if (quota > 0 && period > 0) limits->cores = std::min(limits->cores, quota / period);
}

void LimitCoresV1(const path& group, ControlGroupLimits* limits) {
  double quota = 0, period = 0;  // -1: no limit
  std::ifstream(group / "cpu.cfs_quota_us") >> quota;
  std::ifstream(group / "cpu.cfs_period_us") >> period;
  LimitCores(quota, period, limits);
}

void LimitCoresV2(const path& group, ControlGroupLimits* limits) {
  double quota = 0, period = 0;
  if (std::ifstream(group / "cpu.max") >> quota >> period) LimitCores(quota, period, limits);
}

// Calls visit(directory) for a group and all above it up to the mount. In a container its path may
// be the host's, of which only the mount itself can be seen.
template <typename Visit>
void VisitUpwards(const path& mount, const path& group, Visit visit) {
  for (path below = group.relative_path(); !below.empty(); below = below.parent_path()) {
    visit(mount / below);
  }
  visit(mount);
}

}  // namespace

ControlGroupLimits ReadControlGroupLimits(const path& root) {
  ControlGroupLimits limits;
  const path mounts = root / "sys/fs/cgroup";
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "4:memory:/a/b", version 2 "0::/a/b"
    const size_t first = line.find(':');
    const size_t second = line.find(':', first == line.npos ? first : first + 1);
    if (second == line.npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const path group = line.substr(second + 1);
    const auto has = [&](const char* name) {
      return controllers.find("," + std::string(name) + ",") != controllers.npos;
    };
    if (controllers == ",,") {
      for (const path& mount : {mounts, mounts / "unified"}) {
        VisitUpwards(mount, group, [&](const path& directory) {
          LimitMemory(directory, kMemoryV2, &limits);
          LimitCoresV2(directory, &limits);
        });
      }
    }
    if (has("memory")) {
      VisitUpwards(mounts / "memory", group,
                   [&](const path& directory) { LimitMemory(directory, kMemoryV1, &limits); });
    }
    if (has("cpu")) {
      VisitUpwards(mounts / "cpu", group,
                   [&](const path& directory) { LimitCoresV1(directory, &limits); });
    }
  }
  return limits;
}

}  // namespace innerq
