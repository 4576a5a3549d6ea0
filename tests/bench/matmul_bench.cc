// Speed of MatMul beside its two floors, in one run: the bandwidth of a plain loop that reads
// memory (few rows), and oneDNN alone on the same shape (many rows).
//
//   matmul_bench [Google Benchmark's options]; on all cores this process may use
//
// read_share   weight bytes per second / bytes per second of the reading loop, fastest run of each
// x_bf16       time of a BF16 weight of the same shape / ours, medians
// dnnl_share   our rate / oneDNN's rate, above 1 where ours is higher, medians
// On a machine that is not idle, set OMP_PROC_BIND=true, or both threads may land on one core.
// Weights rotate through at least 1 GiB, or 256 MiB if they are low-bit, so that they come from
// memory as a model's do.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels/backend.h"
#include "kernels/float16.h"
#include "tests/bench/floors.h"
#include "tests/kernels/low_bit_case.h"

namespace innerq {
namespace {

constexpr int64_t kRotatedBytes = int64_t{1} << 30;
constexpr int64_t kLowBitRotatedBytes = int64_t{1} << 28;

int Threads() { return static_cast<int>(std::thread::hardware_concurrency()); }

// A backend of the variant with so high a rank, from the best; null if there is none.
std::unique_ptr<Backend> MakeBackend(size_t rank, int64_t m, int64_t k) {
  if (rank >= CpuVariants().size()) return nullptr;
  Result<std::unique_ptr<Backend>> created = CreateBackend({.variant = CpuVariants()[rank]});
  if (!created.ok() || !(*created)->Reserve({.max_rows = m, .max_features = k}).ok())
    return nullptr;
  return std::move(*created);
}

// Weights of one shape, so many bytes of them.
std::vector<Weight> Rotate(int64_t rotated_bytes, const std::function<Weight()>& make) {
  std::vector<Weight> weights;
  for (int64_t bytes = 0; bytes < rotated_bytes; bytes += weights.back().data.bytes()) {
    weights.push_back(make());
  }
  return weights;
}

std::vector<Weight> Bf16Weights(Backend& backend, int64_t n, int64_t k) {
  std::vector<uint16_t> values(static_cast<size_t>(n * k));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = F32ToBF16(static_cast<float>(i * 2654435761u % 2048) / 1024.0f - 1.0f);
  }
  const ConstTensorView part{reinterpret_cast<const std::byte*>(values.data()), DType::kBF16,
                             Shape{n, k}};
  return Rotate(kRotatedBytes, [&] {
    return backend.PackWeight({&part, 1}, {}, WeightFormat::kBF16).value();
  });
}

std::vector<Weight> LowBitWeights(Backend& backend, int64_t n, int64_t k, const LowBitSpec& spec) {
  std::mt19937_64 random(1);
  const LowBitCase c(random, spec, n, k);
  return Rotate(kLowBitRotatedBytes, [&] {
    return backend.PackLowBitWeight({&c.matrix, 1}, {}).value();
  });
}

// Products of m rows with one weight after the other.
class Products {
 public:
  Products(Backend& backend, int64_t m, std::vector<Weight> weights)
      : backend_(backend), weights_(std::move(weights)) {
    const int64_t n = weights_[0].rows, k = weights_[0].cols;
    inputs_ = backend.Allocate(m * k * 4).value();
    outputs_ = backend.Allocate(m * n * 4).value();
    x_ = inputs_.View(DType::kF32, Shape{m, k});
    out_ = outputs_.View(DType::kF32, Shape{m, n});
    for (int64_t i = 0; i < m * k; ++i) x_.As<float>()[i] = static_cast<float>(i % 113) - 56.0f;
  }
  // Of the next product.
  double Seconds() {
    const auto begin = std::chrono::steady_clock::now();
    backend_.MatMul({.x = x_, .weight = &weights_[next_++ % weights_.size()], .out = out_});
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  double weight_bytes() const { return static_cast<double>(weights_[0].data.bytes()); }

 private:
  Backend& backend_;
  std::vector<Weight> weights_;
  Buffer inputs_, outputs_;
  TensorView x_, out_;
  size_t next_ = 0;
};

double MeasuredReadBandwidth() {
  static const double bandwidth = ReadBandwidth(Threads());
  return bandwidth;
}

// BF16 weights. Arguments: M, K, N, rank of the CPU variant from the best.
void MatMul(benchmark::State& state) {
  const int64_t m = state.range(0), k = state.range(1), n = state.range(2);
  const auto rank = static_cast<size_t>(state.range(3));
  const std::unique_ptr<Backend> backend = MakeBackend(rank, m, k);
  if (backend == nullptr) {
    state.SkipWithError("no such variant, or no memory for it");
    return;
  }
  Products products(*backend, m, Bf16Weights(*backend, n, k));
  const double dnnl_seconds = m < 64 ? 0 : DnnlBf16Seconds(m, n, k, Threads());
  std::vector<double> seconds;
  for (auto _ : state) {
    seconds.push_back(products.Seconds());
    state.SetIterationTime(seconds.back());
  }
  const double median = Median(seconds);
  state.SetLabel(CpuVariants()[rank]);
  state.counters["GFLOP/s"] = 2e-9 * static_cast<double>(m * n * k) / median;
  if (m < 64) {
    state.counters["read_GB/s"] = MeasuredReadBandwidth() * 1e-9;
    state.counters["read_share"] =
        products.weight_bytes() / Fastest(seconds) / MeasuredReadBandwidth();
  } else {
    state.counters["dnnl_share"] = dnnl_seconds / median;
  }
}

// Low-bit weights beside BF16 ones, in turn. Arguments: M, bits, activation bits, rank.
void LowBitMatMul(benchmark::State& state) {
  constexpr int64_t kInputs = 2048, kOutputs = 16384;
  const int64_t m = state.range(0);
  const auto rank = static_cast<size_t>(state.range(3));
  const auto bits = static_cast<int>(state.range(1));
  const LowBitSpec spec{bits == 8 ? LowBitScheme::kUniform : LowBitScheme::kPow2, bits, 64,
                        static_cast<int>(state.range(2))};
  const std::unique_ptr<Backend> backend = MakeBackend(rank, m, kInputs);
  if (backend == nullptr) {
    state.SkipWithError("no such variant, or no memory for it");
    return;
  }
  Products low_bit(*backend, m, LowBitWeights(*backend, kOutputs, kInputs, spec));
  Products bf16(*backend, m, Bf16Weights(*backend, kOutputs, kInputs));
  std::vector<double> seconds, bf16_seconds;
  for (auto _ : state) {
    bf16_seconds.push_back(bf16.Seconds());
    seconds.push_back(low_bit.Seconds());
    state.SetIterationTime(seconds.back());
  }
  state.SetLabel(CpuVariants()[rank]);
  state.counters["x_bf16"] = Median(bf16_seconds) / Median(seconds);
  state.counters["read_share"] =
      low_bit.weight_bytes() / Fastest(seconds) / MeasuredReadBandwidth();
}

void Shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"M", "K", "N", "variant"})->UseManualTime()->Unit(benchmark::kMicrosecond);
  bench->MinTime(0.3);
  constexpr int64_t kShapes[][2] = {
      {2048, 3072}, {2048, 2048}, {2048, 16384}, {8192, 2048}, {2048, 32000}};
  for (const auto& [k, n] : kShapes) {
    for (int64_t m : {1, 4, 16, 512}) bench->Args({m, k, n, 0});
  }
  for (int64_t variant : {1, 2, 3}) {
    for (int64_t m : {1, 16, 512}) bench->Args({m, 2048, 3072, variant});
  }
}
BENCHMARK(MatMul)->Apply(Shapes);

void LowBitShapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"M", "bits", "activations", "variant"});
  bench->UseManualTime()->Unit(benchmark::kMicrosecond)->MinTime(0.3);
  for (int64_t variant = 0; variant < 3; ++variant) {
    for (int64_t bits : {2, 3, 4, 8}) {
      for (int64_t activations : {8, 16}) {
        for (int64_t m : {1, 4, 16, 512}) bench->Args({m, bits, activations, variant});
      }
    }
  }
}
BENCHMARK(LowBitMatMul)->Apply(LowBitShapes);

}  // namespace
}  // namespace innerq

BENCHMARK_MAIN();
