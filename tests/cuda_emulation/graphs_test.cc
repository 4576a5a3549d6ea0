// Steps that run as CUDA graphs give the bits of those that do not.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <string_view>

#include "models/llama.h"
#include "tests/models/step_harness.h"

namespace innerq {
namespace {

using emulation::the_stream;

std::unique_ptr<Backend> CudaBackend(std::function<void(std::string_view)> warn = {}) {
  auto backend = CreateBackend({.device = "cuda", .warn = std::move(warn)});
  CHECK(backend.ok(), backend.error().message);
  return std::move(*backend);
}

// Reserve forgets graphs, and that anything was seen.
void ForgetGraphs(Backend& backend) { CHECK(backend.Reserve({.max_rows = 1}).ok(), "Reserve"); }

constexpr int64_t kMaxRows = 520, kMaxTokens = 576;

ModelConfig SmallModel() {
  ModelConfig config;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_layers = 2;
  config.num_heads = 2;
  config.num_kv_heads = 1;
  config.head_dim = 64;
  config.vocab_size = 50;
  config.max_positions = kMaxTokens;
  return config;
}

std::vector<int32_t> Tokens(int64_t count, int64_t seed) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<int32_t>((i * 31 + i * i / 7 + seed * 13) % 50));
  }
  return tokens;
}

enum class Launches { kGraphs, kPlain };
using Logits = std::vector<std::vector<float>>;

// Prompts and decodes of three sequences: alone and together, while one sequence's pages are
// sealed, others cross a border of segments, and after a prompt so long that staged arrays move.
Logits RunSteps(Launches launches) {
  const std::unique_ptr<Backend> backend = CudaBackend();
  const auto model =
      LlamaModel::Random(SmallModel(), WeightFormat::kBF16, 5, backend.get(), kMaxRows, kMaxRows);
  CHECK(model.ok(), model.error().message);
  const QuantSpec three_bits{.bits = 3};
  const auto harness = StepHarness::Create(
      backend.get(), UniformCacheSpec(SmallModel(), three_bits, three_bits, true), kMaxTokens, 3);
  Logits logits;
  const auto step = [&](const std::vector<StepHarness::Feed>& feeds) {
    if (launches == Launches::kPlain) ForgetGraphs(*backend);
    Logits rows = harness->Step(**model, feeds);
    std::move(rows.begin(), rows.end(), std::back_inserter(logits));
  };
  step({{0, Tokens(150, 0)}});
  for (int32_t i = 0; i < 16; ++i) step({{0, {i}}});
  step({{0, {7}}, {1, Tokens(130, 1)}});
  for (int32_t i = 0; i < 40; ++i) step({{0, {i}}, {1, {(i * 7) % 50}}});
  step({{1, Tokens(20, 3)}, {2, Tokens(500, 2)}});
  for (int32_t i = 0; i < 20; ++i) {
    step({{0, {i}}, {1, {49 - i}}, {2, {(i * 3) % 50}}});
    if (i % 4 == 0) step({{1, {i}}});
  }
  return logits;
}

// Bit by bit, row by row.
void ExpectSameBits(const Logits& a, const Logits& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].size(), b[i].size());
    ASSERT_EQ(std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)), 0) << "row " << i;
  }
}

TEST(CudaGraphs, GiveTheBitsOfPlainLaunches) {
  const int64_t before = the_stream.num_graph_launches;
  const Logits plain = RunSteps(Launches::kPlain);
  EXPECT_EQ(the_stream.num_graph_launches, before);
  const int64_t captures = the_stream.num_captures;
  const Logits replayed = RunSteps(Launches::kGraphs);
  ExpectSameBits(replayed, plain);
  // 84 steps, all but 3 of them decodes; most of these are like one before.
  const int64_t launches = the_stream.num_graph_launches - before;
  RecordProperty("graph_launches", static_cast<int>(launches));
  RecordProperty("captures", static_cast<int>(the_stream.num_captures - captures));
  EXPECT_GT(launches, 2 * 60);
  EXPECT_LT(the_stream.num_captures - captures, launches / 4);
  EXPECT_TRUE(the_stream.waiting.empty());
}

TEST(CudaGraphs, AreDoneWithoutWhereTheyCannotBeMadeAndThatIsSaidOnce) {
  std::vector<std::string> warnings;
  const std::unique_ptr<Backend> backend =
      CudaBackend([&warnings](std::string_view text) { warnings.emplace_back(text); });
  const auto model =
      LlamaModel::Random(SmallModel(), WeightFormat::kBF16, 5, backend.get(), 64, 64);
  ASSERT_TRUE(model.ok());
  const KvCacheSpec spec = UniformCacheSpec(SmallModel());
  const Logits expected =
      StepHarness::Create(backend.get(), spec, 64)->Run(**model, Tokens(20, 0), 1);
  EXPECT_TRUE(warnings.empty());
  const int64_t before = the_stream.num_graph_launches;
  for (int run = 0; run < 2; ++run) {
    ForgetGraphs(*backend);
    the_stream.refuses_captures = true;
    const Logits logits =
        StepHarness::Create(backend.get(), spec, 64)->Run(**model, Tokens(20, 0), 1);
    the_stream.refuses_captures = false;
    ExpectSameBits(logits, expected);
    EXPECT_EQ(the_stream.num_graph_launches, before);
    ASSERT_EQ(warnings.size(), 1u);
    EXPECT_NE(warnings[0].find("no CUDA graph can be made"), std::string::npos) << warnings[0];
  }
}

TEST(CudaGraphs, ReportWhatTheyCouldNotSeal) {
  const std::unique_ptr<Backend> backend = CudaBackend();
  ASSERT_TRUE(backend->Reserve({.max_pages = 64}).ok());
  const QuantSpec four_bits{.bits = 4};
  const KvLayout layout =
      KvLayout::Create(UniformCacheSpec(SmallModel(), four_bits, four_bits), backend->code_order())
          .value();
  constexpr int64_t kPages = 5;
  Buffer open = *backend->Allocate(layout.open_pool_bytes(kPages));
  Buffer sealed = *backend->Allocate(layout.sealed_pool_bytes(kPages));
  const PagedKvView view{&layout.layer(0), open.data(), sealed.data(), nullptr};
  std::vector<SealItem> items;
  for (int32_t i = 0; i < kPages; ++i) items.push_back({i, i, -1});
  const int64_t before = the_stream.num_graph_launches;
  for (const bool finite : {true, true, true, false, true, false, true}) {
    // The emulated device's memory is the host's.
    view.OpenKeys(2, 0)[7] = finite ? uint16_t{0x3c00} : uint16_t{0x7e00};
    backend->Seal({view, items});
    const Result<void> result = backend->Synchronize();
    EXPECT_EQ(result.ok(), finite);
    EXPECT_EQ(backend->failed_seals(), finite ? std::vector<int64_t>() : std::vector<int64_t>{2});
  }
  EXPECT_EQ(the_stream.num_graph_launches - before, 6) << "all but the first";
}

// More arrays than fit are under way at once: the host must not write where one still waits.
TEST(CudaGraphs, ArgumentsSurviveWithoutSynchronize) {
  const std::unique_ptr<Backend> backend = CudaBackend();
  ASSERT_TRUE(backend->Reserve({.max_rows = 16, .max_pages = 1}).ok());
  constexpr int64_t kRows = 16, kCalls = 5000;
  Buffer from = *backend->Allocate(kRows * 4), to = *backend->Allocate(kCalls * kRows * 4);
  for (int64_t i = 0; i < kRows; ++i) {
    reinterpret_cast<float*>(from.data())[i] = static_cast<float>(i);
  }
  const auto row = [](int64_t call, int64_t i) { return (call >> (i % 8 * 2) & 3) + i / 4; };
  for (int64_t call = 0; call < kCalls; ++call) {
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < kRows; ++i) rows.push_back(row(call, i));
    backend->GatherRows({from.View(DType::kF32, Shape{kRows, 1}), rows,
                         to.View(DType::kF32, Shape{kRows, 1}, call * kRows * 4)});
  }
  ASSERT_TRUE(backend->Synchronize().ok());
  for (int64_t call = 0; call < kCalls; ++call) {
    for (int64_t i = 0; i < kRows; ++i) {
      ASSERT_EQ(reinterpret_cast<const float*>(to.data())[call * kRows + i],
                static_cast<float>(row(call, i)))
          << call;
    }
  }
}

}  // namespace
}  // namespace innerq
