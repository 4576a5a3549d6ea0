// The promise of the prefix cache: whatever of a prompt was found, however long ago it was computed
// and whoever uses it as well, every row that is computed has the logits of an engine without a
// cache, bit for bit.
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/engine/engine_test_util.h"
#include "tests/engine/llama_step_model.h"
#include "tests/engine/step_driver.h"

namespace innerq {
namespace {

using Row = std::vector<float>;

bool SameBits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

struct Shape {
  bool quantized;
  int64_t recent_tokens;
  bool norms;
  int64_t sink_tokens;
};

// Requests that resemble each other in all ways: repetitions, conversations, common beginnings,
// under several salts; some are scored, some leave. Every row is compared with the oracle's.
class Crowd {
 public:
  Crowd(const Shape& shape, uint32_t seed)
      : layout_(TestLayout(shape.quantized, shape.recent_tokens, shape.norms, shape.sink_tokens)),
        random_(seed) {
    // Even seeds: pools that hold one sequence of the longest kind and little more.
    PageCounts pools = WorstPeakPages(layout_, kLongest, false);
    pools = pools + PageCounts{Draw(4), Draw(4), Draw(2)};
    if (seed % 2 == 1) pools = pools + pools + pools;
    if (!layout_.quantized()) pools.sealed = 0;
    SchedulerLimits limits{.max_sequences = 1 + Draw(8),
                           .max_batch_tokens = 8 + Draw(seed % 3 == 0 ? 40 : 300),
                           .pools = pools};
    limits.max_logit_rows = limits.max_sequences + Draw(60);
    driver_ = std::make_unique<StepDriver>(
        limits, std::make_unique<HashModel>(layout_, pools, nullptr, 1 << 20),
        [this](const Sequence& sequence, int64_t position, std::span<const float> logits) {
          CheckRow(sequence, position, logits);
        },
        [this](const Sequence& sequence) {
          texts_.push_back(sequence.tokens);
          live_.erase(&sequence);
        });
  }

  void Run(int num_requests) {
    for (int i = 0; i < num_requests && !testing::Test::HasFatalFailure(); ++i) {
      Sequence* const sequence = driver_->Add(RandomRequest());
      live_.emplace(sequence, Live{hash_decoder::Oracle(layout_, 0), {}});
      if (Draw(12) == 0) cancel_.insert(sequence->number);
      for (int64_t steps = Draw(8); steps > 0; --steps) StepAndCancel();
    }
    cancel_.clear();
    driver_->RunToEnd();
    EXPECT_TRUE(live_.empty());
  }

  const Scheduler& scheduler() const { return driver_->scheduler(); }
  int64_t num_rows() const { return num_rows_; }
  int64_t num_steps() const { return driver_->num_steps(); }

 private:
  static constexpr int64_t kLongest = 330;
  struct Live {
    hash_decoder::Oracle oracle;
    std::vector<Row> rows;  // expected, by position
  };

  int64_t Draw(int64_t below) { return static_cast<int64_t>(random_()) % below; }

  void StepAndCancel() {
    for (auto& [sequence, live] : live_) {
      if (cancel_.contains(sequence->number) && Draw(6) == 0) {
        const_cast<Sequence*>(sequence)->End(FinishReason::kCancelled);
      }
    }
    driver_->Step();
  }

  Request RandomRequest() {
    Request request;
    std::vector<int32_t>& prompt = request.prompt;
    const int64_t kind = Draw(8);
    if (kind > 0 && !texts_.empty()) {
      prompt = texts_[static_cast<size_t>(std::max<int64_t>(
          Draw(static_cast<int64_t>(texts_.size())), static_cast<int64_t>(texts_.size()) - 12))];
      if (kind > 5) prompt.resize(static_cast<size_t>(1 + Draw(std::ssize(prompt))));
      if (kind == 5) prompt.resize(prompt.size() / 32 * 32);  // the last page full
    }
    if (kind != 4 || prompt.empty()) {
      for (int64_t i = 1 + Draw(kind == 0 ? 220 : 40); i > 0; --i) {
        prompt.push_back(static_cast<int32_t>(Draw(hash_decoder::kVocab)));
      }
    }
    if (std::ssize(prompt) > 280) prompt.resize(static_cast<size_t>(100 + Draw(180)));
    request.max_tokens = 1 + Draw(Draw(4) == 0 ? kLongest - std::ssize(prompt) : 12);
    request.sampling.seed = static_cast<uint64_t>(Draw(3));
    if (Draw(6) == 0) request.cache_salt = Draw(2) == 0 ? "one" : "another";
    if (Draw(6) == 0) {
      request.prompt_logprobs = 0;
      if (Draw(2) == 0 && prompt.size() > 1) request.max_tokens = 0;
    }
    return request;
  }

  void CheckRow(const Sequence& sequence, int64_t position, std::span<const float> logits) {
    Live& live = live_.at(&sequence);
    while (std::ssize(live.rows) <= position) {
      live.rows.push_back(live.oracle.Next(sequence.tokens[live.rows.size()]));
    }
    ++num_rows_;
    ASSERT_TRUE(SameBits(logits, live.rows[static_cast<size_t>(position)]))
        << "sequence " << sequence.number << ", position " << position << ", cached "
        << *sequence.num_cached;
  }

  const KvLayout layout_;
  std::mt19937 random_;
  std::unique_ptr<StepDriver> driver_;
  std::map<const Sequence*, Live> live_;
  std::set<int64_t> cancel_;  // numbers of those that will leave
  std::vector<std::vector<int32_t>> texts_;
  int64_t num_rows_ = 0;
};

TEST(PrefixCache, RandomCrowdsGetTheLogitsOfAnEngineWithoutACache) {
  const Shape shapes[] = {{true, 96, true, 32},  {true, 32, true, 32}, {true, 32, true, 0},
                          {true, 64, false, 32}, {true, 32, true, 64}, {false, 96, true, 32}};
  int64_t requests = 0, rows = 0, steps = 0, hits = 0, evictions = 0, preemptions = 0;
  for (uint32_t seed = 0; seed < 24; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Crowd crowd(shapes[seed % std::size(shapes)], seed);
    crowd.Run(150);
    ASSERT_FALSE(HasFailure());
    EXPECT_GT(crowd.scheduler().num_prefix_hits(), 0);
    requests += 150;
    rows += crowd.num_rows();
    steps += crowd.num_steps();
    hits += crowd.scheduler().num_prefix_hits();
    evictions += crowd.scheduler().num_prefix_evictions();
    preemptions += crowd.scheduler().num_preemptions();
  }
  std::printf(
      "%ld requests, %ld rows in %ld steps, %ld tokens found, %ld evictions, "
      "%ld preemptions\n",
      requests, rows, steps, hits, evictions, preemptions);
}

}  // namespace
}  // namespace innerq
