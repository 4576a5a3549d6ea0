// Speed of a whole decoder with random weights, beside its floors, all in one run:
//   - bandwidth of a plain reading loop, and the share of it that decode reaches
//   - oneDNN alone on the prefill's matrix shapes, and the share of its rate that prefill reaches
//   - prefill at depth 4096 against prefill at depth 0
//
//   model_bench [--help]
//
// The default shape is a 1B Llama: 16 layers, 2048, 8192, 32/8 heads of 64, vocabulary 32000, BF16.
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#include "engine/kv_cache.h"
#include "models/llama.h"
#include "tests/bench/floors.h"

namespace innerq {
namespace {

double Seconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double MedianSeconds(int runs, const std::function<void()>& work) {
  std::vector<double> seconds;
  for (int i = 0; i < runs; ++i) seconds.push_back(Seconds(work));
  return Median(seconds);
}

// One sequence that owns block ids of its own and grows step by step.
class BenchSequence {
 public:
  BenchSequence(Backend* backend, LlamaModel* model, KvCache* cache)
      : backend_(backend), model_(model), cache_(cache) {}

  // Computes the next `rows` tokens; logits for the last one.
  void Step(int64_t rows) {
    const KvLayout& layout = cache_->layout();
    const int64_t last = computed_ + rows - 1;
    ForwardBatch batch;
    for (int64_t i = 0; i < rows; ++i) {
      const uint64_t mixed = static_cast<uint64_t>(computed_ + i) * 2654435761u;
      batch.token_ids.push_back(
          static_cast<int32_t>(mixed % static_cast<uint64_t>(model_->config().vocab_size)));
      batch.positions.push_back(computed_ + i);
    }
    while (static_cast<int64_t>(pages_.size()) <= layout.PageOf(last)) {
      pages_.push_back({TakeOpen(), -1});
    }
    const PageRange sealed = layout.SealedPages(last);
    if (sealed.size() > 0 && num_sealed_ == 0 && layout.normalizes_keys()) {
      KeyNormItem item{0, {}};
      for (int64_t p = layout.KeyNormPages().begin; p < layout.KeyNormPages().end; ++p) {
        item.open_ids.push_back(pages_[static_cast<size_t>(p)].open_id);
      }
      batch.key_norms.push_back(std::move(item));
    }
    std::vector<int32_t> freed;
    for (int64_t p = sealed.begin + num_sealed_; p < sealed.end; ++p) {
      PageRef& page = pages_[static_cast<size_t>(p)];
      page.sealed_id = static_cast<int32_t>(num_sealed_++);
      batch.seals.push_back({page.open_id, page.sealed_id, layout.normalizes_keys() ? 0 : -1});
      freed.push_back(page.open_id);
    }
    batch.page_tables.push_back(pages_);
    batch.slices.push_back(
        {0, rows, computed_, batch.page_tables[0], layout.normalizes_keys() ? 0 : -1, 0});
    batch.logit_rows.push_back(rows - 1);
    model_->Forward(batch, layout, cache_->layers());
    const Result<void> done = backend_->Synchronize();
    CHECK(done.ok(), done.error().message);
    for (const int32_t id : freed) {
      for (PageRef& page : pages_) {
        if (page.open_id == id) page.open_id = -1;
      }
      free_open_.push_back(id);
    }
    computed_ += rows;
  }

 private:
  int32_t TakeOpen() {
    if (free_open_.empty()) return next_open_++;
    const int32_t id = free_open_.back();
    free_open_.pop_back();
    return id;
  }

  Backend* backend_;
  LlamaModel* model_;
  KvCache* cache_;
  std::vector<PageRef> pages_;
  std::vector<int32_t> free_open_;
  int32_t next_open_ = 0;
  int64_t num_sealed_ = 0;
  int64_t computed_ = 0;
};

struct Options {
  ModelConfig model;
  BackendOptions backend;
  KvCacheOptions cache;
  int64_t rows = 512;
  int64_t depth = 4096;
  int decode_steps = 15;
  int runs = 3;
};

// Weight matrices of one layer: N, K.
std::vector<std::pair<int64_t, int64_t>> LayerShapes(const ModelConfig& m) {
  return {{(m.num_heads + 2 * m.num_kv_heads) * m.head_dim, m.hidden_size},
          {m.hidden_size, m.num_heads * m.head_dim},
          {2 * m.intermediate_size, m.hidden_size},
          {m.hidden_size, m.intermediate_size}};
}

// Bytes of BF16 weights that a decode step reads: all but the table of embeddings.
double StreamedBytes(const ModelConfig& m) {
  int64_t elements = m.vocab_size * m.hidden_size;
  for (const auto& [n, k] : LayerShapes(m)) elements += m.num_layers * n * k;
  return 2.0 * static_cast<double>(elements);
}

// Seconds that oneDNN alone takes for the matrix products of `rows` prefilled tokens.
double DnnlPrefillSeconds(const Options& options, int threads) {
  double seconds = 0;
  for (const auto& [n, k] : LayerShapes(options.model)) {
    seconds += DnnlBf16Seconds(options.rows, n, k, threads);
  }
  return seconds * static_cast<double>(options.model.num_layers);
}

int Run(Options options) {
  Result<std::unique_ptr<Backend>> backend = CreateBackend(options.backend);
  if (!backend.ok()) {
    std::fprintf(stderr, "model_bench: %s\n", backend.error().message.c_str());
    return 1;
  }
  const int threads = options.backend.threads > 0 ? options.backend.threads : omp_get_max_threads();
  std::printf("backend %s, %d threads\n", std::string((*backend)->name()).c_str(), threads);
  const double bandwidth = ReadBandwidth(threads);
  std::printf("reading loop              %8.2f GB/s\n", bandwidth / 1e9);

  const KvCacheSpec spec = *ResolveKvCacheSpec(options.cache, options.model);
  const KvLayout layout = *KvLayout::Create(spec, (*backend)->code_order());
  const int64_t longest = options.depth + 2 * options.rows;
  const int64_t pages = CeilDiv(longest, layout.page_tokens());
  const KvPoolPlan plan{.open_pages = layout.quantized()
                                          ? CeilDiv(options.rows, layout.page_tokens()) +
                                                layout.sink_pages() + layout.recent_pages() + 2
                                          : pages,
                        .sealed_pages = layout.quantized() ? pages : 0,
                        .norm_slots = 1};
  Result<std::unique_ptr<KvCache>> cache = KvCache::Create(backend->get(), layout, plan);
  CHECK(cache.ok(), cache.error().message);
  Result<std::unique_ptr<LlamaModel>> model =
      LlamaModel::Random(options.model, WeightFormat::kBF16, 1, backend->get(), options.rows, 1);
  CHECK(model.ok(), model.error().message);
  const auto fresh = [&] { return BenchSequence(backend->get(), model->get(), cache->get()); };

  {
    BenchSequence sequence = fresh();
    sequence.Step(64);
    const double seconds = MedianSeconds(options.decode_steps, [&] { sequence.Step(1); });
    const double bytes = StreamedBytes(options.model);
    std::printf(
        "decode, depth 64          %8.2f tokens/s, %.2f GB of weights a token, %.1f %% of the "
        "reading loop\n",
        1 / seconds, bytes / 1e9, 100 * bytes / seconds / bandwidth);
  }
  // Prefill and its peer in turn, so that a drift of the machine meets both.
  std::vector<double> ours, peers;
  for (int i = 0; i < options.runs; ++i) {
    BenchSequence sequence = fresh();
    ours.push_back(Seconds([&] { sequence.Step(options.rows); }));
    peers.push_back(DnnlPrefillSeconds(options, threads));
  }
  const double rows = static_cast<double>(options.rows);
  std::printf("prefill %ld, depth 0       %8.1f tokens/s\n", options.rows, rows / Median(ours));
  std::printf("  oneDNN, its GEMMs alone %8.1f tokens/s; prefill runs at %.0f %% of that\n",
              rows / Median(peers), 100 * Median(peers) / Median(ours));
  // At depth, then at once without.
  std::vector<double> deep, shares;
  for (int i = 0; i < options.runs; ++i) {
    BenchSequence sequence = fresh();
    for (int64_t at = 0; at < options.depth; at += options.rows) sequence.Step(options.rows);
    deep.push_back(Seconds([&] { sequence.Step(options.rows); }));
    BenchSequence other = fresh();
    shares.push_back(Seconds([&] { other.Step(options.rows); }) / deep.back());
  }
  std::printf("prefill %ld, depth %ld    %8.1f tokens/s; %.0f %% of depth 0\n", options.rows,
              options.depth, rows / Median(deep), 100 * Median(shares));
  return 0;
}

}  // namespace
}  // namespace innerq

int main(int argc, char** argv) {
  innerq::Options options;
  innerq::ModelConfig& model = options.model;
  model.num_layers = 16;
  model.hidden_size = 2048;
  model.intermediate_size = 8192;
  model.num_heads = 32;
  model.num_kv_heads = 8;
  model.head_dim = 64;
  model.vocab_size = 32000;
  model.max_positions = 131072;
  CLI::App app("Decode and prefill of a random Llama beside their floors");
  app.add_option("--layers", model.num_layers);
  app.add_option("--hidden", model.hidden_size);
  app.add_option("--intermediate", model.intermediate_size);
  app.add_option("--heads", model.num_heads);
  app.add_option("--kv-heads", model.num_kv_heads);
  app.add_option("--head-dim", model.head_dim);
  app.add_option("--vocab", model.vocab_size);
  app.add_option("--threads", options.backend.threads);
  app.add_option("--variant", options.backend.variant);
  app.add_option("--key-bits", options.cache.key.bits);
  app.add_option("--value-bits", options.cache.value.bits);
  app.add_option("--depth", options.depth, "depth of the second prefill, tokens");
  app.add_option("--rows", options.rows, "tokens of a prefill step");
  app.add_option("--runs", options.runs, "of each prefill, of which the median is taken")
      ->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  return innerq::Run(options);
}
