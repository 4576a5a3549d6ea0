#include "kernels/cuda/cuda_device.h"

#include <cuda_runtime_api.h>

#include "kernels/cuda/launch.h"

namespace innerq::cuda {
namespace {

constexpr int kLeastMajor = 8;  // BF16 tensor cores

// A CUDA version number, 13000, as people write it: 13.0.
std::string VersionName(int version) {
  if (version == 0) return "none";
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// `why`, and the versions that explain it.
Error Unusable(const std::string& why) {
  int driver = 0, runtime = 0;
  // Either may fail without a driver: then it stays 0.
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = 0;
  return {ErrorCode::kUnavailable,
          "device cuda: " + why + " (driver for CUDA " + VersionName(driver) + ", runtime CUDA " +
              VersionName(runtime) + ", built for architectures " + INNERQ_CUDA_ARCHITECTURES + ")",
          "backend.device"};
}

Error Unusable(cudaError_t status, const std::string& what) {
  return Unusable(what + ": " + cudaGetErrorString(status));
}

}  // namespace

Result<CudaDevice> OpenDevice() {
  int count = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) {
    return Unusable(status, "no usable GPU");
  }
  if (count == 0) return Unusable("no GPU");
  if (const cudaError_t status = cudaSetDevice(0); status != cudaSuccess) {
    return Unusable(status, "cannot use the GPU");
  }
  cudaDeviceProp properties;
  if (const cudaError_t status = cudaGetDeviceProperties(&properties, 0); status != cudaSuccess) {
    return Unusable(status, "cannot describe the GPU");
  }
  CudaDevice device;
  device.name = properties.name;
  device.architecture = "sm_" + std::to_string(properties.major) + std::to_string(properties.minor);
  device.num_multiprocessors = properties.multiProcessorCount;
  const std::string who = device.name + " (" + device.architecture + ")";
  if (properties.major < kLeastMajor) {
    return Unusable(who + " is older than sm_80, the least that the kernels need");
  }
  if (const cudaError_t status = ProbeKernels(); status != cudaSuccess) {
    return Unusable(status, "this build has no kernels for " + who);
  }
  return device;
}

}  // namespace innerq::cuda
