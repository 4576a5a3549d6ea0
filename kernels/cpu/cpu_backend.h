// The CPU backend: OpTable functions on OpenMP threads, with CpuAttention for the cache.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace innerq {

// Errors: invalid argument for a variant that does not exist or a negative number of threads,
// unavailable for a variant that this machine cannot run. With `deterministic` false, BF16 and F32
// products of the machine's best variant go to oneDNN; where it is absent for a format (BF16
// without AVX512_BF16, F16) and for forced lesser variants, the backend's own kernels run.
Result<std::unique_ptr<Backend>> CreateCpuBackend(const BackendOptions& options);

}  // namespace innerq
