#include "kernels/cuda/pack_rows.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/launch.h"
#include "kernels/float16.h"

namespace innerq::cuda {
namespace {

int64_t ElementBytes(WeightFormat format) { return format == WeightFormat::kF32 ? 4 : 2; }

void WriteElement(WeightFormat format, float x, std::byte* to) {
  switch (format) {
    case WeightFormat::kF32:
      std::memcpy(to, &x, sizeof(x));
      return;
    case WeightFormat::kF16:
    case WeightFormat::kBF16: {
      const uint16_t bits = format == WeightFormat::kF16 ? F32ToF16(x) : F32ToBF16(x);
      std::memcpy(to, &bits, sizeof(bits));
      return;
    }
  }
}

// Copies a part's rows [n, K] to the device, `row_bytes` apart, converted to `format`.
Result<void> CopyRows(const ConstTensorView& part, WeightFormat format, int64_t row_bytes,
                      std::byte* to) {
  const int64_t rows = part.shape[0], cols = part.shape[1];
  const int64_t width = cols * ElementBytes(format);
  const bool as_stored = (format == WeightFormat::kF32 && part.dtype == DType::kF32) ||
                         (format == WeightFormat::kF16 && part.dtype == DType::kF16) ||
                         (format == WeightFormat::kBF16 && part.dtype == DType::kBF16);
  const int64_t chunk = as_stored ? rows : std::max<int64_t>(1, (int64_t{1} << 24) / width);
  std::vector<std::byte> converted;
  for (int64_t row = 0; row < rows; row += chunk) {
    const int64_t count = std::min(chunk, rows - row);
    const std::byte* from = part.data + row * width;
    if (!as_stored) {
      converted.resize(static_cast<size_t>(count * width));
      for (int64_t i = 0; i < count * cols; ++i) {
        WriteElement(format, ElementAsFloat(part, row * cols + i),
                     converted.data() + i * ElementBytes(format));
      }
      from = converted.data();
    }
    RETURN_IF_ERROR(CopyToDevice(from, count, width, row_bytes, to + row * row_bytes));
  }
  return {};
}

}  // namespace

Result<Buffer> PackRows(std::span<const ConstTensorView> parts, const Weight& weight) {
  const int64_t row_bytes = RoundUp(weight.cols, kMatMulUnit) * ElementBytes(weight.format);
  ASSIGN_OR_RETURN(Buffer rows, AllocateDevice(RoundUp(weight.rows, kMatMulUnit) * row_bytes));
  std::byte* to = rows.data();
  for (const ConstTensorView& part : parts) {
    RETURN_IF_ERROR(CopyRows(part, weight.format, row_bytes, to));
    to += part.shape[0] * row_bytes;
  }
  return rows;
}

Result<Buffer> PackCodes(std::span<const LowBitMatrix> parts, const Weight& weight,
                         cudaStream_t stream) {
  constexpr int64_t kSliceBytes = int64_t{1} << 20;  // of codes
  const LowBitSpec& spec = *weight.low_bit;
  const int64_t code_bytes = spec.RowBytes(weight.cols);  // of a row
  const int64_t scale_bytes = spec.Groups(weight.cols) * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t most_rows =
      std::min(weight.rows, RoundUp(CeilDiv(kSliceBytes, code_bytes), kRecordOutputs));
  ASSIGN_OR_RETURN(Buffer codes, AllocateDevice(most_rows * code_bytes));
  ASSIGN_OR_RETURN(Buffer scales, AllocateDevice(most_rows * scale_bytes));
  ASSIGN_OR_RETURN(Buffer packed,
                   AllocateDevice(LowBitLayout(spec, weight.rows, weight.cols).Bytes()));
  std::byte* out = packed.data();
  int64_t filled = 0;  // rows of the slice
  const auto pack = [&]() -> Result<void> {
    const LowBitLayout layout(spec, std::exchange(filled, 0), weight.cols);
    const PackLowBitLaunch launch{.spec = spec,
                                  .layout = layout,
                                  .codes = reinterpret_cast<const uint8_t*>(codes.data()),
                                  .scales = reinterpret_cast<const uint16_t*>(scales.data()),
                                  .out = out};
    out += layout.Bytes();
    RETURN_IF_CUDA_ERROR(LaunchPackLowBit(launch, stream), "packing low-bit weights");
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream), "packing low-bit weights");
    return {};
  };
  for (const LowBitMatrix& part : parts) {
    for (int64_t row = 0; row < part.rows;) {
      const int64_t rows = std::min(part.rows - row, most_rows - filled);
      RETURN_IF_ERROR(
          CopyToDevice(reinterpret_cast<const std::byte*>(part.codes) + row * code_bytes, rows,
                       code_bytes, code_bytes, codes.data() + filled * code_bytes));
      RETURN_IF_ERROR(
          CopyToDevice(reinterpret_cast<const std::byte*>(part.scales) + row * scale_bytes, rows,
                       scale_bytes, scale_bytes, scales.data() + filled * scale_bytes));
      row += rows;
      filled += rows;
      if (filled == most_rows) RETURN_IF_ERROR(pack());
    }
  }
  if (filled > 0) RETURN_IF_ERROR(pack());
  return packed;
}

}  // namespace innerq::cuda
