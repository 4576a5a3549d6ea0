#include "kernels/cpu/gram.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <dnnl.hpp>
#include <string>

#include "kernels/cpu/host_memory.h"
#include "kernels/cpu/lower_triangle.h"

namespace innerq {
namespace {

constexpr int64_t kSumRows = 512;    // of a sum in F32
constexpr int64_t kPanelRows = 256;  // of X^T X at once

}  // namespace

Result<void> AddGram(const AddGramArgs& args) {
  const int64_t cols = args.cols;
  const int64_t panel_rows = std::min(kPanelRows, cols);
  ASSIGN_OR_RETURN(Buffer buffer,
                   AllocateHost(panel_rows * cols * static_cast<int64_t>(sizeof(float))));
  auto* const panel = reinterpret_cast<float*>(buffer.data());
#if defined(_OPENMP)
  omp_set_num_threads(args.threads);  // oneDNN takes the calling thread's setting
#endif
  for (int64_t first = 0; first < args.rows; first += kSumRows) {
    const int64_t rows = std::min(kSumRows, args.rows - first);
    const float* const x = args.x + first * cols;
    for (int64_t begin = 0; begin < cols; begin += kPanelRows) {
      const int64_t count = std::min(kPanelRows, cols - begin);
      const int64_t end = begin + count;  // of the triangle's columns
      const dnnl_status_t done =
          dnnl_sgemm('T', 'N', count, end, rows, 1.0f, x + begin, cols, x, cols, 0.0f, panel, end);
      if (done != dnnl_success) {
        return Error{ErrorCode::kInternal, "oneDNN: sgemm: status " + std::to_string(done)};
      }
#pragma omp parallel for num_threads(args.threads)
      for (int64_t i = begin; i < end; ++i) {
        const float* const sums = panel + (i - begin) * end;
        double* const to = args.gram + TriangleElements(i);
        for (int64_t j = 0; j <= i; ++j) to[j] += static_cast<double>(sums[j]);
      }
    }
  }
  return {};
}

}  // namespace innerq
