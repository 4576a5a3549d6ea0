// EncodeLowBit: chooses the codes of low-bit weights.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/low_bit_weight.h"
#include "kernels/result.h"

namespace innerq {

// A matrix to encode.
struct EncodeLowBitArgs {
  LowBitSpec spec;
  int64_t rows = 0;                // N
  int64_t cols = 0;                // K, which spec divides
  const float* weights = nullptr;  // [N][K], finite
  // H = X^T X [K][K] of inputs X seen in use, to minimize |X W^T - X Q^T|^2; null: the identity.
  const double* hessian = nullptr;
  // The share of weights that become zero because they are small: those with |w| < t * sigma of
  // their group, t found for the whole matrix. 0: those alone that round to zero. In [0, 1).
  double prune = 0;
  int threads = 1;
};

struct EncodedLowBit {
  std::vector<uint8_t> codes;    // [N][K * B / 8]
  std::vector<uint16_t> scales;  // [N][groups] F16
  double alpha = 0;              // of the matrix, before groups were refined
  double threshold = 0;          // t of `prune`
  double zeros = 0;              // share of weights that are zero
  // |X W^T - X Q^T|^2 / |X W^T|^2, with a matrix of ones on the diagonal for X^T X if there is
  // none.
  double error = 0;
};

// Alpha is learned for the whole matrix by descent on that error over alpha with T = alpha * sigma,
// and refined for each group. With a Hessian, an output's columns are encoded in order and the
// error of each is taken up by those not yet encoded (GPTQ, arXiv 2210.17323). Errors: invalid
// argument for weights that are not finite or exceed F16; resource exhausted.
Result<EncodedLowBit> EncodeLowBit(const EncodeLowBitArgs& args);

}  // namespace innerq
