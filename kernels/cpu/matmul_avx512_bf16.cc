// The BF16 product with vdpbf16ps: sixteen outputs at a time, two inputs k per instruction.
//
// Activations are BF16 [M][K rounded up to 32]. The instruction adds the products of a pair of k to
// its sum, in order of the pairs, whatever the number of rows; it takes subnormals as zero.
#include "kernels/cpu/op_table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define INNERQ_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace innerq {
namespace {

constexpr int kMaxBlockRows = 8;
constexpr int64_t kPairBytes = kPanelOutputs * 4;  // one pair of k of a panel
constexpr int64_t kAhead = 4096;  // bytes: covers the latency of memory at the rate of one core

INNERQ_TARGET void Pack(const float* x, int64_t rows, int64_t block_rows, int64_t k,
                        std::byte* packed) {
  const int64_t depth = PackedDepth(WeightFormat::kBF16, k);
  for (int64_t r = 0; r < block_rows; ++r) {
    for (int64_t i = 0; i < depth; i += 16) {
      const int64_t left = r < rows ? std::clamp<int64_t>(k - i, 0, 16) : 0;
      const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1u);
      const __m512 values = _mm512_maskz_loadu_ps(mask, x + r * k + i);
      const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + (r * depth + i) * 2), rounded);
    }
  }
}

INNERQ_TARGET void StoreSums(const PanelTask& task, int64_t row, int64_t n, __m512 sum) {
  const int64_t left = std::clamp<int64_t>(task.n - n, 0, 16);
  const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1u);
  float* out = task.out + row * task.n + n;
  if (task.bias != nullptr) {
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, task.bias + n));
  }
  if (task.accumulate) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, out));
  _mm512_mask_storeu_ps(out, mask, sum);
}

// Multiplies blocks of kRows rows from `row` on by one panel, then smaller blocks for the rest.
template <int kRows>
INNERQ_TARGET void MultiplyRows(const PanelTask& task, int64_t panel, int64_t row) {
  const std::byte* weight = task.weight + panel * task.k * kPanelOutputs * 2;
  for (; row + kRows <= task.row_end; row += kRows) {
    const std::byte* x = task.activations + row * task.k * 2;
    __m512 sum[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < task.k / 2; ++pair) {
      const std::byte* w = weight + pair * kPairBytes;
      if (kRows == 1) {
        __builtin_prefetch(w + kAhead);
        __builtin_prefetch(w + kAhead + 64);
      }
      const __m512bh w0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w));
      const __m512bh w1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + 64));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t inputs;
        std::memcpy(&inputs, x + (r * task.k + 2 * pair) * 2, sizeof(inputs));
        const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(inputs));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], both, w0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], both, w1);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      StoreSums(task, row + r, panel * kPanelOutputs, sum[r][0]);
      StoreSums(task, row + r, panel * kPanelOutputs + 16, sum[r][1]);
    }
  }
  if constexpr (kRows > 1) MultiplyRows<kRows / 2>(task, panel, row);
}

void Multiply(const PanelTask& task) {
  for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
    MultiplyRows<kMaxBlockRows>(task, panel, task.row_begin);
  }
}

}  // namespace

MatMulKernel Avx512Bf16MatMul() { return {Pack, 2, Multiply}; }

}  // namespace innerq

#endif  // __x86_64__
