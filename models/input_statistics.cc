#include "models/input_statistics.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/cpu/gram.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/cpu/lower_triangle.h"
#include "models/layer_tensors.h"

namespace innerq {
namespace {

// A bin is what the upper bits of an F32 without its sign say: exponent and 7 bits of fraction.
constexpr int kDroppedBits = 16;
constexpr size_t kBins = size_t{1} << (31 - kDroppedBits);

double BinEnd(size_t bin) {
  return std::bit_cast<float>(static_cast<uint32_t>(bin << kDroppedBits));
}
double BinMiddle(size_t bin) { return bin == 0 ? 0 : (BinEnd(bin) + BinEnd(bin + 1)) / 2; }

int64_t GramBytes(int64_t cols) {
  return TriangleElements(cols) * static_cast<int64_t>(sizeof(double));
}

}  // namespace

MagnitudeHistogram::MagnitudeHistogram() : counts_(kBins) {}

void MagnitudeHistogram::Add(std::span<const float> x) {
  for (const float value : x) {
    ++counts_[(std::bit_cast<uint32_t>(value) & 0x7fffffffu) >> kDroppedBits];
  }
}

double MagnitudeHistogram::RoundingError(const LowBitSpec& spec, double range) const {
  const double step = range / spec.max_activation();
  double error = 0;
  int64_t total = 0;
  for (size_t bin = 0; bin < kBins; ++bin) {
    if (counts_[bin] == 0) continue;
    const double x = BinMiddle(bin);
    const double rounded = step * std::min<double>(std::nearbyint(x / step), spec.max_activation());
    error += static_cast<double>(counts_[bin]) * (x - rounded) * (x - rounded);
    total += counts_[bin];
  }
  return error / static_cast<double>(std::max<int64_t>(total, 1));
}

double MagnitudeHistogram::largest() const {
  for (size_t bin = kBins; bin-- > 1;) {
    if (counts_[bin] > 0) return BinEnd(bin + 1);
  }
  return 0;
}

double InputStatistics::sigma() const {
  double squares = 0;
  for (int64_t i = 0; i < cols; ++i) squares += hessian()[TriangleElements(i) + i];
  return std::sqrt(squares / static_cast<double>(std::max<int64_t>(rows * cols, 1)));
}

Result<InputClip> LearnInputClip(const InputStatistics& inputs, const LowBitSpec& spec) {
  constexpr double kFirst = 0.25;  // times sigma
  constexpr double kRatio = 1.02;  // of one alpha to the next
  const double sigma = inputs.sigma();
  // A clip that F32 rounds to zero is none.
  if (!(sigma * kFirst > std::numeric_limits<float>::min())) {
    return InvalidArgument("all inputs are zero in the calibration texts");
  }
  const double last = inputs.magnitudes.largest() / sigma * kRatio;
  InputClip best;
  double least = std::numeric_limits<double>::infinity();
  for (double alpha = kFirst; alpha < std::max(last, kFirst * kRatio); alpha *= kRatio) {
    const double error = inputs.magnitudes.RoundingError(spec, alpha * sigma);
    if (error >= least) continue;
    least = error;
    best = {alpha, static_cast<float>(alpha * sigma)};
  }
  return best;
}

int64_t InputCollector::Bytes(const ModelConfig& config) {
  int64_t bytes = 0;
  for (const Stack& stack : LayerStacks(config)) bytes += GramBytes(stack.cols);
  return bytes;
}

Result<std::unique_ptr<InputCollector>> InputCollector::Create(const ModelConfig& config,
                                                               int threads) {
  std::unique_ptr<InputCollector> collector(new InputCollector(threads));
  for (const Stack& stack : LayerStacks(config)) {
    const auto inputs = std::make_shared<InputStatistics>();
    inputs->cols = stack.cols;
    ASSIGN_OR_RETURN(inputs->gram, AllocateHost(GramBytes(stack.cols)));
    for (const Part& part : stack.parts) collector->of_[part.name] = inputs;
  }
  return collector;
}

void InputCollector::Add(std::span<const std::string> matrices, ConstTensorView x) {
  if (!status_.ok()) return;
  const auto found = of_.find(matrices.front());
  CHECK(found != of_.end(), "matrix " + matrices.front() + " is in no layer");
  InputStatistics& inputs = *found->second;
  CHECK(x.dtype == DType::kF32 && x.shape.rank() == 2 && x.shape[1] == inputs.cols,
        "inputs of " + matrices.front());
  inputs.rows += x.shape[0];
  inputs.magnitudes.Add({x.As<float>(), static_cast<size_t>(x.shape.num_elements())});
  status_ = AddGram({.x = x.As<float>(),
                     .rows = x.shape[0],
                     .cols = inputs.cols,
                     .threads = threads_,
                     .gram = reinterpret_cast<double*>(inputs.gram.data())});
}

Result<void> InputCollector::Check() const {
  RETURN_IF_ERROR(status_);
  for (const auto& [name, inputs] : of_) {
    if (inputs->rows == 0) return InvalidArgument(name + ": no inputs were seen");
    if (!std::isfinite(inputs->sigma())) {
      return InvalidArgument(name + ": inputs are not finite in the calibration texts");
    }
  }
  return {};
}

const InputStatistics& InputCollector::Of(const std::string& name) const {
  const auto found = of_.find(name);
  CHECK(found != of_.end(), "matrix " + name + " is in no layer");
  return *found->second;
}

}  // namespace innerq
