#include "kernels/cpu/low_bit_clip.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "kernels/quant_group.h"

namespace innerq {
namespace {

constexpr int64_t kSums = 8;  // partial sums, which the compiler turns into lanes

// The level nearest to `magnitude` >= 0 of those up to `top`, as NearestLowBitCode chooses it.
template <LowBitScheme kScheme>
float NearestLevel(float magnitude, float top) {
  const float clipped = std::min(magnitude, top);
  if constexpr (kScheme == LowBitScheme::kUniform) {
    return static_cast<float>(static_cast<int>(clipped + 0.5f));
  } else if constexpr (kScheme == LowBitScheme::kApot) {
    const auto rounded = static_cast<float>(static_cast<int>(clipped + 0.5f));
    return clipped >= 7.0f ? 8.0f : std::min(rounded, 6.0f);
  } else {
    // Half a unit of the exponent carries into it from 1.5 * 2^i on; then the mantissa is dropped.
    const float power = FloatFromBits((FloatBits(clipped) + 0x400000u) & 0x7f800000u);
    return clipped < 0.5f ? 0.0f : std::max(power, 1.0f);
  }
}

template <LowBitScheme kScheme>
RoundingSums SumLevels(float top, std::span<const float> weights, const float* costs, float clip) {
  const float* values = weights.data();
  float product[kSums] = {}, square[kSums] = {}, error[kSums] = {};
  const float scale = top / clip;
  for (int64_t i = 0; i < std::ssize(weights); i += kSums) {
    for (int64_t s = 0; s < kSums; ++s) {
      const float magnitude = std::fabs(values[i + s]) * scale;
      const float level = NearestLevel<kScheme>(magnitude, top);
      const float cost = costs[i + s];
      const float difference = magnitude - level;
      product[s] += cost * magnitude * level;
      square[s] += cost * level * level;
      error[s] += cost * difference * difference;
    }
  }
  RoundingSums sums;
  for (int64_t s = 0; s < kSums; ++s) {
    sums.product += product[s];
    sums.square += square[s];
    sums.error += error[s];
  }
  return sums;
}

// T as F16; at most the largest, which clips no weight that F16 holds.
float RoundClip(double clip) {
  return F16ToF32(F32ToF16(static_cast<float>(std::min(clip, static_cast<double>(kMaxF16)))));
}

// Tries clips for a group and keeps the one of least error.
class ClipSearch {
 public:
  ClipSearch(const LowBitSpec& spec, std::span<const float> weights, const float* costs)
      : spec_(spec), weights_(weights), costs_(costs) {
    for (size_t i = 0; i < weights.size(); ++i) {
      const double weight = weights[i];
      least_ += costs[i] * weight * weight;
      if (costs[i] > 0) largest_ = std::max(largest_, std::fabs(weight));
    }
  }

  RoundingSums Try(float clip) {
    const RoundingSums sums = SumRounding(spec_, weights_, costs_, clip);
    const double unit = static_cast<double>(clip) / spec_.max_level();
    const double error = sums.error * unit * unit;
    if (error < least_) {
      least_ = error;
      best_ = clip;
    }
    return sums;
  }

  double largest() const { return largest_; }  // |w| that costs anything
  float best() const { return best_; }         // 0: nothing is better than zeros

 private:
  const LowBitSpec& spec_;
  const std::span<const float> weights_;
  const float* const costs_;
  double least_ = 0, largest_ = 0;
  float best_ = 0;
};

}  // namespace

RoundingSums SumRounding(const LowBitSpec& spec, std::span<const float> weights, const float* costs,
                         float clip) {
  const auto top = static_cast<float>(spec.max_level());
  switch (spec.scheme) {
    case LowBitScheme::kPow2:
      return SumLevels<LowBitScheme::kPow2>(top, weights, costs, clip);
    case LowBitScheme::kApot:
      return SumLevels<LowBitScheme::kApot>(top, weights, costs, clip);
    case LowBitScheme::kUniform:
      return SumLevels<LowBitScheme::kUniform>(top, weights, costs, clip);
  }
  return {};
}

double Sigma(std::span<const float> weights) {
  double sum = 0;
  for (const float weight : weights) sum += static_cast<double>(weight) * weight;
  return std::sqrt(sum / static_cast<double>(weights.size()));
}

double NormalAlpha(const LowBitSpec& spec) {
  constexpr double kPow2[] = {1.22, 2.08, 4.20}, kUniform[] = {1.22, 1.96, 2.48};  // 2, 3, 4 bits
  constexpr double kUniform8 = 3.92;
  constexpr double kApot = 2.58;
  if (spec.scheme == LowBitScheme::kApot) return kApot;
  if (spec.bits == 8) return kUniform8;
  return (spec.scheme == LowBitScheme::kPow2 ? kPow2 : kUniform)[spec.bits - 2];
}

uint16_t FitClip(const LowBitSpec& spec, double alpha, std::span<const float> weights,
                 const float* costs) {
  constexpr double kStarts[] = {1, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3};
  constexpr int kMaxSteps = 8;
  ClipSearch search(spec, weights, costs);
  const auto descend = [&](double start) {
    float clip = RoundClip(start);
    for (int step = 0; step < kMaxSteps && clip > 0; ++step) {
      const RoundingSums sums = search.Try(clip);
      const float next = sums.square > 0 ? RoundClip(clip * sums.product / sums.square) : clip;
      if (next == clip) return;
      clip = next;
    }
  };
  const double usual = alpha * Sigma(weights);
  for (const double start : kStarts) descend(start * usual);
  descend(search.largest());
  return F32ToF16(search.best());
}

uint16_t FitPow2Clip(const LowBitSpec& spec, std::span<const float> weights, const float* costs) {
  constexpr int kLeast = -24, kMost = 15;
  ClipSearch search(spec, weights, costs);
  int exponent = 0;
  if (std::frexp(search.largest(), &exponent) == 0.5) --exponent;  // the least power not below it
  for (exponent = std::min(exponent, kMost); exponent >= kLeast; --exponent) {
    search.Try(std::ldexp(1.0f, exponent));
  }
  return F32ToF16(search.best());
}

}  // namespace innerq
