// DecodeLowBit: a matrix of codes as floats.
#pragma once

#include "kernels/low_bit_weight.h"
#include "kernels/result.h"
#include "kernels/tensor.h"

namespace innerq {

// [N, K] F32: LowBitMatrix::Value of every weight, to the bit, by so many threads. Errors: resource
// exhausted.
Result<Buffer> DecodeLowBit(const LowBitMatrix& matrix, int threads);

}  // namespace innerq
