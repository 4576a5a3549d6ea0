// How low-bit weights and the inputs that meet them lie in device memory. Host and device.
//
// M rows, N outputs, K inputs, B bits of a code. A record holds 16 outputs by 256 inputs, the A
// operands of eight products mma.m16n8k32, or blocks of 32 inputs; the records of a tile of 16
// outputs follow each other along K. What N lacks has scales of zero; what K lacks meets inputs of
// zero. A record has
//   codes   B vectors of 16 bytes a lane, [B][32 lanes]: its words, four a vector. Lane 4g + t has
//           rows g and g + 8, and inputs 8t to 8t + 7 of every block, 16 codes, which fill two
//           words of eight "nibbles": word w has inputs 4w to 4w + 3 of row g from the lowest
//           nibble on, then those of row g + 8. 4 bits have these words as they are. 2 bits have
//           word 0 of a block in the lower and word 1 in the upper half of its nibbles. 3 bits have
//           the words of two blocks in three: the first three, and bit i of the fourth's nibbles in
//           the highest bit of those of word i. 8 bits have four words, [w][row] of four bytes.
//   scales  [chunks][8 g][2] F16, of rows g and g + 8
// A chunk is the inputs of a group, or 128 of a group that is the whole row.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/low_bit_weight.h"

namespace innerq::cuda {

constexpr int kRecordOutputs = 16;
constexpr int kRecordInputs = 256;
constexpr int kBlockInputs = 32;
constexpr int kRecordBlocks = kRecordInputs / kBlockInputs;

// Of B bits a matrix has a device code for each code of the file, and each device code a byte that
// products take, its level + L.
//
// 4 bits find it in two tables of 8 bytes, for the codes below and from 8. A look-up that ignores
// the highest bit of a nibble gives 0 where it is set, if the byte it would have found is below
// 128; so a code's byte is the OR of both. 128 alone, the largest of pow2, has code 0, and no code
// is 8.
class LowBitCodes {
 public:
  INNERQ_HOST_DEVICE explicit LowBitCodes(const LowBitSpec& spec) : spec_(spec) {}
  INNERQ_HOST_DEVICE int DeviceCode(int code) const {
    const int last = 2 * spec_.max_level();
    if (spec_.scheme == LowBitScheme::kUniform) return code < last ? code : last;
    if (spec_.bits != 4) return code;
    const bool zero = code == 0 || code == 8;
    return zero ? 7 : code == 7 ? 0 : code;
  }
  // The bytes of device codes 0 to 15, where they are fewer than 256.
  void FillTable(uint32_t (&table)[4]) const {
    for (uint32_t& word : table) word = 0;
    if (spec_.bits == 8) return;
    for (int code = 0; code < 1 << spec_.bits; ++code) {
      const int at = DeviceCode(code);
      const auto byte = static_cast<uint32_t>(spec_.Level(code) + spec_.max_level());
      uint32_t& word = table[at / 4];
      word = (word & ~(0xffu << at % 4 * 8)) | byte << at % 4 * 8;
    }
  }

 private:
  LowBitSpec spec_;
};

// Sizes of a weight [N, K].
struct LowBitLayout {
  int64_t rows = 0, cols = 0;
  int bits = 0;
  int chunk_blocks = 0;  // blocks of a chunk: 1, 2 or 4
  int planes = 0;        // bytes of an input: 1 or 2

  LowBitLayout() = default;
  LowBitLayout(const LowBitSpec& spec, int64_t n, int64_t k)
      : rows(n),
        cols(k),
        bits(spec.bits),
        chunk_blocks(spec.group_size == 0 ? 4 : static_cast<int>(spec.group_size / kBlockInputs)),
        planes(spec.activation_bits > 8 ? 2 : 1) {}
  INNERQ_HOST_DEVICE int64_t Tiles() const { return CeilDiv(rows, kRecordOutputs); }
  INNERQ_HOST_DEVICE int64_t Records() const { return CeilDiv(cols, kRecordInputs); }  // of a tile
  INNERQ_HOST_DEVICE int RecordChunks() const { return kRecordBlocks / chunk_blocks; }
  INNERQ_HOST_DEVICE int64_t CodeBytes() const { return bits * 512; }  // of a record
  INNERQ_HOST_DEVICE int64_t RecordBytes() const {
    return CodeBytes() + RecordChunks() * kRecordOutputs * 2;
  }
  INNERQ_HOST_DEVICE int64_t Bytes() const { return Tiles() * Records() * RecordBytes(); }
};

// Rows of inputs as integers, q = low + 128 * high; those of up to 8 bits are low bytes alone:
//   planes  [low, high][M][K rounded up to records] bytes, zeros beyond K. Inputs 64p to 64p + 63
//   of a row, two
//           blocks, are 16 bytes of every t, [4 t][2 blocks][8]: the B operands of a lane.
//   starts  [chunks][M rounded up to 8] int32: where the sum of a chunk begins, -L times the sum of
//           its integers, since levels are multiplied as level + L
//   units   [M] F32: what 1 is worth
struct LowBitInputLayout {
  int64_t rows = 0;
  int64_t width = 0;  // of a row of a plane, in bytes
  int64_t chunks = 0;
  int planes = 0;

  INNERQ_HOST_DEVICE LowBitInputLayout(const LowBitLayout& weight, int64_t m)
      : rows(m),
        width(weight.Records() * kRecordInputs),
        chunks(weight.Records() * weight.RecordChunks()),
        planes(weight.planes) {}
  INNERQ_HOST_DEVICE int64_t StartRows() const { return RoundUp(rows, 8); }
  INNERQ_HOST_DEVICE int64_t StartsAt() const { return planes * rows * width; }
  INNERQ_HOST_DEVICE int64_t UnitsAt() const { return StartsAt() + chunks * StartRows() * 4; }
  int64_t Bytes() const { return UnitsAt() + rows * 4; }
};

// Enough for so many rows of at most `cols`, whatever the weight.
inline int64_t LowBitInputBytes(int64_t rows, int64_t cols) {
  const LowBitSpec most{.bits = 8, .group_size = 32, .activation_bits = 16};
  return LowBitInputLayout(LowBitLayout(most, 1, cols), rows).Bytes();
}

}  // namespace innerq::cuda
