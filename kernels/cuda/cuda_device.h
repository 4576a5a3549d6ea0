// CudaDevice: the GPU of this process, checked for what the kernels need.
#pragma once

#include <string>

#include "kernels/result.h"

namespace innerq::cuda {

struct CudaDevice {
  std::string name;          // "NVIDIA H100 80GB HBM3"
  std::string architecture;  // "sm_90"
  int num_multiprocessors = 0;
};

// The first device that the driver shows (CUDA_VISIBLE_DEVICES chooses), made the calling thread's.
// Errors: unavailable, with the versions of driver and runtime and the architectures of this build.
Result<CudaDevice> OpenDevice();

}  // namespace innerq::cuda
