// Stands in for the CUDA backend in builds without it: says so.
#include "kernels/cuda/cuda_backend.h"

namespace innerq {

Result<std::unique_ptr<Backend>> CreateCudaBackend(const BackendOptions&) {
  return Error{ErrorCode::kUnavailable,
               "device cuda: this build has no CUDA; see GPU build in README.md", "backend.device"};
}

}  // namespace innerq
