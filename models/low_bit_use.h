// LowBitUse: what becomes of a checkpoint's matrices of codes.
#pragma once

#include <optional>

#include "kernels/backend.h"
#include "models/checkpoint.h"

namespace innerq {

enum class LowBitUse { kNone, kMultiplied, kDecoded };

// `format`: as of LoadOptions.
inline LowBitUse PlanLowBitUse(const ModelConfig& config, const Backend& backend,
                               std::optional<WeightFormat> format) {
  if (!config.low_bit) return LowBitUse::kNone;
  return backend.has_low_bit() && !format ? LowBitUse::kMultiplied : LowBitUse::kDecoded;
}

}  // namespace innerq
