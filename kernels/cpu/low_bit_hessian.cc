#include "kernels/cpu/low_bit_hessian.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <string>

namespace innerq {
namespace {

constexpr int64_t kPanel = 64;  // rows factored together; K is a multiple of 4
constexpr int64_t kTile = 512;  // columns of a panel that stay in cache
constexpr int64_t kStrip = 32;  // rows updated by one thread
constexpr double kDamping = 0.01;
constexpr int kDampingTries = 4;

// Row k of the lower triangle that a Hessian is given as.
const double* HessianRow(const double* hessian, int64_t k) { return hessian + TriangleElements(k); }

double MeanDiagonal(const double* hessian, int64_t cols) {
  double sum = 0;
  for (int64_t k = 0; k < cols; ++k) sum += HessianRow(hessian, k)[k];
  return sum / static_cast<double>(cols);
}

// Factors rows [begin, end) of `rows`, of which later rows are done. Row k keeps M_jk D_k.
bool FactorPanel(LowerTriangle<double>& rows, int64_t begin, int64_t end) {
  constexpr double kLeastPivot = 1e-9;  // of a mean of 1: far below the damping
  for (int64_t k = end - 1; k >= begin; --k) {
    const double* from = rows.Row(k);
    if (!(from[k] > kLeastPivot) || !std::isfinite(from[k])) return false;
    for (int64_t i = begin; i < k; ++i) {
      double* to = rows.Row(i);
      const double factor = from[i] / from[k];
      for (int64_t j = 0; j <= i; ++j) to[j] -= factor * from[j];
    }
  }
  return true;
}

struct Range {
  int64_t begin, end;
};

// Subtracts from `columns` of row i what the rows of a panel after it say.
void UpdateRow(LowerTriangle<double>& rows, Range panel, int64_t i, Range columns) {
  double* to = rows.Row(i);
  for (int64_t k = panel.begin; k < panel.end; k += 4) {
    const double *a = rows.Row(k), *b = rows.Row(k + 1), *c = rows.Row(k + 2), *d = rows.Row(k + 3);
    const double fa = a[i] / a[k], fb = b[i] / b[k + 1], fc = c[i] / c[k + 2], fd = d[i] / d[k + 3];
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      to[j] -= (fa * a[j] + fb * b[j]) + (fc * c[j] + fd * d[j]);
    }
  }
}

bool Factor(LowerTriangle<double>& rows, int64_t cols, [[maybe_unused]] int threads) {
  for (int64_t end = cols; end > 0;) {
    const int64_t begin = (end - 1) / kPanel * kPanel;
    if (!FactorPanel(rows, begin, end)) return false;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t strip = 0; strip < begin; strip += kStrip) {
      const int64_t strip_end = std::min(strip + kStrip, begin);
      for (int64_t tile = 0; tile < strip_end; tile += kTile) {
        for (int64_t i = std::max(strip, tile); i < strip_end; ++i) {
          UpdateRow(rows, {begin, end}, i, {tile, std::min(tile + kTile, i + 1)});
        }
      }
    }
    end = begin;
  }
  return true;
}

// FactorHessian, but throws std::bad_alloc.
Result<FeedbackFactor> FactorOrThrow(const double* hessian, int64_t cols, int threads) {
  const double mean = MeanDiagonal(hessian, cols);
  if (!(mean >= 0) || !std::isfinite(mean)) {
    return InvalidArgument("a Hessian's mean diagonal must be finite and not negative, not " +
                           std::to_string(mean));
  }
  const double scale = mean > 0 ? mean : 1;
  double damping = mean > 0 ? kDamping : 1;
  LowerTriangle<double> rows(cols);
  for (int attempt = 0; attempt < kDampingTries; ++attempt, damping *= 10) {
    for (int64_t k = 0; k < cols; ++k) {
      const double* from = HessianRow(hessian, k);
      double* row = rows.Row(k);
      for (int64_t j = 0; j <= k; ++j) row[j] = from[j] / scale;
      row[k] += damping;
    }
    if (!Factor(rows, cols, threads)) continue;
    FeedbackFactor factor{LowerTriangle<float>(cols), {}};
    for (int64_t k = 0; k < cols; ++k) {
      const double* from = rows.Row(k);
      float* to = factor.feedback.Row(k);
      for (int64_t j = 0; j <= k; ++j) to[j] = static_cast<float>(from[j] / from[k]);
      factor.diagonal.push_back(static_cast<float>(HessianRow(hessian, k)[k] / scale + damping));
    }
    return factor;
  }
  return InvalidArgument("the Hessian is not positive definite, not even with " +
                         std::to_string(damping / 10) + " of its mean added to its diagonal");
}

constexpr int64_t kVectorLanes = 4;
using Vector = float __attribute__((vector_size(kVectorLanes * sizeof(float))));

Vector Load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}
void Store(Vector vector, float* to) { std::memcpy(to, &vector, sizeof(vector)); }

}  // namespace

// In vectors of the least instruction set, 4 of them at a time: left alone, the compiler vectorizes
// the wrong loop or keeps sums in memory.
void AddLaneSums(const float* row, const float* lanes, int64_t count, float* sums) {
  static_assert(kFeedbackLanes == 4 * kVectorLanes);
  Vector a = Load(sums), b = Load(sums + 4), c = Load(sums + 8), d = Load(sums + 12);
  for (int64_t j = 0; j < count; ++j, lanes += kFeedbackLanes) {
    a += row[j] * Load(lanes);
    b += row[j] * Load(lanes + 4);
    c += row[j] * Load(lanes + 8);
    d += row[j] * Load(lanes + 12);
  }
  Store(a, sums);
  Store(b, sums + 4);
  Store(c, sums + 8);
  Store(d, sums + 12);
}

ScaledHessian ScaleHessian(const double* hessian, int64_t cols) {
  const double mean = MeanDiagonal(hessian, cols);
  ScaledHessian scaled{mean > 0 ? mean : 1, LowerTriangle<float>(cols)};
  for (int64_t k = 0; k < cols; ++k) {
    const double* from = HessianRow(hessian, k);
    float* row = scaled.values.Row(k);
    for (int64_t j = 0; j <= k; ++j) row[j] = static_cast<float>(from[j] / scaled.mean);
  }
  return scaled;
}

void AddCosts(const ScaledHessian& hessian, int64_t cols, const float* x, double* costs) {
  for (int64_t k = 0; k < cols; ++k) {
    const float* row = hessian.values.Row(k);
    const float* of_column = x + k * kFeedbackLanes;
    float sums[kFeedbackLanes] = {};
    AddLaneSums(row, x, k, sums);
    for (int64_t l = 0; l < kFeedbackLanes; ++l) {
      const double value = of_column[l];
      costs[l] += value * (2.0 * sums[l] + row[k] * value);
    }
  }
}

Result<FeedbackFactor> FactorHessian(const double* hessian, int64_t cols, int threads) {
  try {
    return FactorOrThrow(hessian, cols, threads);
  } catch (const std::bad_alloc&) {
    return Error{ErrorCode::kResourceExhausted,
                 "not enough memory to factor a Hessian of " + std::to_string(cols) + " inputs"};
  }
}

}  // namespace innerq
