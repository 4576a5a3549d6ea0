// PackPanels: weights from checkpoint order [N, K] to the panels described in op_table.h.
#pragma once

#include <span>

#include "kernels/backend.h"
#include "kernels/cpu/op_table.h"

namespace innerq {

// Bytes of the panels of a weight [n, k].
int64_t PanelBytes(WeightFormat format, int64_t n, int64_t k);

// Converts parts [n_i, K] (F32, F16 or BF16), stacked along N, into panels of `format`, on
// `threads` threads. `panels` holds PanelBytes, zeroed.
void PackPanels(std::span<const ConstTensorView> parts, WeightFormat format, const OpTable& ops,
                int threads, std::byte* panels);

// Converts elements [begin, begin + count) of a floating-point view to F32.
void ReadFloats(const ConstTensorView& view, int64_t begin, int64_t count, const OpTable& ops,
                float* out);

}  // namespace innerq
