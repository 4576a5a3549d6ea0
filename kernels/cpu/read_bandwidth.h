// MeasureReadBandwidth: how fast this machine's memory can be read at best.
#pragma once

#include "kernels/result.h"

namespace innerq {

// Bytes per second of a plain loop on `threads` threads that touches every cache line of 1 GiB of
// written memory: slices of it are timed one by one, about as long as a matrix product, and the
// fastest counts. Errors: resource exhausted without that memory.
Result<double> MeasureReadBandwidth(int threads);

}  // namespace innerq
