// Speed of MatMul beside its two floors, in one run: the bandwidth of a plain loop that reads
// memory (few rows), and oneDNN alone on the same shape (many rows).
//
//   matmul_bench [Google Benchmark's options]; on all cores this process may use
//
// read_share   weight bytes per second / bytes per second of the reading loop, fastest run of each
// dnnl_share   our rate / oneDNN's rate, above 1 where ours is higher, medians
// On a machine that is not idle, set OMP_PROC_BIND=true, or both threads may land on one core.
// Weights rotate through at least 1 GiB, so that they come from memory as a model's do.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/backend.h"
#include "kernels/float16.h"
#include "tests/bench/floors.h"

namespace innerq {
namespace {

constexpr int64_t kRotatedBytes = int64_t{1} << 30;

int Threads() { return static_cast<int>(std::thread::hardware_concurrency()); }

// One product on rotating weights. Arguments: M, K, N, rank of the CPU variant from the best.
void MatMul(benchmark::State& state) {
  const int64_t m = state.range(0), k = state.range(1), n = state.range(2);
  const size_t rank = static_cast<size_t>(state.range(3));
  if (rank >= CpuVariants().size()) {
    state.SkipWithError("this machine has no such variant");
    return;
  }
  const std::string variant = CpuVariants()[rank];
  Result<std::unique_ptr<Backend>> created = CreateBackend({.variant = variant});
  if (!created.ok() || !(*created)->Reserve({.max_rows = m, .max_features = k}).ok()) {
    state.SkipWithError("cannot create the backend");
    return;
  }
  Backend& backend = **created;

  std::vector<uint16_t> values(static_cast<size_t>(n * k));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = F32ToBF16(static_cast<float>(i * 2654435761u % 2048) / 1024.0f - 1.0f);
  }
  const ConstTensorView part{reinterpret_cast<const std::byte*>(values.data()), DType::kBF16,
                             Shape{n, k}};
  std::vector<Weight> weights;
  for (int64_t bytes = 0; bytes < kRotatedBytes; bytes += n * k * 2) {
    weights.push_back(backend.PackWeight({&part, 1}, {}, WeightFormat::kBF16).value());
  }
  Buffer x = backend.Allocate(m * k * 4).value();
  Buffer out = backend.Allocate(m * n * 4).value();
  const TensorView inputs = x.View(DType::kF32, Shape{m, k});
  for (int64_t i = 0; i < m * k; ++i) inputs.As<float>()[i] = static_cast<float>(i % 113) - 56.0f;

  static const double read_bandwidth = ReadBandwidth(Threads());
  const double dnnl_seconds = m < 64 ? 0 : DnnlBf16Seconds(m, n, k, Threads());
  std::vector<double> seconds;
  size_t next = 0;
  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    backend.MatMul({.x = inputs,
                    .weight = &weights[next++ % weights.size()],
                    .out = out.View(DType::kF32, Shape{m, n})});
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    state.SetIterationTime(seconds.back());
  }
  const double median = Median(seconds);
  state.SetLabel(variant);
  state.counters["GFLOP/s"] = 2e-9 * static_cast<double>(m * n * k) / median;
  if (m < 64) {
    state.counters["read_GB/s"] = read_bandwidth * 1e-9;
    state.counters["read_share"] =
        static_cast<double>(n * k * 2) / Fastest(seconds) / read_bandwidth;
  } else {
    state.counters["dnnl_share"] = dnnl_seconds / median;
  }
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

}  // namespace
}  // namespace innerq

BENCHMARK_MAIN();
