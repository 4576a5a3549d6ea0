// The clip T of a group of low-bit weights that makes the error of their rounding least.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/low_bit_weight.h"

namespace innerq {

// What rounding weights w to a clip T says about it, with m = |w| L / T, l the level nearest to m
// and h >= 0 what an error of w costs.
struct RoundingSums {
  double product = 0;  // sum of h m l
  double square = 0;   // sum of h l^2; with the codes as they are, T * product / square is best
  double error = 0;    // sum of h (m - l)^2, in units of (T / L)^2
};

// `weights` [n], n a multiple of 8; `costs` [n]: h; `clip` > 0. Sums are in F32 and always in the
// same order.
RoundingSums SumRounding(const LowBitSpec& spec, std::span<const float> weights, const float* costs,
                         float clip);

// sqrt(mean w^2): the standard deviation about zero, where levels are centered.
double Sigma(std::span<const float> weights);

// Clips of weights of N(0, 1) that make their mean square error least, in units of sigma.
double NormalAlpha(const LowBitSpec& spec);

// T as F16, at most the largest F16. For fixed codes the best T has a closed form: rounding and
// that step alternate, as in Lloyd's algorithm, from alpha * sigma, from some multiples of it and
// from the largest weight that counts, until T as F16 stays, and the T of least error is kept. 0 if
// nothing is better than zeros.
uint16_t FitClip(const LowBitSpec& spec, double alpha, std::span<const float> weights,
                 const float* costs);

// The same with T a power of two that F16 holds, 2^-24 to 2^15: of all of them up to the first that
// is not below the largest weight that counts, the one of least error. A larger one has no more
// levels where weights are.
uint16_t FitPow2Clip(const LowBitSpec& spec, std::span<const float> weights, const float* costs);

}  // namespace innerq
