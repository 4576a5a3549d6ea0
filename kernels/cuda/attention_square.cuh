// The square of attention on tensor cores: 32 x 32 elements of K or V in CodeOrder::kMmaFragment,
// and the rows that it is multiplied with.
//
// D head dimension, N group size, T page_tokens. A strip of 32 tokens is D/32 squares of 32 x 32
// elements of K, and as many of V. A square is the B operand of mma.m16n8k16, four tiles of eight
// columns and two steps of sixteen rows, in the order that FragmentIndex gives it: lane 4g + i has
// what it needs in whole words, and its sums are those of row g and of the eight outer places from
// 8i on. So a lane's scores of K are the weights that it needs as an operand for V, and neither
// crosses lanes.
//
// Codes enter unscaled, as exact integers: masked out of their word they are subnormal halves,
// code * 2^(at - 24), and the places of a row that meet codes at bit `at` are taken times 2^-at
// (TileCodeBit). A symmetric group's zero is implied: it is what the sum starts from. The group's
// scale multiplies the finished sum over a square (InnerQ, arXiv 2602.23200):
//   score = sum_g  s_g * (q_g . k_g) + z_g * sum(q_g)
//   out_c = sum_g  s_g * (p_g . v_g) + z_g * sum(p_g)
#pragma once

#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/strip_index.h"

namespace innerq::cuda {

constexpr int kSide = 32;              // of a square
constexpr int kHalfBits = 16;          // of a side that is not quantized
constexpr float kCodeUnit = 0x1p-24f;  // of subnormal halves

// What a lane brings to a square: the A operands of both steps.
using Operand = uint32_t[2][4];

// log2(size / 32) of a size in {32, 64, 128}.
__device__ inline int Log2Of32s(int64_t size) { return size == 128 ? 2 : size == 64 ? 1 : 0; }

// The power of two that a row's elements are taken times where they meet the codes of register
// `pair`, whatever the tile.
template <int kBits>
__device__ constexpr float PairUnit(int pair) {
  return kBits == kHalfBits ? 1.0f : 1.0f / static_cast<float>(1 << TileCodeBit(kBits, pair));
}

// One square: out_r[j] += scale[j] * (start_r + row r . codes of outer place 8i + j), in kCodeUnit.
// `scales`: those of the lane's eight places. `start`: of rows g, g, g + 8, g + 8.
template <int kBits, int kRows>
__device__ void MultiplyCodes(const uint32_t* codes, const uint16_t* scales,
                              const float (&start)[4], const Operand& rows,
                              float* const (&out)[kRows]) {
  uint32_t words[kBits];
  LoadLaneWords<kBits>(codes, static_cast<int>(threadIdx.x % kWarpSize), words);
  const auto factors = *reinterpret_cast<const Words<4>*>(scales);
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    uint32_t b[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) b[pair] = TileCodes<kBits>(words, tile, pair);
    float sums[4];
    Multiply(rows[0], b[0], b[1], start, sums);
    MultiplyAdd(rows[1], b[2], b[3], sums);
    const float2 scale = HalvesToFloats(factors.word[tile]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float* to = out[r] + 2 * tile;
      to[0] = fmaf(scale.x, sums[2 * r], to[0]);
      to[1] = fmaf(scale.y, sums[2 * r + 1], to[1]);
    }
  }
}

// out[j] += zero[j] * sum, for the lane's eight places.
__device__ inline void AddZeros(const uint16_t* zeros, float sum, float* out) {
  const auto words = *reinterpret_cast<const Words<4>*>(zeros);
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    const float2 zero = HalvesToFloats(words.word[tile]);
    out[2 * tile] = fmaf(zero.x, sum, out[2 * tile]);
    out[2 * tile + 1] = fmaf(zero.y, sum, out[2 * tile + 1]);
  }
}

// One square of F16, straight from global memory: out_r[j] += unit * (row r . elements of outer
// place 8i + j). `from`: the lane's eight elements of tile 0; those of the next tile lie `stride`
// further. Only the first `num_elements` of each eight count, whatever the bytes of the others.
// `rows`: rows g and what rounding took from them, then the same of rows g + 8.
template <int kRows>
__device__ void MultiplyHalves(const uint16_t* from, int stride, int num_elements,
                               const Operand (&rows)[kRows], float unit,
                               float* const (&out)[kRows]) {
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    const uint4 eight = __ldg(reinterpret_cast<const uint4*>(from + tile * stride));
    uint32_t b[4] = {eight.x, eight.y, eight.z, eight.w};
    if (num_elements < 8) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int left = num_elements - 2 * pair;
        b[pair] &= left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0u;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sums[4] = {};
      MultiplyAdd(rows[r][0], b[0], b[1], sums);
      MultiplyAdd(rows[r][1], b[2], b[3], sums);
      float* to = out[r] + 2 * tile;
      to[0] = fmaf(unit, sums[0] + sums[2], to[0]);
      to[1] = fmaf(unit, sums[1] + sums[3], to[1]);
    }
  }
}

// The operand of a square from shared memory, [squares][2 steps][32 lanes] of 16 bytes.
__device__ inline void LoadOperand(const std::byte* operands, int square, int lane, Operand& rows) {
  const auto* from = reinterpret_cast<const Words<4>*>(operands) + square * 2 * kWarpSize + lane;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const Words<4> quad = from[step * kWarpSize];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[step][i] = quad.word[i];
  }
}

// x, as the compiler does not know; `zero` is 0. Products take four registers in a row, for which
// it would otherwise copy the same value before each of them.
__device__ inline uint32_t InAnotherRegister(uint32_t x, uint32_t zero) { return x | zero; }

// Two neighbouring elements of row r of kRows, in the registers of an operand for rows g and g + 8.
// Returns the sum of what they are rounded to: where a zero meets it, rounding must not show.
// Where there are no rows g + 8, the elements are there twice: zeros would be moved into place
// for every product.
template <int kRows>
__device__ float PackRow(float2 two, int r, uint32_t zero, uint32_t* to) {
  to[r] = PackHalves(two.x, two.y);
  if constexpr (kRows == 1) to[1] = InAnotherRegister(to[0], zero);
  const float2 rounded = HalvesToFloats(to[r]);
  return rounded.x + rounded.y;
}

// Two neighbouring elements of a row, and what rounding takes from them, in the registers of an
// operand for rows g and g + 8.
__device__ inline void PackSplit(float a, float b, uint32_t* to) {
  to[0] = PackHalves(a, b);
  const float2 taken = HalvesToFloats(to[0]);
  to[1] = PackHalves(a - taken.x, b - taken.y);
}

}  // namespace innerq::cuda
