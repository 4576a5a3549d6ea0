// Dense products of BF16 weights on the GPU, by M: our kernels and cuBLASLt, beside the time that
// reading the weights alone would take.
//
//   matmul_gpu_bench [m=1,16,256] [shape=qkv,down] [kernel=tiled,cublaslt]
//
// Each argument replaces a list of what is measured. Shapes are those of Llama 3.1 8B. Prints one
// line per case: microseconds of the product, the byte floor (weights, x and out at the bandwidth
// that MeasureReadBandwidth finds in the same run) and its share of them, TFLOP/s, and for kernels
// that take x rounded the microseconds of rounding, which are not in the product's. Copies of the
// weights, together more than any cache, take turns; cases whose out is larger than 512 MiB are
// left out. Times are medians of several runs of many launches between two events. Every kernel of
// ours must give the first row the same bits for every M, or the program fails.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/cublas_matmul.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/launch.h"
#include "tests/gpu/bench_setup.h"

namespace innerq {
namespace {

using cuda::CublasMatMul;
using cuda::MatMulLaunch;

constexpr int64_t kPoolBytes = int64_t{1200} << 20;  // of weights
constexpr int64_t kPartBytes = int64_t{256} << 20;
constexpr int64_t kMostOutBytes = int64_t{512} << 20;
constexpr int kRuns = 5;
constexpr double kRunMs = 3;
constexpr int kMostCalls = 200;  // of a run

struct ProductShape {
  const char* name;
  int64_t n, k;
};
constexpr ProductShape kShapes[] = {{"qkv", 6144, 4096},
                                    {"o", 4096, 4096},
                                    {"gate_up", 28672, 4096},
                                    {"down", 4096, 14336},
                                    {"lm_head", 128256, 4096}};
constexpr int64_t kMostColumns = 14336;

// What is measured.
struct Choice {
  std::vector<int64_t> rows = {1, 4, 16, 32, 64, 256, 2048};
  std::vector<std::string> shapes, kernels;  // empty: all
};

// BF16 bits of normal numbers, over and over.
void FillWeights(Buffer& pool) {
  std::vector<uint16_t> values(size_t{8} << 20);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (uint16_t& bits : values) {
    const float x = normal(random);
    uint32_t word = 0;
    std::memcpy(&word, &x, sizeof(word));
    bits = static_cast<uint16_t>(word >> 16);
  }
  FillRepeating(pool, values);
}

class Bench {
 public:
  Bench(double bandwidth, Choice choice) : bandwidth_(bandwidth), choice_(std::move(choice)) {
    const int64_t most = *std::max_element(choice_.rows.begin(), choice_.rows.end());
    weights_ = *cuda::AllocateDevice(kPoolBytes);
    out_ = *cuda::AllocateDevice(kMostOutBytes);
    x_ = *cuda::AllocateDevice(most * kMostColumns * 4);
    rounded_ = *cuda::AllocateDevice(most * kMostColumns * 2);
    parts_ = *cuda::AllocateDevice(kPartBytes);
    CheckCuda(cudaDeviceGetAttribute(&num_multiprocessors_, cudaDevAttrMultiProcessorCount, 0),
              "multiprocessors");
    FillWeights(weights_);
    std::vector<float> x(static_cast<size_t>(most * kMostColumns));
    std::mt19937 random(2);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (float& value : x) value = uniform(random);
    CheckCuda(cudaMemcpy(x_.data(), x.data(), x.size() * 4, cudaMemcpyDefault), "x");
    CheckCuda(cudaEventCreate(&begin_), "an event");
    CheckCuda(cudaEventCreate(&end_), "an event");
    cublas_ = std::move(*CublasMatMul::Create());
  }
  ~Bench() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }

  void Run() {
    std::printf("%-8s %6s %6s %5s %-9s %10s %9s %7s %9s %9s\n", "shape", "N", "K", "M", "kernel",
                "us", "floor us", "floor/t", "TFLOP/s", "round us");
    for (const ProductShape& shape : kShapes) {
      if (!Chosen(choice_.shapes, shape.name)) continue;
      first_row_.clear();
      for (const int64_t m : choice_.rows) {
        if (m * shape.n * 4 <= kMostOutBytes) RunCase(shape, m);
      }
    }
  }

 private:
  void RunCase(const ProductShape& shape, int64_t m) {
    MatMulLaunch launch{.x = x_.data(), .m = m, .n = shape.n, .k = shape.k};
    launch.out = reinterpret_cast<float*>(out_.data());
    launch.parts = reinterpret_cast<float*>(parts_.data());
    launch.num_part_sums = kPartBytes / 4;
    launch.num_multiprocessors = num_multiprocessors_;
    const auto ours = [&](const MatMulLaunch& product) {
      CheckCuda(cuda::LaunchMatMul(product, nullptr), "a product");
    };
    launch.x = rounded_.data();
    const auto round = [&](const MatMulLaunch&) {
      CheckCuda(cuda::LaunchRoundToBf16({reinterpret_cast<const float*>(x_.data()), m, shape.k,
                                         reinterpret_cast<uint16_t*>(rounded_.data())},
                                        nullptr),
                "rounding");
    };
    const double rounding_us = Measure(launch, round);
    if (Chosen(choice_.kernels, "tiled")) {
      Report("tiled", launch, ours, rounding_us);
      CheckFirstRow(launch);
    }
    if (Chosen(choice_.kernels, "cublaslt")) {
      const auto theirs = [&](const MatMulLaunch& product) {
        const Result<void> result = cublas_->Run(product, shape.k, nullptr);
        CHECK(result.ok(), result.error().message);
      };
      Report("cublaslt", launch, theirs, rounding_us);
    }
  }

  // Microseconds of a launch.
  double Measure(MatMulLaunch launch, const std::function<void(const MatMulLaunch&)>& run) {
    const int64_t bytes = launch.n * launch.k * 2, copies = kPoolBytes / bytes;
    int64_t next = 0;
    const auto time_of = [&](int calls) {
      CheckCuda(cudaEventRecord(begin_, nullptr), "timing");
      for (int i = 0; i < calls; ++i) {
        launch.weight = weights_.data() + next++ % copies * bytes;
        run(launch);
      }
      CheckCuda(cudaEventRecord(end_, nullptr), "timing");
      CheckCuda(cudaEventSynchronize(end_), "timing");
      float ms = 0;
      CheckCuda(cudaEventElapsedTime(&ms, begin_, end_), "timing");
      return static_cast<double>(ms) / calls;
    };
    time_of(2);
    const int calls = static_cast<int>(std::clamp<double>(kRunMs / time_of(4), 4, kMostCalls));
    std::vector<double> ms;
    for (int i = 0; i < kRuns; ++i) ms.push_back(time_of(calls));
    std::nth_element(ms.begin(), ms.begin() + kRuns / 2, ms.end());
    return ms[kRuns / 2] * 1e3;
  }

  void Report(const char* kernel, const MatMulLaunch& launch,
              const std::function<void(const MatMulLaunch&)>& run, double rounding_us) {
    const double us = Measure(launch, run);
    const int64_t bytes =
        launch.n * launch.k * 2 + launch.m * launch.k * 2 + launch.m * launch.n * 4;
    const double floor_us = static_cast<double>(bytes) / bandwidth_ * 1e6;
    const double flop = 2.0 * static_cast<double>(launch.m * launch.n * launch.k);
    std::printf("%-8s %6ld %6ld %5ld %-9s %10.1f %9.1f %6.0f%% %9.1f ", NameOf(launch),
                static_cast<long>(launch.n), static_cast<long>(launch.k),
                static_cast<long>(launch.m), kernel, us, floor_us, 100 * floor_us / us,
                flop / us * 1e-6);
    std::printf("%9.1f\n", rounding_us);
    std::fflush(stdout);
  }

  static const char* NameOf(const MatMulLaunch& launch) {
    for (const ProductShape& shape : kShapes) {
      if (shape.n == launch.n && shape.k == launch.k) return shape.name;
    }
    return "";
  }

  // The first row of out by the first copy of the weights, bit for bit.
  void CheckFirstRow(MatMulLaunch launch) {
    launch.weight = weights_.data();
    CheckCuda(cuda::LaunchMatMul(launch, nullptr), "a product");
    std::vector<float> row(static_cast<size_t>(launch.n));
    CheckCuda(cudaMemcpy(row.data(), launch.out, row.size() * 4, cudaMemcpyDefault), "a row");
    if (first_row_.empty()) first_row_ = row;
    CHECK(std::memcmp(row.data(), first_row_.data(), row.size() * 4) == 0,
          std::string(NameOf(launch)) + ": the first row depends on M, here " +
              std::to_string(launch.m));
  }

  const double bandwidth_;  // bytes per second
  const Choice choice_;
  Buffer weights_, x_, rounded_, out_, parts_;
  int num_multiprocessors_ = 0;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  std::unique_ptr<CublasMatMul> cublas_;
  std::vector<float> first_row_;  // of a shape
};

}  // namespace
}  // namespace innerq

int main(int argc, char** argv) {
  innerq::Choice choice;
  const innerq::ListArgument lists[] = {{.key = "m", .numbers = &choice.rows},
                                        {.key = "shape", .names = &choice.shapes},
                                        {.key = "kernel", .names = &choice.kernels}};
  innerq::ReadArguments({argv, static_cast<size_t>(argc)}, "matmul_gpu_bench.cc", lists);
  if (choice.rows.empty()) return 0;
  const auto backend = innerq::CudaBackendOrExit();
  const auto bandwidth = backend->MeasureReadBandwidth();
  CHECK(bandwidth.ok() && bandwidth->has_value(), "measuring the bandwidth");
  std::printf("reading device memory: %.0f GB/s\n", **bandwidth / 1e9);
  innerq::Bench(**bandwidth, std::move(choice)).Run();
}
