// Attention over cache pages on the GPU: decode and prefill by cache format, beside the time that
// the bytes alone would take.
//
//   attention_gpu_bench [tokens=1024,32768] [batch=1,8] [model=32x8x128] [cache=fp16,innerq_base]
//                       [behind=0,4096]
//
// Each argument replaces a list of what is measured; an empty one leaves that table out.
// Prints one line per case. The byte floor is what a decode must read, at the bandwidth that a
// device-to-device copy of 1 GiB reaches in the same run. Pools are written with random halves and
// hold several layers, together more than any cache, which take turns. Times are medians of several
// runs of many calls between two Synchronize, host work included. Cases that do not fit in memory
// are listed.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/bench_setup.h"

namespace innerq {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kLeastPoolBytes = int64_t{512} << 20;  // of all layers: beyond every L2
constexpr int64_t kMaxLayers = 64;
constexpr int kRuns = 5;

double Median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2), x.end());
  return x[x.size() / 2];
}

// F16 numbers in (-2, 2); as codes they are as good as any bits.
std::vector<uint16_t> RandomHalves(size_t count) {
  std::vector<uint16_t> halves(count);
  uint64_t state = 1;
  for (uint16_t& half : halves) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    half = static_cast<uint16_t>((state >> 48 & 0x83ffu) | (10u + (state >> 40 & 3u)) << 10);
  }
  return halves;
}

void FillRandom(Buffer& buffer) {
  static const std::vector<uint16_t> kHalves = RandomHalves(size_t{16} << 20);
  FillRepeating(buffer, kHalves);
}

// Bytes per second that a copy within device memory reads and writes.
double CopyBandwidth(Backend& backend) {
  constexpr int64_t kBytes = int64_t{1} << 30;
  Buffer from = *backend.Allocate(kBytes), to = *backend.Allocate(kBytes);
  FillRandom(from);
  std::vector<double> seconds;
  for (int run = 0; run < kRuns + 1; ++run) {
    const Clock::time_point begin = Clock::now();
    for (int i = 0; i < 8; ++i) {
      CheckCuda(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice),
                "copying");
    }
    CheckCuda(cudaDeviceSynchronize(), "copying");
    if (run > 0) seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count() / 8);
  }
  return 2.0 * kBytes / Median(seconds);
}

struct Format {
  const char* name;
  QuantSpec key, value;
};

std::vector<Format> Formats() {
  const auto symmetric = [](int bits) { return QuantSpec{.bits = bits}; };
  return {{"fp16", symmetric(16), symmetric(16)},
          {"int8", symmetric(8), symmetric(8)},
          {"innerq_base", symmetric(3), symmetric(3)},
          {"innerq_small", symmetric(3), symmetric(2)},
          {"innerq_hybrid", symmetric(3), {.bits = 2, .mode = QuantMode::kHybrid}}};
}

struct Model {
  const char* name;
  int64_t heads, kv_heads, head_dim;
};
constexpr Model kModels[] = {{"32x8x128", 32, 8, 128}, {"32x32x128", 32, 32, 128}};

struct Case {
  Model model;
  Format format;
  int64_t depth = 0;  // tokens in the cache before the step
  int64_t batch = 1;  // sequences
  int64_t rows = 1;   // new tokens of each
};

// The cache of one case: `batch` sequences in several layers; every page has the form that the last
// token sees, and the other one too where a row of the step needs it.
class Cache {
 public:
  Cache(const Case& c, const KvLayout& layout) : layout_(layout) {
    const int64_t tokens = c.depth + c.rows, pages = CeilDiv(tokens, layout_.page_tokens());
    const PageRange last = layout_.SealedPages(tokens - 1), first = layout_.SealedPages(c.depth);
    std::vector<int32_t> sealed_ids(static_cast<size_t>(last.size() * c.batch));
    std::iota(sealed_ids.begin(), sealed_ids.end(), 0);
    std::mt19937 random(1);
    std::shuffle(sealed_ids.begin(), sealed_ids.end(), random);  // as after a while of serving
    int32_t open_id = 0;
    size_t next = 0;
    tables_.resize(static_cast<size_t>(c.batch));
    for (std::vector<PageRef>& table : tables_) {
      for (int64_t p = 0; p < pages; ++p) {
        PageRef ref;
        if (p >= last.begin && p < last.end) ref.sealed_id = sealed_ids[next++];
        if (p < first.begin || p >= first.end) ref.open_id = open_id++;
        table.push_back(ref);
      }
    }
    open_bytes_ = RoundUp(open_id * layer().open_page_bytes(), 256);
    sealed_bytes_ = RoundUp(static_cast<int64_t>(next) * layer().sealed_page_bytes(), 256);
    // Read by a decode: sealed pages as such, the others open.
    read_bytes_ = c.batch * (last.size() * layer().sealed_page_bytes() +
                             (pages - last.size()) * layer().open_page_bytes());
    num_layers_ =
        std::clamp<int64_t>(CeilDiv(kLeastPoolBytes, open_bytes_ + sealed_bytes_), 1, kMaxLayers);
  }

  int64_t bytes() const { return num_layers_ * (open_bytes_ + sealed_bytes_); }
  int64_t read_bytes() const { return read_bytes_; }
  int64_t num_layers() const { return num_layers_; }
  const std::vector<PageRef>& table(size_t i) const { return tables_[i]; }
  const KvLayerLayout& layer() const { return layout_.layer(0); }

  Result<void> Allocate(Backend& backend) {
    ASSIGN_OR_RETURN(open_,
                     backend.Allocate(num_layers_ * open_bytes_ + KvLayout::kPoolSlackBytes));
    ASSIGN_OR_RETURN(sealed_,
                     backend.Allocate(num_layers_ * sealed_bytes_ + KvLayout::kPoolSlackBytes));
    ASSIGN_OR_RETURN(norms_, backend.Allocate(layout_.key_norm_bytes()));
    for (Buffer* buffer : {&open_, &sealed_}) FillRandom(*buffer);
    const std::vector<float> ones(static_cast<size_t>(norms_.bytes() / 4), 1.0f);
    CheckCuda(cudaMemcpy(norms_.data(), ones.data(), ones.size() * 4, cudaMemcpyDefault), "norms");
    CheckCuda(cudaDeviceSynchronize(), "norms");
    return {};
  }
  PagedKvView View(int64_t i) {
    const int64_t at = i % num_layers_;
    return {&layer(), open_.data() + at * open_bytes_, sealed_.data() + at * sealed_bytes_,
            reinterpret_cast<float*>(norms_.data())};
  }

 private:
  const KvLayout& layout_;
  std::vector<std::vector<PageRef>> tables_;
  int64_t open_bytes_ = 0, sealed_bytes_ = 0, read_bytes_ = 0, num_layers_ = 0;
  Buffer open_, sealed_, norms_;
};

KvLayout LayoutOf(const Case& c, CodeOrder order) {
  KvCacheSpec spec;
  spec.kv_heads = c.model.kv_heads;
  spec.head_dim = c.model.head_dim;
  spec.layers = {{c.format.key, c.format.value, true}};
  return *KvLayout::Create(spec, order);
}

// Seconds of one attention call; 0 if the cache does not fit.
double Measure(Backend& backend, const Case& c, int64_t* read_bytes) {
  const KvLayout layout = LayoutOf(c, backend.code_order());
  Cache cache(c, layout);
  *read_bytes = cache.read_bytes();
  size_t free_bytes = 0, total_bytes = 0;
  CheckCuda(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for memory");
  if (cache.bytes() + (int64_t{1} << 30) > static_cast<int64_t>(free_bytes)) return 0;
  if (!cache.Allocate(backend).ok()) return 0;
  const int64_t rows = c.batch * c.rows, width = c.model.heads * c.model.head_dim;
  Buffer q = *backend.Allocate(rows * width * 4), out = *backend.Allocate(rows * width * 4);
  std::vector<float> values(static_cast<size_t>(rows * width));
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (float& x : values) x = normal(random);
  CheckCuda(cudaMemcpy(q.data(), values.data(), values.size() * 4, cudaMemcpyDefault), "queries");
  CheckCuda(cudaDeviceSynchronize(), "queries");
  std::vector<SequenceSlice> slices;
  for (int64_t i = 0; i < c.batch; ++i) {
    slices.push_back({i * c.rows, c.rows, c.depth, cache.table(static_cast<size_t>(i)), 0, 0});
  }
  int64_t layer = 0;
  const Shape shape{rows, width};
  const auto run = [&](int64_t calls) {
    const Clock::time_point begin = Clock::now();
    for (int64_t i = 0; i < calls; ++i) {
      backend.Attention({q.View(DType::kF32, shape), cache.View(layer++), &layout, slices,
                         c.model.heads, 0.1f, out.View(DType::kF32, shape)});
    }
    const Result<void> result = backend.Synchronize();
    CHECK(result.ok(), result.error().message);
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  run(2);
  const auto calls = std::clamp<int64_t>(static_cast<int64_t>(0.02 / (run(4) / 4)), 4, 64);
  std::vector<double> seconds;
  for (int i = 0; i < kRuns; ++i) seconds.push_back(run(calls) / static_cast<double>(calls));
  return Median(seconds);
}

// What is measured.
struct Choice {
  std::vector<int64_t> tokens = {1024, 4096, 16384, 32768, 131072};
  std::vector<int64_t> batches = {1, 8, 32};
  std::vector<int64_t> behind = {0, 4096, 32768};
  std::vector<std::string> models, caches;  // empty: all
};

void RunAll(Backend& backend, const Choice& choice) {
  const double bandwidth = CopyBandwidth(backend);
  std::printf("copy within device memory: %.0f GB/s read and written\n", bandwidth / 1e9);
  std::printf("\ndecode: one token of each sequence, one layer\n");
  std::printf("%-10s %-14s %8s %6s %10s %10s %8s %8s\n", "model", "cache", "tokens", "batch", "us",
              "floor us", "floor/t", "x fp16");
  for (const Model& model : kModels) {
    if (!Chosen(choice.models, model.name)) continue;
    for (const int64_t tokens : choice.tokens) {
      for (const int64_t batch : choice.batches) {
        double fp16 = 0;
        for (const Format& format : Formats()) {
          if (!Chosen(choice.caches, format.name)) continue;
          int64_t bytes = 0;
          const double seconds = Measure(backend, {model, format, tokens - 1, batch, 1}, &bytes);
          const double floor = static_cast<double>(bytes) / bandwidth;
          if (format.key.bits == 16) fp16 = seconds;
          std::printf("%-10s %-14s %8ld %6ld ", model.name, format.name, static_cast<long>(tokens),
                      static_cast<long>(batch));
          if (seconds == 0) {
            std::printf("does not fit in memory\n");
            continue;
          }
          std::printf("%10.1f %10.1f %7.0f%% ", seconds * 1e6, floor * 1e6, 100 * floor / seconds);
          fp16 > 0 ? std::printf("%8.2f\n", fp16 / seconds) : std::printf("%8s\n", "-");
          std::fflush(stdout);
        }
      }
    }
  }
  std::printf("\nprefill: 512 tokens of one sequence, one layer\n");
  std::printf("%-10s %-14s %8s %10s\n", "model", "cache", "behind", "us");
  for (const Model& model : kModels) {
    if (!Chosen(choice.models, model.name)) continue;
    for (const int64_t depth : choice.behind) {
      for (const Format& format : Formats()) {
        if (!Chosen(choice.caches, format.name)) continue;
        int64_t bytes = 0;
        const double seconds = Measure(backend, {model, format, depth, 1, 512}, &bytes);
        std::printf("%-10s %-14s %8ld %10.1f\n", model.name, format.name, static_cast<long>(depth),
                    seconds * 1e6);
      }
    }
  }
}

}  // namespace
}  // namespace innerq

int main(int argc, char** argv) {
  innerq::Choice choice;
  const innerq::ListArgument lists[] = {{.key = "tokens", .numbers = &choice.tokens},
                                        {.key = "batch", .numbers = &choice.batches},
                                        {.key = "behind", .numbers = &choice.behind},
                                        {.key = "model", .names = &choice.models},
                                        {.key = "cache", .names = &choice.caches}};
  innerq::ReadArguments({argv, static_cast<size_t>(argc)}, "attention_gpu_bench.cc", lists);
  const auto backend = innerq::CudaBackendOrExit();
  const innerq::Result<void> reserved =
      backend->Reserve({.max_rows = 512, .max_features = 16, .max_pages = 262144});
  if (!reserved.ok()) {
    std::fprintf(stderr, "%s\n", reserved.error().message.c_str());
    return 1;
  }
  innerq::RunAll(*backend, choice);
}
