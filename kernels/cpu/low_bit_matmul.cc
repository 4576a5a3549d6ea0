#include "kernels/cpu/low_bit_matmul.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace innerq {
namespace {

constexpr int64_t kMaxChunk = 128;
// Rows from which on it pays to unpack a panel's levels once for all of them.
constexpr int64_t kUnpackRows = 8;

static_assert(kLowBitSliceInputs % kMaxChunk == 0);

int64_t PanelCodeBytes(const LowBitSpec& spec, int64_t cols) {
  return cols / kLowBitUnit * kQuadBytes * spec.bits;
}

int64_t PanelBytes(const LowBitSpec& spec, int64_t cols) {
  return RoundUp(PanelCodeBytes(spec, cols) + spec.Groups(cols) * kLowBitOutputs * 2, 64);
}

// Adds the code of output n, input k of a block to its vectors.
void PlaceCode(int bits, int code, int64_t n, int64_t k, uint8_t* block) {
  const int64_t quad = k / 4, byte = n * 4 + k % 4;
  const auto put = [byte, block](int64_t vector, int value, int64_t bit) {
    uint8_t& to = block[vector * kQuadBytes + byte];
    to = static_cast<uint8_t>(to | value << bit);
  };
  switch (bits) {
    case 2:
      return put(quad % 2, code, quad / 2 * 2);
    case 3:
      put(quad % 2, code & 3, quad / 2 * 2);
      return put(2, code >> 2, quad);
    case 4:
      return put(quad % 4, code, quad / 4 * 4);
    default:
      return put(quad, code, 0);
  }
}

void PackRow(const LowBitMatrix& matrix, int64_t row, int64_t n, std::byte* panel) {
  const LowBitSpec& spec = matrix.spec;
  const int64_t cols = matrix.cols, groups = spec.Groups(cols);
  auto* blocks = reinterpret_cast<uint8_t*>(panel);
  const uint8_t* codes = matrix.codes + row * spec.RowBytes(cols);
  for (int64_t k = 0; k < cols; ++k) {
    int code = ReadLowBitCode(codes, spec.bits, k);
    if (spec.bits == 8) code = std::min(code, 2 * spec.max_level());
    uint8_t* block = blocks + k / kLowBitUnit * kQuadBytes * spec.bits;
    PlaceCode(spec.bits, code, n, k % kLowBitUnit, block);
  }
  auto* scales = reinterpret_cast<uint16_t*>(panel + PanelCodeBytes(spec, cols));
  for (int64_t g = 0; g < groups; ++g) {
    scales[g * kLowBitOutputs + n] = matrix.scales[row * groups + g];
  }
}

}  // namespace

int64_t LowBitChunk(const LowBitSpec& spec, int64_t cols) {
  if (spec.group_size > 0) return spec.group_size;
  int64_t chunk = kMaxChunk;
  while (cols % chunk != 0) chunk /= 2;
  return chunk;
}

int64_t LowBitPanelBytes(const LowBitSpec& spec, int64_t n, int64_t k) {
  return CeilDiv(n, kLowBitOutputs) * PanelBytes(spec, k);
}

void PackLowBitPanels(std::span<const LowBitMatrix> parts, [[maybe_unused]] int threads,
                      std::byte* panels) {
  struct Row {
    const LowBitMatrix* part;
    int64_t row;
  };
  std::vector<Row> rows;
  for (const LowBitMatrix& part : parts) {
    for (int64_t row = 0; row < part.rows; ++row) rows.push_back({&part, row});
  }
  const int64_t panel_bytes = PanelBytes(parts[0].spec, parts[0].cols);
  const auto n = static_cast<int64_t>(rows.size());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < n; first += kLowBitOutputs) {
    for (int64_t i = first; i < std::min(first + kLowBitOutputs, n); ++i) {
      const Row& row = rows[static_cast<size_t>(i)];
      PackRow(*row.part, row.row, i - first, panels + first / kLowBitOutputs * panel_bytes);
    }
  }
}

void RoundLowBitInputs(const LowBitKernel& kernel, const Weight& weight, const float* x,
                       std::byte* row, std::byte* scratch) {
  const LowBitSpec& spec = *weight.low_bit;
  const LowBitInputs layout(spec, weight.cols);
  const int64_t chunk = LowBitChunk(spec, weight.cols);
  const InputRounding rounding =
      InputRounding::Of(spec, weight.input_clip, kernel.largest(x, weight.cols));
  *layout.Unit(row) = rounding.down;
  int32_t* starts = layout.Starts(row);
  auto* q = reinterpret_cast<int16_t*>(scratch);
  for (int64_t begin = 0; begin < weight.cols; begin += chunk) {
    kernel.round(x + begin, chunk, rounding.up, static_cast<float>(spec.max_activation()), q);
    int32_t sum = 0;
    for (int64_t i = 0; i < chunk; ++i) sum += q[i];
    *starts++ = -spec.max_level() * sum;
    kernel.arrange(q, chunk, spec.activation_bits, row + layout.data_offset + begin * 2);
  }
}

void MultiplyLowBit(const LowBitKernel& kernel, const LowBitTask& task) {
  const Weight& weight = *task.weight;
  const LowBitSpec& spec = *weight.low_bit;
  const LowBitInputs layout(spec, weight.cols);
  const int64_t rows = task.row_end - task.row_begin;
  const bool packed = kernel.add_packed != nullptr && rows < kUnpackRows;
  const int64_t slice_inputs = packed ? weight.cols : kLowBitSliceInputs;
  auto* totals = reinterpret_cast<float*>(task.scratch + kLowBitSliceInputs * kLowBitOutputs);
  const std::byte* inputs = task.inputs + task.row_begin * layout.stride;
  const float* bias = reinterpret_cast<const float*>(weight.bias.data());

  LowBitSlice slice{.spec = spec, .stride = layout.stride, .num_rows = rows, .totals = totals};
  slice.chunk = LowBitChunk(spec, weight.cols);
  slice.scale_step = spec.group_size > 0 ? kLowBitOutputs : 0;
  slice.levels = reinterpret_cast<uint8_t*>(task.scratch);
  for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
    const std::byte* at = weight.data.data() + panel * PanelBytes(spec, weight.cols);
    const auto* scales = reinterpret_cast<const uint16_t*>(at + PanelCodeBytes(spec, weight.cols));
    std::fill(totals, totals + rows * kLowBitOutputs, 0.0f);
    for (int64_t begin = 0; begin < weight.cols; begin += slice_inputs) {
      const int64_t chunks = begin / slice.chunk;
      slice.num_inputs = std::min(slice_inputs, weight.cols - begin);
      slice.codes = reinterpret_cast<const uint8_t*>(at + PanelCodeBytes(spec, begin));
      slice.scales = scales + chunks * slice.scale_step;
      slice.inputs = inputs + layout.data_offset + begin * 2;
      slice.starts = reinterpret_cast<const int32_t*>(inputs + 4) + chunks;
      if (!packed) kernel.unpack(slice);
      (packed ? kernel.add_packed : kernel.add)(slice);
    }
    const int64_t n = panel * kLowBitOutputs;
    for (int64_t r = 0; r < rows; ++r) {
      float unit;
      std::memcpy(&unit, inputs + r * layout.stride, sizeof(unit));
      kernel.finish(totals + r * kLowBitOutputs, unit / static_cast<float>(spec.max_level()),
                    bias == nullptr ? nullptr : bias + n, std::min(kLowBitOutputs, weight.rows - n),
                    task.accumulate, task.out + (task.row_begin + r) * weight.rows + n);
    }
  }
}

}  // namespace innerq
