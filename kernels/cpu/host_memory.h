// AllocateHost: aligned, zeroed host memory that says when there is not enough of it.
#pragma once

#include "kernels/result.h"
#include "kernels/tensor.h"

namespace innerq {

// Zeroed memory, 64-byte aligned; from 4 MiB on aligned to 2 MiB and backed by huge pages where the
// system has them. Errors: resource exhausted when it is more than the system has available.
Result<Buffer> AllocateHost(int64_t bytes);

}  // namespace innerq
