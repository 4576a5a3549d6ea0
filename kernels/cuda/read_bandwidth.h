// How fast a device's memory is read.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "kernels/result.h"

namespace innerq::cuda {

// See Backend::MeasureReadBandwidth. Nothing else may run on the device meanwhile.
Result<std::optional<double>> MeasureReadBandwidth(cudaStream_t stream,
                                                   int64_t num_multiprocessors);

}  // namespace innerq::cuda
