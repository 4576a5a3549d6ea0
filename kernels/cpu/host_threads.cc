#include "kernels/cpu/host_threads.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/control_group.h"
#include "kernels/cpu/thread_index.h"

namespace innerq {

int UsableCores() {
#if defined(_OPENMP)
  // Not the calling thread's own mask: OMP_PROC_BIND narrows that to one core.
  const int cores = omp_get_num_procs();
  const double quota = std::ceil(ReadControlGroupLimits().cores);
  return quota < cores ? std::max(1, static_cast<int>(quota)) : cores;
#else
  return 1;
#endif
}

void RunInParallel([[maybe_unused]] int threads, int64_t count,
                   const std::function<void(int64_t task, int thread)>& run) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count > 1)
  for (int64_t task = 0; task < count; ++task) run(task, ThreadIndex());
}

}  // namespace innerq
