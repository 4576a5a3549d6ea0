// Threads of the host: how many may run, and work in parallel on them.
#pragma once

#include <cstdint>
#include <functional>

namespace innerq {

// Cores that this process may use: of its affinity, and no more than its control group's quota of
// time (cgroup v1 or v2) rounded up. 1 in a build without OpenMP.
int UsableCores();

// Calls run(task, thread) for each task in [0, count), in any order, on up to `threads` threads;
// `thread` in [0, threads) is the one that it runs on. Returns when all have been run. `run` must
// not throw.
void RunInParallel(int threads, int64_t count,
                   const std::function<void(int64_t task, int thread)>& run);

}  // namespace innerq
