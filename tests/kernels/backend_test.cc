// What the public functions of Backend check at the door, and what Reserve refuses.
#include "kernels/backend.h"

#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace innerq {
namespace {

// A step of attention over a cache of one layer, complete until a test takes something away.
class AttentionStep {
 public:
  AttentionStep(int64_t first_position, int64_t num_rows)
      : layout_(*KvLayout::Create(Spec(), backend_->code_order())),
        open_(*backend_->Allocate(layout_.open_pool_bytes(kPages))),
        sealed_(*backend_->Allocate(layout_.sealed_pool_bytes(kPages))),
        norms_(*backend_->Allocate(layout_.key_norm_bytes())),
        x_(*backend_->Allocate(2 * num_rows * kDim * 4)) {
    for (int32_t i = 0; i < kPages; ++i) pages.push_back({i, i});
    kv = {&layout_.layer(0), open_.data(), sealed_.data(), reinterpret_cast<float*>(norms_.data())};
    slice.num_rows = num_rows;
    slice.first_position = first_position;
    slice.norm_id = 0;
  }
  void Run() {
    slice.pages = pages;
    const Shape shape{slice.num_rows, kDim};
    backend_->Attention({x_.View(DType::kF32, shape),
                         kv,
                         &layout_,
                         {&slice, 1},
                         1,
                         1.0f,
                         x_.View(DType::kF32, shape, shape.num_elements() * 4)});
  }

  std::vector<PageRef> pages;
  PagedKvView kv;
  SequenceSlice slice;

 private:
  static constexpr int64_t kDim = 32, kPages = 8;
  static KvCacheSpec Spec() {
    KvCacheSpec spec;
    spec.kv_heads = 1;
    spec.head_dim = kDim;
    spec.layers = {{{.bits = 3}, {.bits = 3}, true}};
    return spec;
  }
  std::unique_ptr<Backend> backend_ = CreateReferenceBackend();
  KvLayout layout_;
  Buffer open_, sealed_, norms_, x_;
};

// Positions 190 to 193 lie in pages 5 and 6: the first rows see page 1 sealed, the last 1 and 2.
AttentionStep AcrossAPage() { return {190, 4}; }

TEST(Backend, AttentionNeedsThePagesThatItReadsAndNoOthers) {
  AttentionStep step = AcrossAPage();
  step.pages[1].open_id = -1;                                                 // always sealed
  for (const size_t page : {0, 3, 4, 5, 6}) step.pages[page].sealed_id = -1;  // always open
  step.pages[7] = {};                                                         // beyond the end
  step.Run();

  AttentionStep first_seal(160, 1);
  first_seal.pages[1].open_id = -1;
  first_seal.Run();

  AttentionStep all_open(159, 1);
  for (PageRef& page : all_open.pages) page.sealed_id = -1;
  all_open.slice.norm_id = -1;
  all_open.kv.sealed_pages = nullptr;
  all_open.kv.key_norms = nullptr;
  all_open.Run();

  AttentionStep exact = AcrossAPage();
  for (PageRef& page : exact.pages) page.sealed_id = -1;
  exact.slice.exact_before = 194;
  exact.Run();
}

TEST(BackendDeathTest, AttentionRefusesPagesThatAreMissing) {
  const auto run_without = [](void (*take)(AttentionStep & step)) {
    AttentionStep step = AcrossAPage();
    take(step);
    step.Run();
  };
  EXPECT_DEATH(run_without([](AttentionStep& s) { s.pages[1].sealed_id = -1; }), "page 1 .*sealed");
  EXPECT_DEATH(run_without([](AttentionStep& s) { s.pages[2].sealed_id = -1; }), "page 2 .*sealed");
  EXPECT_DEATH(run_without([](AttentionStep& s) { s.pages[2].open_id = -1; }), "page 2 .*open");
  EXPECT_DEATH(run_without([](AttentionStep& s) { s.pages[0].open_id = -1; }), "page 0 .*open");
  EXPECT_DEATH(run_without([](AttentionStep& s) { s.pages[6].open_id = -1; }), "page 6 .*open");
  EXPECT_DEATH(run_without([](AttentionStep& s) { s.kv.sealed_pages = nullptr; }), "sealed pages");
  EXPECT_DEATH(run_without([](AttentionStep& s) { s.kv.key_norms = nullptr; }), "key norm");
  EXPECT_DEATH(run_without([](AttentionStep& s) { s.slice.norm_id = -1; }), "key norm");
}

TEST(Backend, ReserveRefusesMoreHeadsOrChannelsThanTilesHold) {
  const std::unique_ptr<Backend> backend = CreateBackend({.device = "cpu"}).value();
  ASSERT_TRUE(backend->Reserve({.max_rows = 1, .max_group = 64}).ok());
  for (const auto& [limits, what, number] :
       {std::tuple{StepLimits{.max_rows = 1, .max_group = 96},
                   "num_attention_heads / num_key_value_heads", "not 96"},
        {StepLimits{.max_rows = 1, .max_head_dim = 512}, "head_dim", "not 512"}}) {
    const Result<void> result = backend->Reserve(limits);
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(result.error().message.find(what), std::string::npos) << result.error().message;
    EXPECT_NE(result.error().message.find(number), std::string::npos) << result.error().message;
  }
}

TEST(Backend, DevicesOtherThanTheCpuHaveNoVariants) {
  for (const std::string device : {"cuda", "reference"}) {
    const auto refused = CreateBackend({.device = device, .variant = "avx2"});
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.error().param, "backend.variant");
    EXPECT_NE(refused.error().message.find(device), std::string::npos) << refused.error().message;
  }
}

#if !defined(INNERQ_SANITIZED)  // the shadow of a gigabyte is several
TEST(Backend, MeasuresHowFastItsMemoryIsRead) {
  const auto cpu = CreateBackend({.device = "cpu", .threads = 2}).value();
  EXPECT_EQ(cpu->threads(), 2);
  const std::optional<double> bandwidth = cpu->MeasureReadBandwidth().value();
  EXPECT_GT(bandwidth.value(), 1e8) << "bytes per second";
  EXPECT_LT(bandwidth.value(), 1e14);
}
#endif

TEST(Backend, KnowsWhatMemoryIsLeftAndWhatItCannotMeasure) {
  const auto reference = CreateReferenceBackend();
  EXPECT_EQ(reference->threads(), 1);
  EXPECT_FALSE(reference->MeasureReadBandwidth().value().has_value());
  for (const std::string device : {"cpu", "reference"}) {
    const int64_t bytes = CreateBackend({.device = device}).value()->available_bytes();
    EXPECT_GT(bytes, int64_t{1} << 20);
    EXPECT_LT(bytes, int64_t{1} << 50);
  }
}

TEST(Backend, CudaComesUpOrSaysWhyNot) {
  const auto cuda = CreateBackend({.device = "cuda"});
  if (cuda.ok()) {
    EXPECT_FALSE((*cuda)->host_visible());
    EXPECT_GT((*cuda)->available_bytes(), int64_t{1} << 20);
    EXPECT_GT((*cuda)->MeasureReadBandwidth().value().value(), 1e10) << "bytes per second";
    return;
  }
  EXPECT_EQ(cuda.error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(cuda.error().param, "backend.device");
  EXPECT_EQ(cuda.error().message.substr(0, 13), "device cuda: ") << cuda.error().message;
}

TEST(Backend, SelectTopPutsTheLargestFirstAndOfEqualsTheLowerColumn) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> x = {1,  3, -2, 3,          1, 3,      // ties
                                -1, 0, -5, -0.0f,      0, -1,     // zeros of both signs
                                9,  2, 9,  -kInfinity, 1, kNaN};  // not finite above all
  const std::vector<std::vector<int32_t>> expected = {{1, 3, 5, 0}, {1, 3, 4, 0}, {3, 5, 0, 2}};
  const std::unique_ptr<Backend> backend = CreateReferenceBackend();
  for (const int64_t k : {4, 1}) {
    std::vector<TopLogit> top(static_cast<size_t>(3 * k));
    backend->SelectTop(
        {{reinterpret_cast<const std::byte*>(x.data()), DType::kF32, Shape{3, 6}}, k, top});
    for (size_t i = 0; i < top.size(); ++i) {
      const size_t row = i / static_cast<size_t>(k), rank = i % static_cast<size_t>(k);
      EXPECT_EQ(top[i].id, expected[row][rank]) << "row " << row << ", rank " << rank;
      EXPECT_EQ(FloatBits(top[i].logit), FloatBits(x[row * 6 + static_cast<size_t>(top[i].id)]));
    }
  }
  const auto select = [&](int64_t k, size_t size) {
    std::vector<TopLogit> top(size);
    backend->SelectTop(
        {{reinterpret_cast<const std::byte*>(x.data()), DType::kF32, Shape{3, 6}}, k, top});
  };
  EXPECT_DEATH(select(0, 0), "k out of range");
  EXPECT_DEATH(select(7, 21), "k out of range");
  EXPECT_DEATH(select(2, 5), "k elements per row");
}

TEST(Backend, ReadToHostCopiesMemoryOfOperations) {
  const std::unique_ptr<Backend> backend = CreateReferenceBackend();
  ASSERT_TRUE(backend->host_visible());
  Buffer from = *backend->Allocate(16), to = *backend->AllocateForHost(16);
  from.data()[15] = std::byte{7};
  backend->ReadToHost(from.data(), 16, to.data());
  ASSERT_TRUE(backend->Synchronize().ok());
  EXPECT_EQ(to.data()[15], std::byte{7});
  backend->ReadToHost(nullptr, 0, nullptr);
}

}  // namespace
}  // namespace innerq
