// AddGram: products of inputs with each other.
#pragma once

#include <cstdint>

#include "kernels/result.h"

namespace innerq {

// Adds the lower triangle of X^T X [K][K] to `gram`; X is [M][K]. Sums of up to 512 rows are in
// F32, those of them in double. An input that is not finite makes its row and column so. Errors:
// resource exhausted for 1 MiB for each 1024 columns; internal from oneDNN.
struct AddGramArgs {
  const float* x = nullptr;  // [M][K]
  int64_t rows = 0;          // M
  int64_t cols = 0;          // K
  int threads = 1;
  double* gram = nullptr;  // row after row (lower_triangle.h)
};
Result<void> AddGram(const AddGramArgs& args);

}  // namespace innerq
