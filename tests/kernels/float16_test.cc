// Conversions to and from the 16-bit formats against literal values and each other.
#include "kernels/float16.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace innerq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kQuietNaN = std::numeric_limits<float>::quiet_NaN();

struct Value {
  float x;
  uint16_t bits;
};

// Every number of `convert_back(convert(.))` but NaN, which stays some NaN of its sign.
template <typename ToFloat, typename FromFloat>
void ExpectRoundTrip(ToFloat to_float, FromFloat from_float) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float x = to_float(static_cast<uint16_t>(h));
    const uint16_t back = from_float(x);
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(to_float(back))) << h;
      EXPECT_EQ(back & 0x8000u, h & 0x8000u) << h;
    } else {
      ASSERT_EQ(back, h) << x;
    }
  }
}

TEST(Float16, EveryF16RoundTrips) {
  ExpectRoundTrip(F16ToF32, F32ToF16);
  int nans = 0;
  for (uint32_t h = 0; h < 0x10000; ++h) nans += std::isnan(F16ToF32(static_cast<uint16_t>(h)));
  EXPECT_EQ(nans, 2 * 1023);
}

TEST(Float16, F16HasTheValuesOfTheStandard) {
  for (const Value v : {Value{0.0f, 0x0000},
                        {1.0f, 0x3c00},
                        {-2.0f, 0xc000},
                        {0.333251953125f, 0x3555},
                        {65504.0f, 0x7bff},
                        {-65504.0f, 0xfbff},
                        {0x1p-14f, 0x0400},
                        {0x1.ff8p-15f, 0x03ff},
                        {0x1p-24f, 0x0001},
                        {-0x1p-24f, 0x8001},
                        {kInfinity, 0x7c00},
                        {-kInfinity, 0xfc00}}) {
    EXPECT_EQ(F16ToF32(v.bits), v.x);
    EXPECT_EQ(F32ToF16(v.x), v.bits) << v.x;
  }
  EXPECT_TRUE(std::signbit(F16ToF32(0x8000)));
  EXPECT_EQ(F32ToF16(-0.0f), 0x8000);
}

TEST(Float16, F16RoundsToNearestTiesToEven) {
  for (const Value v : {Value{1.0f + 0x1p-11f, 0x3c00},        // tie, down to even
                        {1.0f + 0x1p-11f + 0x1p-23f, 0x3c01},  // just above it
                        {1.0f + 0x1p-10f + 0x1p-11f, 0x3c02},  // tie, up to even
                        {1.0f + 0x1p-10f + 0x1p-11f - 0x1p-22f, 0x3c01},
                        {2049.0f, 0x6800},  // between 2048 and 2050
                        {2051.0f, 0x6802},
                        {2.0f - 0x1p-12f, 0x4000},  // carries into the exponent
                        {0x1p-25f, 0x0000},         // half the least subnormal
                        {0x1.000002p-25f, 0x0001},
                        {0x1.8p-24f, 0x0002},           // tie between subnormals
                        {0x1p-14f - 0x1p-26f, 0x0400},  // up to the least normal
                        {0x1p-149f, 0x0000},
                        {65519.996f, 0x7bff},
                        {65520.0f, 0x7c00},  // tie, up to infinity
                        {-65536.0f, 0xfc00},
                        {std::numeric_limits<float>::max(), 0x7c00}}) {
    EXPECT_EQ(F32ToF16(v.x), v.bits) << v.x;
  }
}

TEST(Float16, NaNStaysNaN) {
  for (const uint32_t bits : {0x7fc00000u, 0x7f800001u, 0xffffffffu, 0xff800001u}) {
    const float nan = FloatFromBits(bits);
    EXPECT_TRUE(std::isnan(F16ToF32(F32ToF16(nan)))) << bits;
    EXPECT_TRUE(std::isnan(BF16ToF32(F32ToBF16(nan)))) << bits;
  }
  EXPECT_EQ(F32ToF16(kQuietNaN), 0x7e00);
}

TEST(Float16, BF16RoundTripsAndRoundsToNearestTiesToEven) {
  ExpectRoundTrip(BF16ToF32, F32ToBF16);
  for (const Value v : {Value{1.0f, 0x3f80},
                        {-3.140625f, 0xc049},
                        {1.0f + 0x1p-8f, 0x3f80},  // tie, down to even
                        {1.0f + 0x1p-8f + 0x1p-23f, 0x3f81},
                        {1.0f + 0x1p-7f + 0x1p-8f, 0x3f82},  // tie, up to even
                        {0x1p-133f, 0x0001},                 // the least subnormal
                        {0x1p-134f, 0x0000},
                        {std::numeric_limits<float>::max(), 0x7f80},
                        {-kInfinity, 0xff80}}) {
    EXPECT_EQ(F32ToBF16(v.x), v.bits) << v.x;
  }
}

}  // namespace
}  // namespace innerq
