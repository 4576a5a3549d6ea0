// Products with low-bit weights on the CPU: see low_bit_weight.h for what they compute.
//
// M rows, N outputs, K inputs, B bits of a code, L the largest level. Packed weights of every
// variant are panels of 32 outputs one after the other:
//   codes   [K/32] blocks of 32 inputs, 128 * B bytes each, in vectors of 128 bytes [32 n][4 k].
//           With "quad" q the inputs 4q to 4q + 3 of a block: 4 bits have vectors i < 4 with quad i
//           in the low and quad i + 4 in the high half of their bytes; 2 bits have vectors i < 2
//           with quads i, i + 2, i + 4 and i + 6 from the lowest bits on; 3 bits have their lower
//           two bits so, then a vector with the third bit of quad q at bit q; 8 bits have a vector
//           for every quad.
//   scales  [groups][32] F16
// What N lacks has scales of zero.
//
// A chunk is the inputs of a group, or, of a group that is the whole row, up to 128 of them. Sums
// within a chunk are integers, hence exact; chunks are added to a row's F32 sum in order. So a row
// has the same bits whatever the instructions, the other rows, and the thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_isa.h"

namespace innerq {

constexpr int64_t kLowBitOutputs = 32;        // of a panel
constexpr int64_t kQuadBytes = 128;           // of a vector of codes or levels [32 n][4 k]
constexpr int64_t kLowBitSliceInputs = 1024;  // that levels are unpacked of at a time
constexpr int64_t kLowBitTaskRows = 256;      // most rows of a task

// Inputs of a chunk.
int64_t LowBitChunk(const LowBitSpec& spec, int64_t cols);

// How rows of inputs lie in memory: what a unit of their integers is worth; where sums of a chunk
// begin, since levels are multiplied as level + L: at -L times the sum of its integers; and the
// integers in the order of the variant, 64 bytes for every 32.
struct LowBitInputs {
  int64_t data_offset = 0;  // in bytes, of the integers; starts begin at byte 4
  int64_t stride = 0;       // from row to row

  LowBitInputs(const LowBitSpec& spec, int64_t cols)
      : data_offset(RoundUp(4 + cols / LowBitChunk(spec, cols) * 4, 64)),
        stride(data_offset + cols * 2) {}
  float* Unit(std::byte* row) const { return reinterpret_cast<float*>(row); }
  int32_t* Starts(std::byte* row) const { return reinterpret_cast<int32_t*>(row + 4); }
};

// Bytes of the inputs of `rows` rows of at most `cols`.
constexpr int64_t LowBitInputBytes(int64_t rows, int64_t cols) {
  return rows * (RoundUp(4 + cols / kLowBitUnit * 4, 64) + RoundUp(cols, kLowBitUnit) * 2);
}

// A part of one product: rows [row_begin, row_end) by panels [panel_begin, panel_end).
struct LowBitTask {
  const std::byte* inputs = nullptr;  // [M] as RoundLowBitInputs wrote them
  const Weight* weight = nullptr;
  float* out = nullptr;          // [M, N]
  std::byte* scratch = nullptr;  // kLowBitScratchBytes, 64-byte aligned, of this thread
  int64_t row_begin = 0, row_end = 0;
  int64_t panel_begin = 0, panel_end = 0;
  bool accumulate = false;  // out += sum + bias, instead of out = sum + bias
};
constexpr int64_t kLowBitScratchBytes =
    kLowBitSliceInputs * kLowBitOutputs + kLowBitTaskRows * kLowBitOutputs * 4;

// Some inputs of a panel, a multiple of a chunk, and of some rows.
struct LowBitSlice {
  LowBitSpec spec;
  int64_t num_inputs = 0;
  int64_t chunk = 0;                  // inputs
  const uint8_t* codes = nullptr;     // blocks of the panel
  const uint16_t* scales = nullptr;   // [32] of the first chunk
  int64_t scale_step = 0;             // from chunk to chunk: kLowBitOutputs, or 0
  uint8_t* levels = nullptr;          // [num_inputs/4][32][4] level + L, or null: not unpacked
  const std::byte* inputs = nullptr;  // of the first row: its integers from the slice on
  const int32_t* starts = nullptr;    // likewise, of its chunks
  int64_t stride = 0;                 // of both, in bytes from row to row
  int64_t num_rows = 0;
  float* totals = nullptr;  // [rows][32], in units of Unit / L

  const int32_t* Starts(int64_t row) const {
    return reinterpret_cast<const int32_t*>(reinterpret_cast<const std::byte*>(starts) +
                                            row * stride);
  }
};

// The functions of one instruction set.
struct LowBitKernel {
  // q[k] = round(clamp(x[k] * up, -most, most)), ties to even. NaN gives any integer.
  void (*round)(const float* x, int64_t count, float up, float most, int16_t* q);
  float (*largest)(const float* x, int64_t count);  // as LargestInput
  // Integers [count] of so many bits to the order of `add`: 64 bytes for every 32.
  void (*arrange)(const int16_t* q, int64_t count, int activation_bits, std::byte* to);
  void (*unpack)(const LowBitSlice& slice);  // writes slice.levels
  void (*add)(const LowBitSlice& slice);     // adds the slice to totals
  // The same with codes as they are packed; null: levels are needed.
  void (*add_packed)(const LowBitSlice& slice);
  // out = total * unit + bias for `count` outputs; with `accumulate` added to what out holds.
  void (*finish)(const float* totals, float unit, const float* bias, int64_t count, bool accumulate,
                 float* out);
};

// The functions for an instruction set that this machine supports.
LowBitKernel LowBitKernelFor(CpuIsa isa);
// Overlays the products with VNNI.
void UseVnni(LowBitKernel* kernel);

// Bytes of the panels of a weight [n, k].
int64_t LowBitPanelBytes(const LowBitSpec& spec, int64_t n, int64_t k);
// Packs parts, stacked along N, on `threads` threads. `panels` holds LowBitPanelBytes, zeroed.
void PackLowBitPanels(std::span<const LowBitMatrix> parts, int threads, std::byte* panels);

// Writes a row of inputs x [K] as LowBitInputs says. `scratch`: as of LowBitTask.
void RoundLowBitInputs(const LowBitKernel& kernel, const Weight& weight, const float* x,
                       std::byte* row, std::byte* scratch);
void MultiplyLowBit(const LowBitKernel& kernel, const LowBitTask& task);

}  // namespace innerq
