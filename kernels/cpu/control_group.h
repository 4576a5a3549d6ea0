// ControlGroupLimits: what a container or a service manager allows this process.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>

namespace innerq {

struct ControlGroupLimits {
  int64_t memory_left = std::numeric_limits<int64_t>::max();  // bytes
  double cores = std::numeric_limits<double>::infinity();     // quota of time over its period
};

// The least of the limits of this process's control groups and all above them, as far as these can
// be seen: of versions 1 and 2 (Linux, Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst).
// Pages of files that were read count as left: they make way. `root` holds proc and sys; tests have
// their own.
ControlGroupLimits ReadControlGroupLimits(const std::filesystem::path& root = "/");

}  // namespace innerq
