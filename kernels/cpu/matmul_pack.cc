#include "kernels/cpu/matmul_pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/float16.h"

namespace innerq {
namespace {

constexpr int64_t kSpan = 256;  // inputs k converted at a time: 32 outputs' worth stays in cache

// The row of `parts` stacked along N that holds output n.
struct SourceRow {
  const ConstTensorView* part;
  int64_t row;
};

// Writes `count` inputs of output `lane` of a panel, from input k on.
void Scatter(WeightFormat format, const float* values, int64_t count, int64_t lane, int64_t k,
             std::byte* panel) {
  switch (format) {
    case WeightFormat::kBF16: {
      uint16_t* out = reinterpret_cast<uint16_t*>(panel) + k * kPanelOutputs + lane * 2;
      for (int64_t i = 0; i < count; ++i) {  // k is even
        out[i / 2 * (2 * kPanelOutputs) + i % 2] = F32ToBF16(values[i]);
      }
      return;
    }
    case WeightFormat::kF16: {
      uint16_t* out = reinterpret_cast<uint16_t*>(panel) + k * kPanelOutputs + lane;
      for (int64_t i = 0; i < count; ++i) out[i * kPanelOutputs] = F32ToF16(values[i]);
      return;
    }
    case WeightFormat::kF32: {
      float* out = reinterpret_cast<float*>(panel) + k * kPanelOutputs + lane;
      for (int64_t i = 0; i < count; ++i) out[i * kPanelOutputs] = values[i];
      return;
    }
  }
}

}  // namespace

int64_t PanelBytes(WeightFormat format, int64_t n, int64_t k) {
  const int64_t element_bytes = format == WeightFormat::kF32 ? 4 : 2;
  return RoundUp(n, kPanelOutputs) * PackedDepth(format, k) * element_bytes;
}

void PackPanels(std::span<const ConstTensorView> parts, WeightFormat format, const OpTable& ops,
                [[maybe_unused]] int threads, std::byte* panels) {
  std::vector<SourceRow> rows;
  for (const ConstTensorView& part : parts) {
    for (int64_t row = 0; row < part.shape[0]; ++row) rows.push_back({&part, row});
  }
  const int64_t n = static_cast<int64_t>(rows.size());
  const int64_t k = parts[0].shape[1];
  const int64_t panel_bytes = PanelBytes(format, kPanelOutputs, k);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t panel = 0; panel < CeilDiv(n, kPanelOutputs); ++panel) {
    const int64_t first = panel * kPanelOutputs;
    for (int64_t begin = 0; begin < k; begin += kSpan) {
      const int64_t count = std::min(kSpan, k - begin);
      for (int64_t lane = 0; lane < std::min(kPanelOutputs, n - first); ++lane) {
        float values[kSpan];
        const SourceRow& source = rows[static_cast<size_t>(first + lane)];
        ReadFloats(*source.part, source.row * k + begin, count, ops, values);
        Scatter(format, values, count, lane, begin, panels + panel * panel_bytes);
      }
    }
  }
}

void ReadFloats(const ConstTensorView& view, int64_t begin, int64_t count, const OpTable& ops,
                float* out) {
  switch (view.dtype) {
    case DType::kF32:
      std::memcpy(out, view.As<float>() + begin, static_cast<size_t>(count) * sizeof(float));
      return;
    case DType::kF16:
      ops.f16_to_f32(view.As<uint16_t>() + begin, count, out);
      return;
    case DType::kBF16:
      ops.bf16_to_f32(view.As<uint16_t>() + begin, count, out);
      return;
    case DType::kU8:
      std::copy_n(view.As<uint8_t>() + begin, count, out);
      return;
  }
}

}  // namespace innerq
