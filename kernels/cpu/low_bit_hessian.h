// What a Hessian of inputs says about errors of weights: how one column's error is taken up by the
// columns after it, and what errors cost.
//
// H = X^T X [K][K], given as its lower triangle (lower_triangle.h). As H = M D M^T with M upper
// triangular with a diagonal of ones and D diagonal, an error E = W - Q of one output costs
//   E H E^T = sum over k of D_k * (E_k + sum over j < k of E_j M_jk)^2.
// So a column encoded after others aims at w_k + sum over j < k of E_j M_jk. This is the rule of
// GPTQ (arXiv 2210.17323) as QuIP (arXiv 2307.13304) writes it and proves equal to it; unlike
// GPTQ's own form it needs no inverse of H.
//
// Letters: K inputs.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/lower_triangle.h"
#include "kernels/result.h"

namespace innerq {

// Outputs that are treated together, each in a lane.
constexpr int64_t kFeedbackLanes = 16;

// sums[l] += sum over j < count of row[j] * lanes[j][l]. `lanes` [count][kFeedbackLanes].
void AddLaneSums(const float* row, const float* lanes, int64_t count, float* sums);

// H / mean, where mean is that of H's diagonal (1 if it is 0), in F32.
struct ScaledHessian {
  double mean = 1;
  LowerTriangle<float> values;
};

// Copies the lower triangle `hessian`.
ScaledHessian ScaleHessian(const double* hessian, int64_t cols);

// Adds x H x^T of each lane of `x` [K][kFeedbackLanes] to `costs` [kFeedbackLanes], H scaled.
void AddCosts(const ScaledHessian& hessian, int64_t cols, const float* x, double* costs);

// M^T: row k holds M_jk for j < k, then 1.
struct FeedbackFactor {
  LowerTriangle<float> feedback;
  std::vector<float> diagonal;  // [K] of H / mean, dampened
};

// Bytes of a factor of K inputs, and of it and all else that FactorHessian takes.
constexpr int64_t FeedbackFactorBytes(int64_t cols) {
  return 4 * TriangleElements(cols) + 4 * cols;
}
constexpr int64_t FactorHessianBytes(int64_t cols) {
  return FeedbackFactorBytes(cols) + 8 * TriangleElements(cols);
}

// Factors the lower triangle `hessian` in F64. Its diagonal is dampened
// by 1 % of its mean, or ten, a hundred or a thousand times that, the first that leaves it positive
// definite; so an input that was always zero neither gives nor takes feedback. A Hessian of zeros
// counts as the identity. Errors: invalid argument if none does; resource exhausted. Costs K^3 / 6
// multiplications.
Result<FeedbackFactor> FactorHessian(const double* hessian, int64_t cols, int threads);

}  // namespace innerq
