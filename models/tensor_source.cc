#include "models/tensor_source.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <unordered_map>

#include "kernels/float16.h"
#include "models/fnv1a.h"

namespace innerq {
namespace {

class CheckpointSource : public TensorSource {
 public:
  explicit CheckpointSource(std::shared_ptr<const Checkpoint> checkpoint)
      : checkpoint_(std::move(checkpoint)) {}

  bool Has(const std::string& name) const override { return checkpoint_->Has(name); }

  Result<ConstTensorView> Get(const std::string& name, const Shape& shape) override {
    return checkpoint_->Get(name, shape);
  }

  bool HasLowBit(const std::string& name) const override { return checkpoint_->HasLowBit(name); }

  Result<LowBitMatrix> GetLowBit(const std::string& name, const Shape& shape) override {
    ASSIGN_OR_RETURN(const LowBitMatrix matrix, checkpoint_->GetLowBit(name, shape));
    const bool pow2 = checkpoint_->config().low_bit_scale == LowBitScale::kPow2;
    const int64_t groups = matrix.spec.Groups(matrix.cols);
    for (int64_t i = 0; i < matrix.rows * groups; ++i) {
      const float scale = F16ToF32(matrix.scales[i]);
      const bool possible = scale >= 0 && std::isfinite(scale);
      if (possible && (!pow2 || IsPowerOfTwoScale(matrix.scales[i]))) continue;
      std::string text(32, '\0');  // the shortest that reads back; scales may be small
      text.resize(static_cast<size_t>(
          std::to_chars(text.data(), text.data() + text.size(), scale).ptr - text.data()));
      return Error{ErrorCode::kDataLoss,
                   checkpoint_->directory().string() + ": tensor " + name + ".weight_scales: row " +
                       std::to_string(i / groups) + ": expected " +
                       (possible ? "powers of two or zero, as quantization_config.scale says"
                                 : "finite scales that are not negative") +
                       ", found " + text};
    }
    return matrix;
  }

  void Drop(const std::string& /*name*/) override {}  // mapped pages go when memory is short

 private:
  std::shared_ptr<const Checkpoint> checkpoint_;
};

// A hash of a counter (Steele, Lea and Flood 2014, "splitmix64").
uint64_t HashCounter(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t HashName(const std::string& name) {
  Fnv1a hash;
  hash.Add(std::as_bytes(std::span(name)));
  return hash.value();
}

class RandomSource : public TensorSource {
 public:
  RandomSource(uint64_t seed, const ModelConfig& config) : seed_(seed), config_(config) {
    for (size_t i = 0; i < kQuantiles; ++i) {
      normal_[i] = Quantile((static_cast<double>(i) + 0.5) / kQuantiles);
    }
  }

  bool Has(const std::string& /*name*/) const override { return true; }

  Result<ConstTensorView> Get(const std::string& name, const Shape& shape) override {
    std::unique_ptr<uint16_t[]>& tensor = tensors_[name];
    if (tensor == nullptr) {
      tensor =
          std::make_unique_for_overwrite<uint16_t[]>(static_cast<size_t>(shape.num_elements()));
      Fill(name, shape, tensor.get());
    }
    return ConstTensorView{reinterpret_cast<const std::byte*>(tensor.get()), DType::kBF16, shape};
  }

  bool HasLowBit(const std::string& name) const override {
    const bool may_be_coded = name == kHeadName || name.ends_with("_proj");
    return may_be_coded && config_.LowBitOf(name).has_value();
  }

  Result<LowBitMatrix> GetLowBit(const std::string& name, const Shape& shape) override {
    CHECK(HasLowBit(name), "no codes for such a matrix");
    const LowBitSpec& spec = *config_.LowBitOf(name);
    CHECK(spec.Divides(shape[1]), "no codes for such a matrix");
    Codes& matrix = codes_[name];
    if (matrix.codes.empty()) matrix = RandomCodes(name, spec, shape);
    return LowBitMatrix{spec, shape[0], shape[1], matrix.codes.data(), matrix.scales.data()};
  }

  void Drop(const std::string& name) override {
    tensors_.erase(name);
    codes_.erase(name);
  }

 private:
  static constexpr size_t kQuantiles = 4096;

  struct Codes {
    std::vector<uint8_t> codes;
    std::vector<uint16_t> scales;
  };

  // All codes alike, and scales that make up for how large their levels are.
  Codes RandomCodes(const std::string& name, const LowBitSpec& spec, const Shape& shape) const {
    double squares = 0;
    for (int code = 0; code < 1 << spec.bits; ++code) {
      squares += std::pow(static_cast<double>(spec.Level(code)) / spec.max_level(), 2);
    }
    const double level = std::sqrt(squares / (1 << spec.bits));
    const double clip = 1.0 / std::sqrt(static_cast<double>(shape[1])) / level;
    Codes matrix;
    matrix.scales.assign(static_cast<size_t>(shape[0] * spec.Groups(shape[1])),
                         F32ToF16(static_cast<float>(clip)));
    matrix.codes.resize(static_cast<size_t>(shape[0] * spec.RowBytes(shape[1])));
    const uint64_t stream = HashCounter(seed_ ^ HashName(name));
    for (size_t i = 0; i < matrix.codes.size(); i += sizeof(uint64_t)) {
      const uint64_t random = HashCounter(stream + i);
      std::memcpy(matrix.codes.data() + i, &random,
                  std::min(sizeof(random), matrix.codes.size() - i));
    }
    return matrix;
  }

  // The x below which the standard normal distribution has probability p, by bisection.
  static double Quantile(double p) {
    double low = -8.0, high = 8.0;
    for (int i = 0; i < 50; ++i) {
      const double middle = (low + high) / 2;
      (0.5 * std::erfc(-middle / std::sqrt(2.0)) < p ? low : high) = middle;
    }
    return low;
  }

  void Fill(const std::string& name, const Shape& shape, uint16_t* out) const {
    const int64_t count = shape.num_elements();
    if (name.ends_with("norm.weight")) {
      std::fill(out, out + count, F32ToBF16(1.0f));
      return;
    }
    const double deviation =
        shape.rank() == 2 ? 1.0 / std::sqrt(static_cast<double>(shape[1])) : 0.1;
    std::array<uint16_t, kQuantiles> values;
    for (size_t i = 0; i < kQuantiles; ++i) {
      values[i] = F32ToBF16(static_cast<float>(normal_[i] * deviation));
    }
    const uint64_t stream = HashCounter(seed_ ^ HashName(name));
    for (int64_t i = 0; i < count; i += 4) {
      uint64_t random = HashCounter(stream + static_cast<uint64_t>(i));
      for (int64_t j = i; j < std::min(i + 4, count); ++j) {
        out[j] = values[random % kQuantiles];
        random >>= 16;
      }
    }
  }

  uint64_t seed_;
  const ModelConfig config_;
  std::array<double, kQuantiles> normal_{};
  std::unordered_map<std::string, std::unique_ptr<uint16_t[]>> tensors_;
  std::unordered_map<std::string, Codes> codes_;
};

}  // namespace

std::unique_ptr<TensorSource> CreateCheckpointSource(std::shared_ptr<const Checkpoint> checkpoint) {
  return std::make_unique<CheckpointSource>(std::move(checkpoint));
}

std::unique_ptr<TensorSource> CreateRandomSource(uint64_t seed, const ModelConfig& config) {
  return std::make_unique<RandomSource>(seed, config);
}

}  // namespace innerq
