// Time for tests that say how long something may take.
#pragma once

#include <ctime>

namespace innerq {

// Processor time of this thread, which other programs do not lengthen.
inline double ThreadSeconds() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// How much longer anything may take under sanitizers.
#if defined(INNERQ_SANITIZED)
constexpr double kSlowdown = 20;
#else
constexpr double kSlowdown = 1;
#endif

}  // namespace innerq
