// The codec of one group: the authors' results to the bit, ours against theirs, and its edges.
#include "kernels/quant_group.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "tests/models/test_files.h"

namespace innerq {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kGroupSeed = 20260301;
constexpr int kGroup = 32;
constexpr QuantMode kModes[] = {QuantMode::kSymmetric, QuantMode::kAsymmetric, QuantMode::kHybrid};
constexpr QuantCodec kCodecs[] = {QuantCodec::kPaper, QuantCodec::kFitted};

QuantSpec Spec(int bits, QuantMode mode, QuantCodec codec) {
  return {.bits = bits, .mode = mode, .codec = codec};
}

struct Encoded {
  std::vector<uint8_t> codes;
  GroupParams params;
};

Encoded Encode(const QuantSpec& spec, const std::vector<float>& x, const float* weights = nullptr) {
  Encoded encoded{std::vector<uint8_t>(x.size()), {}};
  EncodeGroups<1>(spec, x.data(), weights, static_cast<int>(x.size()), encoded.codes.data(),
                  &encoded.params);
  return encoded;
}

// What a page gives back: codes with the stored F16 scale and zero.
std::vector<float> Decode(const Encoded& encoded, int bits) {
  const StoredParams stored = StoreParams(encoded.params, bits);
  std::vector<float> x;
  for (const uint8_t code : encoded.codes) {
    x.push_back(F16ToF32(stored.scale) * static_cast<float>(code) + F16ToF32(stored.zero));
  }
  return x;
}

double SquaredError(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::pow(static_cast<double>(a[i]) - b[i], 2);
  return sum;
}

std::vector<float> Normal(std::mt19937_64& random, int n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = normal(random);
  return x;
}

// Groups that differ in kind: Gaussian, with an outlier, shifted, one-sided, constant, two values,
// as small as F16's subnormals, as large as F16 goes.
std::vector<std::vector<float>> HardGroups(int n) {
  std::mt19937_64 random(kGroupSeed);
  std::vector<std::vector<float>> groups;
  for (int i = 0; i < 16; ++i) {
    std::vector<float> x = Normal(random, n);
    for (float& v : x) {
      if (i % 8 == 2) v += 7.0f;
      if (i % 8 == 3) v = std::fabs(v);
      if (i % 8 == 4) v = 0.7f;
      if (i % 8 == 5) v = v > 0 ? 1.0f : -3.0f;
      if (i % 8 == 6) v *= 0x1p-22f;
      if (i % 8 == 7) v = ClampTo(v * 30000.0f, -kMaxF16, kMaxF16);
    }
    if (i % 8 == 1) x[static_cast<size_t>(n / 2)] = -40.0f;
    groups.push_back(x);
  }
  return groups;
}

// The authors' results of one input, axis and number of bits.
struct GoldenCase {
  const Json& json;
  std::vector<float> input;  // [heads][tokens][head_dim]
  int64_t dim;

  bool channels() const { return json["axis"] == "channel"; }
  // Index in the input of value i of group g; groups are in the order of the scales.
  size_t Element(size_t g, size_t i) const {
    const auto width = static_cast<size_t>(dim);
    return channels() ? g * kGroup + i : (g / width * kGroup + i) * width + g % width;
  }
  std::vector<float> Group(size_t g) const {
    std::vector<float> x;
    for (size_t i = 0; i < kGroup; ++i) x.push_back(input[Element(g, i)]);
    return x;
  }
};

void ExpectNear(double actual, double expected, const std::string& what) {
  const bool near = std::fabs(actual - expected) <= 1e-6 * std::max(1.0, std::fabs(expected));
  ASSERT_TRUE(near) << what << ": " << actual << " instead of " << expected;
}

void ExpectMode(const GoldenCase& golden, QuantMode mode) {
  const int bits = golden.json["bits"];
  const bool symmetric = mode == QuantMode::kSymmetric;
  const Json& expected = golden.json[symmetric ? "symmetric" : "asymmetric"];
  const auto codes = expected[symmetric ? "signed_codes" : "codes"].get<std::vector<int>>();
  const auto scales = expected["scale"].get<std::vector<float>>();
  const int shift = symmetric ? 1 << (bits - 1) : 0;
  ASSERT_EQ(scales.size() * kGroup, golden.input.size());
  for (size_t g = 0; g < scales.size(); ++g) {
    const Encoded encoded = Encode(Spec(bits, mode, QuantCodec::kPaper), golden.Group(g));
    for (size_t i = 0; i < kGroup; ++i) {
      ASSERT_EQ(encoded.codes[i], codes[golden.Element(g, i)] + shift) << g << " " << i;
    }
    ASSERT_NO_FATAL_FAILURE(ExpectNear(encoded.params.scale, scales[g], "scale"));
    const double zero = symmetric ? -scales[g] * shift : expected["zero"][g].get<float>();
    ASSERT_NO_FATAL_FAILURE(ExpectNear(encoded.params.zero, zero, "zero"));
  }
}

// Of hybrid groups the file holds the choice and the mean error. Codes are those of the chosen
// mode: symmetric ones of this case, asymmetric ones of `fewer`, the same case with a bit less.
void ExpectHybrid(const GoldenCase& golden, const Json* fewer) {
  const int bits = golden.json["bits"];
  ASSERT_EQ(golden.json["hybrid"]["asymmetric_bits"], bits - 1);
  const auto is_symmetric = golden.json["hybrid"]["symmetric_mask"].get<std::vector<int>>();
  const auto signed_codes = golden.json["symmetric"]["signed_codes"].get<std::vector<int>>();
  const auto codes = fewer != nullptr ? (*fewer)["asymmetric"]["codes"].get<std::vector<int>>()
                                      : std::vector<int>();
  ASSERT_EQ(is_symmetric.size() * kGroup, golden.input.size());
  double error = 0;
  for (size_t g = 0; g < is_symmetric.size(); ++g) {
    const std::vector<float> x = golden.Group(g);
    const Encoded encoded = Encode(Spec(bits, QuantMode::kHybrid, QuantCodec::kPaper), x);
    ASSERT_EQ(encoded.params.asymmetric, is_symmetric[g] == 0) << "group " << g;
    for (size_t i = 0; i < kGroup; ++i) {
      const size_t at = golden.Element(g, i);
      if (is_symmetric[g]) {
        ASSERT_EQ(encoded.codes[i], signed_codes[at] + (1 << (bits - 1))) << g << " " << i;
      } else if (fewer != nullptr) {
        ASSERT_EQ(encoded.codes[i], codes[at]) << g << " " << i;
      }
      error += std::fabs(x[i] - (encoded.params.scale * encoded.codes[i] + encoded.params.zero));
    }
  }
  ExpectNear(error / static_cast<double>(golden.input.size()),
             golden.json["hybrid"]["dequantized_mae"], "mean error");
}

TEST(QuantGroup, PaperCodecEqualsTheAuthorsQuantizer) {
  const std::filesystem::path path = SharedPath("golden/group_quantization.json");
  SKIP_WITHOUT(path);
  const Json file = Json::parse(ReadAll(path));
  const Json& cases = file["cases"];
  ASSERT_EQ(cases.size(), 24u);
  for (const Json& json : cases) {
    const std::string axis = json["axis"], input = json["input"];
    const int bits = json["bits"];
    SCOPED_TRACE(input + ", " + axis + ", " + std::to_string(bits) + " bits");
    ASSERT_EQ(json["group_size"], kGroup);
    const GoldenCase golden{json, file["inputs"][input]["data"].get<std::vector<float>>(),
                            json["head_dim"]};
    const auto fewer = std::find_if(cases.begin(), cases.end(), [&](const Json& other) {
      return other["input"] == input && other["axis"] == axis && other["bits"] == bits - 1;
    });
    ASSERT_NO_FATAL_FAILURE(ExpectMode(golden, QuantMode::kSymmetric));
    ASSERT_NO_FATAL_FAILURE(ExpectMode(golden, QuantMode::kAsymmetric));
    ASSERT_NO_FATAL_FAILURE(ExpectHybrid(golden, fewer == cases.end() ? nullptr : &*fewer));
  }
}

TEST(QuantGroup, FittedErrorIsNoLargerThanPaperErrorInAnyGroup) {
  std::mt19937_64 random(kGroupSeed);
  std::vector<std::vector<float>> groups = HardGroups(kGroup);
  for (int i = 0; i < 2000; ++i) groups.push_back(Normal(random, kGroup));
  for (const int bits : {2, 3, 4, 8}) {
    for (const QuantMode mode : kModes) {
      for (size_t g = 0; g < groups.size(); ++g) {
        const auto error_of = [&](QuantCodec codec) {
          return SquaredError(groups[g], Decode(Encode(Spec(bits, mode, codec), groups[g]), bits));
        };
        const double paper = error_of(QuantCodec::kPaper), fitted = error_of(QuantCodec::kFitted);
        // A paper hybrid with a bit less may hit both values of a group where ours are within F16's
        // rounding, 2^-11 of each.
        const double rounding = 0x1p-22 * SquaredError(groups[g], std::vector<float>(kGroup));
        const bool no_larger = fitted <= paper + rounding;
        EXPECT_TRUE(no_larger) << bits << " bits, mode " << static_cast<int>(mode) << ", group "
                               << g << ": " << fitted << " above " << paper;
      }
    }
  }
}

// Noise-to-signal power of Gaussian groups.
double NoiseToSignal(const QuantSpec& spec) {
  std::mt19937_64 random(kGroupSeed);
  double noise = 0, signal = 0;
  for (int i = 0; i < 4000; ++i) {
    const std::vector<float> x = Normal(random, kGroup);
    noise += SquaredError(x, Decode(Encode(spec, x), spec.bits));
    signal += SquaredError(x, std::vector<float>(x.size()));
  }
  return noise / signal;
}

TEST(QuantGroup, NoiseOfGaussianGroupsIsAsDocumented) {
  struct Bound {
    int bits;
    QuantMode mode;
    QuantCodec codec;
    double noise;  // KV_CACHE.md section 2
  };
  for (const Bound& b : {Bound{2, QuantMode::kSymmetric, QuantCodec::kPaper, 0.432},
                         {3, QuantMode::kSymmetric, QuantCodec::kPaper, 0.051},
                         {2, QuantMode::kSymmetric, QuantCodec::kFitted, 0.108},
                         {3, QuantMode::kSymmetric, QuantCodec::kFitted, 0.029},
                         {2, QuantMode::kAsymmetric, QuantCodec::kFitted, 0.098},
                         {3, QuantMode::kAsymmetric, QuantCodec::kFitted, 0.024}}) {
    const double noise = NoiseToSignal(Spec(b.bits, b.mode, b.codec));
    const bool low = noise <= 1.02 * b.noise;  // of another sample
    EXPECT_TRUE(low) << b.bits << " bits: " << noise << " above " << b.noise;
  }
}

// Normalized keys of channels whose norms c spread over two octaves, their errors weighted by c^2:
// what the fit without weights loses is what it spends on channels that matter little.
TEST(QuantGroup, WeightsLowerTheErrorThatTheyWeigh) {
  std::mt19937_64 random(kGroupSeed);
  std::vector<float> weights, ones(kGroup, 1.0f);
  for (int i = 0; i < kGroup; ++i) weights.push_back(std::exp2(static_cast<float>(i % 5) - 2.0f));
  const auto weighted_error = [&](const std::vector<float>& x, const std::vector<float>& decoded) {
    double error = 0;
    for (size_t i = 0; i < x.size(); ++i) error += weights[i] * std::pow(x[i] - decoded[i], 2);
    return error;
  };
  for (const int bits : {2, 3, 4}) {
    for (const QuantMode mode : kModes) {
      const QuantSpec spec = Spec(bits, mode, QuantCodec::kFitted);
      double plain = 0, weighted = 0;
      for (int g = 0; g < 2000; ++g) {
        std::vector<float> x = Normal(random, kGroup);
        for (size_t i = 0; i < x.size(); ++i) x[i] *= std::sqrt(weights[i]);
        const Encoded without = Encode(spec, x);
        plain += weighted_error(x, Decode(without, bits));
        weighted += weighted_error(x, Decode(Encode(spec, x, weights.data()), bits));
        EXPECT_EQ(Encode(spec, x, ones.data()).codes, without.codes);
      }
      EXPECT_TRUE(weighted < 0.97 * plain) << bits << " bits: " << weighted << " of " << plain;
    }
  }
}

TEST(QuantGroup, AGroupOfZerosHasScaleZeroAndDecodesToZeros) {
  const std::vector<float> zeros(kGroup);
  for (const int bits : {2, 3, 4, 8}) {
    for (const QuantMode mode : kModes) {
      for (const QuantCodec codec : kCodecs) {
        const Encoded encoded = Encode(Spec(bits, mode, codec), zeros);
        EXPECT_EQ(StoreParams(encoded.params, bits).scale & 0x7fff, 0);
        EXPECT_EQ(Decode(encoded, bits), zeros) << bits << " " << static_cast<int>(mode);
      }
    }
  }
}

TEST(QuantGroup, StoredScalesAreNormalAndFiniteForFiniteInput) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const QuantMode mode : kModes) {
      for (const QuantCodec codec : kCodecs) {
        for (const std::vector<float>& x : HardGroups(kGroup)) {
          const Encoded encoded = Encode(Spec(bits, mode, codec), x);
          const StoredParams stored = StoreParams(encoded.params, bits);
          const float scale = std::fabs(F16ToF32(stored.scale));
          const bool constant = std::all_of(x.begin(), x.end(), [&](float v) { return v == x[0]; });
          EXPECT_TRUE(scale >= kMinF16Scale || (scale == 0 && constant)) << scale;
          EXPECT_LE(scale, kMaxF16);
          EXPECT_LE(std::fabs(F16ToF32(stored.zero)), kMaxF16);
          for (const uint8_t code : encoded.codes) EXPECT_LT(code, 1 << bits);
        }
        // A group far below the floor keeps the smallest normal scale and decodes within its span.
        std::vector<float> tiny(kGroup, 0x1p-24f);
        tiny[3] = -0x1p-23f;
        const Encoded encoded = Encode(Spec(bits, mode, codec), tiny);
        EXPECT_EQ(std::fabs(encoded.params.scale), kMinF16Scale);
        for (const float v : Decode(encoded, bits)) EXPECT_LE(std::fabs(v), 0x1p-23f);
      }
    }
  }
}

TEST(QuantGroup, LanesGiveTheBitsOfSingleGroups) {
  constexpr int kLanes = 16;
  for (const int n : {8, 16, 32, 64, 128}) {
    const std::vector<std::vector<float>> groups = HardGroups(n);
    ASSERT_EQ(groups.size(), static_cast<size_t>(kLanes));
    std::vector<float> x(static_cast<size_t>(n * kLanes)), weights;
    for (int i = 0; i < n; ++i) weights.push_back(0.125f + static_cast<float>(i * i % 7));
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < n; ++i) {
        x[static_cast<size_t>(i * kLanes + l)] =
            groups[static_cast<size_t>(l)][static_cast<size_t>(i)];
      }
    }
    for (const int bits : {2, 3, 4, 8}) {
      for (const QuantMode mode : kModes) {
        for (const QuantCodec codec : kCodecs) {
          std::vector<uint8_t> codes(x.size());
          GroupParams params[kLanes];
          EncodeGroups<kLanes>(Spec(bits, mode, codec), x.data(), weights.data(), n, codes.data(),
                               params);
          for (int l = 0; l < kLanes; ++l) {
            const Encoded one =
                Encode(Spec(bits, mode, codec), groups[static_cast<size_t>(l)], weights.data());
            EXPECT_EQ(FloatBits(params[l].scale), FloatBits(one.params.scale));
            EXPECT_EQ(FloatBits(params[l].zero), FloatBits(one.params.zero));
            EXPECT_EQ(params[l].asymmetric, one.params.asymmetric);
            for (int i = 0; i < n; ++i) {
              ASSERT_EQ(codes[static_cast<size_t>(i * kLanes + l)],
                        one.codes[static_cast<size_t>(i)]);
            }
          }
        }
      }
    }
  }
}

TEST(QuantGroup, CodesReadBackAsWrittenAndLeaveTheirNeighbours) {
  std::mt19937_64 random(kGroupSeed);
  constexpr int64_t kCodes = 67;
  for (const int bits : {2, 3, 4, 8}) {
    const auto bytes = static_cast<size_t>((kCodes * bits + 7) / 8);
    std::vector<uint8_t> packed(bytes + 1, 0xa5);  // the last byte is beyond the string
    std::vector<uint32_t> codes(kCodes);
    for (int round = 0; round < 3; ++round) {
      for (int64_t i = 0; i < kCodes; ++i) {
        const int64_t at = i * 29 % kCodes;  // in an order that leaves gaps
        codes[static_cast<size_t>(at)] = static_cast<uint32_t>(random() % (1u << bits));
        WriteCode(packed.data(), bits, at, codes[static_cast<size_t>(at)]);
      }
      for (int64_t i = 0; i < kCodes; ++i) {
        ASSERT_EQ(ReadCode(packed.data(), bits, i), codes[static_cast<size_t>(i)])
            << bits << " bits, code " << i;
      }
      EXPECT_EQ(packed.back(), 0xa5);
    }
  }
  // A little-endian bit string: 0b101 at bit 0, 0b011 at bit 3, 0b110 at bits 6 to 8.
  uint8_t packed[2] = {};
  WriteCode(packed, 3, 0, 5);
  WriteCode(packed, 3, 1, 3);
  WriteCode(packed, 3, 2, 6);
  EXPECT_EQ(packed[0], 0b10011101);
  EXPECT_EQ(packed[1], 0b1);
}

}  // namespace
}  // namespace innerq
