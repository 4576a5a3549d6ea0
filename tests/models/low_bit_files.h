// Checkpoints of low-bit codes, for tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/float16.h"
#include "kernels/low_bit_weight.h"
#include "kernels/tensor.h"
#include "tests/models/test_files.h"

namespace innerq {

// How matrices are coded, "head" of "quantization_config".
inline nlohmann::json LowBitConfig(const LowBitSpec& spec) {
  return {{"scheme", LowBitSchemeName(spec.scheme)},
          {"bits", spec.bits},
          {"group_size", spec.group_size},
          {"activation_bits", spec.activation_bits}};
}
// "quantization_config" of config.json.
inline nlohmann::json QuantizationConfig(const LowBitSpec& spec) {
  nlohmann::json config = LowBitConfig(spec);
  config["quant_method"] = "sigma";
  return config;
}

// A matrix [N, K] as codes: T is three standard deviations of a group.
struct StoredCodes {
  StoredTensor codes, scales;
  StoredTensor decoded;  // "<name>.weight", F32
};
inline StoredCodes StoreCodes(const LowBitSpec& spec, const StoredTensor& matrix) {
  const int64_t rows = matrix.shape[0], cols = matrix.shape[1], groups = spec.Groups(cols);
  const int64_t size = cols / groups;
  const DType dtype = matrix.dtype == "F32"   ? DType::kF32
                      : matrix.dtype == "F16" ? DType::kF16
                                              : DType::kBF16;
  const ConstTensorView view{reinterpret_cast<const std::byte*>(matrix.bytes.data()), dtype,
                             Shape{rows, cols}};
  std::vector<uint8_t> codes(static_cast<size_t>(rows * spec.RowBytes(cols)));
  std::vector<uint16_t> scales;
  for (int64_t begin = 0; begin < rows * cols; begin += size) {
    double sum = 0, squares = 0;
    for (int64_t i = begin; i < begin + size; ++i) {
      const double w = ElementAsFloat(view, i);
      sum += w;
      squares += w * w;
    }
    const double mean = sum / static_cast<double>(size);
    const double sigma =
        std::sqrt(std::max(squares / static_cast<double>(size) - mean * mean, 0.0));
    scales.push_back(F32ToF16(static_cast<float>(3 * sigma)));
    const float clip = F16ToF32(scales.back());
    for (int64_t i = begin; i < begin + size; ++i) {
      const int code = NearestLowBitCode(spec, clip > 0 ? ElementAsFloat(view, i) / clip : 0);
      WriteLowBitCode(codes.data(), spec.bits, i, code);
    }
  }
  LowBitMatrix read{.spec = spec, .rows = rows, .cols = cols};
  read.codes = codes.data();
  read.scales = scales.data();
  std::vector<float> values;
  for (int64_t i = 0; i < rows * cols; ++i) values.push_back(read.Value(i / cols, i % cols));

  const std::string name = matrix.name.substr(0, matrix.name.rfind(".weight"));
  const auto bytes = [](const auto& of) {
    return std::string(reinterpret_cast<const char*>(of.data()), of.size() * sizeof(of[0]));
  };
  return {{name + ".weight_codes", {rows, spec.RowBytes(cols)}, bytes(codes), "U8"},
          {name + ".weight_scales", {rows, groups}, bytes(scales), "F16"},
          {name + ".weight", {rows, cols}, bytes(values), "F32"}};
}

// A model's tensors with the matrices of its layers as codes, and with those decoded.
struct LowBitTensors {
  std::vector<StoredTensor> coded, decoded;
};
inline LowBitTensors StoreLayersAsCodes(const LowBitSpec& spec,
                                        const std::vector<StoredTensor>& tensors) {
  LowBitTensors stored;
  for (const StoredTensor& tensor : tensors) {
    if (!tensor.name.ends_with("_proj.weight")) {
      stored.coded.push_back(tensor);
      stored.decoded.push_back(tensor);
      continue;
    }
    StoredCodes codes = StoreCodes(spec, tensor);
    stored.coded.push_back(std::move(codes.codes));
    stored.coded.push_back(std::move(codes.scales));
    stored.decoded.push_back(std::move(codes.decoded));
  }
  // The largest elements first: every tensor must be aligned to its own.
  for (auto* all : {&stored.coded, &stored.decoded}) {
    std::stable_sort(all->begin(), all->end(), [](const StoredTensor& a, const StoredTensor& b) {
      return (a.dtype == "F32") > (b.dtype == "F32");
    });
  }
  return stored;
}

}  // namespace innerq
