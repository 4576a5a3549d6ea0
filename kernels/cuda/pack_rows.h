// Weights on their way to the device.
#pragma once

#include <span>

#include "kernels/backend.h"

namespace innerq::cuda {

// The rows of `parts`, [n_i, K] each, stacked and converted to the format of `weight`, whose
// extents they have: row-major, both extents padded with zeros to kMatMulUnit. Errors: resource
// exhausted, and what the runtime says.
Result<Buffer> PackRows(std::span<const ConstTensorView> parts, const Weight& weight);

}  // namespace innerq::cuda
