// Attention over cache pages: decode, prefill and sealing, by variant and cache format.
//
//   attention_bench --benchmark_filter=Decode/amx [threads, 2]
//
// Pools are written with random codes and scales and hold several layers, more than 1 GiB together,
// which take turns: every page comes from memory. Counters: ns per cached token and layer, and the
// bytes read per second.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_attention.h"
#include "kernels/cpu/host_memory.h"
#include "tests/bench/floors.h"

namespace innerq {
namespace {

constexpr int64_t kMaxLayers = 128;

struct Format {
  const char* name;
  QuantSpec key, value;
  int64_t sink_tokens = 32, recent_tokens = 96;
};

std::vector<Format> Formats() {
  const QuantSpec half;
  const auto inner = [](int bits, QuantMode mode) { return QuantSpec{bits, mode}; };
  const QuantSpec outer{2, QuantMode::kAsymmetric, QuantAxis::kOuter};
  constexpr QuantMode kSymmetric = QuantMode::kSymmetric;
  return {{"fp16", half, half},
          {"innerq_base", inner(3, kSymmetric), inner(3, kSymmetric)},
          {"innerq_small", inner(3, kSymmetric), inner(2, kSymmetric)},
          {"innerq_hybrid", inner(3, kSymmetric), inner(2, QuantMode::kHybrid)},
          {"int8", inner(8, kSymmetric), inner(8, kSymmetric)},
          {"int4", inner(4, kSymmetric), inner(4, kSymmetric)},
          {"kivi", outer, outer, 0, 128}};
}

struct Model {
  const char* name;
  int64_t heads, kv_heads, head_dim;
};

constexpr Model kModels[] = {{"32x8x128", 32, 8, 128}, {"32x8x64", 32, 8, 64}};

std::vector<float> RandomFloats(int64_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = normal(random);
  return x;
}

TensorView View(std::vector<float>& x, int64_t rows) {
  return {reinterpret_cast<std::byte*>(x.data()), DType::kF32,
          Shape{rows, static_cast<int64_t>(x.size()) / rows}};
}

// F16 numbers in (-2, 2), quickly.
void FillHalves(std::byte* data, int64_t bytes, uint64_t& state) {
  auto* halves = reinterpret_cast<uint16_t*>(data);
  for (int64_t i = 0; i < bytes / 2; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    halves[i] = static_cast<uint16_t>((state >> 48 & 0x83ffu) | (10u + (state >> 40 & 3u)) << 10);
  }
}

void FillBytes(std::byte* data, int64_t bytes, uint64_t& state) {
  for (int64_t i = 0; i + 4 <= bytes; i += 4) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const auto word = static_cast<uint32_t>(state >> 32);
    std::memcpy(data + i, &word, sizeof(word));
  }
}

// One sequence in so many layers that they exceed the caches.
class Cache {
 public:
  Cache(const Model& model, const Format& format, int64_t tokens)
      : layout_(MakeLayout(model, format)), num_pages_(CeilDiv(tokens, layout_.page_tokens())) {
    const int64_t sealed = layout_.SealedPages(tokens - 1).size();
    const int64_t layer_bytes =
        sealed * layer().sealed_page_bytes() + (num_pages_ - sealed) * layer().open_page_bytes();
    num_layers_ = std::clamp<int64_t>(CeilDiv(int64_t{1} << 30, layer_bytes), 1, kMaxLayers);
    open_stride_ = (num_pages_ - sealed + 16) * layer().open_page_bytes();
    sealed_stride_ = std::max<int64_t>(sealed, 16) * layer().sealed_page_bytes();
    open_ = *AllocateHost(num_layers_ * open_stride_ + KvLayout::kPoolSlackBytes);
    sealed_ = *AllocateHost(num_layers_ * sealed_stride_ + KvLayout::kPoolSlackBytes);
    uint64_t state = 1;
    FillHalves(open_.data(), num_layers_ * open_stride_, state);
    if (layout_.quantized()) FillSealed(state);
    norms_.assign(static_cast<size_t>(layer().kv_heads * layer().head_dim), 1.5f);
    // Pages lie scattered, as after a while of serving.
    const PageRange range = layout_.SealedPages(tokens - 1);
    std::vector<int32_t> sealed_ids(static_cast<size_t>(range.size()));
    std::iota(sealed_ids.begin(), sealed_ids.end(), 0);
    std::mt19937 random(1);
    std::shuffle(sealed_ids.begin(), sealed_ids.end(), random);
    for (int32_t p = 0, open_id = 0; p < num_pages_; ++p) {
      const bool is_sealed = p >= range.begin && p < range.end;
      if (is_sealed) {
        pages_.push_back({-1, sealed_ids[static_cast<size_t>(p - range.begin)]});
      } else {
        pages_.push_back({open_id++, -1});
      }
    }
  }

  const KvLayout& layout() const { return layout_; }
  const KvLayerLayout& layer() const { return layout_.layer(0); }
  std::vector<PageRef>& pages() { return pages_; }
  PagedKvView View(int64_t i) {
    const int64_t at = i % num_layers_;
    return {&layer(), open_.data() + at * open_stride_, sealed_.data() + at * sealed_stride_,
            norms_.data()};
  }

 private:
  static KvLayout MakeLayout(const Model& model, const Format& format) {
    KvCacheSpec spec;
    spec.kv_heads = model.kv_heads;
    spec.head_dim = model.head_dim;
    spec.sink_tokens = format.sink_tokens;
    spec.recent_tokens = format.recent_tokens;
    spec.layers = {{format.key, format.value, true}};
    return *KvLayout::Create(spec, CodeOrder::kPanel16);
  }

  void FillSealed(uint64_t& state) {
    const int64_t heads = num_layers_ * sealed_stride_ / layer().sealed_head_bytes;
    for (int64_t i = 0; i < heads; ++i) {
      std::byte* head = sealed_.data() + i * layer().sealed_head_bytes;
      FillBytes(head, layer().key_scales, state);
      FillHalves(head + layer().key_scales, layer().value_codes - layer().key_scales, state);
      FillBytes(head + layer().value_codes, layer().value_scales - layer().value_codes, state);
      FillHalves(head + layer().value_scales, layer().sealed_head_bytes - layer().value_scales,
                 state);
    }
  }

  KvLayout layout_;
  int64_t num_pages_, num_layers_ = 0, open_stride_ = 0, sealed_stride_ = 0;
  Buffer open_, sealed_;  // as a backend allocates them
  std::vector<float> norms_;
  std::vector<PageRef> pages_;
};

// Bytes that attention over `tokens` must read in one layer.
double LayerBytes(const KvLayout& layout, int64_t tokens) {
  const int64_t sealed = layout.SealedPages(tokens - 1).size();
  const int64_t pages = CeilDiv(tokens, layout.page_tokens());
  return static_cast<double>(sealed * layout.sealed_page_bytes() +
                             (pages - sealed) * layout.open_page_bytes());
}

// One new token over `tokens` cached ones, layer after layer.
class DecodeSteps {
 public:
  DecodeSteps(CpuIsa isa, int threads, const Model& model, const Format& format, int64_t tokens)
      : heads_(model.heads),
        cache_(model, format, tokens),
        attention_(CpuAttention::Create(isa, threads)),
        q_(RandomFloats(model.heads * model.head_dim, 2)),
        out_(q_.size()),
        slice_{0, 1, tokens - 1, cache_.pages(), 0, 0} {
    CHECK(attention_->Reserve({}).ok(), "no memory");
  }

  const KvLayout& layout() const { return cache_.layout(); }
  void Step() {
    attention_->Attention({View(q_, 1),
                           cache_.View(layer_++),
                           &cache_.layout(),
                           {&slice_, 1},
                           heads_,
                           0.1f,
                           View(out_, 1)});
  }
  double StepSeconds() {
    const auto begin = std::chrono::steady_clock::now();
    Step();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

 private:
  const int64_t heads_;
  Cache cache_;
  std::unique_ptr<CpuAttention> attention_;
  std::vector<float> q_, out_;
  const SequenceSlice slice_;
  int64_t layer_ = 0;
};

void Decode(benchmark::State& state, CpuIsa isa, int threads, Model model, Format format,
            int64_t tokens) {
  DecodeSteps steps(isa, threads, model, format, tokens);
  for (auto _ : state) steps.Step();
  state.counters["ns_per_token_layer"] = benchmark::Counter(
      static_cast<double>(tokens) * 1e-9,
      benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  state.counters["bytes_per_second"] = benchmark::Counter(
      LayerBytes(steps.layout(), tokens), benchmark::Counter::kIsIterationInvariantRate,
      benchmark::Counter::kIs1024);
}

// Decode of the format and of FP16 in turn, so that a drift of the machine meets both.
void Versus(benchmark::State& state, CpuIsa isa, int threads, Model model, Format format,
            int64_t tokens) {
  DecodeSteps steps(isa, threads, model, format, tokens);
  DecodeSteps fp16(isa, threads, model, Formats()[0], tokens);
  std::vector<double> seconds, fp16_seconds;
  for (auto _ : state) {
    seconds.push_back(steps.StepSeconds());
    fp16_seconds.push_back(fp16.StepSeconds());
    state.SetIterationTime(seconds.back());
  }
  state.counters["x_fp16"] = Median(fp16_seconds) / Median(seconds);
}

// 512 new tokens behind `depth` cached ones; the counter is the time of a new token in a layer.
void Prefill(benchmark::State& state, CpuIsa isa, int threads, Model model, Format format,
             int64_t depth) {
  constexpr int64_t kRows = 512;
  const int64_t tokens = depth + kRows;
  Cache cache(model, format, depth + 1);
  // Rows see different pages sealed: give every page both forms.
  std::vector<PageRef> pages;
  const int32_t num_open = 16, num_sealed = 16;
  for (int32_t p = 0; p < CeilDiv(tokens, cache.layout().page_tokens()); ++p) {
    const PageRef known = p < static_cast<int32_t>(cache.pages().size())
                              ? cache.pages()[static_cast<size_t>(p)]
                              : PageRef{};
    pages.push_back({known.open_id >= 0 ? known.open_id : p % num_open,
                     known.sealed_id >= 0 ? known.sealed_id : p % num_sealed});
  }
  auto attention = CpuAttention::Create(isa, threads);
  CHECK(attention->Reserve({}).ok(), "no memory");
  std::vector<float> q = RandomFloats(kRows * model.heads * model.head_dim, 2), out(q.size());
  const SequenceSlice slice{0, kRows, depth, pages, 0, 0};
  int64_t layer = 0;
  for (auto _ : state) {
    attention->Attention({View(q, kRows),
                          cache.View(layer++),
                          &cache.layout(),
                          {&slice, 1},
                          model.heads,
                          0.1f,
                          View(out, kRows)});
  }
  state.counters["us_per_row_layer"] = benchmark::Counter(
      static_cast<double>(kRows) * 1e-6,
      benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

// One page of one layer, all heads.
void Seal(benchmark::State& state, CpuIsa isa, int threads, Model model, Format format) {
  Cache cache(model, format, 256);
  auto attention = CpuAttention::Create(isa, threads);
  CHECK(attention->Reserve({}).ok(), "no memory");
  const SealItem item{1, 1, 0};
  int64_t layer = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(attention->Seal({cache.View(layer++), {&item, 1}}));
  }
}

void Register(int threads) {
  const std::vector<Format> formats = Formats();
  for (const CpuIsa isa : SupportedCpuIsas()) {
    for (const Model& model : kModels) {
      for (const Format& format : formats) {
        const std::string name =
            std::string(CpuIsaName(isa)) + "/" + model.name + "/" + format.name;
        for (const int64_t tokens : {4096, 16384}) {
          benchmark::RegisterBenchmark(("Decode/" + name + "/" + std::to_string(tokens)).c_str(),
                                       Decode, isa, threads, model, format, tokens)
              ->UseRealTime()
              ->Unit(benchmark::kMicrosecond);
          if (&format == &formats[0]) continue;
          benchmark::RegisterBenchmark(("Versus/" + name + "/" + std::to_string(tokens)).c_str(),
                                       Versus, isa, threads, model, format, tokens)
              ->UseManualTime()
              ->Unit(benchmark::kMicrosecond);
        }
        for (const int64_t depth : {0, 4096}) {
          benchmark::RegisterBenchmark(("Prefill/" + name + "/" + std::to_string(depth)).c_str(),
                                       Prefill, isa, threads, model, format, depth)
              ->UseRealTime()
              ->Unit(benchmark::kMillisecond);
        }
        benchmark::RegisterBenchmark(("Seal/" + name).c_str(), Seal, isa, threads, model, format)
            ->UseRealTime()
            ->Unit(benchmark::kMicrosecond);
      }
    }
  }
}

}  // namespace
}  // namespace innerq

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  innerq::Register(threads);
  benchmark::RunSpecifiedBenchmarks();
}
