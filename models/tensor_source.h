// TensorSource: where a model's weights come from: a checkpoint, or a seeded generator.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "kernels/low_bit_weight.h"
#include "kernels/result.h"
#include "kernels/tensor.h"
#include "models/checkpoint.h"

namespace innerq {

// Hands out weights by their Hugging Face names. One thread.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  virtual bool Has(const std::string& name) const = 0;
  // The tensor in host memory: F32, F16 or BF16, valid until it is dropped or the source ends.
  // Errors: data loss, naming the tensor, if it is absent or has another shape.
  virtual Result<ConstTensorView> Get(const std::string& name, const Shape& shape) = 0;
  // Whether matrix `name` (as in "<name>.weight") is stored as codes.
  virtual bool HasLowBit(const std::string& name) const = 0;
  // Such a matrix, of `shape` [N, K], in host memory that is valid until the source ends. Errors:
  // as of Checkpoint::GetLowBit; data loss, naming tensor and row, for a scale that is negative,
  // not finite, or not what config.json says of scales.
  virtual Result<LowBitMatrix> GetLowBit(const std::string& name, const Shape& shape) = 0;
  // Says that the memory of a tensor, or of the codes of a matrix, is not needed any more.
  virtual void Drop(const std::string& name) = 0;
};

// The tensors of a checkpoint, which stays mapped as long as the source lives.
std::unique_ptr<TensorSource> CreateCheckpointSource(std::shared_ptr<const Checkpoint> checkpoint);

// BF16 tensors that depend on `seed` and their names alone: matrices [N, K] normal with deviation
// 1/sqrt(K), so that products keep the size of their input; vectors of ones where the name ends in
// "norm.weight"; biases normal with deviation 0.1. Matrices of layers and the head are codes, of
// the same deviation, where `config` says how. About a nanosecond an element.
std::unique_ptr<TensorSource> CreateRandomSource(uint64_t seed, const ModelConfig& config);

}  // namespace innerq
