#include "kernels/cpu/low_bit_decode.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/kernels/low_bit_case.h"

namespace innerq {
namespace {

TEST(DecodeLowBit, GivesTheValueOfEveryWeight) {
  constexpr int64_t kRows = 5, kCols = 256;
  std::mt19937_64 random(9);
  for (const LowBitSpec& spec : LowBitSpecs({0, 32, 64, 128}, {16})) {
    const LowBitCase weights(random, spec, kRows, kCols);
    for (const int threads : {1, 3}) {
      const Result<Buffer> decoded = DecodeLowBit(weights.matrix, threads);
      ASSERT_TRUE(decoded.ok()) << decoded.error().message;
      ASSERT_EQ(decoded->bytes(), kRows * kCols * 4);
      const auto* values = reinterpret_cast<const float*>(decoded->data());
      for (int64_t n = 0; n < kRows; ++n) {
        for (int64_t k = 0; k < kCols; ++k) {
          const float expected = weights.matrix.Value(n, k);
          ASSERT_EQ(std::memcmp(&values[n * kCols + k], &expected, sizeof(float)), 0)
              << LowBitSchemeName(spec.scheme) << spec.bits << ": " << n << ", " << k;
        }
      }
    }
  }
}

TEST(DecodeLowBit, MatricesThatNoMemoryHoldsAreAnError) {
  const LowBitMatrix huge{.spec = {}, .rows = int64_t{1} << 40, .cols = 1024};
  const Result<Buffer> decoded = DecodeLowBit(huge, 1);
  ASSERT_FALSE(decoded.ok());
  EXPECT_EQ(decoded.error().code, ErrorCode::kResourceExhausted);
}

}  // namespace
}  // namespace innerq
