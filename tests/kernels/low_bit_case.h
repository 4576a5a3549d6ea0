// LowBitCase: a random low-bit matrix for tests.
#pragma once

#include <random>
#include <vector>

#include "kernels/float16.h"
#include "kernels/low_bit_weight.h"

namespace innerq {

// All specs of low-bit weights with these groups and activation bits.
inline std::vector<LowBitSpec> LowBitSpecs(const std::vector<int64_t>& groups,
                                           const std::vector<int>& activation_bits) {
  std::vector<LowBitSpec> specs;
  for (const LowBitScheme scheme :
       {LowBitScheme::kPow2, LowBitScheme::kApot, LowBitScheme::kUniform}) {
    for (const int bits : {2, 3, 4, 8}) {
      for (const int64_t group : groups) {
        for (const int activations : activation_bits) {
          const LowBitSpec spec{scheme, bits, group, activations};
          if (spec.valid()) specs.push_back(spec);
        }
      }
    }
  }
  return specs;
}

// Random codes, those that no encoder writes among them, and scales of different sizes.
struct LowBitCase {
  LowBitCase(std::mt19937_64& random, const LowBitSpec& spec, int64_t n, int64_t k,
             float input_clip = 0)
      : codes(static_cast<size_t>(n * spec.RowBytes(k))),
        scales(static_cast<size_t>(n * spec.Groups(k))) {
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random());
    for (uint16_t& scale : scales) scale = F32ToF16(static_cast<float>(random() % 1000) / 4096.0f);
    matrix = {spec, n, k, codes.data(), scales.data(), input_clip};
  }
  LowBitCase(const LowBitCase&) = delete;
  LowBitCase& operator=(const LowBitCase&) = delete;

  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales;
  LowBitMatrix matrix;
};

}  // namespace innerq
