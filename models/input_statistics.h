// InputCollector: what the inputs of a model's matrices are like while texts run.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/low_bit_weight.h"
#include "kernels/result.h"
#include "kernels/tensor.h"
#include "models/checkpoint.h"

namespace innerq {

// Magnitudes |x| counted in bins whose widths are a 128th of the power of two below them.
class MagnitudeHistogram {
 public:
  MagnitudeHistogram();
  void Add(std::span<const float> x);
  // The mean of (x - round(x))^2 for inputs rounded as `spec` says with the range `range`, all of a
  // bin taken for its middle.
  double RoundingError(const LowBitSpec& spec, double range) const;
  double largest() const;  // upper end of the last bin with an input; 0 if all are zero

 private:
  std::vector<int64_t> counts_;
};

// Of the inputs x [M, K] that a stack of matrices shares.
struct InputStatistics {
  int64_t rows = 0;  // M
  int64_t cols = 0;  // K
  Buffer gram;       // the lower triangle of X^T X [K][K], double, as AddGram has it
  MagnitudeHistogram magnitudes;

  const double* hessian() const { return reinterpret_cast<const double*>(gram.data()); }
  // Their root mean square: sigma of inputs.
  double sigma() const;
};

// The clip R = alpha * sigma of static activations, alpha with the least rounding error of the
// inputs, found by search. Errors: invalid argument for inputs that are all zero.
struct InputClip {
  double alpha = 0;
  float range = 0;  // R
};
Result<InputClip> LearnInputClip(const InputStatistics& inputs, const LowBitSpec& spec);

// Gathers the statistics of all layers' matrices. One thread.
class InputCollector {
 public:
  // Bytes that it takes: 4 K (K + 1) for each stack.
  static int64_t Bytes(const ModelConfig& config);
  // Errors: resource exhausted.
  static Result<std::unique_ptr<InputCollector>> Create(const ModelConfig& config, int threads);

  // To be LoadOptions::observe. A failure shows in Check.
  void Add(std::span<const std::string> matrices, ConstTensorView x);
  // Errors: the first of Add; invalid argument, with the name, for a matrix that has seen no inputs
  // or such as are not finite.
  Result<void> Check() const;
  // Of the inputs of matrix `name`, as in "<name>.weight". CHECK: it is one of a layer.
  const InputStatistics& Of(const std::string& name) const;

 private:
  explicit InputCollector(int threads) : threads_(threads) {}

  const int threads_;
  std::map<std::string, std::shared_ptr<InputStatistics>> of_;  // by matrix
  Result<void> status_;
};

}  // namespace innerq
