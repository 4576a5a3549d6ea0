// The encoder of low-bit weights: alphas of normal weights, refined clips, pruning, error feedback
// against GPTQ as published, and its edges.
#include "kernels/cpu/low_bit_encoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cpu/low_bit_clip.h"
#include "kernels/cpu/low_bit_hessian.h"
#include "kernels/cpu/lower_triangle.h"
#include "tests/kernels/low_bit_case.h"

namespace innerq {
namespace {

constexpr LowBitScheme kEncoderPow2 = LowBitScheme::kPow2, kEncoderUniform = LowBitScheme::kUniform;

std::vector<float> EncoderWeights(int64_t rows, int64_t cols, float sigma = 1) {
  std::mt19937_64 random(20260401);
  std::normal_distribution<float> normal(0, sigma);
  std::vector<float> weights(static_cast<size_t>(rows * cols));
  for (float& weight : weights) weight = normal(random);
  return weights;
}

// X^T X of inputs of which each resembles the one before it.
std::vector<double> CorrelatedHessian(int64_t cols) {
  constexpr int kTokens = 400;
  std::mt19937_64 random(20260402);
  std::normal_distribution<double> normal;
  std::vector<double> hessian(static_cast<size_t>(cols * cols));
  std::vector<double> x(static_cast<size_t>(cols));
  for (int t = 0; t < kTokens; ++t) {
    double state = normal(random);
    for (double& value : x) value = state = 0.95 * state + 0.3 * normal(random);
    for (size_t i = 0; i < hessian.size(); ++i) hessian[i] += x[i / x.size()] * x[i % x.size()];
  }
  return hessian;
}

// The lower triangle of a square, row after row.
std::vector<double> LowerOf(const std::vector<double>& square, int64_t cols) {
  std::vector<double> lower;
  for (int64_t k = 0; k < cols; ++k) {
    const auto row = square.begin() + k * cols;
    lower.insert(lower.end(), row, row + k + 1);
  }
  return lower;
}

std::vector<LowBitSpec> EncoderSpecs() { return LowBitSpecs({0, 32, 64, 128}, {16}); }

std::string EncoderSpecName(const LowBitSpec& spec) {
  return std::string(LowBitSchemeName(spec.scheme)) + " " + std::to_string(spec.bits) + " bits, " +
         std::to_string(spec.group_size);
}

EncodedLowBit MustEncodeLowBit(const EncodeLowBitArgs& args) {
  Result<EncodedLowBit> encoded = EncodeLowBit(args);
  CHECK(encoded.ok(), encoded.error().message);
  return std::move(*encoded);
}

LowBitMatrix EncodedMatrix(const EncodeLowBitArgs& args, const EncodedLowBit& encoded) {
  return {args.spec, args.rows, args.cols, encoded.codes.data(), encoded.scales.data()};
}

// The value nearest to `weight` that a code can have with clip T.
double NearestLowBitValue(const LowBitSpec& spec, double clip, double weight) {
  double nearest = 0;
  for (int code = 0; code < 1 << spec.bits; ++code) {
    const double value = clip * spec.Level(code) / spec.max_level();
    if (std::fabs(weight - value) < std::fabs(weight - nearest)) nearest = value;
  }
  return nearest;
}

// trace(E H E^T) / trace(W H W^T).
double OutputError(const EncodeLowBitArgs& args, const EncodedLowBit& encoded,
                   const std::vector<double>& hessian) {
  const LowBitMatrix matrix = EncodedMatrix(args, encoded);
  double of_errors = 0, of_weights = 0;
  for (int64_t n = 0; n < args.rows; ++n) {
    const float* row = args.weights + n * args.cols;
    for (int64_t i = 0; i < args.cols; ++i) {
      for (int64_t j = 0; j < args.cols; ++j) {
        const double h = hessian[static_cast<size_t>(i * args.cols + j)];
        const double error_i = row[i] - matrix.Value(n, i), error_j = row[j] - matrix.Value(n, j);
        of_errors += h * error_i * error_j;
        of_weights += h * row[i] * row[j];
      }
    }
  }
  return of_errors / of_weights;
}

// |w| / sigma of its group, in the order of the matrix.
std::vector<double> EncoderMagnitudes(const EncodeLowBitArgs& args) {
  const int64_t size = args.spec.group_size == 0 ? args.cols : args.spec.group_size;
  std::vector<double> magnitudes;
  for (int64_t begin = 0; begin < args.rows * args.cols; begin += size) {
    double squares = 0;
    for (int64_t i = begin; i < begin + size; ++i) squares += std::pow(args.weights[i], 2.0);
    const double sigma = std::sqrt(squares / static_cast<double>(size));
    for (int64_t i = begin; i < begin + size; ++i) {
      magnitudes.push_back(std::fabs(args.weights[i]) / sigma);
    }
  }
  return magnitudes;
}

// Quantiles of N(0, 1), evenly spaced: a sample would move flat optima.
std::vector<float> NormalQuantiles(int64_t count) {
  std::vector<float> quantiles;
  double x = -6;
  for (int64_t i = 0; i < count; ++i) {
    const double share = (static_cast<double>(i) + 0.5) / static_cast<double>(count);
    double high = 6;
    while (high - x > 1e-6) {
      const double middle = (x + high) / 2;
      (std::erfc(-middle / std::sqrt(2.0)) / 2 < share ? x : high) = middle;
    }
    quantiles.push_back(static_cast<float>(x));
  }
  return quantiles;
}

TEST(LowBitEncoder, NormalWeightsGetTheOptimalAlphas) {
  struct Optimum {
    LowBitSpec spec;
    double alpha, error;
  };
  // The least of the integral of (x - Q(x))^2 over N(0, 1), and where it is.
  const Optimum optima[] = {
      {{kEncoderPow2, 2, 0}, 1.224, 0.19017},         {{kEncoderPow2, 3, 0}, 2.073, 0.047560},
      {{kEncoderPow2, 4, 0}, 4.194, 0.037745},        {{kEncoderUniform, 2, 0}, 1.224, 0.19017},
      {{kEncoderUniform, 3, 0}, 1.952, 0.046860},     {{kEncoderUniform, 4, 0}, 2.474, 0.012889},
      {{LowBitScheme::kApot, 4, 0}, 2.588, 0.011470},
  };
  constexpr int64_t kCols = 1 << 16;
  const std::vector<float> weights = NormalQuantiles(kCols);
  for (const Optimum& optimum : optima) {
    SCOPED_TRACE(EncoderSpecName(optimum.spec));
    const EncodedLowBit encoded = MustEncodeLowBit(
        {.spec = optimum.spec, .rows = 1, .cols = kCols, .weights = weights.data()});
    EXPECT_NEAR(encoded.alpha / optimum.alpha, 1, 0.005);
    EXPECT_NEAR(encoded.error / optimum.error, 1, 0.005);
  }
}

TEST(LowBitEncoder, EveryWeightGetsTheNearestLevel) {
  constexpr int64_t kRows = 3, kCols = 256;
  const std::vector<float> weights = EncoderWeights(kRows, kCols);
  for (const LowBitSpec& spec : EncoderSpecs()) {
    SCOPED_TRACE(EncoderSpecName(spec));
    const EncodeLowBitArgs args{
        .spec = spec, .rows = kRows, .cols = kCols, .weights = weights.data()};
    const EncodedLowBit encoded = MustEncodeLowBit(args);
    const LowBitMatrix matrix = EncodedMatrix(args, encoded);
    double error = 0, square = 0;
    int64_t zeros = 0;
    for (int64_t n = 0; n < kRows; ++n) {
      for (int64_t k = 0; k < kCols; ++k) {
        const double weight = weights[static_cast<size_t>(n * kCols + k)];
        const double value = matrix.Value(n, k);
        const double nearest = NearestLowBitValue(spec, matrix.Clip(n, k), weight);
        ASSERT_NEAR(std::fabs(weight - value), std::fabs(weight - nearest), 1e-6)
            << "row " << n << ", column " << k;
        error += (weight - value) * (weight - value);
        square += weight * weight;
        zeros += value == 0;
      }
    }
    EXPECT_NEAR(encoded.error, error / square, 1e-6 * encoded.error);
    EXPECT_DOUBLE_EQ(encoded.zeros, static_cast<double>(zeros) / (kRows * kCols));
    EXPECT_EQ(encoded.threshold, 0);
  }
}

TEST(LowBitEncoder, RefinedClipsAreNeverWorseThanAlphaSigma) {
  constexpr int64_t kRows = 8, kCols = 256;
  const std::vector<float> weights = EncoderWeights(kRows, kCols, 0.1f);
  for (const LowBitSpec& spec : EncoderSpecs()) {
    SCOPED_TRACE(EncoderSpecName(spec));
    const EncodeLowBitArgs args{
        .spec = spec, .rows = kRows, .cols = kCols, .weights = weights.data()};
    const EncodedLowBit encoded = MustEncodeLowBit(args);
    const std::vector<double> magnitudes = EncoderMagnitudes(args);
    const int64_t size = spec.group_size == 0 ? kCols : spec.group_size;
    double refined_total = 0, usual_total = 0;
    for (int64_t begin = 0; begin < kRows * kCols; begin += size) {
      const auto at = static_cast<size_t>(begin);
      const double sigma = std::fabs(weights[at]) / magnitudes[at];
      const float usual_clip = F16ToF32(F32ToF16(static_cast<float>(encoded.alpha * sigma)));
      const float clip = F16ToF32(encoded.scales[static_cast<size_t>(begin / size)]);
      double refined = 0, usual = 0;
      for (int64_t i = begin; i < begin + size; ++i) {
        const double weight = weights[static_cast<size_t>(i)];
        refined += std::pow(weight - NearestLowBitValue(spec, clip, weight), 2);
        usual += std::pow(weight - NearestLowBitValue(spec, usual_clip, weight), 2);
      }
      EXPECT_LE(refined, usual * (1 + 1e-5)) << "group " << begin / size;
      refined_total += refined;
      usual_total += usual;
    }
    EXPECT_LT(refined_total, usual_total);
  }
}

TEST(LowBitScale, PowersOfTwoAreTold) {
  for (int half = 0; half < 0x7c00; ++half) {
    const float scale = F16ToF32(static_cast<uint16_t>(half));
    int exponent = 0;
    const bool expected = scale == 0 || std::frexp(scale, &exponent) == 0.5f;
    EXPECT_EQ(IsPowerOfTwoScale(static_cast<uint16_t>(half)), expected) << scale;
  }
  for (const LowBitScale scale : {LowBitScale::kFree, LowBitScale::kPow2}) {
    EXPECT_EQ(FindLowBitScale(LowBitScaleName(scale)), scale);
  }
  EXPECT_EQ(FindLowBitScale("pow3"), std::nullopt);
}

// The least error of a group over all T that are powers of two.
double LeastPow2Error(const LowBitSpec& spec, const float* weights, int64_t count) {
  double least = std::numeric_limits<double>::infinity();
  for (int exponent = -24; exponent <= 15; ++exponent) {
    double error = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double value = NearestLowBitValue(spec, std::ldexp(1.0, exponent), weights[i]);
      error += std::pow(weights[i] - value, 2);
    }
    least = std::min(least, error);
  }
  return least;
}

TEST(LowBitEncoder, PowerOfTwoClipsAreTheBestOnes) {
  constexpr int64_t kRows = 4, kCols = 256;
  std::vector<float> weights = EncoderWeights(kRows, kCols, 0.1f);
  weights[5] = 0.5f;  // a power of two, and of its group the largest
  for (const LowBitSpec& spec : EncoderSpecs()) {
    SCOPED_TRACE(EncoderSpecName(spec));
    EncodeLowBitArgs args{.spec = spec, .rows = kRows, .cols = kCols, .weights = weights.data()};
    const EncodedLowBit free = MustEncodeLowBit(args);
    args.scale = LowBitScale::kPow2;
    const EncodedLowBit encoded = MustEncodeLowBit(args);
    const LowBitMatrix matrix = EncodedMatrix(args, encoded);
    const int64_t size = spec.group_size == 0 ? kCols : spec.group_size;
    for (int64_t begin = 0; begin < kRows * kCols; begin += size) {
      const uint16_t scale = encoded.scales[static_cast<size_t>(begin / size)];
      EXPECT_TRUE(scale != 0 && IsPowerOfTwoScale(scale)) << F16ToF32(scale);
      double error = 0;
      for (int64_t i = begin; i < begin + size; ++i) {
        const float weight = weights[static_cast<size_t>(i)];
        error += std::pow(weight - matrix.Value(i / kCols, i % kCols), 2);
      }
      const double least = LeastPow2Error(spec, weights.data() + begin, size);
      EXPECT_LE(error, least * (1 + 1e-5)) << "group " << begin / size;
    }
    EXPECT_GT(encoded.error, free.error);
    EXPECT_EQ(encoded.alpha, free.alpha) << "of the matrix, before groups";
  }
}

TEST(LowBitEncoder, PowerOfTwoClipsStayWithinF16) {
  constexpr int64_t kRows = 1, kCols = 64;
  const auto encode = [](float weight) {
    std::vector<float> weights(kCols, weight);
    weights[0] = -weight;
    return MustEncodeLowBit({.spec = {kEncoderPow2, 3, 64},
                             .rows = kRows,
                             .cols = kCols,
                             .weights = weights.data(),
                             .scale = LowBitScale::kPow2});
  };
  for (const auto& [weight, clip, error] :
       {std::tuple(0x1p15f, 0x1p15f, 0.0), std::tuple(0x1.8p15f, 0x1p15f, 1.0 / 9),
        std::tuple(0x1p-14f, 0x1p-14f, 0.0), std::tuple(0x1p-20f, 0x1p-20f, 0.0),
        std::tuple(0x1p-24f, 0x1p-24f, 0.0), std::tuple(0x1p-26f, 0.0f, 1.0),
        std::tuple(0.0f, 0.0f, 0.0)}) {
    const EncodedLowBit encoded = encode(weight);
    EXPECT_EQ(F16ToF32(encoded.scales[0]), clip) << weight;
    EXPECT_NEAR(encoded.error, error, 1e-6) << weight;
  }
}

TEST(LowBitEncoder, PruningHitsItsTargetWithTheSmallestWeights) {
  constexpr int64_t kRows = 16, kCols = 256, kWeights = kRows * kCols;
  const std::vector<float> weights = EncoderWeights(kRows, kCols);
  const std::vector<double> hessian = LowerOf(CorrelatedHessian(kCols), kCols);
  for (const LowBitSpec& spec :
       {LowBitSpec{kEncoderUniform, 4, 64}, LowBitSpec{kEncoderPow2, 4, 128},
        LowBitSpec{kEncoderPow2, 3, 0}}) {
    for (const double prune : {0.5, 0.7}) {
      for (const bool feedback : {false, true}) {
        SCOPED_TRACE(EncoderSpecName(spec) + (feedback ? " feedback" : ""));
        const EncodeLowBitArgs args{.spec = spec,
                                    .rows = kRows,
                                    .cols = kCols,
                                    .weights = weights.data(),
                                    .hessian = feedback ? hessian.data() : nullptr,
                                    .prune = prune};
        const EncodedLowBit encoded = MustEncodeLowBit(args);
        const LowBitMatrix matrix = EncodedMatrix(args, encoded);
        const std::vector<double> magnitudes = EncoderMagnitudes(args);
        int64_t below = 0;
        for (int64_t i = 0; i < kWeights; ++i) {
          if (magnitudes[static_cast<size_t>(i)] >= encoded.threshold * (1 - 1e-6)) continue;
          ++below;
          EXPECT_EQ(matrix.Level(i / kCols, i % kCols), 0) << i;
        }
        EXPECT_NEAR(static_cast<double>(below) / kWeights, prune, 1.0 / kWeights);
        EXPECT_GE(encoded.zeros, prune - 1.0 / kWeights);
        if (!feedback) {
          EXPECT_NEAR(encoded.zeros, prune, 1.0 / kWeights);
        }
        EXPECT_NEAR(encoded.threshold, prune == 0.5 ? 0.674 : 1.036, 0.05);  // of N(0, 1)
      }
    }
  }
}

TEST(LowBitEncoder, PruningForcesNothingWhereRoundingMakesMoreZeros) {
  constexpr int64_t kRows = 16, kCols = 256;
  const std::vector<float> weights = EncoderWeights(kRows, kCols);
  EncodeLowBitArgs args{
      .spec = {kEncoderPow2, 3, 64}, .rows = kRows, .cols = kCols, .weights = weights.data()};
  const EncodedLowBit unpruned = MustEncodeLowBit(args);
  args.prune = 0.1;
  const EncodedLowBit encoded = MustEncodeLowBit(args);
  EXPECT_GT(unpruned.zeros, 0.15);
  EXPECT_EQ(encoded.codes, unpruned.codes);
  EXPECT_EQ(encoded.scales, unpruned.scales);
  EXPECT_EQ(encoded.threshold, 0);
}

// Where the free scale would round as many to zero, theirs need not.
TEST(LowBitEncoder, ScalesOfPowersOfTwoArePrunedToTheirTarget) {
  constexpr int64_t kRows = 16, kCols = 256;
  const std::vector<float> weights = EncoderWeights(kRows, kCols);
  for (const int bits : {2, 3, 4}) {
    for (const double prune : {0.1, 0.4, 0.45, 0.6}) {
      const EncodedLowBit encoded = MustEncodeLowBit({.spec = {kEncoderPow2, bits, 64},
                                                      .rows = kRows,
                                                      .cols = kCols,
                                                      .weights = weights.data(),
                                                      .prune = prune,
                                                      .scale = LowBitScale::kPow2});
      EXPECT_GE(encoded.zeros, prune - 1.0 / (kRows * kCols)) << bits << " bits";
    }
  }
}

TEST(LowBitEncoder, ErrorFeedbackLowersTheErrorOfOutputs) {
  constexpr int64_t kRows = 20, kCols = 128;
  const std::vector<float> weights = EncoderWeights(kRows, kCols);
  const std::vector<double> hessian = CorrelatedHessian(kCols);
  const std::vector<double> lower = LowerOf(hessian, kCols);
  for (const LowBitSpec& spec : EncoderSpecs()) {
    SCOPED_TRACE(EncoderSpecName(spec));
    EncodeLowBitArgs args{.spec = spec, .rows = kRows, .cols = kCols, .weights = weights.data()};
    const double without = OutputError(args, MustEncodeLowBit(args), hessian);
    args.hessian = lower.data();
    const EncodedLowBit encoded = MustEncodeLowBit(args);
    const double with = OutputError(args, encoded, hessian);
    EXPECT_NEAR(encoded.error, with, 1e-3 * with);
    EXPECT_LT(with, 0.4 * without);
    args.scale = LowBitScale::kPow2;
    const EncodedLowBit pow2 = MustEncodeLowBit(args);
    for (const uint16_t scale : pow2.scales) EXPECT_TRUE(IsPowerOfTwoScale(scale));
    args.hessian = nullptr;
    EXPECT_LT(OutputError(args, pow2, hessian),
              0.4 * OutputError(args, MustEncodeLowBit(args), hessian));
  }
}

TEST(LowBitEncoder, AFactorThatMatricesShareGivesTheSameCodes) {
  constexpr int64_t kRows = 20, kCols = 128;
  const std::vector<float> weights = EncoderWeights(kRows, kCols);
  const std::vector<double> hessian = LowerOf(CorrelatedHessian(kCols), kCols);
  const Result<FeedbackFactor> factor = FactorHessian(hessian.data(), kCols, 1);
  ASSERT_TRUE(factor.ok());
  EncodeLowBitArgs args{.spec = {kEncoderUniform, 3, 64},
                        .rows = kRows,
                        .cols = kCols,
                        .weights = weights.data(),
                        .hessian = hessian.data()};
  const EncodedLowBit own = MustEncodeLowBit(args);
  args.factor = &*factor;
  for (int i = 0; i < 2; ++i) {
    const EncodedLowBit shared = MustEncodeLowBit(args);
    EXPECT_EQ(shared.codes, own.codes);
    EXPECT_EQ(shared.scales, own.scales);
    EXPECT_EQ(shared.error, own.error);
  }
}

TEST(LowBitEncoder, TellsItsMemory) {
  constexpr int64_t kRows = 1000, kCols = 4096;
  EncodeLowBitArgs args{.spec = {kEncoderUniform, 4, 64}, .rows = kRows, .cols = kCols};
  constexpr int64_t kCodes = kRows * kCols / 2;
  const int64_t plain = EncodeLowBitBytes(args, false);
  EXPECT_GT(plain, kCodes);
  EXPECT_LT(plain, 2 * kCodes);
  EXPECT_NEAR(static_cast<double>(EncodeLowBitBytes(args, true) - plain), 2.0 * kCols * kCols,
              1e-3 * kCols * kCols);
  args.prune = 0.5;
  EXPECT_EQ(EncodeLowBitBytes(args, false) - plain, 4 * kRows * kCols);
  EXPECT_EQ(FeedbackFactorBytes(kCols), 4 * (kCols * (kCols + 1) / 2 + kCols));
  EXPECT_EQ(FactorHessianBytes(kCols) - FeedbackFactorBytes(kCols), 8 * (kCols * (kCols + 1) / 2));
}

// H^-1 by Gauss and Jordan.
std::vector<double> InverseHessian(std::vector<double> hessian, size_t cols) {
  std::vector<double> inverse(cols * cols);
  for (size_t k = 0; k < cols; ++k) inverse[k * cols + k] = 1;
  for (size_t k = 0; k < cols; ++k) {
    const double pivot = hessian[k * cols + k];
    for (size_t j = 0; j < cols; ++j) {
      hessian[k * cols + j] /= pivot;
      inverse[k * cols + j] /= pivot;
    }
    for (size_t i = 0; i < cols; ++i) {
      const double factor = hessian[i * cols + k];
      for (size_t j = 0; i != k && j < cols; ++j) {
        hessian[i * cols + j] -= factor * hessian[k * cols + j];
        inverse[i * cols + j] -= factor * inverse[k * cols + j];
      }
    }
  }
  return inverse;
}

// GPTQ of one row: every column's error goes to all columns that are left, by an inverse Hessian of
// those that is kept up to date. No factor of it, no blocks. `hessian` has a mean diagonal of 1.
std::vector<double> PublishedGptq(const EncodeLowBitArgs& args, double alpha,
                                  std::vector<float> row, std::vector<double> hessian) {
  const LowBitSpec& spec = args.spec;
  const size_t cols = row.size();
  const size_t group = spec.group_size == 0 ? cols : static_cast<size_t>(spec.group_size);
  std::vector<float> costs;
  for (size_t k = 0; k < cols; ++k) {
    costs.push_back(static_cast<float>(hessian[k * cols + k] += 0.01));
  }
  std::vector<double> inverse = InverseHessian(std::move(hessian), cols);
  std::vector<double> current(row.begin(), row.end()), values;
  float clip = 0;
  for (size_t k = 0; k < cols; ++k) {
    if (k % group == 0) {
      std::copy(current.begin(), current.end(), row.begin());
      const std::span<const float> weights(row.data() + k, group);
      clip = F16ToF32(args.scale == LowBitScale::kPow2
                          ? FitPow2Clip(spec, weights, costs.data() + k)
                          : FitClip(spec, alpha, weights, costs.data() + k));
    }
    values.push_back(NearestLowBitValue(spec, clip, current[k]));
    const double error = (current[k] - values[k]) / inverse[k * cols + k];
    for (size_t j = k + 1; j < cols; ++j) current[j] -= error * inverse[k * cols + j];
    for (size_t i = k + 1; i < cols; ++i) {
      const double factor = inverse[i * cols + k] / inverse[k * cols + k];
      for (size_t j = k + 1; j < cols; ++j) inverse[i * cols + j] -= factor * inverse[k * cols + j];
    }
  }
  return values;
}

TEST(LowBitEncoder, ErrorFeedbackIsThatOfGptq) {
  constexpr int64_t kRows = 3, kCols = 160;  // more than are encoded together, and than a panel
  const std::vector<float> weights = EncoderWeights(kRows, kCols);
  std::vector<double> hessian = CorrelatedHessian(kCols);
  double mean = 0;
  for (int64_t k = 0; k < kCols; ++k) mean += hessian[static_cast<size_t>(k * (kCols + 1))] / kCols;
  for (double& value : hessian) value /= mean;
  const std::vector<double> lower = LowerOf(hessian, kCols);
  for (const LowBitSpec& spec :
       {LowBitSpec{kEncoderUniform, 4, 0}, LowBitSpec{kEncoderUniform, 4, 32},
        LowBitSpec{kEncoderPow2, 4, 32}}) {
    EncodeLowBitArgs args{.spec = spec,
                          .rows = kRows,
                          .cols = kCols,
                          .weights = weights.data(),
                          .hessian = lower.data()};
    if (spec.scheme == kEncoderPow2) args.scale = LowBitScale::kPow2;
    const EncodedLowBit encoded = MustEncodeLowBit(args);
    const LowBitMatrix matrix = EncodedMatrix(args, encoded);
    for (int64_t n = 0; n < kRows; ++n) {
      const std::vector<double> published =
          PublishedGptq(args, encoded.alpha,
                        {weights.begin() + n * kCols, weights.begin() + (n + 1) * kCols}, hessian);
      for (int64_t k = 0; k < kCols; ++k) {
        EXPECT_NEAR(matrix.Value(n, k), published[static_cast<size_t>(k)], 1e-6)
            << EncoderSpecName(spec) << ", row " << n << ", column " << k;
      }
    }
  }
}

TEST(LowBitEncoder, InputsThatWereAlwaysZeroTakeNoFeedback) {
  constexpr int64_t kRows = 4, kCols = 64;
  const std::vector<float> weights = EncoderWeights(kRows, kCols);
  std::vector<double> hessian = CorrelatedHessian(kCols);
  constexpr int64_t kDead = 40;
  for (int64_t k = 0; k < kCols; ++k) {
    hessian[static_cast<size_t>(kDead * kCols + k)] = 0;
    hessian[static_cast<size_t>(k * kCols + kDead)] = 0;
  }
  const std::vector<double> lower = LowerOf(hessian, kCols);
  EncodeLowBitArgs args{.spec = {kEncoderUniform, 4, 0},
                        .rows = kRows,
                        .cols = kCols,
                        .weights = weights.data(),
                        .hessian = lower.data()};
  const EncodedLowBit encoded = MustEncodeLowBit(args);
  const LowBitMatrix matrix = EncodedMatrix(args, encoded);
  for (int64_t n = 0; n < kRows; ++n) {
    const double weight = weights[static_cast<size_t>(n * kCols + kDead)];
    EXPECT_NEAR(matrix.Value(n, kDead),
                NearestLowBitValue(args.spec, matrix.Clip(n, kDead), weight), 1e-6);
  }
  const std::vector<double> zeros(hessian.size());
  args.hessian = zeros.data();
  const EncodedLowBit of_zeros = MustEncodeLowBit(args);
  args.hessian = nullptr;
  EXPECT_EQ(of_zeros.codes, MustEncodeLowBit(args).codes);
  EXPECT_EQ(of_zeros.error, 0);
}

TEST(LowBitEncoder, HessiansThatCannotBeAreErrors) {
  constexpr int64_t kCols = 32;
  const std::vector<float> weights = EncoderWeights(1, kCols);
  EncodeLowBitArgs args{
      .spec = {kEncoderPow2, 4, 32}, .rows = 1, .cols = kCols, .weights = weights.data()};
  const std::vector<double> good = LowerOf(CorrelatedHessian(kCols), kCols);
  const auto code_with = [&](double value) {
    std::vector<double> hessian = good;
    hessian[TriangleElements(20) + 5] = value;
    args.hessian = hessian.data();
    const Result<EncodedLowBit> encoded = EncodeLowBit(args);
    return encoded.ok() ? "ok" : encoded.error().code == ErrorCode::kInvalidArgument ? "bad" : "?";
  };
  EXPECT_STREQ(code_with(good[0] * 1.2), "ok");  // a little more damping makes it definite
  EXPECT_STREQ(code_with(good[0] * 1e3), "bad");
  EXPECT_STREQ(code_with(std::nan("")), "bad");
  EXPECT_STREQ(code_with(std::numeric_limits<double>::infinity()), "bad");
  std::vector<double> negative = good;
  for (double& value : negative) value = -value;
  args.hessian = negative.data();
  EXPECT_FALSE(EncodeLowBit(args).ok());
}

TEST(LowBitEncoder, GroupsOfZerosAreZero) {
  constexpr int64_t kRows = 2, kCols = 128;
  const std::vector<double> hessian = LowerOf(CorrelatedHessian(kCols), kCols);
  for (const bool all : {false, true}) {
    std::vector<float> weights = EncoderWeights(kRows, kCols);
    std::fill(weights.begin() + (all ? 0 : 64), weights.end(), 0.0f);
    for (const LowBitSpec& spec : EncoderSpecs()) {
      for (const double prune : {0.0, 0.9}) {
        SCOPED_TRACE(EncoderSpecName(spec));
        const EncodeLowBitArgs args{.spec = spec,
                                    .rows = kRows,
                                    .cols = kCols,
                                    .weights = weights.data(),
                                    .hessian = all ? hessian.data() : nullptr,
                                    .prune = prune};
        const EncodedLowBit encoded = MustEncodeLowBit(args);
        const LowBitMatrix matrix = EncodedMatrix(args, encoded);
        for (int64_t k = 0; k < kCols; ++k) EXPECT_EQ(matrix.Level(1, k), 0);
        EXPECT_EQ(matrix.Clip(1, 0), 0);
        EXPECT_GE(encoded.zeros, all ? 1 : 0.75);
        if (all) {
          EXPECT_EQ(encoded.error, 0);
        }
      }
    }
  }
}

TEST(LowBitEncoder, TinyAndHugeWeightsKeepTheirClips) {
  constexpr int64_t kRows = 2, kCols = 64;
  for (const LowBitSpec& spec : EncoderSpecs()) {
    if (!spec.Divides(kCols)) continue;
    SCOPED_TRACE(EncoderSpecName(spec));
    const auto error_of = [&](float sigma) {
      std::vector<float> weights = EncoderWeights(kRows, kCols);
      for (float& weight : weights) weight = std::clamp(weight, -3.0f, 3.0f) * sigma;
      return MustEncodeLowBit(
                 {.spec = spec, .rows = kRows, .cols = kCols, .weights = weights.data()})
          .error;
    };
    const double usual = error_of(1);
    EXPECT_NEAR(error_of(21000), usual, 0.02 * usual);    // up to 63000
    EXPECT_NEAR(error_of(0x1p-17f), usual, 0.1 * usual);  // subnormal clips
    EXPECT_LT(error_of(0x1p-24f), 1);                     // clips of a few units
    EXPECT_EQ(error_of(1e-9f), 1);                        // no clip is so small
    EXPECT_EQ(error_of(1e-40f), 1);
  }
}

TEST(LowBitEncoder, WeightsThatF16CannotHoldAreErrors) {
  constexpr int64_t kRows = 2, kCols = 64;
  for (const float bad : {std::nanf(""), -std::numeric_limits<float>::infinity(), 70000.0f}) {
    std::vector<float> weights = EncoderWeights(kRows, kCols);
    weights[kCols + 7] = bad;
    const Result<EncodedLowBit> encoded =
        EncodeLowBit({.spec = {}, .rows = kRows, .cols = kCols, .weights = weights.data()});
    ASSERT_FALSE(encoded.ok());
    EXPECT_EQ(encoded.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(encoded.error().message.find("row 1, column 7"), std::string::npos)
        << encoded.error().message;
  }
}

TEST(LowBitEncoder, ThreadsDoNotChangeTheResult) {
  constexpr int64_t kRows = 37, kCols = 256;
  const std::vector<float> weights = EncoderWeights(kRows, kCols);
  const std::vector<double> hessian = LowerOf(CorrelatedHessian(kCols), kCols);
  for (const int64_t group_size : {0, 64}) {
    for (const bool feedback : {false, true}) {
      EncodeLowBitArgs args{.spec = {kEncoderPow2, 3, group_size},
                            .rows = kRows,
                            .cols = kCols,
                            .weights = weights.data(),
                            .hessian = feedback ? hessian.data() : nullptr,
                            .prune = 0.4};
      const EncodedLowBit one = MustEncodeLowBit(args);
      args.threads = 3;
      const EncodedLowBit three = MustEncodeLowBit(args);
      EXPECT_EQ(one.codes, three.codes);
      EXPECT_EQ(one.scales, three.scales);
      EXPECT_EQ(one.alpha, three.alpha);
      EXPECT_EQ(one.error, three.error);
    }
  }
}

}  // namespace
}  // namespace innerq
