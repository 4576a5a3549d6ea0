// ThreadIndex: which thread of an OpenMP region runs.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace innerq {

// In [0, threads of the region); 0 in a build without OpenMP.
inline int ThreadIndex() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace innerq
