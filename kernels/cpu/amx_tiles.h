// TileConfig: the shapes of the AMX tile registers.
#pragma once

#include <cstdint>

namespace innerq {

// The memory image of LDTILECFG: Intel SDM volume 1, table 18-1. Load it from a static constant:
// g++ 12 drops the stores to a local configuration.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace innerq
