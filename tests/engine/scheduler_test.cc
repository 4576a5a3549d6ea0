#include "engine/scheduler.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <random>
#include <set>
#include <string>

#include "gtest/gtest.h"
#include "tests/engine/hash_model.h"

namespace innerq {
namespace {

// Prompts here are all alike: with a prefix cache no two would be computed. See
// prefix_exactness_test.cc for those that share.
SchedulerLimits WithoutPrefixes(SchedulerLimits limits) {
  limits.prefix_cache = false;
  return limits;
}

// Drives a scheduler step by step, as the engine does, with tokens that mean nothing, and checks
// every plan against the rules.
class Simulation {
 public:
  Simulation(const SchedulerLimits& limits, KvLayout layout, bool exact_prefill = false)
      : limits_(limits),
        layout_(std::move(layout)),
        exact_prefill_(exact_prefill),
        scheduler_(WithoutPrefixes(limits), layout_) {}

  // Returns the arrival number.
  int64_t Add(int64_t prompt_length, int64_t max_tokens, bool scores = false) {
    Request request;
    request.prompt.assign(static_cast<size_t>(prompt_length), 7);
    request.max_tokens = max_tokens;
    request.prompt_logprobs = scores ? 0 : -1;
    auto sequence =
        std::make_unique<Sequence>(std::move(request), std::make_shared<ResponseStream>(max_tokens),
                                   exact_prefill_ ? prompt_length : 0);
    arrivals_[sequence.get()] = num_arrivals_;
    scheduler_.Admit(std::move(sequence));
    Collect();  // what has nothing to compute
    return num_arrivals_++;
  }

  void Cancel(int64_t arrival) {
    for (const auto& [sequence, number] : arrivals_) {
      if (number == arrival) const_cast<Sequence*>(sequence)->End(FinishReason::kCancelled);
    }
    Collect();
  }

  // Plans, checks and commits one step. Returns rows by arrival number.
  std::map<int64_t, int64_t> Step() {
    const Sequence* oldest = Oldest();
    const ScheduledBatch batch = scheduler_.Schedule();
    CheckBatch(batch, oldest);
    std::map<int64_t, int64_t> rows;
    for (const ScheduledChunk& chunk : batch.chunks) {
      rows[arrivals_.at(chunk.sequence)] = chunk.num_tokens;
    }
    scheduler_.Commit(batch);
    for (const ScheduledChunk& chunk : batch.chunks) {
      Sequence& sequence = *chunk.sequence;
      CheckPagesAfterStep(sequence);
      sequence.num_scored += chunk.num_scores;
      EXPECT_GE(sequence.num_scored, std::min(sequence.num_computed, sequence.num_to_score()));
      if (chunk.samples) sequence.Append(8);
      if (sequence.num_generated() == sequence.request.max_tokens &&
          (chunk.samples || sequence.num_uncomputed() == 0)) {
        EXPECT_EQ(sequence.num_scored, sequence.num_to_score());
        sequence.End(FinishReason::kLength);
        finish_order_.push_back(arrivals_.at(&sequence));
      }
    }
    Collect();
    ++num_steps_;
    return rows;
  }

  void RunToEnd(int64_t max_steps) {
    while (!scheduler_.empty()) {
      ASSERT_LT(num_steps_, max_steps) << "no end in sight";
      Step();
    }
    EXPECT_EQ(scheduler_.used(), PageCounts());
  }

  const Scheduler& scheduler() const { return scheduler_; }
  int64_t num_steps() const { return num_steps_; }
  const std::string& log() const { return log_; }
  const std::vector<int64_t>& finish_order() const { return finish_order_; }

 private:
  const Sequence* Oldest() const {
    if (!scheduler_.running().empty()) return scheduler_.running().front().get();
    return scheduler_.waiting().empty() ? nullptr : scheduler_.waiting().front().get();
  }

  void Collect() {
    for (const auto& sequence : scheduler_.TakeFinished()) {
      arrivals_.erase(sequence.get());
      sealed_.erase(sequence.get());
    }
    scheduler_.CheckIntegrity();
    CheckLine();
  }

  // First come first served: running before waiting, each by arrival; one prefill at a time.
  void CheckLine() const {
    std::vector<int64_t> line;
    for (const auto& s : scheduler_.running()) {
      line.push_back(arrivals_.at(s.get()));
      EXPECT_TRUE(s->num_uncomputed() <= 1 || s == scheduler_.running().back());
    }
    for (const auto& s : scheduler_.waiting()) {
      line.push_back(arrivals_.at(s.get()));
      EXPECT_EQ(s->pages.num_pages(), 0) << "a waiting sequence holds pages";
      EXPECT_EQ(s->num_computed, 0);
      EXPECT_FALSE(s->norm);
    }
    EXPECT_TRUE(std::is_sorted(line.begin(), line.end()));
    EXPECT_EQ(line.size(), arrivals_.size()) << "a sequence is lost";
  }

  void CheckBatch(const ScheduledBatch& batch, const Sequence* oldest) {
    ASSERT_LE(static_cast<int64_t>(scheduler_.running().size()), limits_.max_sequences);
    ASSERT_TRUE(scheduler_.used().FitsIn(limits_.pools));
    scheduler_.CheckIntegrity();
    int64_t rows = 0, logit_rows = 0;
    int64_t last_arrival = -1;
    std::set<int32_t> open, sealed, norms;
    if (oldest != nullptr) {
      ASSERT_FALSE(batch.chunks.empty());
      EXPECT_EQ(batch.chunks[0].sequence, oldest) << "the oldest sequence makes no progress";
    }
    for (const ScheduledChunk& chunk : batch.chunks) {
      const Sequence& sequence = *chunk.sequence;
      const int64_t arrival = arrivals_.at(&sequence);
      EXPECT_GT(arrival, last_arrival);
      last_arrival = arrival;
      ASSERT_GT(chunk.num_tokens, 0);
      ASSERT_LE(chunk.num_tokens, sequence.num_uncomputed());
      EXPECT_EQ(chunk.samples,
                chunk.num_tokens == sequence.num_uncomputed() && sequence.request.max_tokens > 0);
      if (chunk.num_scores > 0) {
        EXPECT_EQ(chunk.first_score, sequence.num_scored);
      }
      rows += chunk.num_tokens;
      logit_rows += chunk.num_logit_rows();
      CheckPagesOfRows(chunk);
      CheckSeals(chunk);
      for (int64_t i = 0; i < sequence.pages.num_pages(); ++i) {
        const PageRef page = sequence.pages.page(i);
        EXPECT_TRUE(page.open_id < 0 || open.insert(page.open_id).second);
        EXPECT_TRUE(page.sealed_id < 0 || sealed.insert(page.sealed_id).second);
      }
      EXPECT_TRUE(!sequence.norm || norms.insert(sequence.norm.id()).second);
      log_ += std::to_string(arrival) + ":" + std::to_string(chunk.num_tokens) + "@" +
              std::to_string(sequence.num_computed) + " ";
    }
    log_ += "\n";
    ASSERT_LE(rows, limits_.max_batch_tokens);
    ASSERT_LE(logit_rows, limits_.max_logit_rows);
  }

  // Every row finds every page in the form its position asks for.
  void CheckPagesOfRows(const ScheduledChunk& chunk) const {
    const Sequence& sequence = *chunk.sequence;
    const int64_t end = sequence.num_computed + chunk.num_tokens;
    ASSERT_EQ(sequence.pages.num_pages(), layout_.PageOf(end - 1) + 1);
    for (int64_t position = sequence.num_computed; position < end; ++position) {
      const PageRange seen_sealed = layout_.SealedPages(position, sequence.exact_before);
      for (int64_t i = 0; i <= layout_.PageOf(position); ++i) {
        const bool is_sealed = i >= seen_sealed.begin && i < seen_sealed.end;
        const PageRef page = sequence.pages.page(i);
        ASSERT_GE(is_sealed ? page.sealed_id : page.open_id, 0)
            << "position " << position << " misses page " << i;
      }
    }
  }

  // No page is sealed twice, none is left out, and the norm comes with the first.
  void CheckSeals(const ScheduledChunk& chunk) {
    const Sequence& sequence = *chunk.sequence;
    const int64_t end = sequence.num_computed + chunk.num_tokens;
    if (sequence.num_computed == 0) sealed_[&sequence].clear();  // new, or preempted since
    std::set<int64_t>& done = sealed_[&sequence];
    EXPECT_EQ(chunk.computes_norm,
              layout_.normalizes_keys() && done.empty() && chunk.seals.size() > 0);
    for (int64_t page = chunk.seals.begin; page < chunk.seals.end; ++page) {
      EXPECT_TRUE(done.insert(page).second) << "page " << page << " sealed twice";
    }
    const PageRange expected = layout_.SealedPages(end - 1, sequence.exact_before);
    EXPECT_EQ(static_cast<int64_t>(done.size()), expected.size());
    if (!done.empty()) {
      EXPECT_EQ(*done.begin(), expected.begin);
      EXPECT_EQ(*done.rbegin(), expected.end - 1);
      EXPECT_EQ(static_cast<bool>(sequence.norm), layout_.normalizes_keys());
    }
  }

  // Pages are held in one form only between steps.
  void CheckPagesAfterStep(const Sequence& sequence) const {
    for (int64_t i = 0; i < sequence.pages.num_pages(); ++i) {
      const PageRef page = sequence.pages.page(i);
      EXPECT_NE(page.open_id < 0, page.sealed_id < 0) << "page " << i;
    }
  }

  const SchedulerLimits limits_;
  const KvLayout layout_;
  const bool exact_prefill_;
  Scheduler scheduler_;
  std::map<const Sequence*, int64_t> arrivals_;
  std::map<const Sequence*, std::set<int64_t>> sealed_;
  int64_t num_arrivals_ = 0;
  int64_t num_steps_ = 0;
  std::string log_;
  std::vector<int64_t> finish_order_;
};

constexpr PageCounts kAmple{1000, 1000, 100};

TEST(Scheduler, FillsAStepWithDecodesAndTheRestWithPrefill) {
  Simulation simulation({8, 64, kAmple}, TestLayout());
  simulation.Add(10, 50);
  simulation.Add(10, 50);
  EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{0, 10}, {1, 10}}));
  simulation.Add(200, 5);
  simulation.Add(200, 5);
  const std::map<int64_t, int64_t> mixed{{0, 1}, {1, 1}, {2, 62}};
  EXPECT_EQ(simulation.Step(), mixed);
  EXPECT_EQ(simulation.Step(), mixed);
  EXPECT_EQ(simulation.Step(), mixed);
  EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{0, 1}, {1, 1}, {2, 14}, {3, 48}}));
}

TEST(Scheduler, StreamOfNewPromptsDoesNotStarveAnOldPrefill) {
  Simulation simulation({8, 64, kAmple}, TestLayout());
  simulation.Add(640, 1);
  for (int i = 0; i < 10; ++i) {
    simulation.Add(5, 1);
    EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{0, 64}}));
  }
}

TEST(Scheduler, APromptIsScoredByNoMoreRowsThanMayHaveLogits) {
  Simulation simulation({8, 64, kAmple, /*max_logit_rows=*/20}, TestLayout());
  simulation.Add(10, 50);
  EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{0, 10}}));
  simulation.Add(90, 5, /*scores=*/true);
  simulation.Add(10, 5);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{0, 1}, {1, 19}})) << "2 came later";
  }
  // 13 that score and one that samples; 5 are left for 2, which needs but one.
  EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{0, 1}, {1, 14}, {2, 10}}));
}

TEST(Scheduler, APromptWithoutAnAnswerIsComputedUpToItsLastToken) {
  Simulation simulation({8, 64, kAmple}, TestLayout());
  simulation.Add(1, 0, /*scores=*/true);
  EXPECT_TRUE(simulation.scheduler().empty()) << "there is nothing to score";
  simulation.Add(10, 0);
  EXPECT_TRUE(simulation.scheduler().empty()) << "nothing was asked for";
  simulation.Add(10, 0, /*scores=*/true);
  EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{2, 9}}));
  EXPECT_TRUE(simulation.scheduler().empty());
}

TEST(Scheduler, RunsNoMoreThanMaxSequences) {
  Simulation simulation({3, 64, kAmple}, TestLayout());
  for (int i = 0; i < 5; ++i) simulation.Add(4, 3);
  EXPECT_EQ(simulation.Step().size(), 3u);
  EXPECT_EQ(simulation.scheduler().waiting().size(), 2u);
  simulation.Step();
  simulation.Step();
  EXPECT_EQ(simulation.finish_order(), (std::vector<int64_t>{0, 1, 2}));
  EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{3, 4}, {4, 4}}));
}

TEST(Scheduler, PreemptsTheYoungestAndKeepsItsTokens) {
  // Room for two sequences of 64 tokens, unquantized, but not of 96.
  Simulation simulation({8, 256, {5, 0, 0}}, TestLayout(/*quantized=*/false));
  simulation.Add(60, 60);
  simulation.Add(60, 60);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(simulation.Step().size(), 2u);
  EXPECT_EQ(simulation.scheduler().num_preemptions(), 0);
  EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{0, 1}})) << "1 waits for a page";
  while (simulation.scheduler().num_preemptions() == 0) simulation.Step();
  ASSERT_EQ(simulation.scheduler().waiting().size(), 1u);
  EXPECT_EQ(simulation.scheduler().waiting().front()->num_tokens(), 65);
  simulation.RunToEnd(500);
  EXPECT_EQ(simulation.finish_order(), (std::vector<int64_t>{0, 1}));
}

// What lacks a page for a while keeps those it has, and a newcomer that would be pushed out at once
// does not start.
TEST(Scheduler, SequenceThatWaitsForAPageIsNotOvertaken) {
  const KvLayout layout = TestLayout();
  Simulation simulation({8, 512, {100, 4, 8}}, layout);
  simulation.Add(200, 60);  // two sealed pages each, soon three
  simulation.Add(210, 60);
  for (int i = 0; i < 15; ++i) EXPECT_EQ(simulation.Step().size(), 2u);
  simulation.Add(5, 100);
  for (int i = 0; i < 9; ++i) EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{0, 1}}));
  ASSERT_EQ(simulation.scheduler().running().size(), 2u);
  EXPECT_EQ(simulation.scheduler().running()[1]->num_computed, 224);
  EXPECT_EQ(simulation.scheduler().num_preemptions(), 0);
  simulation.RunToEnd(500);
  EXPECT_EQ(simulation.scheduler().num_preemptions(), 1);
  EXPECT_EQ(simulation.finish_order(), (std::vector<int64_t>{0, 1, 2}));
}

TEST(Scheduler, TriesAWaitingSequenceAgainOnlyWhenSomethingHasChanged) {
  Simulation simulation({8, 256, {5, 0, 0}}, TestLayout(/*quantized=*/false));
  simulation.Add(60, 60);
  simulation.Step();
  simulation.Add(100, 5);  // has four pages where three are free
  for (int i = 0; i < 30; ++i) EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{0, 1}}));
  EXPECT_EQ(simulation.scheduler().num_start_attempts(), 2) << "one of each";
  simulation.Cancel(0);
  EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{1, 100}}));
  simulation.Add(100, 5);
  simulation.Step();
  simulation.Cancel(2);  // the one that was tried
  simulation.Add(10, 5);
  EXPECT_EQ(simulation.Step(), (std::map<int64_t, int64_t>{{1, 1}, {3, 10}}));
}

TEST(Scheduler, ShrinksAChunkToThePagesThereAre) {
  // Open pages for one window and two more; a chunk of 512 would need 16.
  const KvLayout layout = TestLayout();
  Simulation simulation({8, 512, {OpenWindowPages(layout) + 2, 100, 4}}, layout);
  simulation.Add(1000, 2);
  EXPECT_EQ(simulation.Step().at(0), 8 * 32);
  EXPECT_EQ(simulation.Step().at(0), 3 * 32) << "the open copies of 4 sealed pages came back";
  simulation.RunToEnd(50);
}

TEST(Scheduler, OldestAlwaysRunsInPoolsThatHoldJustOne) {
  for (const bool exact : {false, true}) {
    const KvLayout layout = TestLayout();
    const PageCounts pools = WorstPeakPages(layout, 400, exact);
    Simulation simulation({16, 64, pools}, layout, exact);
    for (int i = 0; i < 6; ++i) simulation.Add(300, 101);
    for (int i = 0; i < 6; ++i) simulation.Add(20, 300);
    simulation.RunToEnd(6 * 500 + 6 * 400);  // each step checks that the oldest moved
    EXPECT_EQ(simulation.finish_order().size(), 12u);
    EXPECT_TRUE(
        std::is_sorted(simulation.finish_order().begin(), simulation.finish_order().begin() + 6));
  }
}

TEST(Scheduler, PassesOverASequenceWithoutATokenToCompute) {
  const KvLayout layout = TestLayout();
  const SchedulerLimits limits{
      .max_sequences = 2, .max_batch_tokens = 2, .pools = {8, 8, 2}, .max_logit_rows = 2};
  Scheduler scheduler(limits, layout);
  std::vector<Sequence*> sequences;
  for (const size_t prompt_length : {1, 4}) {
    Request request;
    request.prompt.assign(prompt_length, static_cast<int32_t>(prompt_length));
    auto sequence = std::make_unique<Sequence>(std::move(request), nullptr, int64_t{0});
    sequences.push_back(sequence.get());
    scheduler.Admit(std::move(sequence));
  }
  const auto step = [&] {
    const ScheduledBatch batch = scheduler.Schedule();
    scheduler.Commit(batch);
    std::map<const Sequence*, int64_t> rows;
    for (const ScheduledChunk& chunk : batch.chunks) rows[chunk.sequence] = chunk.num_tokens;
    return rows;
  };
  using Rows = std::map<const Sequence*, int64_t>;
  EXPECT_EQ(step(), (Rows{{sequences[0], 1}, {sequences[1], 1}}));
  EXPECT_EQ(step(), (Rows{{sequences[1], 2}})) << "the first waits for its next token";
  sequences[0]->Append(8);
  EXPECT_EQ(step(), (Rows{{sequences[0], 1}, {sequences[1], 1}}));
  EXPECT_EQ(sequences[0]->pages.num_pages(), 1);
}

// The row that first sees sealed pages wants them all at once; those before it want none.
TEST(Scheduler, ComputesAnExactPromptWhileSealedPagesAreLacking) {
  const KvLayout layout = TestLayout();
  const auto sealed = [&](int64_t tokens, int64_t exact_before) {
    return PeakPages(layout, tokens, exact_before).sealed;
  };
  Scheduler scheduler(WithoutPrefixes({.max_batch_tokens = 33,
                                       .pools = {100, sealed(250, 0) + sealed(510, 500), 8}}),
                      layout);
  const auto add = [&](int64_t prompt_length, int64_t exact_before) {
    Request request;
    request.prompt.assign(static_cast<size_t>(prompt_length), 7);
    request.max_tokens = 60;
    scheduler.Admit(std::make_unique<Sequence>(std::move(request), nullptr, exact_before));
    return scheduler.waiting().back().get();
  };
  const auto step = [&] {
    const ScheduledBatch batch = scheduler.Schedule();
    scheduler.Commit(batch);
    for (const ScheduledChunk& chunk : batch.chunks) {
      if (chunk.samples) chunk.sequence->Append(8);
    }
  };
  const Sequence* const elder = add(245, 0);
  while (elder->num_generated() == 0) step();
  Sequence* const exact = add(500, 500);
  for (int i = 0; i < 10; ++i) exact->Append(8);  // of an answer that it began before
  while (exact->num_computed < 480) step();
  ASSERT_EQ(exact->num_computed, 480);
  EXPECT_GT(elder->pages.num_sealed(), sealed(250, 0)) << "pages were to be lacking by now";
  step();
  EXPECT_EQ(exact->num_computed, 500);
  step();
  EXPECT_EQ(exact->num_computed, 500);
  EXPECT_EQ(scheduler.num_preemptions(), 0);
  while (!scheduler.waiting().empty() || exact->num_generated() < 11) {
    for (const auto& sequence : scheduler.running()) {
      if (sequence->num_generated() == 60) sequence->End(FinishReason::kLength);
    }
    scheduler.TakeFinished();
    step();
  }
}

TEST(SchedulerDeathTest, RefusesASequenceThatCanNeverFit) {
  const KvLayout layout = TestLayout();
  Simulation simulation({16, 64, WorstPeakPages(layout, 400, false)}, layout);
  simulation.Add(300, 101);
  EXPECT_DEATH(simulation.Add(400, 33), "never fit");
}

// What a crowd cost: steps, tokens computed and sequences pushed out.
struct Cost {
  int64_t steps = 0;
  int64_t computed = 0;
  int64_t preemptions = 0;
};

// Runs requests that all come at once, each with a prompt of 200 tokens and as many for the answer
// as `max_tokens`, and stops each after as many as `answers` says.
Cost RunCrowd(PageCounts pools, int64_t max_tokens, const std::vector<int64_t>& answers) {
  const KvLayout layout = TestLayout();
  Scheduler scheduler(WithoutPrefixes({.pools = pools}), layout);
  for (size_t i = 0; i < answers.size(); ++i) {
    Request request;
    request.prompt.assign(200, 7);
    request.max_tokens = max_tokens;
    auto sequence = std::make_unique<Sequence>(std::move(request), nullptr, int64_t{0});
    sequence->number = static_cast<int64_t>(i);
    scheduler.Admit(std::move(sequence));
  }
  Cost cost;
  for (; !scheduler.empty(); ++cost.steps) {
    const ScheduledBatch batch = scheduler.Schedule();
    scheduler.Commit(batch);
    for (const ScheduledChunk& chunk : batch.chunks) {
      cost.computed += chunk.num_tokens;
      if (!chunk.samples) continue;
      Sequence& sequence = *chunk.sequence;
      sequence.Append(8);
      if (sequence.num_generated() == answers[static_cast<size_t>(sequence.number)]) {
        sequence.End(FinishReason::kLength);
      }
    }
    scheduler.TakeFinished();
  }
  cost.preemptions = scheduler.num_preemptions();
  return cost;
}

// Prints what the decision log in CONTRIBUTING.md says of the reserve.
TEST(Scheduler, ReservesForAnswersThatPushEachOtherOut) {
  const auto print = [](const char* what, const Cost& cost, int64_t useful) {
    std::printf("%s: %ld steps, %ld tokens computed, %ld useful, %ld preemptions\n", what,
                static_cast<long>(cost.steps), static_cast<long>(cost.computed),
                static_cast<long>(useful), static_cast<long>(cost.preemptions));
  };
  constexpr PageCounts kPools{38, 175, 64};  // of the demo model in 6 MiB
  const Cost full = RunCrowd(kPools, 2500, std::vector<int64_t>(16, 2500));
  print("answers as long as they may be", full, 16 * 2699);
  EXPECT_LT(full.computed, 70000);
  EXPECT_LT(full.preemptions, 25);
  EXPECT_LT(full.steps, 12000);

  // Most answers are shorter than they may be.
  std::mt19937 random(1);
  std::vector<int64_t> answers(128);
  int64_t useful = 0;
  for (int64_t& answer : answers) {
    answer = static_cast<int64_t>(100 + random() % 800);
    useful += 200 + answer - 1;
  }
  const Cost crowd = RunCrowd({400, 175, 64}, 5000, answers);
  print("answers of up to 900 of 5000 tokens", crowd, useful);
  EXPECT_LT(crowd.computed, 2 * useful);
  EXPECT_LT(crowd.steps, 5000);
}

struct Population {
  int seed;
  SchedulerLimits limits;
  bool quantized;
  bool exact;
};

// A random population with arrivals and cancellations; every step is checked by Simulation.
std::string RunPopulation(const Population& population, int64_t* preemptions) {
  const KvLayout layout = TestLayout(population.quantized);
  Simulation simulation(population.limits, layout, population.exact);
  std::mt19937 random(static_cast<uint32_t>(population.seed));
  std::vector<int64_t> alive;
  for (int step = 0; step < 300; ++step) {
    while (random() % 3 == 0) {
      const int64_t prompt = random() % 4 == 0 ? 1 + random() % 400 : 1 + random() % 60;
      const int64_t answer = 1 + random() % (random() % 4 == 0 ? 200 : 30);
      const bool scores = random() % 4 == 0;
      alive.push_back(simulation.Add(prompt, scores && random() % 2 == 0 ? 0 : answer, scores));
    }
    if (!alive.empty() && random() % 10 == 0) simulation.Cancel(alive[random() % alive.size()]);
    simulation.Step();
    if (testing::Test::HasFatalFailure()) return "";
  }
  simulation.RunToEnd(100000);
  *preemptions += simulation.scheduler().num_preemptions();
  return simulation.log();
}

TEST(Scheduler, HoldsItsRulesForRandomPopulations) {
#if defined(INNERQ_SANITIZED)
  constexpr int kSeeds = 8;
#else
  constexpr int kSeeds = 24;
#endif
  int64_t preemptions = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    std::mt19937 random(static_cast<uint32_t>(seed) + 1000);
    const bool exact = seed % 3 == 1;
    const bool quantized = seed % 4 != 3;
    const KvLayout layout = TestLayout(quantized);
    // Tiny pools for even seeds: just one longest sequence; else a few of them.
    const PageCounts one = WorstPeakPages(layout, 600, exact);
    const PageCounts few = one + one + PageCounts{static_cast<int64_t>(random() % 10), 3, 3};
    SchedulerLimits limits{static_cast<int64_t>(1 + random() % 12),
                           static_cast<int64_t>(1 + random() % 200), seed % 2 == 0 ? one : few};
    limits.max_logit_rows = limits.max_sequences + static_cast<int64_t>(random() % 60);
    const Population population{seed, limits, quantized, exact};
    SCOPED_TRACE("seed " + std::to_string(seed));
    const std::string first = RunPopulation(population, &preemptions);
    ASSERT_FALSE(testing::Test::HasFailure());
    EXPECT_EQ(first, RunPopulation(population, &preemptions)) << "not deterministic";
  }
  EXPECT_GT(preemptions, 4 * kSeeds) << "the pools were too large to test preemption";
}

}  // namespace
}  // namespace innerq
