// Index arithmetic of the attention and seal kernels, host and device, so that it is tested where
// there is no GPU.
#pragma once

#include <cstdint>

#include "kernels/paged_kv.h"

namespace innerq {

// How rows of packed elements lie in shared memory. Rows of whole 32-bit words start an odd number
// of words apart, so that 32 lanes that each read their own row meet 32 banks. Other rows lie as
// in the page, one string without gaps.
struct PackedRows {
  int32_t row_words = 0;   // words that are copied before a gap
  int32_t pitch = 0;       // words from one row to the next
  int32_t num_words = 0;   // of all rows, without gaps
  int32_t lane_words = 0;  // added per row to where a row's bits are looked up
  int32_t lane_bits = 0;   // likewise, in bits

  // Words of shared memory; reads may touch one word beyond the last element.
  INNERQ_HOST_DEVICE int32_t shared_words() const {
    return (num_words + row_words - 1) / row_words * pitch + 1;
  }
};

// `num_rows` rows of `columns` elements of `bits` bits. num_rows * columns * bits is a multiple
// of 32.
INNERQ_HOST_DEVICE inline PackedRows PackRows(int32_t num_rows, int32_t columns, int32_t bits) {
  PackedRows rows;
  const int32_t row_bits = columns * bits;
  rows.num_words = num_rows * row_bits / 32;
  const bool whole = row_bits % 32 == 0;
  rows.row_words = whole ? row_bits / 32 : rows.num_words;
  rows.pitch = rows.row_words | 1;
  rows.lane_words = whole ? rows.pitch : 0;
  rows.lane_bits = whole ? 0 : row_bits;
  return rows;
}

// The same without gaps, for lanes that read side by side.
INNERQ_HOST_DEVICE inline PackedRows PackRowsDensely(int32_t num_rows, int32_t columns,
                                                     int32_t bits) {
  PackedRows rows;
  rows.num_words = num_rows * columns * bits / 32;
  rows.row_words = rows.pitch = rows.num_words;
  rows.lane_bits = columns * bits;
  return rows;
}

// Offsets in the shared memory of one warp of attention, in floats; see attention.cu.
struct AttentionShared {
  int32_t q = 0;        // [D][R]
  int32_t weights = 0;  // [32][R]
  int32_t q_sums = 0;   // [D / N][R]
  int32_t total = 0;    // [R][C][32]
  int32_t strip = 0;    // words of keys, then of values
  int32_t floats = 0;   // of all
};

INNERQ_HOST_DEVICE inline AttentionShared PlanAttentionShared(const KvLayerLayout& layout,
                                                              int32_t tile_rows,
                                                              int32_t lane_channels) {
  const auto dim = static_cast<int32_t>(layout.head_dim);
  const auto padded = static_cast<int32_t>(layout.padded_dim());
  AttentionShared shared;
  shared.weights = dim * tile_rows;
  shared.q_sums = shared.weights + 32 * tile_rows;
  const int32_t groups = layout.key.quantized() ? dim / 8 : 0;  // no group is smaller than 8
  shared.total = shared.q_sums + groups * tile_rows;
  shared.strip = shared.total + tile_rows * lane_channels * 32;
  // Open pages have 16 bits, sealed ones those of their codec, or 16 as well.
  const int32_t strips[] = {PackRows(32, dim, 16).shared_words(),
                            PackRows(32, dim, layout.key.bits).shared_words(),
                            PackRowsDensely(32, padded, 16).shared_words(),
                            PackRowsDensely(32, padded, layout.value.bits).shared_words()};
  int32_t words = 0;
  for (int i = 0; i < 4; ++i) words = strips[i] > words ? strips[i] : words;
  shared.floats = shared.strip + words;
  return shared;
}

// Token and channel of value i of group j of one side of a page of T tokens and D channels. Groups
// run along channels or along tokens; neighbouring j differ in what the groups do not run along.
struct PageElement {
  int64_t t = 0;
  int64_t d = 0;
};
INNERQ_HOST_DEVICE inline PageElement GroupElement(const KvLayerLayout& layout, int64_t group_size,
                                                   bool along_channels, int64_t i, int64_t j) {
  const int64_t tokens = layout.page_tokens, dim = layout.head_dim;
  if (along_channels) return {j % tokens, j / tokens * group_size + i};
  return {j / dim * group_size + i, j % dim};
}

// Packs eight codes, one a byte, into `bits` bytes: eight consecutive codes of a page's string.
INNERQ_HOST_DEVICE inline void PackEightCodes(const uint8_t* codes, int bits, uint8_t* packed) {
  uint64_t string = 0;
  for (int i = 0; i < 8; ++i) string |= static_cast<uint64_t>(codes[i]) << (i * bits);
  for (int i = 0; i < bits; ++i) packed[i] = static_cast<uint8_t>(string >> (8 * i));
}

}  // namespace innerq
