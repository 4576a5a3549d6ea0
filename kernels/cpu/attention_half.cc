// The F16 functions of AttentionOps in Highway: conversion, rotation, products with open pages.

// Scalar (the compiler's baseline), AVX2 and AVX-512: the steps between are not worth their size.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_half.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h.
#include "kernels/cpu/attention_simd_inl.h"
#include "kernels/cpu/float16_simd_inl.h"
#include "kernels/float16.h"

HWY_BEFORE_NAMESPACE();
namespace innerq {
namespace HWY_NAMESPACE {

void HalfToFloat(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(LoadF16(kF32, x + i), kF32, out + i);
  for (; i < n; ++i) out[i] = F16ToF32(x[i]);
}

void FloatToHalf(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::Rebind<hwy::float16_t, F32> d16;
  for (; i + kLanes <= n; i += kLanes) {
    hn::StoreU(hn::DemoteTo(d16, hn::LoadU(kF32, x + i)), d16,
               reinterpret_cast<hwy::float16_t*>(out + i));
  }
#endif
  for (; i < n; ++i) out[i] = F32ToF16(x[i]);
}

template <class D>
HWY_INLINE void RotateAt(D d, const float* x, const float* cos, const float* sin, int64_t half,
                         int64_t i, float* out) {
  const auto a = hn::LoadU(d, x + i);
  const auto b = hn::LoadU(d, x + half + i);
  const auto c = hn::LoadU(d, cos + i);
  const auto s = hn::LoadU(d, sin + i);
  hn::StoreU(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), d, out + i);
  hn::StoreU(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), d, out + half + i);
}

void Rotate(const float* x, const float* cos, const float* sin, int64_t head_dim, float* out) {
  const int64_t half = head_dim / 2;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) RotateAt(kF32, x, cos, sin, half, i, out);
  for (; i < half; ++i) RotateAt(hn::CappedTag<float, 1>(), x, cos, sin, half, i, out);
}

// Rows that a block of the F16 functions takes together.
constexpr int kHalfRows = kLanes >= 16 ? 4 : kLanes >= 8 ? 2 : 1;

// Even and odd channels are summed apart, for shorter chains.
template <int kRows>
HWY_INLINE void HalfScoresBlock(const HalfScoresArgs& args, int64_t row, int64_t panel) {
  constexpr int kPanels = kLanes >= 16 ? 2 : 1;
  constexpr int kVectors = kPanels * kPanelVectors;
  const int64_t dim = args.head_dim;
  const int64_t stride = RoundUp(dim, kPanelWidth);
  const uint16_t* keys = args.keys + panel * dim * kPanelWidth;
  const float* q = args.q + row * stride;
  Vector sums[2][kRows][kVectors];
  for (auto& parity : sums) {
    for (auto& of_row : parity) {
      for (Vector& sum : of_row) sum = hn::Zero(kF32);
    }
  }
  for (int64_t d = 0; d < dim; d += 2) {
    HWY_UNROLL(2)
    for (int parity = 0; parity < 2; ++parity) {
      HWY_UNROLL(16)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at =
            (v / kPanelVectors * dim + d + parity) * kPanelWidth + v % kPanelVectors * kLanes;
        const Vector k = LoadF16(kF32, keys + at);
        HWY_UNROLL(8)
        for (int r = 0; r < kRows; ++r) {
          sums[parity][r][v] =
              hn::MulAdd(hn::Set(kF32, q[r * stride + d + parity]), k, sums[parity][r][v]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      hn::StoreU(hn::Add(sums[0][r][v], sums[1][r][v]), kF32,
                 args.scores + (row + r) * args.num_tokens + panel * kPanelWidth + v * kLanes);
    }
  }
}

void HalfScores(const HalfScoresArgs& args) {
  const int64_t step = kLanes >= 16 ? 2 : 1;
  int64_t row = 0;
  for (; row + kHalfRows <= args.num_rows; row += kHalfRows) {
    for (int64_t panel = 0; panel < args.num_tokens / kPanelWidth; panel += step) {
      HalfScoresBlock<kHalfRows>(args, row, panel);
    }
  }
  for (; row < args.num_rows; ++row) {
    for (int64_t panel = 0; panel < args.num_tokens / kPanelWidth; panel += step) {
      HalfScoresBlock<1>(args, row, panel);
    }
  }
}

template <int kRows, int kVectors>
HWY_INLINE void HalfValuesBlock(const HalfValuesArgs& args, int64_t row, int64_t channel) {
  Vector sums[kRows][kVectors];
  for (auto& of_row : sums) {
    for (Vector& sum : of_row) sum = hn::Zero(kF32);
  }
  const uint16_t* values = args.values + channel;
  const float* p = args.p + row * args.p_stride;
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      const Vector value = LoadF16(kF32, values + t * args.padded_dim + v * kLanes);
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        sums[r][v] = hn::MulAdd(hn::Set(kF32, p[r * args.p_stride + t]), value, sums[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = args.out + (row + r) * args.padded_dim + channel;
    const Vector keep = hn::Set(kF32, args.keep[row + r]);
    const Vector add = hn::Set(kF32, args.add[row + r]);
    for (int v = 0; v < kVectors; ++v) {
      const Vector kept = hn::Mul(keep, hn::LoadU(kF32, out + v * kLanes));
      hn::StoreU(hn::MulAdd(add, sums[r][v], kept), kF32, out + v * kLanes);
    }
  }
}

template <int kRows>
HWY_INLINE void HalfValuesRows(const HalfValuesArgs& args, int64_t row) {
  constexpr int kWide = kLanes >= 8 ? 4 : 1;
  int64_t channel = 0;
  for (; channel + kWide * kLanes <= args.padded_dim; channel += kWide * kLanes) {
    HalfValuesBlock<kRows, kWide>(args, row, channel);
  }
  for (; channel < args.padded_dim; channel += kLanes)
    HalfValuesBlock<kRows, 1>(args, row, channel);
}

void HalfValues(const HalfValuesArgs& args) {
  int64_t row = 0;
  for (; row + kHalfRows <= args.num_rows; row += kHalfRows) HalfValuesRows<kHalfRows>(args, row);
  for (; row < args.num_rows; ++row) HalfValuesRows<1>(args, row);
}

}  // namespace HWY_NAMESPACE
}  // namespace innerq
HWY_AFTER_NAMESPACE();
