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

// How a block of attention on tensor cores is cut; see attention_mma.cuh.
struct MmaShape {
  int32_t head_dim = 0;
  int32_t lane_rows = 1;  // rows of a warp are eight times as many
  int32_t num_teams = 1;

  // Sizes of the two forms of queries, for open and for sealed keys, and offsets in them, in bytes.
  INNERQ_HOST_DEVICE constexpr int32_t operand_bytes() const { return head_dim / 32 * 2 * 32 * 16; }
  INNERQ_HOST_DEVICE constexpr int32_t open_units() const { return lane_rows * operand_bytes(); }
  INNERQ_HOST_DEVICE constexpr int32_t open_bytes() const { return open_units() + 16 * 4; }
  INNERQ_HOST_DEVICE constexpr int32_t starts() const { return operand_bytes(); }
  INNERQ_HOST_DEVICE constexpr int32_t sums() const { return starts() + head_dim / 32 * 8 * 16; }
  INNERQ_HOST_DEVICE constexpr int32_t sealed_units() const {
    return sums() + head_dim / 32 * 16 * 4;
  }
  INNERQ_HOST_DEVICE constexpr int32_t sealed_bytes() const { return sealed_units() + 16 * 4; }
  INNERQ_HOST_DEVICE constexpr int32_t query_bytes() const { return open_bytes() + sealed_bytes(); }
};

// Offsets in the shared memory of one block, in bytes. A stage is a sealed strip: of a page of one
// strip, what lies in memory.
struct MmaShared {
  // Within a stage, which begins with the codes of keys [D/32] squares.
  int32_t key_scales = 0, key_zeros = 0;      // F16 [D/N][32]
  int32_t value_codes = 0;                    // [D/32] squares
  int32_t value_scales = 0, value_zeros = 0;  // F16 [D]
  int32_t stage_bytes = 0;
  int32_t team_bytes = 0;  // of a team's stages and their barriers
  // After the stages of all teams.
  int32_t parts = 0;    // states of a segment's parts [teams][D/4 + 2][32] F32; of one team: the
                        // segment so far [rows][D/4][threads]
  int32_t total = 0;    // of one team: the segments so far [rows][D/4][threads] F32
  int32_t queries = 0;  // of each warp's rows, or of all teams' rows: two forms
  int32_t bytes = 0;    // of all
};

INNERQ_HOST_DEVICE inline MmaShared PlanMmaShared(const KvLayerLayout& layout,
                                                  const MmaShape& shape, int32_t num_stages,
                                                  int32_t num_threads) {
  const int32_t dim = shape.head_dim;
  const QuantSpec &key = layout.key, &value = layout.value;
  MmaShared shared;
  if (key.quantized()) {  // both are, or none
    const int32_t key_params = dim / key.group_size * 32 * 2;
    shared.key_scales = 32 * dim * key.bits / 8;
    shared.key_zeros = shared.key_scales + key_params;
    shared.value_codes = shared.key_zeros + (key.has_zero() ? key_params : 0);
    shared.value_scales = shared.value_codes + 32 * dim * value.bits / 8;
    shared.value_zeros = shared.value_scales + dim * 2;
    shared.stage_bytes = shared.value_zeros + (value.has_zero() ? dim * 2 : 0);
  }
  shared.team_bytes = num_stages * shared.stage_bytes + (num_stages * 8 + 15) / 16 * 16;
  shared.parts = shape.num_teams * shared.team_bytes;
  const bool teams = shape.num_teams > 1;
  const int32_t state = shape.lane_rows * dim / 4 * num_threads * 4;
  shared.total = shared.parts + (teams ? shape.num_teams * (dim / 4 + 2) * 32 * 4 : state);
  shared.queries = shared.total + (teams ? 0 : state);
  shared.bytes = shared.queries + (teams ? 1 : num_threads / 32) * shape.query_bytes();
  return shared;
}

// So many neighbouring words, read at once.
template <int kCount>
struct alignas(4 * kCount) Words {
  uint32_t word[kCount];
};

// The words of a square's codes that a lane owns; see FragmentFieldAt.
template <int kBits>
INNERQ_HOST_DEVICE inline void LoadLaneWords(const uint32_t* square, int lane,
                                             uint32_t (&words)[kBits]) {
  constexpr int kAtOnce = kBits == 3 ? 2 : kBits < 4 ? kBits : 4;
  for (int k = 0; k + kAtOnce <= kBits; k += kAtOnce) {
    const auto some =
        *reinterpret_cast<const Words<kAtOnce>*>(square + FragmentWord(kBits, lane, k));
    for (int i = 0; i < kAtOnce; ++i) words[k + i] = some.word[i];
  }
  if constexpr (kBits == 3) words[2] = square[FragmentWord(kBits, lane, 2)];
}

// Bit of a half at which TileCodes leaves the codes of register `pair` of every tile.
INNERQ_HOST_DEVICE constexpr int TileCodeBit(int bits, int pair) {
  return bits == 3 ? (pair == 2 ? 6 : pair == 0 ? 0 : 3) : pair * bits % 8;
}

// Two codes of a lane, in the halves of a word: those of register `pair` of tile `tile` of a
// square; each begins at TileCodeBit, all other bits are 0.
template <int kBits>
INNERQ_HOST_DEVICE inline uint32_t TileCodes(const uint32_t (&words)[kBits], int tile, int pair) {
  constexpr uint32_t kBothHalves = 0x00010001u;
  const int field = 4 * tile + pair, to = TileCodeBit(kBits, pair);
  if (IsSplitField(kBits, field)) {
    return (words[0] >> (15 - to) & kBothHalves << to) |
           (words[kBits / 2] >> (14 - to) & kBothHalves << (to + 1)) |
           (words[kBits - 1] >> (13 - to) & kBothHalves << (to + 2));
  }
  const FragmentField at = FragmentFieldAt(kBits, field);
  return words[at.word] >> (at.bit - to) & ((1u << kBits) - 1u) * kBothHalves << to;
}

// Packs word `word` of a square from its codes, one a byte.
INNERQ_HOST_DEVICE inline uint32_t PackFragmentWord(const uint8_t* codes, int bits, int64_t word) {
  const bool third = bits == 3 && word >= 2 * 32;
  const int64_t words = third ? 1 : bits == 3 ? 2 : bits;  // of a lane, side by side
  const int64_t lane = (third ? word - 2 * 32 : word) / words;
  const int k = third ? 2 : static_cast<int>(word % words);
  uint32_t packed = 0;
  for (int field = 0; field < 16; ++field) {
    const uint8_t* two = codes + lane * 32 + field * 2;
    const uint32_t halves = two[0] | static_cast<uint32_t>(two[1]) << 16;
    if (IsSplitField(bits, field)) {
      packed |= (halves >> k & 0x00010001u) << 15;
    } else if (const FragmentField at = FragmentFieldAt(bits, field); at.word == k) {
      packed |= halves << at.bit;
    }
  }
  return packed;
}

// Packs eight codes, one a byte, into `bits` bytes: eight consecutive codes of a page's string.
INNERQ_HOST_DEVICE inline void PackEightCodes(const uint8_t* codes, int bits, uint8_t* packed) {
  uint64_t string = 0;
  for (int i = 0; i < 8; ++i) string |= static_cast<uint64_t>(codes[i]) << (i * bits);
  for (int i = 0; i < bits; ++i) packed[i] = static_cast<uint8_t>(string >> (8 * i));
}

}  // namespace innerq
