#include "kernels/cuda/cublas_matmul.h"

#include <string>
#include <utility>

namespace innerq::cuda {
namespace {

// Every M has plans of its own, so chunks of changing length would add to them without end: beyond
// this many all are dropped, and those in use made anew.
constexpr size_t kMaxPlans = 64;
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;  // what NVIDIA advises for sm_90

#define RETURN_IF_CUBLAS_ERROR(expression, what)                                         \
  do {                                                                                   \
    if (const cublasStatus_t status_ = (expression); status_ != CUBLAS_STATUS_SUCCESS) { \
      return Error{ErrorCode::kInternal,                                                 \
                   std::string(what) + ": " + cublasLtGetStatusName(status_)};           \
    }                                                                                    \
  } while (false)

std::string Describe(const MatMulLaunch& launch) {
  return "cuBLASLt, " + std::string(WeightFormatName(launch.format)) + " product of M " +
         std::to_string(launch.m) + ", N " + std::to_string(launch.n) + ", K " +
         std::to_string(launch.k);
}

cudaDataType_t TypeOf(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBF16:
      return CUDA_R_16BF;
    case WeightFormat::kF16:
      return CUDA_R_16F;
    case WeightFormat::kF32:
      return CUDA_R_32F;
  }
  return CUDA_R_32F;
}

}  // namespace

CublasMatMul::Plan::~Plan() {
  if (operation != nullptr) cublasLtMatmulDescDestroy(operation);
  for (const cublasLtMatrixLayout_t layout : {weight, x, out}) {
    if (layout != nullptr) cublasLtMatrixLayoutDestroy(layout);
  }
}

Result<std::unique_ptr<CublasMatMul>> CublasMatMul::Create() {
  std::unique_ptr<CublasMatMul> made(new CublasMatMul());
  RETURN_IF_CUBLAS_ERROR(cublasLtCreate(&made->handle_), "starting cuBLASLt");
  ASSIGN_OR_RETURN(made->workspace_, AllocateDevice(kWorkspaceBytes));
  return made;
}

CublasMatMul::~CublasMatMul() {
  plans_.clear();
  if (handle_ != nullptr) cublasLtDestroy(handle_);
}

// In cuBLAS's column order a row-major [M, N] is [N, M]: out^T = (weight^T)^T x^T.
Result<const CublasMatMul::Plan*> CublasMatMul::PlanFor(const MatMulLaunch& launch,
                                                        int64_t x_stride) {
  const Key key{launch.format, launch.m, launch.n, launch.k};
  if (const auto known = plans_.find(key); known != plans_.end()) return known->second.get();
  const std::string what = Describe(launch);
  const cudaDataType_t type = TypeOf(launch.format);
  const auto m = static_cast<uint64_t>(launch.m), n = static_cast<uint64_t>(launch.n),
             k = static_cast<uint64_t>(launch.k);
  auto plan = std::make_unique<Plan>();
  RETURN_IF_CUBLAS_ERROR(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                         what);
  const cublasOperation_t transposed = CUBLAS_OP_T;
  RETURN_IF_CUBLAS_ERROR(
      cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                     sizeof(transposed)),
      what);
  RETURN_IF_CUBLAS_ERROR(
      cublasLtMatrixLayoutCreate(&plan->weight, type, k, n, RoundUp(launch.k, kMatMulUnit)), what);
  RETURN_IF_CUBLAS_ERROR(cublasLtMatrixLayoutCreate(&plan->x, type, k, m, x_stride), what);
  RETURN_IF_CUBLAS_ERROR(cublasLtMatrixLayoutCreate(&plan->out, CUDA_R_32F, n, m, launch.n), what);
  cublasLtMatmulPreference_t preference = nullptr;
  RETURN_IF_CUBLAS_ERROR(cublasLtMatmulPreferenceCreate(&preference), what);
  const auto workspace = static_cast<uint64_t>(kWorkspaceBytes);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                       &workspace, sizeof(workspace));
  cublasLtMatmulHeuristicResult_t found{};
  int num_found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, plan->operation, plan->weight, plan->x, plan->out,
                                     plan->out, preference, 1, &found, &num_found);
  cublasLtMatmulPreferenceDestroy(preference);
  RETURN_IF_CUBLAS_ERROR(status, what);
  if (num_found == 0) return Error{ErrorCode::kInternal, what + ": no algorithm"};
  plan->algorithm = found.algo;
  if (plans_.size() >= kMaxPlans) plans_.clear();
  return plans_.emplace(key, std::move(plan)).first->second.get();
}

Result<void> CublasMatMul::Run(const MatMulLaunch& launch, int64_t x_stride, cudaStream_t stream) {
  ASSIGN_OR_RETURN(const Plan* plan, PlanFor(launch, x_stride));
  // Without units cuBLASLt adds to what `out` holds; with them the sums have to be finished first.
  const bool has_units = launch.units != nullptr;
  MatMulLaunch rest = launch;
  rest.accumulate = launch.accumulate && has_units;
  rest.parts = rest.accumulate ? launch.parts : launch.out;
  const float one = 1.0f, beta = launch.accumulate && !has_units ? 1.0f : 0.0f;
  RETURN_IF_CUBLAS_ERROR(
      cublasLtMatmul(handle_, plan->operation, &one, launch.weight, plan->weight, launch.x, plan->x,
                     &beta, rest.parts, plan->out, rest.parts, plan->out, &plan->algorithm,
                     workspace_.data(), static_cast<size_t>(kWorkspaceBytes), stream),
      Describe(launch));
  if (launch.bias == nullptr && !has_units) return {};
  RETURN_IF_CUDA_ERROR(LaunchFinishMatMul(rest, stream), "finishing a product");
  return {};
}

}  // namespace innerq::cuda
