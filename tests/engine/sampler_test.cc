#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace innerq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

TokenEvent SampleOk(const std::vector<float>& logits, const SamplingParams& params,
                    int64_t index = 0, const SeenTokens& seen = {},
                    const std::vector<int32_t>& masked = {}) {
  SamplerScratch scratch;
  return Sample({logits, &params, &seen, masked, index}, scratch).value();
}

int32_t Greedy(const std::vector<float>& logits, SamplingParams params,
               const SeenTokens& seen = {}) {
  params.temperature = 0;
  return SampleOk(logits, params, 0, seen).token_id;
}

std::vector<float> RandomLogits(size_t size, uint32_t seed, float spread = 3.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(size);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

// The filters as their definitions say, by a full sort in double precision: probability by token.
std::vector<double> Expected(const std::vector<float>& logits, const SamplingParams& params) {
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
  if (params.top_k > 0) ids.resize(std::min(ids.size(), static_cast<size_t>(params.top_k)));
  const double max = logits[static_cast<size_t>(ids[0])];
  std::vector<double> weights(logits.size(), 0.0);
  double total = 0;
  for (const int32_t id : ids) {
    const auto i = static_cast<size_t>(id);
    weights[i] = std::exp((logits[i] - max) / params.temperature);
    total += weights[i];
  }
  double sum = 0;
  for (const int32_t id : ids) {
    double& weight = weights[static_cast<size_t>(id)];
    const bool dropped = sum >= params.top_p * total && params.top_p < 1;
    sum += weight;
    if (dropped || weight < params.min_p) weight = 0;
  }
  const double kept = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& weight : weights) weight /= kept;
  return weights;
}

// Draws many tokens and compares counts with probabilities: Pearson's chi-square, whose mean is the
// number of free cells and whose standard deviation sqrt(2 * that). Six deviations with fixed seeds
// leave no room for luck and little for a wrong distribution.
void ExpectDistribution(const std::vector<float>& logits, const SamplingParams& params) {
  constexpr int kDraws = 10000;
  const std::vector<double> expected = Expected(logits, params);
  std::vector<int> counts(logits.size(), 0);
  for (int i = 0; i < kDraws; ++i) {
    ++counts[static_cast<size_t>(SampleOk(logits, params, i).token_id)];
  }
  double chi_square = 0;
  int cells = 0;
  double rest_expected = 0, rest_counted = 0;  // tokens too rare for a cell of their own
  const auto add = [&](double wanted, double counted) {
    chi_square += (counted - wanted) * (counted - wanted) / wanted;
    ++cells;
  };
  for (size_t i = 0; i < counts.size(); ++i) {
    const double wanted = expected[i] * kDraws;
    EXPECT_TRUE(expected[i] > 0 || counts[i] == 0) << "token " << i << " was filtered out";
    if (wanted >= 10) {
      add(wanted, counts[i]);
    } else {
      rest_expected += wanted;
      rest_counted += counts[i];
    }
  }
  if (rest_expected >= 10) add(rest_expected, rest_counted);
  ASSERT_GE(cells, 2) << "nothing was tested";
  const double bound = cells - 1 + 6 * std::sqrt(2.0 * (cells - 1));
  const bool fits = chi_square <= bound;
  EXPECT_TRUE(fits) << chi_square << " with " << cells << " cells, at most " << bound;
}

TEST(Sampler, DrawsFromTheSoftmax) { ExpectDistribution(RandomLogits(50, 1, 1.0f), {}); }

TEST(Sampler, DrawsWithTemperature) {
  SamplingParams params;
  params.temperature = 0.5f;
  ExpectDistribution(RandomLogits(50, 2, 1.0f), params);
  params.temperature = 2.0f;
  ExpectDistribution(RandomLogits(50, 3, 2.0f), params);
}

TEST(Sampler, FiltersAsDefined) {
  std::vector<SamplingParams> cases(6);
  cases[0].top_k = 5;
  cases[1].top_p = 0.7f;
  cases[2].min_p = 0.2f;
  cases[3].top_k = 20, cases[3].top_p = 0.8f;
  cases[4].top_k = 30, cases[4].top_p = 0.95f, cases[4].min_p = 0.05f, cases[4].temperature = 1.5f;
  cases[5].top_p = 0.9f, cases[5].temperature = 0.7f;
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE("case " + std::to_string(i));
    cases[i].seed = i;
    ExpectDistribution(RandomLogits(300, static_cast<uint32_t>(i), 2.0f), cases[i]);
  }
}

// The support alone, on a vocabulary where no full sort may happen, over many nucleus sizes.
TEST(Sampler, NucleusOfALargeVocabularyIsExact) {
  for (const float spread : {0.1f, 1.0f, 4.0f}) {
    const std::vector<float> logits = RandomLogits(20000, 9, spread);
    for (const float top_p : {1e-6f, 0.3f, 0.9f, 0.999f}) {
      SamplingParams params;
      params.top_p = top_p;
      const std::vector<double> expected = Expected(logits, params);
      std::vector<bool> seen(logits.size(), false);
      int outside = 0;
      for (int i = 0; i < 100; ++i) {
        const auto token = static_cast<size_t>(SampleOk(logits, params, i).token_id);
        // At the very edge F32 weights may round differently from the double ones.
        outside += expected[token] == 0 ? 1 : 0;
        seen[token] = true;
      }
      EXPECT_LE(outside, 1) << "spread " << spread << ", top_p " << top_p;
      EXPECT_TRUE(top_p > 1e-6f || std::count(seen.begin(), seen.end(), true) == 1);
    }
  }
}

TEST(Sampler, TakesTheLowestIdAmongEquals) {
  EXPECT_EQ(Greedy({1, 5, 5, 2, 5}, {}), 1);
  SamplingParams top;
  top.top_k = 2;
  for (int i = 0; i < 50; ++i) EXPECT_LE(SampleOk({5, 5, 5, 5}, top, i).token_id, 1);
  top.top_k = 0;
  top.top_p = 0.5f;
  for (int i = 0; i < 50; ++i) EXPECT_LE(SampleOk({5, 5, 5, 5}, top, i).token_id, 1);
  top.top_p = 0;
  for (int i = 0; i < 50; ++i) EXPECT_EQ(SampleOk({1, 5, 5, 5}, top, i).token_id, 1);
}

TEST(Sampler, AddsBiasThenPenaltiesThenMasks) {
  SamplingParams params;
  EXPECT_EQ(Greedy({1, 2, 3}, params), 2);
  params.logit_bias = {{0, 2.5f}, {2, -1.0f}};
  EXPECT_EQ(Greedy({1, 2, 3}, params), 0);
  SeenTokens seen = SeenTokens::InPrompt(std::vector<int32_t>{0});
  params.repetition_penalty = 2;  // of the biased 3.5: 1.75, below token 1
  EXPECT_EQ(Greedy({1, 2, 3}, params, seen), 1);
  params.repetition_penalty = 1.5f;  // 2.33
  EXPECT_EQ(Greedy({1, 2, 3}, params, seen), 0);
  params.temperature = 0;
  EXPECT_EQ(SampleOk({1, 2, 3}, params, 0, seen, {0, 1}).token_id, 2);
}

TEST(Sampler, RepetitionPenaltyPushesNegativeLogitsDown) {
  SamplingParams params;
  params.repetition_penalty = 2;
  const SeenTokens seen = SeenTokens::InPrompt(std::vector<int32_t>{1});
  EXPECT_EQ(Greedy({-1.5f, -1.0f}, params, seen), 0);
}

TEST(Sampler, PresenceCountsOnceAndFrequencyEachTimeInTheAnswerAlone) {
  SeenTokens seen = SeenTokens::InPrompt(std::vector<int32_t>{0, 0, 0, 0});
  SamplingParams presence;
  presence.presence_penalty = 1;
  SamplingParams frequency;
  frequency.frequency_penalty = 1;
  EXPECT_EQ(Greedy({3.5f, 3, 2}, presence, seen), 0) << "the prompt does not count";
  EXPECT_EQ(Greedy({3.5f, 3, 2}, frequency, seen), 0);
  for (int i = 0; i < 3; ++i) seen.AddToAnswer(0);
  EXPECT_EQ(Greedy({3.5f, 3, 2}, presence, seen), 1);
  EXPECT_EQ(Greedy({3.75f, 2.5f, 2}, presence, seen), 0) << "once, not three times";
  EXPECT_EQ(Greedy({4.75f, 2, 2}, frequency, seen), 1) << "three times";
  EXPECT_EQ(Greedy({5.25f, 2, 2}, frequency, seen), 0);
}

TEST(Sampler, SurvivesExtremeParameters) {
  SamplingParams params;
  params.repetition_penalty = 1e-40f;
  const SeenTokens seen = SeenTokens::InPrompt(std::vector<int32_t>{1});
  EXPECT_EQ(SampleOk({1, 2, 3}, params, 0, seen).token_id, 1);
  SamplingParams cold;
  cold.temperature = std::numeric_limits<float>::denorm_min();
  EXPECT_EQ(SampleOk({1, 3, 2, 3}, cold).token_id % 2, 1);
  SamplingParams hot;
  EXPECT_GE(SampleOk({3e38f, -3e38f}, hot).token_id, 0);
}

TEST(Sampler, MaskedTokensAreNeverChosen) {
  SamplingParams params;
  for (int i = 0; i < 100; ++i) EXPECT_EQ(SampleOk({9, 0, 9}, params, i, {}, {0, 2}).token_id, 1);
}

TEST(Sampler, ReportsRatherThanChoosesWhenLogitsAreBroken) {
  const SamplingParams params;
  SamplerScratch scratch;
  const SeenTokens seen;
  for (const float bad : {kNaN, kInfinity, -kInfinity}) {
    const std::vector<float> logits{1, bad, 2};
    const auto result = Sample({logits, &params, &seen, {}, 0}, scratch);
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.error().code, ErrorCode::kInternal);
    EXPECT_NE(result.error().message.find("token 1"), std::string::npos);
  }
  const std::vector<float> logits{1, 2};
  const std::vector<int32_t> all{0, 1};
  EXPECT_FALSE(Sample({logits, &params, &seen, all, 0}, scratch).ok());
}

std::vector<TopLogit> TopOf(const std::vector<float>& logits, int64_t k) {
  std::vector<TopLogit> top(static_cast<size_t>(k));
  CreateReferenceBackend()->SelectTop({{reinterpret_cast<const std::byte*>(logits.data()),
                                        DType::kF32, Shape{1, static_cast<int64_t>(logits.size())}},
                                       k,
                                       top});
  return top;
}

TEST(Sampler, ChoosesFromTheLargestLogitsWhatItChoosesFromAll) {
  std::vector<SamplingParams> cases(9);
  cases[0].temperature = 0;
  cases[1].top_p = 0, cases[1].top_k = 5;
  cases[2].top_k = 1;
  cases[3].top_k = 7, cases[3].temperature = 2;
  cases[4].top_k = 20, cases[4].top_p = 0.8f;
  cases[5].top_k = 40, cases[5].min_p = 0.3f;
  cases[6].top_k = 64, cases[6].top_p = 0.95f, cases[6].min_p = 0.02f;
  cases[7].top_k = 64, cases[7].temperature = 0.3f;
  cases[8].top_k = 33, cases[8].top_p = 1e-6f;
  const SeenTokens seen;
  SamplerScratch scratch;
  std::set<int32_t> chosen;
  for (const bool tied : {false, true}) {
    std::vector<float> logits = RandomLogits(3000, 12, 1.5f);
    if (tied) {
      for (float& logit : logits) logit = std::round(logit);
    }
    for (SamplingParams& params : cases) {
      const int64_t least = NumTopLogits(params, {});
      ASSERT_EQ(least, params.temperature == 0 || params.top_p == 0 ? 1 : params.top_k);
      for (const int64_t k : {least, kMaxTopLogits}) {
        const std::vector<TopLogit> top = TopOf(logits, k);
        for (int64_t index = 0; index < 100; ++index) {
          params.seed = static_cast<uint64_t>(index % 7);
          const TokenEvent event = Sample({{}, &params, &seen, {}, index, top}, scratch).value();
          ASSERT_EQ(event.token_id, SampleOk(logits, params, index).token_id);
          chosen.insert(event.token_id);
        }
      }
    }
  }
  EXPECT_GT(chosen.size(), 40u) << "hardly anything was drawn";
}

TEST(Sampler, NeedsAllLogitsForWhateverElseDependsOnThem) {
  const auto needs = [](const std::function<void(SamplingParams&)>& change) {
    SamplingParams params;
    params.temperature = 0;
    change(params);
    return NumTopLogits(params, {});
  };
  EXPECT_EQ(needs([](auto&) {}), 1);
  EXPECT_EQ(needs([](auto& p) { p.temperature = 1; }), 0);
  EXPECT_EQ(needs([](auto& p) { p.temperature = 1, p.top_p = 0.5f; }), 0);
  EXPECT_EQ(needs([](auto& p) { p.temperature = 1, p.min_p = 0.5f; }), 0);
  EXPECT_EQ(needs([](auto& p) { p.temperature = 1, p.top_k = 65; }), 0);
  EXPECT_EQ(needs([](auto& p) { p.num_logprobs = 0; }), 0);
  EXPECT_EQ(needs([](auto& p) { p.logit_bias = {{3, 1.0f}}; }), 0);
  EXPECT_EQ(needs([](auto& p) { p.repetition_penalty = 1.1f; }), 0);
  EXPECT_EQ(needs([](auto& p) { p.presence_penalty = 0.1f; }), 0);
  EXPECT_EQ(needs([](auto& p) { p.frequency_penalty = 0.1f; }), 0);
  SamplingParams greedy;
  greedy.temperature = 0;
  EXPECT_EQ(NumTopLogits(greedy, std::vector<int32_t>{2}), 0);
}

TEST(Sampler, ReportsABrokenLogitAmongTheLargestAsAmongAll) {
  const SeenTokens seen;
  SamplerScratch scratch;
  SamplingParams greedy, drawn;
  greedy.temperature = 0;
  drawn.top_k = 3;
  for (const SamplingParams& params : {greedy, drawn}) {
    for (const float bad : {kNaN, -kNaN, kInfinity, -kInfinity}) {
      const std::vector<float> logits{1, 5, bad, 2, kInfinity, kNaN};
      const std::vector<TopLogit> top = TopOf(logits, NumTopLogits(params, {}));
      const auto all = Sample({logits, &params, &seen}, scratch);
      const auto largest = Sample({{}, &params, &seen, {}, 0, top}, scratch);
      ASSERT_FALSE(largest.ok());
      EXPECT_EQ(largest.error().code, all.error().code);
      EXPECT_EQ(largest.error().message, all.error().message);
    }
  }
}

TEST(Sampler, LogprobsAreOfTheRawLogits) {
  const std::vector<float> logits = RandomLogits(5000, 4);
  SamplingParams params;
  params.num_logprobs = 20;
  params.temperature = 0.3f;
  params.top_k = 3;
  params.logit_bias = {{17, 50.0f}};
  const TokenEvent event = SampleOk(logits, params);
  EXPECT_EQ(event.token_id, 17);
  long double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<long double>(logit));
  const auto expected = [&](int32_t id) {
    return static_cast<float>(logits[static_cast<size_t>(id)] - std::log(sum));
  };
  // One rounding to float each, of nearly equal numbers: at most one unit in the last place apart.
  const auto near = [](float a, float b) {
    return std::abs(a - b) <= std::abs(b) * std::numeric_limits<float>::epsilon();
  };
  EXPECT_TRUE(near(event.logprob, expected(17)));
  ASSERT_EQ(event.top.size(), 20u);
  std::vector<float> sorted = logits;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  for (size_t i = 0; i < 20; ++i) {
    EXPECT_EQ(logits[static_cast<size_t>(event.top[i].token_id)], sorted[i]);
    EXPECT_TRUE(near(event.top[i].logprob, expected(event.top[i].token_id)));
  }
}

TEST(Sampler, SortsTopLogprobsByLogprobThenId) {
  SamplingParams params;
  params.temperature = 0;
  params.num_logprobs = 3;
  const TokenEvent event = SampleOk({1, 4, 4, 0, 4}, params);
  ASSERT_EQ(event.top.size(), 3u);
  EXPECT_EQ(event.top[0].token_id, 1);
  EXPECT_EQ(event.top[1].token_id, 2);
  EXPECT_EQ(event.top[2].token_id, 4);
  EXPECT_EQ(event.logprob, event.top[0].logprob);
  params.num_logprobs = 0;
  EXPECT_TRUE(SampleOk({1, 4}, params).top.empty());
  EXPECT_LT(SampleOk({1, 4}, params).logprob, 0);
  params.num_logprobs = 20;
  EXPECT_EQ(SampleOk({1, 4}, params).top.size(), 2u) << "a vocabulary of two";
}

TEST(Sampler, DependsOnSeedAndIndexAlone) {
  const std::vector<float> logits = RandomLogits(1000, 5, 1.0f);
  SamplingParams params;
  params.seed = 42;
  SamplerScratch dirty;
  const SeenTokens seen;
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < 64; ++i) tokens.push_back(SampleOk(logits, params, i).token_id);
  for (int64_t i = 63; i >= 0; --i) {  // another order, with scratch that others used
    const auto again = Sample({logits, &params, &seen, {}, i}, dirty);
    EXPECT_EQ(again->token_id, tokens[static_cast<size_t>(i)]);
    SamplingParams other;
    other.top_k = 7;
    other.num_logprobs = 5;
    const std::vector<float> few = RandomLogits(100, static_cast<uint32_t>(i));
    ASSERT_TRUE(Sample({few, &other, &seen, {}, i}, dirty).ok());
  }
  EXPECT_GT(std::set<int32_t>(tokens.begin(), tokens.end()).size(), 40u);
  params.seed = 43;
  int equal = 0, shifted = 0;
  for (int64_t i = 0; i < 63; ++i) {
    const int32_t token = SampleOk(logits, params, i).token_id;
    equal += token == tokens[static_cast<size_t>(i)] ? 1 : 0;
    shifted += token == tokens[static_cast<size_t>(i) + 1] ? 1 : 0;
  }
  EXPECT_LT(equal, 8);
  EXPECT_LT(shifted, 8) << "the next seed must not be the same stream one later";
}

TEST(ValidateSamplingParams, AcceptsTheEndsOfEveryRange) {
  SamplingParams params;
  EXPECT_TRUE(ValidateSamplingParams(params, 100).ok());
  params.temperature = 0, params.top_p = 1, params.min_p = 1, params.repetition_penalty = 2;
  params.presence_penalty = -2, params.frequency_penalty = 2, params.num_logprobs = 20;
  params.logit_bias = {{0, -100.0f}, {99, 100.0f}};
  EXPECT_TRUE(ValidateSamplingParams(params, 100).ok());
  params.temperature = 2, params.top_p = 0, params.min_p = 0;
  EXPECT_TRUE(ValidateSamplingParams(params, 100).ok());
}

TEST(Score, ReportsATokenAsSampleReportsIt) {
  const std::vector<float> logits = RandomLogits(300, 5);
  SamplingParams params;
  params.num_logprobs = 4;
  SamplerScratch scratch;
  for (int64_t index = 0; index < 20; ++index) {
    const TokenEvent sampled = SampleOk(logits, params, index);
    const TokenEvent scored = Score(logits, sampled.token_id, 4, scratch).value();
    EXPECT_EQ(scored.token_id, sampled.token_id);
    EXPECT_EQ(scored.logprob, sampled.logprob);
    ASSERT_EQ(scored.top.size(), sampled.top.size());
    for (size_t i = 0; i < scored.top.size(); ++i) {
      EXPECT_EQ(scored.top[i].token_id, sampled.top[i].token_id);
      EXPECT_EQ(scored.top[i].logprob, sampled.top[i].logprob);
      if (scored.top[i].token_id == scored.token_id) {
        EXPECT_EQ(scored.top[i].logprob, scored.logprob);
      }
    }
  }
  EXPECT_TRUE(Score(logits, 3, 0, scratch).value().top.empty());
  std::vector<int32_t> ids;  // of equals the lowest
  const TokenEvent tied = Score(std::vector<float>{5, 7, 5, 5, 7, 6}, 0, 4, scratch).value();
  for (const TokenLogprob& top : tied.top) ids.push_back(top.token_id);
  EXPECT_EQ(ids, (std::vector<int32_t>{1, 4, 5, 0}));
  EXPECT_EQ(Score(std::vector<float>{0, kNaN}, 0, 0, scratch).error().code, ErrorCode::kInternal);
}

// Rows of all kinds give what they give alone, on any number of threads, call after call.
TEST(RowSampler, RowsDependNeitherOnOthersNorOnThreads) {
  std::vector<std::vector<float>> logits;
  for (uint32_t i = 0; i < 24; ++i) logits.push_back(RandomLogits(700 + 64 * i, i));
  logits[5][17] = kNaN;
  const SeenTokens seen = SeenTokens::InPrompt(std::vector<int32_t>{3, 4, 5});
  std::vector<SamplingParams> params(6);
  params[0].temperature = 0;
  params[1].top_p = 0.8f;
  params[2].repetition_penalty = 1.3f;
  params[3].num_logprobs = 3;
  params[4].top_k = 1500;
  params[5].min_p = 0.1f;
  const std::vector<TopLogit> top = {{7.0f, 11}};
  std::vector<RowArgs> rows;
  for (size_t i = 0; i < logits.size(); ++i) {
    RowArgs row{.sample = {.logits = logits[i],
                           .params = &params[i % params.size()],
                           .seen = &seen,
                           .index = static_cast<int64_t>(i)}};
    if (i % 7 == 3) row.scored = static_cast<int32_t>(i);
    if (i == 12) row.sample.top = top;  // greedy
    rows.push_back(row);
  }
  SamplerScratch scratch;
  for (const int threads : {1, 2, 5}) {
    RowSampler sampler(threads);
    for (int repeat = 0; repeat < 3; ++repeat) {
      const auto results = sampler.Run(rows);
      ASSERT_EQ(results.size(), rows.size());
      for (size_t i = 0; i < rows.size(); ++i) {
        const RowArgs& row = rows[i];
        const auto alone = row.scored ? Score(row.sample.logits, *row.scored, row.num_top, scratch)
                                      : Sample(row.sample, scratch);
        ASSERT_EQ(results[i].ok(), alone.ok()) << i;
        EXPECT_EQ(alone.ok(), i != 5);
        if (!alone) continue;
        EXPECT_EQ(results[i]->token_id, alone->token_id) << i;
        EXPECT_EQ(results[i]->logprob, alone->logprob) << i;
        EXPECT_EQ(results[i]->top.size(), alone->top.size()) << i;
      }
    }
    EXPECT_EQ(sampler.Run({}).size(), 0u);
  }
}

TEST(SeedOfChoice, DiffersForEachChoiceAndSeed) {
  std::set<uint64_t> seeds;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    EXPECT_EQ(SeedOfChoice(seed, 0), seed);
    for (int64_t choice = 0; choice < 50; ++choice) seeds.insert(SeedOfChoice(seed, choice));
  }
  EXPECT_EQ(seeds.size(), 50u * 50u);
}

TEST(ValidateSamplingParams, NamesTheParameterThatIsWrong) {
  const auto refused = [](const char* name, const std::function<void(SamplingParams&)>& change) {
    SamplingParams params;
    change(params);
    const auto result = ValidateSamplingParams(params, 100);
    ASSERT_FALSE(result.ok()) << name;
    EXPECT_EQ(result.error().code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(result.error().param, name);
  };
  for (const float bad : {-0.1f, 2.1f, kNaN, kInfinity}) {
    refused("temperature", [=](auto& p) { p.temperature = bad; });
  }
  for (const float bad : {-0.1f, 1.01f, kNaN}) refused("top_p", [=](auto& p) { p.top_p = bad; });
  for (const float bad : {-0.1f, 1.1f, kNaN}) refused("min_p", [=](auto& p) { p.min_p = bad; });
  refused("top_k", [](auto& p) { p.top_k = -1; });
  for (const float bad : {0.0f, 2.1f, kNaN}) {
    refused("repetition_penalty", [=](auto& p) { p.repetition_penalty = bad; });
  }
  for (const float bad : {-2.1f, 2.1f, kNaN}) {
    refused("presence_penalty", [=](auto& p) { p.presence_penalty = bad; });
    refused("frequency_penalty", [=](auto& p) { p.frequency_penalty = bad; });
  }
  refused("logit_bias", [](auto& p) { p.logit_bias = {{100, 1.0f}}; });
  refused("logit_bias", [](auto& p) { p.logit_bias = {{-1, 1.0f}}; });
  refused("logit_bias", [](auto& p) { p.logit_bias = {{5, kNaN}}; });
  refused("logit_bias", [](auto& p) { p.logit_bias = {{5, 100.5f}}; });
  refused("top_logprobs", [](auto& p) { p.num_logprobs = 21; });
  refused("top_logprobs", [](auto& p) { p.num_logprobs = -2; });
}

}  // namespace
}  // namespace innerq
