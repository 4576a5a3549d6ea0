// AllocateHost: aligned, zeroed host memory that says when there is not enough of it.
#pragma once

#include <cstdint>

#include "kernels/result.h"
#include "kernels/tensor.h"

namespace innerq {

// Memory that can be used without swapping, in bytes: of the machine and, in a container with a
// limit (see control_group.h), of that. The largest number if nobody knows.
int64_t AvailableHostBytes();

// Zeroed memory, 64-byte aligned; from 4 MiB on aligned to 2 MiB, backed by huge pages where the
// system has them, and cleared on all usable cores. Errors: resource exhausted when it is more than
// the system has available.
Result<Buffer> AllocateHost(int64_t bytes);

}  // namespace innerq
