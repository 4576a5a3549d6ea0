// EncodeLowBit: chooses the codes of low-bit weights.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/low_bit_weight.h"
#include "kernels/result.h"

namespace innerq {

struct FeedbackFactor;

// A matrix to encode. Borrowed.
struct EncodeLowBitArgs {
  LowBitSpec spec;
  int64_t rows = 0;                // N
  int64_t cols = 0;                // K, which spec divides
  const float* weights = nullptr;  // [N][K], finite
  // The lower triangle (lower_triangle.h) of H = X^T X [K][K] of inputs X seen in use, to minimize
  // |X W^T - X Q^T|^2; null: the identity.
  const double* hessian = nullptr;
  // Of `hessian`, where several matrices share it (low_bit_hessian.h); null: made here.
  const FeedbackFactor* factor = nullptr;
  // The share of weights that become zero because they are small: those with |w| < t * sigma of
  // their group, t found for the whole matrix. Where about as many would round to zero anyway,
  // those alone do, as with 0. In [0, 1).
  double prune = 0;
  LowBitScale scale = LowBitScale::kFree;
  int threads = 1;
};

struct EncodedLowBit {
  std::vector<uint8_t> codes;    // [N][K * B / 8]
  std::vector<uint16_t> scales;  // [N][groups] F16
  double alpha = 0;              // of the matrix, before groups were refined
  double threshold = 0;          // t of `prune`; 0: rounding alone made zeros
  double zeros = 0;              // share of weights that are zero
  // |X W^T - X Q^T|^2 / |X W^T|^2, with the identity for X^T X if there is none; 0 if nothing is to
  // be met.
  double error = 0;
};

// Sigma is the root mean square of a group's weights: their standard deviation about zero. Alpha is
// the one for the whole matrix that makes sum h (w - q)^2 least with T = alpha * sigma, h the
// diagonal of H; then T of each group is refined on its own weights, or is the best power of two
// for them (low_bit_clip.h). Weights that pruning makes zero have no say in either.
//
// With a Hessian an output's columns are encoded in order, and each aims at its weight and at what
// makes up for the errors of those before it (low_bit_hessian.h). T of a group is fitted when its
// turn comes, to what its columns then aim at; T of a whole output to the weights as they came,
// which also decide what is pruned.
//
// The result is the same for any number of threads. Errors: invalid argument for a weight
// that is not finite or exceeds F16, and for a Hessian that cannot be one; resource exhausted.
Result<EncodedLowBit> EncodeLowBit(const EncodeLowBitArgs& args);

// Bytes that EncodeLowBit takes at most beside weights, Hessian and factor, its result included.
// What `args` points to does not matter.
int64_t EncodeLowBitBytes(const EncodeLowBitArgs& args, bool has_hessian);

}  // namespace innerq
