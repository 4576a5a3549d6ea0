// Products on the GPU, by M: BF16 and F16 weights by our kernel and by cuBLASLt, and low-bit
// weights in groups of 64, beside the time that reading the weights alone would take. Shapes are
// those of Llama 3.1 8B.
//
//   matmul_gpu_bench [m=1,16,256] [shape=qkv,down] [kernel=tiled,cublaslt,pow2_3]
//
// Each argument replaces a list of what is measured. Kernels: tiled and cublaslt, of BF16 weights;
// tiled_f16 and cublaslt_f16; pow2_2, pow2_3, apot_4, uniform_8, of low-bit weights with inputs of
// 16 bits, and apot_4_8 with inputs of 8. Prints one line per case: microseconds of the product,
// the byte floor (weights, x and out at the bandwidth that MeasureReadBandwidth finds in the same
// run) and its share of them, TFLOP/s, and the microseconds of rounding x, which are not in the
// product's. Copies of the weights, together more than any cache, take turns; cases whose out is
// larger than 512 MiB are left out. Times are medians of several runs of many launches between two
// events. Every kernel of ours must give the first row the same bits for every M, or the program
// fails.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
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

struct FloatKernels {
  WeightFormat format;
  const char *ours, *cublas;
};
constexpr FloatKernels kFloatKernels[] = {{WeightFormat::kBF16, "tiled", "cublaslt"},
                                          {WeightFormat::kF16, "tiled_f16", "cublaslt_f16"}};

struct LowBitKernel {
  const char* name;
  LowBitSpec spec;
};
constexpr LowBitKernel kLowBitKernels[] = {
    {"pow2_2", {.scheme = LowBitScheme::kPow2, .bits = 2}},
    {"pow2_3", {.scheme = LowBitScheme::kPow2, .bits = 3}},
    {"apot_4", {.scheme = LowBitScheme::kApot, .bits = 4}},
    {"apot_4_8", {.scheme = LowBitScheme::kApot, .bits = 4, .activation_bits = 8}},
    {"uniform_8", {.scheme = LowBitScheme::kUniform, .bits = 8}}};

// What is measured.
struct Choice {
  std::vector<int64_t> rows = {1, 4, 16, 32, 64, 256, 2048};
  std::vector<std::string> shapes, kernels;  // empty: all
};

// BF16 bits of normal numbers, over and over. As F16, as which weights and scales are read as well,
// they are finite; as codes they are any.
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
    packed_ = *cuda::AllocateDevice(kPoolBytes);
    out_ = *cuda::AllocateDevice(kMostOutBytes);
    x_ = *cuda::AllocateDevice(most * kMostColumns * 4);
    rounded_ = *cuda::AllocateDevice(cuda::LowBitInputBytes(most, kMostColumns));
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
    std::printf("%-8s %6s %6s %5s %-12s %10s %9s %7s %9s %9s\n", "shape", "N", "K", "M", "kernel",
                "us", "floor us", "floor/t", "TFLOP/s", "round us");
    for (const ProductShape& shape : kShapes) {
      if (!Chosen(choice_.shapes, shape.name)) continue;
      first_rows_.clear();
      for (const int64_t m : choice_.rows) {
        if (m * shape.n * 4 <= kMostOutBytes) RunCase(shape, m);
      }
    }
  }

 private:
  // A product of a weight of so many bytes.
  struct Case {
    const ProductShape& shape;
    int64_t m;
    const char* kernel;
    const Buffer& weights;  // copies, one after the other
    int64_t weight_bytes;
    std::function<void(const std::byte*weight)> round, multiply;
  };

  void RunCase(const ProductShape& shape, int64_t m) {
    for (const FloatKernels& kernels : kFloatKernels) RunFloatCase(shape, m, kernels);
    for (const LowBitKernel& kernel : kLowBitKernels) {
      if (Chosen(choice_.kernels, kernel.name)) RunLowBitCase(shape, m, kernel);
    }
  }

  void RunFloatCase(const ProductShape& shape, int64_t m, const FloatKernels& kernels) {
    cuda::RoundLaunch rounding{.format = kernels.format,
                               .x = reinterpret_cast<const float*>(x_.data()),
                               .rows = m,
                               .cols = shape.k,
                               .out = reinterpret_cast<uint16_t*>(rounded_.data())};
    if (kernels.format == WeightFormat::kF16) {
      rounding.units = reinterpret_cast<float*>(rounded_.data() + m * shape.k * 2);
    }
    MatMulLaunch launch{.format = kernels.format,
                        .x = rounded_.data(),
                        .units = rounding.units,
                        .m = m,
                        .n = shape.n,
                        .k = shape.k,
                        .out = reinterpret_cast<float*>(out_.data()),
                        .parts = reinterpret_cast<float*>(parts_.data()),
                        .num_part_sums = kPartBytes / 4,
                        .num_multiprocessors = num_multiprocessors_};
    const auto round = [&](const std::byte*) {
      CheckCuda(cuda::LaunchRound(rounding, nullptr), "rounding");
    };
    const int64_t bytes = shape.n * shape.k * 2;
    if (Chosen(choice_.kernels, kernels.ours)) {
      const auto multiply = [&](const std::byte* weight) {
        launch.weight = weight;
        CheckCuda(cuda::LaunchMatMul(launch, nullptr), "a product");
      };
      const Case ours{shape, m, kernels.ours, weights_, bytes, round, multiply};
      Report(ours);
      CheckFirstRow(ours);
    }
    if (Chosen(choice_.kernels, kernels.cublas)) {
      const auto multiply = [&](const std::byte* weight) {
        launch.weight = weight;
        const Result<void> result = cublas_->Run(launch, shape.k, nullptr);
        CHECK(result.ok(), result.error().message);
      };
      Report({shape, m, kernels.cublas, weights_, bytes, round, multiply});
    }
  }

  void RunLowBitCase(const ProductShape& shape, int64_t m, const LowBitKernel& kernel) {
    const cuda::LowBitLayout layout(kernel.spec, shape.n, shape.k);
    for (int64_t copy = 0; copy < kPoolBytes / layout.Bytes(); ++copy) {
      CheckCuda(
          cuda::LaunchPackLowBit({.spec = kernel.spec,
                                  .layout = layout,
                                  .codes = reinterpret_cast<const uint8_t*>(weights_.data()),
                                  .scales = reinterpret_cast<const uint16_t*>(weights_.data()),
                                  .out = packed_.data() + copy * layout.Bytes()},
                                 nullptr),
          "packing");
    }
    const auto round = [&](const std::byte*) {
      CheckCuda(cuda::LaunchRoundLowBit({.spec = kernel.spec,
                                         .layout = layout,
                                         .x = reinterpret_cast<const float*>(x_.data()),
                                         .m = m,
                                         .out = rounded_.data()},
                                        nullptr),
                "rounding");
    };
    const auto multiply = [&](const std::byte* weight) {
      CheckCuda(cuda::LaunchLowBitMatMul({.spec = kernel.spec,
                                          .layout = layout,
                                          .inputs = rounded_.data(),
                                          .weight = weight,
                                          .m = m,
                                          .n = shape.n,
                                          .out = reinterpret_cast<float*>(out_.data()),
                                          .num_multiprocessors = num_multiprocessors_},
                                         nullptr),
                "a product");
    };
    const Case low_bit{shape, m, kernel.name, packed_, layout.Bytes(), round, multiply};
    Report(low_bit);
    CheckFirstRow(low_bit);
  }

  // Microseconds of a launch.
  double Measure(const Case& c, const std::function<void(const std::byte*)>& run) {
    const int64_t copies = kPoolBytes / c.weight_bytes;
    int64_t next = 0;
    const auto time_of = [&](int calls) {
      CheckCuda(cudaEventRecord(begin_, nullptr), "timing");
      for (int i = 0; i < calls; ++i) run(c.weights.data() + next++ % copies * c.weight_bytes);
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

  // Rounds before it multiplies.
  void Report(const Case& c) {
    const double rounding_us = Measure(c, c.round);
    const double us = Measure(c, c.multiply);
    const int64_t bytes = c.weight_bytes + c.m * c.shape.k * 2 + c.m * c.shape.n * 4;
    const double floor_us = static_cast<double>(bytes) / bandwidth_ * 1e6;
    const double flop = 2.0 * static_cast<double>(c.m * c.shape.n * c.shape.k);
    std::printf("%-8s %6ld %6ld %5ld %-12s %10.1f %9.1f %6.0f%% %9.1f %9.1f\n", c.shape.name,
                static_cast<long>(c.shape.n), static_cast<long>(c.shape.k), static_cast<long>(c.m),
                c.kernel, us, floor_us, 100 * floor_us / us, flop / us * 1e-6, rounding_us);
    std::fflush(stdout);
  }

  // The first row of out by the first copy of the weights, bit for bit.
  void CheckFirstRow(const Case& c) {
    c.multiply(c.weights.data());
    std::vector<float> row(static_cast<size_t>(c.shape.n));
    CheckCuda(cudaMemcpy(row.data(), out_.data(), row.size() * 4, cudaMemcpyDefault), "a row");
    std::vector<float>& first = first_rows_[c.kernel];
    if (first.empty()) first = row;
    CHECK(std::memcmp(row.data(), first.data(), row.size() * 4) == 0,
          std::string(c.shape.name) + ", " + c.kernel + ": the first row depends on M, here " +
              std::to_string(c.m));
  }

  const double bandwidth_;  // bytes per second
  const Choice choice_;
  Buffer weights_, packed_, x_, rounded_, out_, parts_;
  int num_multiprocessors_ = 0;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  std::unique_ptr<CublasMatMul> cublas_;
  std::map<std::string, std::vector<float>> first_rows_;  // of a shape, by kernel
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
