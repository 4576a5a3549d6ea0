// CreateCudaBackend: the backend of one NVIDIA GPU.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace innerq {

// Errors: unavailable, with the versions of driver and runtime and the architectures of this build,
// where there is no GPU that it can use, or where the build has no CUDA at all.
Result<std::unique_ptr<Backend>> CreateCudaBackend(const BackendOptions& options);

}  // namespace innerq
