// The promise of the prefix cache: whatever of a prompt was found, however long ago it was computed
// and whoever uses it as well, every row that is computed has the logits of an engine without a
// cache, bit for bit.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine/kv_cache.h"
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

struct CacheShape {
  bool quantized;
  int64_t recent_tokens;
  bool norms;
  int64_t sink_tokens;
};

// Requests that resemble each other in all ways: repetitions, conversations, common beginnings,
// under several salts; some are scored, some leave. Every row is compared with the oracle's.
class Crowd {
 public:
  Crowd(const CacheShape& shape, uint32_t seed)
      : layout_(TestLayout(shape.quantized, shape.recent_tokens, shape.norms, shape.sink_tokens)),
        random_(seed) {
    // Even seeds: pools that hold one sequence of the longest kind and little more.
    PageCounts pools = WorstPeakPages(layout_, kLongest, false);
    pools = pools + PageCounts{Draw(4), Draw(4), Draw(2)};
    if (seed % 2 == 1) pools = pools + pools + pools + pools + pools + pools;
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
  const CacheShape shapes[] = {{true, 96, true, 32},  {true, 32, true, 32}, {true, 32, true, 0},
                               {true, 64, false, 32}, {true, 32, true, 64}, {false, 96, true, 32}};
#if defined(INNERQ_SANITIZED)
  constexpr int64_t kSeeds = 6;
#else
  constexpr int64_t kSeeds = 24;
#endif
  int64_t requests = 0, rows = 0, steps = 0, hits = 0, evictions = 0, preemptions = 0;
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
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
  EXPECT_EQ(requests, 150 * kSeeds);
  EXPECT_GT(rows, 8000 * kSeeds);
  EXPECT_GT(steps, 2000 * kSeeds);
  EXPECT_GT(hits, 1500 * kSeeds) << "tokens found";
  EXPECT_GT(evictions, 40 * kSeeds);
  EXPECT_GT(preemptions, kSeeds / 2);
}

struct Turn {
  int64_t found = 0;  // tokens
  int64_t known = 0;  // of the chat, computed in earlier turns, in whole pages
};

// Lets chats take turns, one request at a time, in pools as they are planned. Every prompt takes
// two steps, every answer begins a page: so a chat leaves two states with a window each.
std::vector<Turn> TakeTurns(int64_t memory_bytes, uint64_t num_chats, int num_turns) {
  const KvLayout layout = TestLayout();
  KvCacheOptions cache;
  cache.memory_bytes = memory_bytes;
  const KvPoolPlan plan = PlanKvPools(layout, cache, 1, 512, 2000).value();
  const PageCounts pools{plan.open_pages, plan.sealed_pages, plan.norm_slots};
  std::vector<int32_t> text;
  std::vector<Turn> turns;
  StepDriver driver({.max_sequences = 1, .max_batch_tokens = 512, .pools = pools},
                    std::make_unique<HashModel>(layout, pools, nullptr, 512), nullptr,
                    [&](const Sequence& sequence) {
                      text = sequence.tokens;
                      turns.back().found = *sequence.num_cached;
                    });
  std::vector<std::vector<int32_t>> chats(num_chats);
  for (int turn = 0; turn < num_turns; ++turn) {
    for (uint64_t chat = 0; chat < num_chats; ++chat) {
      std::vector<int32_t>& history = chats[chat];
      turns.push_back({.known = std::max<int64_t>(std::ssize(history) - 1, 0) / 32 * 32});
      const std::vector<int32_t> question = PromptOf(630, chat * 100 + static_cast<uint64_t>(turn));
      Request request;
      request.prompt = history;
      request.max_tokens = 12;
      request.prompt.insert(request.prompt.end(), question.begin(), question.end());
      driver.Add(std::move(request));
      driver.RunToEnd();
      history = text;
    }
  }
  return turns;
}

TEST(PrefixCache, ChatsThatAlternateFindAllTheyKnowThoughOneRunsAtATime) {
  for (const Turn& turn : TakeTurns(int64_t{1} << 20, 2, 3)) EXPECT_EQ(turn.found, turn.known);
}

TEST(PrefixCache, WithMoreMemoryMoreChatsAreKept) {
  for (const Turn& turn : TakeTurns(int64_t{4} << 20, 10, 2)) EXPECT_EQ(turn.found, turn.known);
}

// A model whose sequences' rows are kept, by the number of the sequence and position.
class Recorder {
 public:
  Recorder(std::unique_ptr<StepModel> model, const PageCounts& pools, bool prefix_cache,
           int64_t max_batch_tokens = 512)
      : driver_(
            {.max_sequences = 16,
             .max_batch_tokens = max_batch_tokens,
             .pools = pools,
             .prefix_cache = prefix_cache},
            std::move(model),
            [this](const Sequence& sequence, int64_t position, std::span<const float> logits) {
              rows_[sequence.number][position].assign(logits.begin(), logits.end());
            },
            [this](const Sequence& sequence) {
              cached_[sequence.number] = sequence.finish->usage.cached_tokens;
            }) {}

  StepDriver& driver() { return driver_; }
  // Runs a request to its end, others may go on; its number.
  int64_t Run(const std::vector<int32_t>& prompt, int64_t max_tokens = 4) {
    const int64_t number = Add(prompt, max_tokens);
    while (!cached_.contains(number) && !testing::Test::HasFatalFailure()) driver_.Step();
    return number;
  }
  int64_t Add(const std::vector<int32_t>& prompt, int64_t max_tokens) {
    Request request;
    request.prompt = prompt;
    request.max_tokens = max_tokens;
    return driver_.Add(std::move(request))->number;
  }
  const std::map<int64_t, Row>& rows(int64_t number) const { return rows_.at(number); }
  int64_t cached(int64_t number) const { return cached_.at(number); }

 private:
  std::map<int64_t, std::map<int64_t, Row>> rows_;
  std::map<int64_t, int64_t> cached_;  // of those that have finished
  StepDriver driver_;
};

// A kind of model, and the pools that one gets.
struct Maker {
  std::string name;
  // Empty if there is no such model. Of what it made only one may step at a time.
  std::function<std::unique_ptr<StepModel>(const PageCounts&)> make;
};

void PrintTo(const Maker& maker, std::ostream* out) { *out << maker.name; }

class ExactnessOfPrefixes : public testing::TestWithParam<Maker> {};

// Prompts of ten pages less a little: at the end of one, five (or more) pages are sealed.
TEST_P(ExactnessOfPrefixes, HitsOfAllKindsGiveTheLogitsOfAColdRun) {
  if (!GetParam().make) GTEST_SKIP() << "set INNERQ_MODEL to a Hugging Face model directory";
  const PageCounts plenty{200, 100, 16};
  Recorder cold(GetParam().make(plenty), plenty, /*prefix_cache=*/false);
  const auto random = [&](int64_t length, uint64_t seed) {
    return PromptOf(length, seed, cold.driver().vocab_size());
  };
  const auto prompt_of = [&](int64_t shared, uint64_t seed) {
    std::vector<int32_t> prompt = random(shared, 1);
    for (const int32_t token : random(310 - shared, seed)) prompt.push_back(token);
    return prompt;
  };
  const std::vector<int32_t> first = prompt_of(310, 1), second = prompt_of(200, 2),
                             third = prompt_of(200, 3);
  std::map<std::vector<int32_t>, int64_t> alone;
  for (const auto& prompt : {first, second, third}) alone[prompt] = cold.Run(prompt);
  const auto expect_same = [&](const Recorder& warm, int64_t number,
                               const std::vector<int32_t>& prompt, int64_t cached) {
    EXPECT_EQ(warm.cached(number), cached);
    const std::map<int64_t, Row>& expected = cold.rows(alone.at(prompt));
    EXPECT_EQ(warm.rows(number).begin()->first, cached) << "what was found was computed again";
    ASSERT_EQ(warm.rows(number).rbegin()->first, expected.rbegin()->first);
    for (const auto& [position, row] : warm.rows(number)) {
      ASSERT_TRUE(SameBits(row, expected.at(position))) << "position " << position;
    }
  };

  // Chunks of 100 tokens cut pages.
  Recorder warm(GetParam().make(plenty), plenty, /*prefix_cache=*/true, 100);
  // Where two prompts part the state is known only after the second, but for that after the sinks;
  // F16 pages are states anywhere.
  const KvLayout& layout = cold.driver().layout();
  const int64_t at_first_parting = (layout.quantized() ? layout.sink_pages() : 6) * 32;
  expect_same(warm, warm.Run(first), first, 0);
  expect_same(warm, warm.Run(first), first, 9 * 32);
  expect_same(warm, warm.Run(second), second, at_first_parting);
  expect_same(warm, warm.Run(third), third, 6 * 32);

  // The first answer goes on and on while others begin as it did.
  Recorder busy(GetParam().make(plenty), plenty, true);
  const int64_t donor = busy.Add(first, 40);
  for (int i = 0; i < 12; ++i) busy.driver().Step();
  expect_same(busy, busy.Run(first), first, 9 * 32);
  expect_same(busy, busy.Run(second), second, at_first_parting);
  expect_same(busy, busy.Run(third), third, 6 * 32);
  EXPECT_EQ(busy.driver().scheduler().running().size(), 1u) << "the donor has finished too early";
  busy.driver().RunToEnd();
  for (const auto& [position, row] : cold.rows(alone.at(first))) {
    ASSERT_TRUE(SameBits(row, busy.rows(donor).at(position))) << "the donor was disturbed";
  }

  // Pools of two sequences: strangers take the pages of strangers, again and again.
  const PageCounts one = WorstPeakPages(layout, 320, false);
  Recorder pressed(GetParam().make(one + one), one + one, true);
  expect_same(pressed, pressed.Run(first), first, 0);
  for (uint64_t seed = 10; seed < 14; ++seed) {
    pressed.Run(random(150, seed), 2);
    expect_same(pressed, pressed.Run(first), first, 9 * 32);
  }
  EXPECT_GT(pressed.driver().scheduler().num_prefix_evictions(), 1);
  // Until one needs nearly all.
  pressed.Run(random(310, 20));
  pressed.Run(random(310, 21));
  const int64_t last = pressed.Run(first);
  expect_same(pressed, last, first, pressed.cached(last));
  EXPECT_LT(pressed.cached(last), 9 * 32);
}

std::vector<Maker> Makers() {
  std::vector<Maker> makers;
  const auto hashes = [&](const char* name, const KvLayout& layout) {
    makers.push_back({name, [layout](const PageCounts& pools) {
                        return std::make_unique<HashModel>(layout, pools);
                      }});
  };
  hashes("hashes", TestLayout());
  hashes("hashes_plain", TestLayout(/*quantized=*/false));
  hashes("hashes_no_norms", TestLayout(true, 96, /*norms=*/false));
  const auto llama = [&](const std::string& variant, const char* name,
                         const KvCacheOptions& cache) {
    makers.push_back({variant + "_" + name, [variant, cache](const PageCounts& pools) {
                        return std::make_unique<LlamaStepModel>(LlamaStepModel::Config{
                            variant, WeightFormat::kBF16, cache, pools, 512});
                      }});
  };
  KvCacheOptions mixed, plain, small, outer;
  mixed.value.mode = QuantMode::kHybrid;
  mixed.layers = {{.first_layer = 0, .last_layer = 0, .key = {.bits = 16}, .value = {.bits = 16}}};
  plain.key.bits = plain.value.bits = 16;
  small.recent_tokens = 32;
  small.normalize_keys = false;
  outer.key.axis = outer.value.axis = QuantAxis::kOuter;
  outer.sink_tokens = 0;
  for (const std::string& variant : CpuVariants()) {
#if defined(INNERQ_SANITIZED)
    if (variant == "scalar") continue;  // takes minutes
#endif
    llama(variant, "base", {});
  }
  const std::string best = CpuVariants().front();
  llama(best, "mixed", mixed);
  llama(best, "plain", plain);
  llama(best, "small", small);
  llama(best, "outer", outer);
  Maker& given = makers.emplace_back(Maker{"given", nullptr});
  if (const char* directory = std::getenv("INNERQ_MODEL"); directory != nullptr) {
    given.make = [best, directory,
                  weights = std::shared_ptr<LlamaWeights>()](const PageCounts& pools) mutable {
      if (weights == nullptr) weights = GivenWeights(best, directory, 512);
      LlamaStepModel::Config config{.pools = pools, .max_logit_rows = 512};
      // Groups of keys fill a head.
      while (weights->model->config().head_dim % config.cache.key.group_size != 0) {
        config.cache.key.group_size /= 2;
      }
      return std::make_unique<LlamaStepModel>(weights, config);
    };
  }
  return makers;
}

INSTANTIATE_TEST_SUITE_P(Models, ExactnessOfPrefixes, testing::ValuesIn(Makers()),
                         [](const auto& chosen) { return chosen.param.name; });

}  // namespace
}  // namespace innerq
