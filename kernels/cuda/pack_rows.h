// Weights on their way to the device.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "kernels/backend.h"

namespace innerq::cuda {

// The rows of `parts`, [n_i, K] each, stacked and converted to the format of `weight`, whose
// extents they have: row-major, both extents padded with zeros to kMatMulUnit. Errors: resource
// exhausted, and what the runtime says.
Result<Buffer> PackRows(std::span<const ConstTensorView> parts, const Weight& weight);

// Low-bit matrices [n_i, K], stacked, as low_bit_layout.h says. `stream` packs them on the device,
// where a MiB of the file's codes at a time is as well; waits for it. Errors: as above.
Result<Buffer> PackCodes(std::span<const LowBitMatrix> parts, const Weight& weight,
                         cudaStream_t stream);

}  // namespace innerq::cuda
