// The promise of the cache, end to end: on one backend a request's logits are the same to the bit,
// whoever its neighbours are, however its prompt is cut, and whether it was preempted.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/kv_cache.h"
#include "gtest/gtest.h"
#include "tests/engine/engine_test_util.h"
#include "tests/engine/llama_step_model.h"

namespace innerq {
namespace {

constexpr int32_t kMark = 255;  // first token of the request under test, and of no other
constexpr int64_t kMaxContext = 384;
constexpr int kElders = 3;  // neighbours that come before the request under test

using LogitsByPosition = std::map<int64_t, std::vector<float>>;

// What a model saw; read when the engine is at rest.
struct Record {
  LogitsByPosition logits;  // of the marked request
  int64_t num_starts = 0;   // of the marked request: once, and again after each preemption
  int64_t num_seals = 0;    // of all
};

// A random Llama that records the logits of the marked request.
class RecordingModel : public LlamaStepModel {
 public:
  RecordingModel(const Config& config, std::shared_ptr<Record> record)
      : LlamaStepModel(config), record_(std::move(record)) {}

  Result<std::span<const float>> Step(const ForwardBatch& batch) override {
    ASSIGN_OR_RETURN(const std::span<const float> logits, LlamaStepModel::Step(batch));
    record_->num_seals += static_cast<int64_t>(batch.seals.size());
    for (const SequenceSlice& slice : batch.slices) {
      // The first page stays open for a sequence's whole stay: its id names the sequence.
      const int32_t id = slice.pages[0].open_id;
      if (slice.first_position == 0) {
        const bool marked = batch.token_ids[static_cast<size_t>(slice.row_begin)] == kMark;
        if (marked) marked_page_ = id;
        if (marked) ++record_->num_starts;
        if (!marked && marked_page_ == id) marked_page_ = -1;  // preempted, its page taken over
      }
      if (id != marked_page_) continue;
      for (size_t i = 0; i < batch.logit_rows.size(); ++i) {
        const int64_t row = batch.logit_rows[i];
        if (row < slice.row_begin || row >= slice.row_begin + slice.num_rows) continue;
        const auto width = static_cast<size_t>(vocab_size());
        const std::span<const float> values = logits.subspan(i * width, width);
        record_->logits[batch.positions[static_cast<size_t>(row)]].assign(values.begin(),
                                                                          values.end());
      }
    }
    return logits;
  }

 private:
  std::shared_ptr<Record> record_;
  int32_t marked_page_ = -1;
};

struct Outcome {
  std::vector<TokenEvent> events;
  Record record;
  int64_t preemptions = 0;
};

struct NamedSchedule {
  const char* name;
  int64_t max_batch_tokens;
  int num_neighbours;
  bool tiny_pools;
  int64_t max_logit_rows = 64;
};

Outcome Serve(const std::string& variant, std::optional<WeightFormat> format,
              const KvCacheOptions& cache, const NamedSchedule& run) {
  const KvLayout layout =
      KvLayout::Create(ResolveKvCacheSpec(cache, TinyLlama()).value(), CodeOrder::kRowMajor)
          .value();
  PageCounts pools{300, 100, 32};
  // One long sequence and a little: when its three elders reach their third page, the marked
  // request has to make room and to begin again. An exact prompt needs more pages than what comes
  // after it.
  if (run.tiny_pools) {
    pools = WorstPeakPages(layout, kMaxContext - 1, cache.exact_prefill) +
            PageCounts{cache.exact_prefill ? 1 : 6, 3, 1};
  }
  auto record = std::make_shared<Record>();
  EngineOptions options;
  options.max_sequences = 32;
  options.max_batch_tokens = run.max_batch_tokens;
  options.max_context = kMaxContext;
  options.exact_prefill = cache.exact_prefill;
  const LlamaStepModel::Config config{variant, format, cache, pools, run.max_logit_rows};
  const auto engine =
      Engine::Create(options, std::make_unique<RecordingModel>(config, record)).value();
  Request request = RequestOf(290, 50, 77);
  request.prompt[0] = kMark;
  request.sampling.temperature = 0.9f;
  request.sampling.frequency_penalty = 0.2f;
  request.sampling.logit_bias = {{kMark, -100.0f}};
  request.sampling.num_logprobs = 1;
  request.prompt_logprobs = 3;
  std::vector<Request> requests;
  for (int i = 0; i < run.num_neighbours; ++i) {
    // The elders grow long while the marked request runs.
    requests.push_back(i < kElders ? RequestOf(30, 300, 500 + i)
                                   : RequestOf(10 + 9 * i, 30, 500 + i));
  }
  const auto marked = std::min<size_t>(kElders, requests.size());
  requests.insert(requests.begin() + static_cast<std::ptrdiff_t>(marked), std::move(request));
  // As one group they meet in the first step, whatever the threads' pace.
  ResponseGroup group = engine->SubmitGroup(std::move(requests)).value();
  Outcome outcome;
  outcome.events = ReadAll(group.readers[marked]).events;
  group.readers.clear();
  engine->Drain(kLong);
  outcome.preemptions = engine->Stats().preemptions;
  outcome.record = *record;
  return outcome;
}

// Parameter: a CPU variant, or cuda, and a cache.
struct Case {
  std::string variant;
  std::string cache_name;
  std::optional<WeightFormat> format;  // nullopt: codes
  KvCacheOptions cache;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.variant << " " << c.cache_name; }

std::vector<Case> Cases() {
  KvCacheOptions base;  // InnerQ base: 3-bit keys and values
  KvCacheOptions mixed = base;
  mixed.value.mode = QuantMode::kHybrid;
  mixed.layers = {{.first_layer = 0, .last_layer = 0, .key = {.bits = 16}, .value = {.bits = 16}}};
  KvCacheOptions exact = base;
  exact.exact_prefill = true;
  KvCacheOptions plain;
  plain.key.bits = plain.value.bits = 16;
  std::vector<Case> cases;
  for (const std::string& variant : CpuVariants()) {
#if defined(INNERQ_SANITIZED)
    if (variant == "scalar") continue;  // takes minutes
#endif
    cases.push_back({variant, "base", WeightFormat::kBF16, base});
  }
  const std::string best = CpuVariants().front();
  cases.push_back({"cuda", "base", WeightFormat::kBF16, base});
  for (const std::string& variant : {best, std::string("cuda")}) {
    cases.push_back({variant, "base_codes", std::nullopt, base});
    cases.push_back({variant, "base_f32", WeightFormat::kF32, base});
    cases.push_back({variant, "mixed", WeightFormat::kBF16, mixed});
    cases.push_back({variant, "exact", WeightFormat::kBF16, exact});
    cases.push_back({variant, "plain", WeightFormat::kF16, plain});
  }
  return cases;
}

double LogSoftmax(const std::vector<float>& logits, int32_t id) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return logits[static_cast<size_t>(id)] - largest - std::log(sum);
}

class ExactnessOfCaches : public testing::TestWithParam<Case> {};

TEST_P(ExactnessOfCaches, LogitsDoNotDependOnNeighboursChunksOrPreemption) {
  const auto& [variant, cache_name, format, cache] = GetParam();
  if (const std::string why = WhyAbsent(variant); !why.empty()) GTEST_SKIP() << why;
  const Outcome alone = Serve(variant, format, cache, {"alone", 512, 0, false, 512});
  ASSERT_EQ(alone.events.size(), 289u + 50u) << "what scores the prompt, and the answer";
  ASSERT_EQ(alone.record.logits.size(), alone.events.size());
  EXPECT_EQ(alone.record.num_seals, cache.key.quantized() ? 6 : 0);
  for (size_t i = 0; i < alone.events.size(); ++i) {
    const TokenEvent& event = alone.events[i];
    const std::vector<float>& logits = alone.record.logits.at(static_cast<int64_t>(i));
    EXPECT_NEAR(event.logprob, LogSoftmax(logits, event.token_id), 1e-6) << "position " << i;
    EXPECT_EQ(event.is_prompt, i < 289);
  }
  const std::vector<float>& first = alone.record.logits.begin()->second;
  const auto [low, high] = std::minmax_element(first.begin(), first.end());
  ASSERT_GT(*high - *low, 0.1f) << "the logits are too flat to tell anything";
  for (const NamedSchedule& run : {NamedSchedule{"16 neighbours", 512, 16, false},
                                   {"chunks of 1", 1, 0, false},
                                   {"chunks of 32", 32, 0, false},
                                   {"chunks of 33", 33, 0, false},
                                   {"16 neighbours, 33 rows", 33, 16, false},
                                   {"32 rows with logits", 512, 0, false, 32},
                                   {"preempted", 512, 16, true}}) {
    SCOPED_TRACE(run.name);
    const Outcome other = Serve(variant, format, cache, run);
    ExpectSameEvents(other.events, alone.events);
    ASSERT_EQ(other.record.logits.size(), alone.record.logits.size());
    for (const auto& [position, row] : alone.record.logits) {
      const auto found = other.record.logits.find(position);
      ASSERT_NE(found, other.record.logits.end());
      ASSERT_EQ(std::memcmp(row.data(), found->second.data(), row.size() * sizeof(float)), 0)
          << "logits of position " << position << " differ";
    }
    EXPECT_EQ(other.record.num_starts > 1, run.tiny_pools) << "the pools have the wrong size";
    EXPECT_EQ(other.preemptions > 0, run.tiny_pools);
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, ExactnessOfCaches, testing::ValuesIn(Cases()),
                         [](const auto& chosen) {
                           return chosen.param.variant + "_" + chosen.param.cache_name;
                         });

double RootMeanSquareDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::pow(static_cast<double>(a[i]) - b[i], 2);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

// A layer that keeps 16 bits among quantized ones has its pages moved to the sealed pool as well;
// were they lost, its error would be as large as the logits, not smaller than that of two 8-bit
// layers together.
TEST(Exactness, LayerThatKeepsF16AmongQuantizedOnesLosesNothing) {
  KvCacheOptions plain;
  plain.key.bits = plain.value.bits = 16;
  KvCacheOptions eight;
  eight.key.bits = eight.value.bits = 8;
  KvCacheOptions mixed = eight;
  mixed.layers = {{.first_layer = 0, .last_layer = 0, .key = {.bits = 16}, .value = {.bits = 16}}};
  std::vector<std::string> variants = CpuVariants();
#if defined(INNERQ_SANITIZED)
  variants.resize(1);  // minutes for what has no threads or addresses of its own
#endif
  if (WhyAbsent("cuda").empty()) variants.push_back("cuda");
  for (const std::string& variant : variants) {
    SCOPED_TRACE(variant);
    const auto logits = [&](const KvCacheOptions& cache) {
      const Outcome outcome = Serve(variant, WeightFormat::kF32, cache, {"alone", 512, 0, false});
      return outcome.record.logits.at(289);  // after the prompt, which all share
    };
    const std::vector<float> expected = logits(plain);
    const double both = RootMeanSquareDifference(logits(eight), expected);
    const double one = RootMeanSquareDifference(logits(mixed), expected);
    ASSERT_GT(both, 0);
    const bool near = one <= 2 * both;
    EXPECT_TRUE(near) << one << " with one quantized layer, " << both << " with two";
  }
}

}  // namespace
}  // namespace innerq
