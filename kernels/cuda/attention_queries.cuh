// How a warp's rows of queries meet keys in attention on tensor cores; see attention_mma.cuh for
// how they are rounded.
//
// D head dimension.
#pragma once

#include "kernels/cuda/attention_square.cuh"
#include "kernels/cuda/attention_tile.cuh"

namespace innerq::cuda {

// Rows of a tile that a warp has, from `first` on.
struct WarpRows {
  const AttentionKernelLaunch& args;
  const PlannedTile& tile;
  int kv_head, first;
};

// Two forms of a warp's rows, for open and for sealed keys, in shared memory; kRows of a lane. A
// form: operands [D/32][2 steps][32 lanes] of 16 bytes, of each of a lane's rows where keys are
// open; what symmetric sums start from [D/32][8][4], sums over squares in kCodeUnit [D/32][16]; and
// what turns a product into a score in units of log2 [16].
template <int kDim, int kRows>
class QueryForms {
  static constexpr int kLaneChannels = kDim / 4;
  static constexpr int kSquares = kDim / kSide;
  __device__ static constexpr MmaShape Shape() { return {kDim, kRows, 1}; }

 public:
  __device__ explicit QueryForms(std::byte* memory) : memory_(memory) {}

  __device__ const std::byte* Form(bool sealed) const { return At(sealed); }
  __device__ static const float* UnitsOf(const std::byte* form, bool sealed) {
    return reinterpret_cast<const float*>(form +
                                          (sealed ? Shape().sealed_units() : Shape().open_units()));
  }

  // Writes a form, by a whole warp. kBits: of the keys; `zero`: see InAnotherRegister.
  template <int kBits>
  __device__ void Prepare(const WarpRows& rows, uint32_t zero, bool sealed) const {
    constexpr bool kCoded = kBits != kHalfBits;
    const KvLayerLayout& layout = rows.args.layout;
    const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
    const int first = lane % 4 * 8;  // of the lane's channels of a square
    const bool times_norm =
        sealed && layout.normalize_keys && rows.tile.sealed_begin < rows.tile.sealed_end;
    const float* norm = rows.args.kv.key_norms;
    norm += times_norm ? (rows.tile.norm_id * layout.kv_heads + rows.kv_head) * kDim : 0;
    std::byte* form = At(sealed);
    auto* units = const_cast<float*>(UnitsOf(form, sealed));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = rows.first + lane / 4 + 8 * r;
      const bool present = row < rows.tile.num_rows;
      const float* q =
          rows.args.q + RowOffset(rows.args, rows.tile, rows.kv_head, present ? row : 0);
      float x[kSquares][8];
      float largest = 0;
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        const int d = c / 8 * kSide + first + c % 8;
        float element = present ? q[d] : 0.0f;
        if (times_norm) element *= norm[d];
        x[c / 8][c % 8] = element;
        largest = fmaxf(largest, fabsf(element));
      }
      // The power of two, and its inverse, that bring the largest into [2^14, 2^15).
      const uint32_t exponent = FloatBits(RowMax(largest)) >> 23;
      const uint32_t bounded = exponent < 15u ? 15u : exponent;
      const float up = FloatFromBits((268u - bounded) << 23);
      const float unit = rows.args.scale * kLog2E * FloatFromBits((bounded - 14u) << 23);
      units[r * 8 + lane / 4] = kCoded ? unit * (1.0f / kCodeUnit) : unit;
      auto* operands =
          reinterpret_cast<uint32_t*>(form + (kCoded ? 0 : r * Shape().operand_bytes()));
#pragma unroll
      for (int s = 0; s < kSquares; ++s) {
        float sum = 0;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const float pair_unit = PairUnit<kBits>(pair);
          const float a = x[s][2 * pair] * (up * pair_unit);
          const float b = x[s][2 * pair + 1] * (up * pair_unit);
          uint32_t* to = operands + ((s * 2 + pair / 2) * kWarpSize + lane) * 4 + pair % 2 * 2;
          if constexpr (kCoded) {
            sum = fmaf(PackRow<kRows>({a, b}, r, zero, to), 1.0f / pair_unit, sum);
          } else {
            PackSplit(a, b, to);
          }
        }
        if constexpr (kCoded) {
          sum = RowSum(sum) * kCodeUnit;
          constexpr float kImpliedZero = -static_cast<float>(1 << (kBits - 1));
          const float start = layout.key.has_zero() ? 0.0f : kImpliedZero * sum;
          auto* quad = reinterpret_cast<float*>(form + Shape().starts()) + (s * 8 + lane / 4) * 4;
          quad[2 * r] = start;
          quad[2 * r + 1] = start;
          if constexpr (kRows == 1) quad[2] = quad[3] = start;  // of rows that are none
          auto* sums = reinterpret_cast<float*>(form + Shape().sums());
          sums[s * 16 + r * 8 + lane / 4] = sum;
        }
      }
    }
  }

 private:
  __device__ std::byte* At(bool sealed) const {
    return memory_ + (sealed ? Shape().open_bytes() : 0);
  }

  std::byte* const memory_;
};

}  // namespace innerq::cuda
