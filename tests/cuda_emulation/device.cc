// The emulated device, and products of cuBLASLt, which there are none of.
#include "kernels/cuda/cublas_matmul.h"
#include "kernels/cuda/cuda_device.h"

namespace innerq::cuda {

// So few multiprocessors that attention and products are split in some cases of the tests and not
// in others.
Result<CudaDevice> OpenDevice() { return CudaDevice{"CPU", "sm_emulated", 2}; }

Result<std::unique_ptr<CublasMatMul>> CublasMatMul::Create() {
  return Error{ErrorCode::kUnavailable, "device cuda: cuBLASLt is not emulated"};
}
CublasMatMul::~CublasMatMul() = default;
CublasMatMul::Plan::~Plan() = default;
Result<void> CublasMatMul::Run(const MatMulLaunch&, int64_t, cudaStream_t) {
  return Error{ErrorCode::kInternal, "cuBLASLt is not emulated"};
}

}  // namespace innerq::cuda
