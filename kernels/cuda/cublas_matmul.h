// CublasMatMul: dense products by cuBLASLt, for a backend that need not be deterministic.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <tuple>

#include "kernels/backend.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/launch.h"

namespace innerq::cuda {

// cuBLASLt chooses an algorithm per shape, hence per M: rows depend on the batch.
class CublasMatMul {
 public:
  static Result<std::unique_ptr<CublasMatMul>> Create();
  ~CublasMatMul();

  // All products but those that have units, are added to what `out` holds, and are larger than
  // `parts`, where their sums wait for the units.
  static bool Handles(const MatMulLaunch& launch) {
    return launch.units == nullptr || !launch.accumulate ||
           launch.m * launch.n <= launch.num_part_sums;
  }

  // As LaunchMatMul; rows of x begin `x_stride` elements apart.
  Result<void> Run(const MatMulLaunch& launch, int64_t x_stride, cudaStream_t stream);

 private:
  struct Plan {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t weight = nullptr, x = nullptr, out = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
    Plan() = default;
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;
    ~Plan();
  };
  using Key = std::tuple<WeightFormat, int64_t, int64_t, int64_t>;  // format, M, N, K

  CublasMatMul() = default;
  // Valid until the next call.
  Result<const Plan*> PlanFor(const MatMulLaunch& launch, int64_t x_stride);

  cublasLtHandle_t handle_ = nullptr;
  Buffer workspace_;
  std::map<Key, std::unique_ptr<Plan>> plans_;  // a bounded number
};

}  // namespace innerq::cuda
