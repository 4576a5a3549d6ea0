// The integer products of codes with AMX tiles.
//
// A panel of codes [inner/4][16 outer][4 inner] is a B tile as it lies; a block of IntegerRows,
// eight rows of high and eight of low bytes, is an A tile. A step multiplies two blocks by two
// panels.
#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/attention_ops.h"

#if defined(__x86_64__)
// g++ 12 takes the undefined operands inside its AVX-512 intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <array>

#define INNERQ_TARGET __attribute__((target("avx512f,avx512bw,amx-tile,amx-int8")))

namespace innerq {
namespace {

constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileSize = 16 * kTileRowBytes;
// Below these VNNI is quicker: tiles are half empty, and setting them up takes 60 ns.
constexpr int64_t kMinDepth = 32;
constexpr int64_t kMinRows = 16;

// Tiles 0 to 3: sums of two blocks by two panels; 4 and 5: rows; 6 and 7: codes. Entry i is for a
// depth of 4 * i inner elements.
constexpr std::array<TileConfig, 17> MakeTileConfigs() {
  std::array<TileConfig, 17> configs;
  for (size_t quads = 1; quads < configs.size(); ++quads) {
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_rows = tile == 4 || tile == 5;
      configs[quads].row_bytes[tile] = static_cast<uint16_t>(is_rows ? 4 * quads : kTileRowBytes);
      configs[quads].rows[tile] = static_cast<uint8_t>(tile < 6 ? 16 : quads);
    }
  }
  return configs;
}
constexpr std::array<TileConfig, 17> kTileConfigs = MakeTileConfigs();

// The largest number of inner elements that tiles can take at a time.
int64_t Depth(int64_t group_size) {
  int64_t depth = std::min<int64_t>(group_size, 64);
  while (group_size % depth != 0) depth -= 4;
  return depth;
}

// Two blocks of rows (or the last one) by two panels (or the last one), one group.
struct Step {
  int64_t row = 0, panel = 0, group = 0;
};

// The sums of a step as tiles store them, [2 blocks][2 panels].
struct alignas(64) StepSums {
  int32_t tiles[2][2][kTileSize / 4];
};

// dots = 128 * high + low for the rows of a step.
INNERQ_TARGET void Combine(const DotArgs& args, const Step& step, const StepSums& sums) {
  const int64_t row_dots = args.groups() * args.outer;
  const int64_t num_panels = std::min<int64_t>(2, args.panel_end - step.panel);
  for (int block = 0; block < 2; ++block) {
    const int64_t row = step.row + block * kRowBlock;
    const int64_t num_rows = std::min(kRowBlock, args.row_end - row);
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      const int32_t* from = sums.tiles[block][panel];
      int32_t* to = args.dots + ((row - args.row_begin) * args.groups() + step.group) * args.outer +
                    (step.panel + panel) * kPanelWidth;
      for (int64_t r = 0; r < num_rows; ++r) {
        const __m512i high = _mm512_load_si512(from + r * kPanelWidth);
        const __m512i low = _mm512_load_si512(from + (r + kRowBlock) * kPanelWidth);
        _mm512_storeu_si512(to + r * row_dots, _mm512_add_epi32(_mm512_slli_epi32(high, 7), low));
      }
    }
  }
}

// Sums of a step into tiles 0 to 3.
INNERQ_TARGET void Multiply(const DotArgs& args, const Step& step, int64_t depth) {
  const int64_t panel_bytes = args.inner * kPanelWidth, stride = args.rows.stride;
  const uint8_t* codes = args.codes + step.panel * panel_bytes;
  const int8_t* rows = args.rows.High(step.row);
  const bool two_blocks = step.row + kRowBlock < args.row_end;
  const bool two_panels = step.panel + 1 < args.panel_end;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t begin = step.group * args.group_size;
  for (int64_t i = begin; i < begin + args.group_size; i += depth) {
    _tile_loadd(4, rows + i, stride);
    _tile_loadd(6, codes + i * kPanelWidth, kTileRowBytes);
    _tile_dpbsud(0, 4, 6);
    if (two_panels) {
      _tile_loadd(7, codes + panel_bytes + i * kPanelWidth, kTileRowBytes);
      _tile_dpbsud(1, 4, 7);
    }
    if (two_blocks) {
      _tile_loadd(5, rows + 2 * kRowBlock * stride + i, stride);
      _tile_dpbsud(2, 5, 6);
      if (two_panels) _tile_dpbsud(3, 5, 7);
    }
  }
}

INNERQ_TARGET void DotAll(const DotArgs& args, int64_t depth) {
  StepSums sums;
  Step previous;
  bool waits = false;  // sums of the previous step are not yet combined
  _tile_loadconfig(&kTileConfigs[static_cast<size_t>(depth / 4)]);
  for (int64_t panel = args.panel_begin; panel < args.panel_end; panel += 2) {
    for (int64_t group = 0; group < args.groups(); ++group) {
      for (int64_t row = args.row_begin; row < args.row_end; row += 2 * kRowBlock) {
        const Step step{row, panel, group};
        Multiply(args, step, depth);
        if (waits) Combine(args, previous, sums);  // while the tiles are busy
        _tile_stored(0, sums.tiles[0][0], kTileRowBytes);
        _tile_stored(1, sums.tiles[0][1], kTileRowBytes);
        _tile_stored(2, sums.tiles[1][0], kTileRowBytes);
        _tile_stored(3, sums.tiles[1][1], kTileRowBytes);
        previous = step;
        waits = true;
      }
    }
  }
  Combine(args, previous, sums);
  _tile_release();
}

}  // namespace

void DotAmx(const DotArgs& args) {
  const int64_t depth = Depth(args.group_size);
  const bool fills = depth >= kMinDepth && args.row_end - args.row_begin >= kMinRows;
  fills ? DotAll(args, depth) : DotVnni(args);
}

}  // namespace innerq

#endif  // __x86_64__
