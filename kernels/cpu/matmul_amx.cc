// The BF16 product with AMX tiles: 32 rows by 32 outputs by 32 inputs per step of eight tiles.
//
// Activations are BF16 tiles [M/16][K/32][16 rows][32 k]; with M < 16 a tile has M rows. A tile
// product adds 16 pairs of k to its F32 sums in order, each row by itself; sums that wait between
// two spans of k are stored as F32. So the order over k is one for every M and every task.
#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/op_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <array>

#define INNERQ_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))

namespace innerq {
namespace {

constexpr int64_t kTileDepth = 32;                           // inputs k of a tile
constexpr int64_t kRowBytes = kTileDepth * 2;                // of a tile of activations
constexpr int64_t kPairBytes = kPanelOutputs * 4;            // one pair of k of a panel
constexpr int64_t kStepBytes = kTileDepth / 2 * kPairBytes;  // the panel's part of one step
constexpr int64_t kSumBytes = kPanelOutputs * 4;             // one row of a block of sums
constexpr int64_t kBlockRows = 2 * kRowTile;
constexpr int64_t kBlockBytes = kBlockRows * kSumBytes;
// Inputs k of a span: its 16 KiB of a panel stay in the L1 cache while blocks of rows go by. Fewer
// blocks than kSpanBlocks reuse too little to pay for keeping sums in memory between spans.
constexpr int64_t kSpanDepth = 256;
constexpr int64_t kSpanBlocks = 4;
// Bytes of weights fetched ahead of a single block of rows: covers the latency of memory.
constexpr int64_t kAhead = 4 * kStepBytes;
constexpr int64_t kLineBytes = 64;

static_assert(kTaskRows / kBlockRows * kTaskPanels * kBlockBytes <= kTaskScratchBytes);

// Tiles: 0 and 1 the sums of the first 16 rows by two times 16 outputs, 2 and 3 of the second 16
// rows; 4 and 5 activations of both; 6 and 7 weights. Entry r is for activations with r rows.
constexpr std::array<TileConfig, kRowTile + 1> MakeTileConfigs() {
  std::array<TileConfig, kRowTile + 1> configs;
  for (size_t rows = 1; rows < configs.size(); ++rows) {
    for (int tile = 0; tile < 8; ++tile) {
      configs[rows].row_bytes[tile] = 64;
      configs[rows].rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kRowTile);
    }
  }
  return configs;
}
constexpr std::array<TileConfig, kRowTile + 1> kTileConfigs = MakeTileConfigs();

INNERQ_TARGET void Pack(const float* x, int64_t rows, int64_t block_rows, int64_t k,
                        std::byte* packed) {
  const int64_t depth = PackedDepth(WeightFormat::kBF16, k);
  for (int64_t i = 0; i < depth; i += kTileDepth) {
    for (int64_t r = 0; r < block_rows; ++r, packed += kRowBytes) {
      const int64_t left = r < rows ? std::clamp<int64_t>(k - i, 0, kTileDepth) : 0;
      const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << left) - 1u);
      const float* from = x + r * k + i;
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16);
      _mm512_storeu_si512(packed, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
}

// One block: `steps` tiles of k, of kRowTiles (1 or 2) tiles of rows, by one panel.
struct Block {
  const std::byte* activations;  // the first tile
  int64_t tile_stride;           // bytes to the tile of the next 16 rows
  int64_t step_stride;           // bytes to the tile of the next k
  const std::byte* weight;
  const std::byte* ahead;  // weights to fetch into the cache meanwhile
  int64_t ahead_bytes;     // per step
  int64_t steps;
  std::byte* sums;  // [32][32] F32
  bool first;       // sums are zero, whatever they hold
};

template <int kRowTiles>
INNERQ_TARGET void AddProducts(const Block& block) {
  std::byte* sums = block.sums;
  std::byte* lower_sums = sums + kRowTile * kSumBytes;
  if (block.first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kSumBytes);
    _tile_loadd(1, sums + 64, kSumBytes);
    if (kRowTiles > 1) {
      _tile_loadd(2, lower_sums, kSumBytes);
      _tile_loadd(3, lower_sums + 64, kSumBytes);
    }
  }
  const std::byte* a = block.activations;
  const std::byte* w = block.weight;
  const std::byte* ahead = block.ahead;
  for (int64_t step = 0; step < block.steps; ++step) {
    const std::byte* ahead_end = ahead + block.ahead_bytes;
    for (; ahead < ahead_end; ahead += kLineBytes) __builtin_prefetch(ahead, 0, 2);
    _tile_loadd(6, w, kPairBytes);
    _tile_loadd(4, a, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 64, kPairBytes);
    _tile_dpbf16ps(1, 4, 7);
    if (kRowTiles > 1) {
      _tile_loadd(5, a + block.tile_stride, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    a += block.step_stride;
    w += kStepBytes;
  }
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + 64, kSumBytes);
  if (kRowTiles > 1) {
    _tile_stored(2, lower_sums, kSumBytes);
    _tile_stored(3, lower_sums + 64, kSumBytes);
  }
}

// Adds bias and residual to the finished sums of rows [row, row + rows) and writes them out.
INNERQ_TARGET void StoreBlock(const PanelTask& task, int64_t row, int64_t rows, int64_t panel,
                              const std::byte* sums) {
  for (int half = 0; half < 2; ++half) {
    const int64_t n = panel * kPanelOutputs + half * 16;
    const int64_t left = std::clamp<int64_t>(task.n - n, 0, 16);
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1u);
    const bool biased = task.bias != nullptr;
    const __m512 bias = biased ? _mm512_maskz_loadu_ps(mask, task.bias + n) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; ++r) {
      float* out = task.out + (row + r) * task.n + n;
      __m512 sum = _mm512_loadu_ps(sums + r * kSumBytes + half * 64);
      if (biased) sum = _mm512_add_ps(sum, bias);
      if (task.accumulate) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, out));
      _mm512_mask_storeu_ps(out, mask, sum);
    }
  }
}

INNERQ_TARGET void Multiply(const PanelTask& task) {
  const int64_t tile_rows = std::min(task.m, kRowTile);
  _tile_loadconfig(&kTileConfigs[static_cast<size_t>(tile_rows)]);
  const int64_t step_stride = tile_rows * kRowBytes;
  const int64_t tile_stride = task.k / kTileDepth * step_stride;
  const int64_t row_blocks = CeilDiv(task.row_end - task.row_begin, kBlockRows);
  const bool one_span = row_blocks < kSpanBlocks || task.k <= kSpanDepth;
  const int64_t span = one_span ? task.k : kSpanDepth;
  const int64_t panel_bytes = task.k * kPanelOutputs * 2;
  // All blocks of rows together fetch the next panel while this one is multiplied.
  const int64_t ahead_bytes = RoundUp(CeilDiv(kStepBytes, row_blocks), kLineBytes);
  const int64_t distance = row_blocks == 1 ? kAhead : panel_bytes;
  for (int64_t k = 0; k < task.k; k += span) {
    const int64_t depth = std::min(span, task.k - k);
    std::byte* sums = task.scratch;
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      for (int64_t row = task.row_begin; row < task.row_end; row += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, task.row_end - row);
        const int64_t steps = depth / kTileDepth;
        const std::byte* weight = task.weight + panel * panel_bytes + k * kPanelOutputs * 2;
        const Block block = {
            .activations =
                task.activations + row / kRowTile * tile_stride + k / kTileDepth * step_stride,
            .tile_stride = tile_stride,
            .step_stride = step_stride,
            .weight = weight,
            .ahead = weight + distance + (row - task.row_begin) / kBlockRows * steps * ahead_bytes,
            .ahead_bytes = ahead_bytes,
            .steps = steps,
            .sums = sums,
            .first = k == 0,
        };
        if (rows > kRowTile) {
          AddProducts<2>(block);
        } else {
          AddProducts<1>(block);
        }
        if (k + depth == task.k) StoreBlock(task, row, rows, panel, sums);
        if (!one_span) sums += kBlockBytes;
      }
    }
  }
  _tile_release();
}

}  // namespace

MatMulKernel AmxMatMul() { return {Pack, 2, Multiply}; }

}  // namespace innerq

#endif  // __x86_64__
