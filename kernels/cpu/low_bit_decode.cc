#include "kernels/cpu/low_bit_decode.h"

#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/host_memory.h"

namespace innerq {
namespace {

constexpr size_t kMostCodes = 256;

}  // namespace

Result<Buffer> DecodeLowBit(const LowBitMatrix& matrix, [[maybe_unused]] int threads) {
  const LowBitSpec& spec = matrix.spec;
  const int64_t rows = matrix.rows, cols = matrix.cols;
  ASSIGN_OR_RETURN(Buffer buffer, AllocateHost(rows * cols * static_cast<int64_t>(sizeof(float))));
  auto* const values = reinterpret_cast<float*>(buffer.data());
  std::array<float, kMostCodes> levels{};
  for (int code = 0; code < 1 << spec.bits; ++code) {
    levels[static_cast<size_t>(code)] = static_cast<float>(spec.Level(code));
  }
  const auto max_level = static_cast<float>(spec.max_level());
  const int64_t group_size = spec.group_size == 0 ? cols : spec.group_size;
#pragma omp parallel for num_threads(threads)
  for (int64_t n = 0; n < rows; ++n) {
    const uint8_t* const codes = matrix.codes + n * spec.RowBytes(cols);
    float* const row = values + n * cols;
    for (int64_t begin = 0; begin < cols; begin += group_size) {
      const float clip = matrix.Clip(n, begin);
      for (int64_t k = begin; k < begin + group_size; ++k) {
        const int code = ReadLowBitCode(codes, spec.bits, k);
        row[k] = clip * levels[static_cast<size_t>(code)] / max_level;
      }
    }
  }
  return buffer;
}

}  // namespace innerq
