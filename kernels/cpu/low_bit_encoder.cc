#include "kernels/cpu/low_bit_encoder.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "kernels/cpu/low_bit_clip.h"
#include "kernels/cpu/low_bit_hessian.h"
#include "kernels/cpu/thread_index.h"
#include "kernels/quant_group.h"

namespace innerq {
namespace {

constexpr int64_t kLanes = kFeedbackLanes;
constexpr int64_t kMaxColumns = 128;   // encoded together; the largest group but that of a row
constexpr double kLeastSigma = 1e-30;  // so small that F16 holds no clip, F32 its reciprocal

// One thread's.
struct EncodeScratch {
  std::vector<float> errors;  // [K][kLanes]: w - q
  std::vector<float> costs;   // [K]
  // Of the columns encoded together, [kMaxColumns][kLanes].
  std::vector<float> weights, targets, expected;
};

// Up to kLanes rows that are encoded with feedback, each in a lane.
struct FeedbackRows {
  int64_t first, count;
  const LowerTriangle<float>& feedback;
  EncodeScratch& scratch;
};

// Encodes one matrix, once.
class LowBitEncoder {
 public:
  explicit LowBitEncoder(const EncodeLowBitArgs& args);

  Result<EncodedLowBit> Encode();

 private:
  Result<void> CheckWeights() const;
  RoundingSums SumMatrix(double alpha);
  double LearnAlpha();
  double ShareOfZeros() const;
  double PruningThreshold() const;
  void FitGroup(int64_t n, int64_t group, const float* current, EncodeScratch& scratch);
  float EncodeWeight(int64_t n, int64_t k, float target);
  void EncodeRow(int64_t n, EncodeScratch& scratch);
  void EncodeRows(const FeedbackRows& rows);
  void FitColumns(const FeedbackRows& rows, int64_t begin, int64_t end);
  void EncodeColumns(const FeedbackRows& rows, int64_t begin, int64_t end);
  void MeasureError();

  const float* Row(int64_t n) const { return args_.weights + n * args_.cols; }
  int64_t GroupOf(int64_t n, int64_t k) const { return n * groups_ + k / group_size_; }
  std::span<const float> Group(const float* begin) const {
    return {begin, static_cast<size_t>(group_size_)};
  }
  // |w| / sigma of its group.
  float Magnitude(int64_t n, int64_t k) const {
    const double sigma = sigmas_[static_cast<size_t>(GroupOf(n, k))];
    return sigma < kLeastSigma ? 0 : static_cast<float>(std::fabs(Row(n)[k]) / sigma);
  }
  bool Pruned(int64_t n, int64_t k) const { return threshold_ > 0 && Magnitude(n, k) < threshold_; }
  // What errors of a row's weights cost: nothing where pruning forces them.
  const float* Costs(int64_t n, int64_t begin, int64_t end, std::vector<float>& costs) const;

  const EncodeLowBitArgs& args_;
  const LowBitSpec& spec_;
  const int64_t group_size_, groups_;
  std::vector<double> sigmas_;          // [N][groups]
  std::vector<float> costs_;            // [K]: the dampened diagonal of the Hessian, or ones
  std::vector<RoundingSums> row_sums_;  // [N]
  std::vector<EncodeScratch> scratch_;  // [threads]
  float threshold_ = 0;
  EncodedLowBit out_;
};

LowBitEncoder::LowBitEncoder(const EncodeLowBitArgs& args)
    : args_(args),
      spec_(args.spec),
      group_size_(spec_.group_size == 0 ? args.cols : spec_.group_size),
      groups_(spec_.Groups(args.cols)),
      sigmas_(static_cast<size_t>(args.rows * groups_)),
      costs_(static_cast<size_t>(args.cols), 1.0f),
      row_sums_(static_cast<size_t>(args.rows)),
      scratch_(static_cast<size_t>(args.threads)) {
  constexpr auto kBlock = static_cast<size_t>(kMaxColumns * kLanes);
  const auto cols = static_cast<size_t>(args.cols);
  for (EncodeScratch& scratch : scratch_) {
    scratch.costs.resize(cols);
    scratch.errors.resize(cols * kLanes);
    for (auto* block : {&scratch.weights, &scratch.targets, &scratch.expected}) {
      block->resize(kBlock);
    }
  }
  out_.codes.resize(static_cast<size_t>(args.rows * spec_.RowBytes(args.cols)));
  out_.scales.resize(static_cast<size_t>(args.rows * groups_));
}

Result<void> LowBitEncoder::CheckWeights() const {
  for (int64_t n = 0; n < args_.rows; ++n) {
    for (int64_t k = 0; k < args_.cols; ++k) {
      const float weight = Row(n)[k];
      if (std::fabs(weight) <= kMaxF16) continue;
      return InvalidArgument(
          "a low-bit weight must be finite and at most 65504 in magnitude: row " +
          std::to_string(n) + ", column " + std::to_string(k) + " is " + std::to_string(weight));
    }
  }
  return {};
}

const float* LowBitEncoder::Costs(int64_t n, int64_t begin, int64_t end,
                                  std::vector<float>& costs) const {
  if (threshold_ == 0) return costs_.data() + begin;
  for (int64_t k = begin; k < end; ++k) {
    costs[static_cast<size_t>(k - begin)] = Pruned(n, k) ? 0 : costs_[static_cast<size_t>(k)];
  }
  return costs.data();
}

// Of the whole matrix with T = alpha * sigma; in units of sigma^2, the error of (alpha / L)^2.
RoundingSums LowBitEncoder::SumMatrix(double alpha) {
#pragma omp parallel for num_threads(args_.threads) schedule(static)
  for (int64_t n = 0; n < args_.rows; ++n) {
    RoundingSums& total = row_sums_[static_cast<size_t>(n)] = {};
    std::vector<float>& scratch = scratch_[static_cast<size_t>(ThreadIndex())].costs;
    for (int64_t begin = 0; begin < args_.cols; begin += group_size_) {
      const double sigma = sigmas_[static_cast<size_t>(GroupOf(n, begin))];
      if (sigma < kLeastSigma) continue;
      const RoundingSums sums =
          SumRounding(spec_, Group(Row(n) + begin), Costs(n, begin, begin + group_size_, scratch),
                      static_cast<float>(alpha * sigma));
      total.product += sums.product * sigma * sigma;
      total.square += sums.square * sigma * sigma;
      total.error += sums.error * sigma * sigma;
    }
  }
  RoundingSums total;
  for (const RoundingSums& sums : row_sums_) {
    total.product += sums.product;
    total.square += sums.square;
    total.error += sums.error;
  }
  return total;
}

// Tries alphas in a wide range, then halves the interval around the best by the sign of the
// gradient of LSQ (arXiv 1902.08153), alpha * square - product: steps of gradient descent, or of
// least squares for fixed codes, hardly move where few weights are clipped.
double LowBitEncoder::LearnAlpha() {
  constexpr double kLowest = 0.5, kHighest = 2.5;  // of what is best for N(0, 1)
  constexpr double kRatio = 1.1;
  constexpr int kHalvings = 10;
  double best = NormalAlpha(spec_), least = std::numeric_limits<double>::infinity();
  const auto rises = [&](double alpha) {
    const RoundingSums sums = SumMatrix(alpha);
    const double error = sums.error * alpha * alpha;
    if (error < least) {
      least = error;
      best = alpha;
    }
    return sums.square > sums.product;
  };
  for (double start = kLowest; start < kHighest; start *= kRatio) rises(start * NormalAlpha(spec_));
  double low = best / kRatio, high = best * kRatio;
  for (int i = 0; i < kHalvings; ++i) {
    const double middle = (low + high) / 2;
    (rises(middle) ? high : low) = middle;
  }
  return best;
}

// Those that round to zero with T = alpha * sigma.
double LowBitEncoder::ShareOfZeros() const {
  const auto largest = static_cast<float>(out_.alpha * 0.5 / spec_.max_level());
  int64_t zeros = 0;
  for (int64_t n = 0; n < args_.rows; ++n) {
    for (int64_t k = 0; k < args_.cols; ++k) zeros += Magnitude(n, k) < largest;
  }
  return static_cast<double>(zeros) / static_cast<double>(args_.rows * args_.cols);
}

double LowBitEncoder::PruningThreshold() const {
  std::vector<float> magnitudes;
  magnitudes.reserve(static_cast<size_t>(args_.rows * args_.cols));
  for (int64_t n = 0; n < args_.rows; ++n) {
    for (int64_t k = 0; k < args_.cols; ++k) magnitudes.push_back(Magnitude(n, k));
  }
  const auto count = static_cast<double>(magnitudes.size());
  const auto at = std::min(static_cast<int64_t>(std::lround(args_.prune * count)),
                           static_cast<int64_t>(magnitudes.size()) - 1);
  std::nth_element(magnitudes.begin(), magnitudes.begin() + at, magnitudes.end());
  return magnitudes[static_cast<size_t>(at)];
}

void LowBitEncoder::FitGroup(int64_t n, int64_t group, const float* current,
                             EncodeScratch& scratch) {
  const int64_t begin = group * group_size_;
  const float* costs = Costs(n, begin, begin + group_size_, scratch.costs);
  out_.scales[static_cast<size_t>(n * groups_ + group)] =
      args_.scale == LowBitScale::kPow2 ? FitPow2Clip(spec_, Group(current), costs)
                                        : FitClip(spec_, out_.alpha, Group(current), costs);
}

// Returns what the code stands for.
float LowBitEncoder::EncodeWeight(int64_t n, int64_t k, float target) {
  const float clip = F16ToF32(out_.scales[static_cast<size_t>(GroupOf(n, k))]);
  const bool zero = clip == 0 || Pruned(n, k);
  const int code = NearestLowBitCode(spec_, zero ? 0 : target / clip);
  WriteLowBitCode(out_.codes.data() + n * spec_.RowBytes(args_.cols), spec_.bits, k, code);
  return clip * static_cast<float>(spec_.Level(code)) / static_cast<float>(spec_.max_level());
}

void LowBitEncoder::EncodeRow(int64_t n, EncodeScratch& scratch) {
  for (int64_t g = 0; g < groups_; ++g) FitGroup(n, g, Row(n) + g * group_size_, scratch);
  for (int64_t k = 0; k < args_.cols; ++k) EncodeWeight(n, k, Row(n)[k]);
}

void LowBitEncoder::EncodeRows(const FeedbackRows& rows) {
  const bool whole = spec_.group_size == 0;
  for (int64_t l = 0; whole && l < rows.count; ++l) {
    FitGroup(rows.first + l, 0, Row(rows.first + l), rows.scratch);
  }
  const int64_t columns = whole ? kMaxColumns : group_size_;
  for (int64_t begin = 0; begin < args_.cols; begin += columns) {
    const int64_t end = std::min(begin + columns, args_.cols);
    for (int64_t k = begin; k < end; ++k) {
      float* weights = rows.scratch.weights.data() + (k - begin) * kLanes;
      for (int64_t l = 0; l < kLanes; ++l) weights[l] = l < rows.count ? Row(rows.first + l)[k] : 0;
      float* targets = rows.scratch.targets.data() + (k - begin) * kLanes;
      std::copy_n(weights, kLanes, targets);
      AddLaneSums(rows.feedback.Row(k), rows.scratch.errors.data(), begin, targets);
    }
    if (!whole) FitColumns(rows, begin, end);
    EncodeColumns(rows, begin, end);
  }
}

// Fits T of a group to what its columns will aim at if each is met exactly: what the columns before
// the group left is then taken up in full.
void LowBitEncoder::FitColumns(const FeedbackRows& rows, int64_t begin, int64_t end) {
  const float* weights = rows.scratch.weights.data();
  float* expected = rows.scratch.expected.data();  // w - q, were q the target
  for (int64_t k = begin; k < end; ++k) {
    const int64_t at = (k - begin) * kLanes;
    float target[kLanes];
    std::copy_n(rows.scratch.targets.data() + at, kLanes, target);
    AddLaneSums(rows.feedback.Row(k) + begin, expected, k - begin, target);
    for (int64_t l = 0; l < kLanes; ++l) expected[at + l] = weights[at + l] - target[l];
  }
  for (int64_t l = 0; l < rows.count; ++l) {
    float current[kMaxColumns];
    for (int64_t k = 0; k < end - begin; ++k) {
      current[k] = weights[k * kLanes + l] - expected[k * kLanes + l];
    }
    FitGroup(rows.first + l, begin / group_size_, current, rows.scratch);
  }
}

void LowBitEncoder::EncodeColumns(const FeedbackRows& rows, int64_t begin, int64_t end) {
  float* of_begin = rows.scratch.errors.data() + begin * kLanes;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t at = (k - begin) * kLanes;
    const float* weights = rows.scratch.weights.data() + at;
    float* targets = rows.scratch.targets.data() + at;
    AddLaneSums(rows.feedback.Row(k) + begin, of_begin, k - begin, targets);
    for (int64_t l = 0; l < kLanes; ++l) {
      const float error =
          l < rows.count ? weights[l] - EncodeWeight(rows.first + l, k, targets[l]) : 0;
      of_begin[at + l] = error;
    }
  }
}

// Also counts zeros.
void LowBitEncoder::MeasureError() {
  const int64_t blocks = (args_.rows + kLanes - 1) / kLanes;
  std::optional<ScaledHessian> hessian;
  if (args_.hessian != nullptr) hessian = ScaleHessian(args_.hessian, args_.cols);
  struct BlockCosts {
    double of_errors[kLanes] = {}, of_weights[kLanes] = {};
    int64_t zeros = 0;
  };
  std::vector<BlockCosts> costs(static_cast<size_t>(blocks));
  const LowBitMatrix matrix{spec_, args_.rows, args_.cols, out_.codes.data(), out_.scales.data()};
#pragma omp parallel for num_threads(args_.threads) schedule(dynamic, 1)
  for (int64_t block = 0; block < blocks; ++block) {
    BlockCosts& cost = costs[static_cast<size_t>(block)];
    std::vector<float>& lanes = scratch_[static_cast<size_t>(ThreadIndex())].errors;
    const auto measure = [&](auto value, double* sums) {
      for (int64_t k = 0; k < args_.cols; ++k) {
        for (int64_t l = 0; l < kLanes; ++l) {
          const int64_t n = block * kLanes + l;
          const float x = n < args_.rows ? value(n, k) : 0;
          if (!hessian.has_value()) sums[l] += static_cast<double>(x) * x;
          lanes[static_cast<size_t>(k * kLanes + l)] = x;
        }
      }
      if (hessian.has_value()) AddCosts(*hessian, args_.cols, lanes.data(), sums);
    };
    measure([&](int64_t n, int64_t k) { return Row(n)[k]; }, cost.of_weights);
    measure(
        [&](int64_t n, int64_t k) {
          const float value = matrix.Value(n, k);
          cost.zeros += value == 0;
          return Row(n)[k] - value;
        },
        cost.of_errors);
  }
  double of_errors = 0, of_weights = 0;
  int64_t zeros = 0;
  for (const BlockCosts& cost : costs) {
    for (const double sum : cost.of_errors) of_errors += sum;
    for (const double sum : cost.of_weights) of_weights += sum;
    zeros += cost.zeros;
  }
  out_.error = of_weights > 0 ? std::max(of_errors, 0.0) / of_weights : 0;
  out_.zeros = static_cast<double>(zeros) / static_cast<double>(args_.rows * args_.cols);
}

Result<EncodedLowBit> LowBitEncoder::Encode() {
  RETURN_IF_ERROR(CheckWeights());
  std::optional<FeedbackFactor> own;
  const FeedbackFactor* factor = args_.factor;
  if (args_.hessian != nullptr && factor == nullptr) {
    ASSIGN_OR_RETURN(own, FactorHessian(args_.hessian, args_.cols, args_.threads));
    factor = &*own;
  }
  if (factor != nullptr) costs_ = factor->diagonal;
  for (int64_t g = 0; g < args_.rows * groups_; ++g) {
    sigmas_[static_cast<size_t>(g)] = Sigma(Group(args_.weights + g * group_size_));
  }
  out_.alpha = LearnAlpha();
  // With scales that are powers of two, alpha does not tell what rounds to zero.
  if (args_.prune > 0 && (args_.scale == LowBitScale::kPow2 || ShareOfZeros() < args_.prune)) {
    out_.threshold = PruningThreshold();
    threshold_ = static_cast<float>(out_.threshold);
    out_.alpha = LearnAlpha();
  }
  const int64_t step = factor != nullptr ? kLanes : 1;
#pragma omp parallel for num_threads(args_.threads) schedule(dynamic, 1)
  for (int64_t n = 0; n < args_.rows; n += step) {
    EncodeScratch& scratch = scratch_[static_cast<size_t>(ThreadIndex())];
    if (factor != nullptr) {
      EncodeRows({n, std::min(kLanes, args_.rows - n), factor->feedback, scratch});
    } else {
      EncodeRow(n, scratch);
    }
  }
  own.reset();
  MeasureError();
  return std::move(out_);
}

}  // namespace

Result<EncodedLowBit> EncodeLowBit(const EncodeLowBitArgs& args) {
  CHECK(args.spec.valid() && args.rows > 0 && args.cols > 0 && args.spec.Divides(args.cols),
        "a low-bit matrix that its spec cannot hold");
  CHECK(args.factor == nullptr ||
            (args.hessian != nullptr && std::ssize(args.factor->diagonal) == args.cols),
        "a factor of no Hessian, or of another size");
  CHECK(args.threads > 0 && args.prune >= 0 && args.prune < 1, "no such threads or pruning");
  try {
    return LowBitEncoder(args).Encode();
  } catch (const std::bad_alloc&) {
    return Error{ErrorCode::kResourceExhausted, "not enough memory to encode low-bit weights of " +
                                                    std::to_string(args.rows) + " rows and " +
                                                    std::to_string(args.cols) + " columns"};
  }
}

int64_t EncodeLowBitBytes(const EncodeLowBitArgs& args, bool has_hessian) {
  constexpr int64_t kFloat = sizeof(float);
  const int64_t rows = args.rows, cols = args.cols, groups = rows * args.spec.Groups(cols);
  const auto of_group = static_cast<int64_t>(sizeof(double) + sizeof(uint16_t));
  const int64_t result = rows * args.spec.RowBytes(cols) + groups * of_group;  // and sigmas
  const int64_t of_row = rows * static_cast<int64_t>(sizeof(RoundingSums) + 2 * sizeof(double));
  const int64_t of_thread = kFloat * (cols * (kLanes + 1) + 3 * kMaxColumns * kLanes);
  const int64_t magnitudes = args.prune > 0 ? kFloat * rows * cols : 0;
  const int64_t scaled_hessian = has_hessian ? kFloat * cols * (cols + 1) / 2 : 0;
  return result + of_row + args.threads * of_thread + kFloat * cols +
         std::max(magnitudes, scaled_hessian);
}

}  // namespace innerq
