// OpTable: the inner functions of the CPU backend for one instruction set, chosen once at creation.
//
// M rows, N outputs, K inputs of a matrix product; C channels of a row.
//
// Packed weights of every variant are panels of 32 outputs, contiguous one after the other, so a
// product reads one linear stream:
//   BF16       [N/32][K/2][32 n][2 k], K rounded up to 32
//   F16, F32   [N/32][K][32 n]
// What N or K lack is zero. A BF16 panel holds the B tiles of AMX (16 pairs of k by 16 outputs)
// with 128 bytes from one pair of k to the next.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_isa.h"

namespace innerq {

constexpr int64_t kPanelOutputs = 32;  // outputs of a weight panel
constexpr int64_t kDepthUnit = 32;     // BF16: K is rounded up to this
constexpr int64_t kRowTile = 16;       // rows that MatMulKernel::pack converts together
constexpr int64_t kTaskRows = 256;     // most rows of a PanelTask
constexpr int64_t kTaskPanels = 8;     // most panels of a PanelTask
constexpr int64_t kTaskScratchBytes = kTaskRows * kTaskPanels * kPanelOutputs * 4;

// K as it is stored in packed weights and activations.
constexpr int64_t PackedDepth(WeightFormat format, int64_t k) {
  return format == WeightFormat::kBF16 ? RoundUp(k, kDepthUnit) : k;
}

// A part of one product: rows [row_begin, row_end) by panels [panel_begin, panel_end).
struct PanelTask {
  const std::byte* activations = nullptr;  // [M, K] as MatMulKernel::pack wrote them, or F32
  const std::byte* weight = nullptr;       // all panels
  const float* bias = nullptr;             // [N], or null
  float* out = nullptr;                    // [M, N]
  std::byte* scratch = nullptr;            // kTaskScratchBytes, 64-byte aligned, of this thread
  int64_t m = 0, n = 0, k = 0;             // k = PackedDepth
  int64_t row_begin = 0, row_end = 0;      // row_begin is a multiple of kRowTile
  int64_t panel_begin = 0, panel_end = 0;
  bool accumulate = false;  // out += sum + bias, instead of out = sum + bias
};

// How one weight format is multiplied. Every output is summed over k in an order that depends on
// K alone: not on M, the task, or the thread.
struct MatMulKernel {
  // Converts `rows` <= kRowTile rows of x [rows, k] into a block of `block_rows` >= rows packed
  // rows of PackedDepth(k); missing rows and inputs become zero. Null: x is multiplied as it is.
  void (*pack)(const float* x, int64_t rows, int64_t block_rows, int64_t k, std::byte* packed);
  int64_t packed_element_bytes;
  void (*multiply)(const PanelTask& task);
};

struct OpTable {
  // out = x / sqrt(mean(x^2) + epsilon) * weight over C channels; out may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t c, float epsilon, float* out);
  // out = silu(gate) * up over C channels.
  void (*swiglu)(const float* gate, const float* up, int64_t c, float* out);
  void (*f16_to_f32)(const uint16_t* x, int64_t c, float* out);
  void (*bf16_to_f32)(const uint16_t* x, int64_t c, float* out);
  std::array<MatMulKernel, 3> matmul;  // by WeightFormat

  const MatMulKernel& kernel(WeightFormat format) const {
    return matmul[static_cast<size_t>(format)];
  }
};

// The functions for `isa`, which this machine must support.
OpTable OpTableFor(CpuIsa isa);

// The BF16 product with AVX512_BF16 dot products, and with AMX tiles.
MatMulKernel Avx512Bf16MatMul();
MatMulKernel AmxMatMul();

}  // namespace innerq
