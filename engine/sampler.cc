#include "engine/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>
#include <string>

#include "kernels/cpu/host_threads.h"
#include "kernels/cpu/logit_ops.h"
#include "kernels/float16.h"
#include "kernels/paged_kv.h"

namespace innerq {
namespace {

using Candidate = SamplerScratch::Candidate;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// Most likely first, the lower id among equals.
bool MoreLikely(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// SplitMix64's output function (Steele, Lea, Flood, "Fast splittable pseudorandom number
// generators", OOPSLA 2014): a bijection that mixes all bits.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Random number `index` of the stream `seed`, uniform in [0, 1).
double Uniform(uint64_t seed, int64_t index) {
  const uint64_t bits = Mix(Mix(seed) ^ Mix(~static_cast<uint64_t>(index)));
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

Error NotFinite(const TopLogit& bad) {
  return {ErrorCode::kInternal, "the model's logit of token " + std::to_string(bad.id) + " is " +
                                    std::to_string(bad.logit) + ", expected a finite number"};
}

// The largest logit, if all are finite.
Result<float> LargestOf(std::span<const float> logits) {
  const LargestLogit largest = BestLogitOps().largest(logits);
  if (largest.finite) return largest.value;
  const auto bad = std::find_if_not(logits.begin(), logits.end(),
                                    [](float logit) { return std::isfinite(logit); });
  return NotFinite({*bad, static_cast<int32_t>(bad - logits.begin())});
}

bool AdjustsLogits(const SamplingParams& params, std::span<const int32_t> masked) {
  return !params.logit_bias.empty() || UsesPenalties(params) || !masked.empty();
}

// Bias, penalties and masks, in place.
void Adjust(const SampleArgs& args, std::span<float> logits) {
  const SamplingParams& params = *args.params;
  for (const auto& [id, bias] : params.logit_bias) logits[static_cast<size_t>(id)] += bias;
  if (UsesPenalties(params)) {
    constexpr float kMax = std::numeric_limits<float>::max();
    for (const auto& [id, count] : args.seen->answer_counts()) {
      float& logit = logits[static_cast<size_t>(id)];
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
      logit = std::clamp(logit, -kMax, kMax);  // a tiny penalty must not make an infinity
      if (count > 0) {
        logit -= params.presence_penalty + params.frequency_penalty * static_cast<float>(count);
      }
    }
  }
  for (const int32_t id : args.masked) logits[static_cast<size_t>(id)] = kMasked;
}

// Makes `candidates` the k most likely tokens that can be chosen, the best first.
void ListBest(std::span<const float> logits, int64_t k, std::vector<Candidate>& candidates) {
  candidates.clear();
  if (k == 0) return;
  // A heap whose front is the least likely of those that are kept: most tokens cost a comparison.
  float least = kMasked;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] <= least) continue;  // of equals the lower id stays
    if (static_cast<int64_t>(candidates.size()) == k) {
      std::pop_heap(candidates.begin(), candidates.end(), MoreLikely);
      candidates.pop_back();
    }
    candidates.push_back({logits[i], static_cast<int32_t>(i), 0});
    std::push_heap(candidates.begin(), candidates.end(), MoreLikely);
    if (static_cast<int64_t>(candidates.size()) == k) least = candidates.front().logit;
  }
  std::sort_heap(candidates.begin(), candidates.end(), MoreLikely);
}

// Sets the weights to exp((logit - max) / temperature).
void Weigh(float max, float temperature, std::span<Candidate> candidates) {
  for (Candidate& candidate : candidates) {
    candidate.weight = std::exp((candidate.logit - max) / temperature);
  }
}

double TotalWeight(std::span<const Candidate> candidates) {
  double total = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  return total;
}

// Keeps the fewest most likely tokens that weigh `wanted` together: quickselect by weight.
void KeepHeaviest(double wanted, std::vector<Candidate>& candidates) {
  auto begin = candidates.begin();  // what stands before it is kept and weighs `sum`
  auto end = candidates.end();      // what stands from here on is dropped
  double sum = 0;
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, MoreLikely);
    const double upper = TotalWeight({begin, middle});
    if (sum + upper >= wanted) {
      end = middle;
    } else {
      sum += upper;
      begin = middle;
    }
  }
  candidates.erase(end, candidates.end());
}

// Drops what weighs less.
void KeepAtLeast(float weight, std::vector<Candidate>& candidates) {
  if (weight <= 0) return;
  std::erase_if(candidates, [weight](const Candidate& c) { return c.weight < weight; });
}

// Sets scratch.weights to exp((logit - max) / temperature) and scratch.sums; the sum of all.
double WeighAll(std::span<const float> logits, float max, float temperature,
                SamplerScratch& scratch) {
  scratch.weights.resize(logits.size());
  scratch.sums.resize(static_cast<size_t>(CeilDiv(std::ssize(logits), kLogitBlock)));
  BestLogitOps().weigh({logits, max, temperature, scratch.weights, scratch.sums});
  return std::accumulate(scratch.sums.begin(), scratch.sums.end(), 0.0);
}

// Makes `candidates` all tokens that can be chosen.
void ListAll(std::span<const float> logits, std::vector<Candidate>& candidates) {
  candidates.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] != kMasked) candidates.push_back({logits[i], static_cast<int32_t>(i), 0});
  }
}

// Keeps the k most likely, in any order.
void KeepBest(int64_t k, std::vector<Candidate>& candidates) {
  if (k >= std::ssize(candidates)) return;
  std::nth_element(candidates.begin(), candidates.begin() + k, candidates.end(), MoreLikely);
  candidates.resize(static_cast<size_t>(k));
}

// Makes `candidates` all tokens that weigh at least `weight`, above 0.
void ListAtLeast(std::span<const float> logits, std::span<const float> weights, float weight,
                 std::vector<Candidate>& candidates) {
  candidates.clear();
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] < weight) continue;
    candidates.push_back({logits[i], static_cast<int32_t>(i), weights[i]});
  }
}

// Makes `candidates` the fewest most likely tokens whose weights are `wanted` together. Weights are
// at most 1. First they are summed by exponent and leading bits, which tells all but the last bits
// of the least weight that is kept: only tokens that share these are selected from.
void ListHeaviest(std::span<const float> logits, std::span<const float> weights, double wanted,
                  std::vector<Candidate>& candidates) {
  constexpr int kShift = 20;
  const auto bin_of = [](float weight) { return FloatBits(weight) >> kShift; };
  std::array<double, (0x3f800000u >> kShift) + 1> bins{};
  for (const float weight : weights) bins[bin_of(weight)] += weight;
  size_t last = bins.size() - 1;
  double above = 0;  // weigh the bins before `last`
  while (last > 0 && above + bins[last] < wanted) above += bins[last--];
  candidates.clear();
  for (size_t i = 0; i < weights.size(); ++i) {
    if (bin_of(weights[i]) == last && weights[i] > 0) {
      candidates.push_back({logits[i], static_cast<int32_t>(i), weights[i]});
    }
  }
  KeepHeaviest(wanted - above, candidates);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (bin_of(weights[i]) <= last) continue;
    candidates.push_back({logits[i], static_cast<int32_t>(i), weights[i]});
  }
}

// Draws by weight.
int32_t Draw(std::span<const Candidate> candidates, double uniform) {
  const double target = TotalWeight(candidates) * uniform;
  double sum = 0;
  int32_t chosen = -1;
  for (const Candidate& candidate : candidates) {
    if (candidate.weight <= 0) continue;
    chosen = candidate.id;  // the last one stands if rounding keeps the sum below the target
    sum += candidate.weight;
    if (sum > target) break;
  }
  return chosen;
}

// Draws from all by weight, `sums` being those of blocks.
int32_t DrawFromAll(std::span<const float> weights, std::span<const double> sums, double uniform) {
  double target = std::accumulate(sums.begin(), sums.end(), 0.0) * uniform;
  size_t block = 0;
  for (size_t b = 0; b < sums.size(); ++b) {
    if (sums[b] <= 0) continue;
    block = b;  // the last one stands, as below
    if (target < sums[b]) break;
    target -= sums[b];
  }
  double sum = 0;
  int32_t chosen = -1;
  const auto begin = block * static_cast<size_t>(kLogitBlock);
  const auto end = std::min(begin + static_cast<size_t>(kLogitBlock), weights.size());
  for (size_t i = begin; i < end; ++i) {
    if (weights[i] <= 0) continue;
    chosen = static_cast<int32_t>(i);
    sum += weights[i];
    if (sum > target) break;
  }
  return chosen;
}

bool IsGreedy(const SamplingParams& params) { return params.temperature == 0 || params.top_p == 0; }

// Draws from what top_k left, `max` being the largest logit.
int32_t ChooseAmong(std::vector<Candidate>& candidates, float max, const SampleArgs& args) {
  const SamplingParams& params = *args.params;
  Weigh(max, params.temperature, candidates);
  if (params.top_p < 1) KeepHeaviest(TotalWeight(candidates) * params.top_p, candidates);
  KeepAtLeast(params.min_p, candidates);
  return Draw(candidates, Uniform(params.seed, args.index));
}

// Draws from all, `max` being the largest logit.
int32_t ChooseFromAll(std::span<const float> logits, float max, const SampleArgs& args,
                      SamplerScratch& scratch) {
  const SamplingParams& params = *args.params;
  const double total = WeighAll(logits, max, params.temperature, scratch);
  const double uniform = Uniform(params.seed, args.index);
  const std::span<const float> weights = scratch.weights;
  if (params.top_p == 1 && params.min_p == 0) return DrawFromAll(weights, scratch.sums, uniform);
  if (params.top_p < 1) {
    ListHeaviest(logits, weights, total * params.top_p, scratch.candidates);
    KeepAtLeast(params.min_p, scratch.candidates);
  } else {
    ListAtLeast(logits, weights, params.min_p, scratch.candidates);
  }
  return Draw(scratch.candidates, uniform);
}

// From the adjusted logits, `max` being the largest. -1: all tokens are masked.
int32_t Choose(const SampleArgs& args, std::span<const float> logits, float max,
               SamplerScratch& scratch) {
  if (max == kMasked) return -1;
  if (IsGreedy(*args.params)) {  // the first among equals
    return static_cast<int32_t>(std::find(logits.begin(), logits.end(), max) - logits.begin());
  }
  const int64_t top_k = args.params->top_k;
  if (top_k == 0 || top_k >= std::ssize(logits)) return ChooseFromAll(logits, max, args, scratch);
  constexpr int64_t kSmall = 1024;  // few enough for a heap to beat selection
  if (top_k <= kSmall) {
    ListBest(logits, top_k, scratch.candidates);
  } else {
    ListAll(logits, scratch.candidates);
    KeepBest(top_k, scratch.candidates);
  }
  return ChooseAmong(scratch.candidates, max, args);
}

// From args.top: Choose's token.
Result<TokenEvent> SampleTop(const SampleArgs& args, std::vector<Candidate>& candidates) {
  const SamplingParams& params = *args.params;
  const auto count = static_cast<size_t>(NumTopLogits(params, args.masked));
  CHECK(count > 0 && count <= args.top.size(), "more logits are needed than there are");
  const TopLogit& best = args.top.front();
  if (!std::isfinite(best.logit)) return NotFinite(best);
  TokenEvent event;
  event.token_id = best.id;
  if (IsGreedy(params)) return event;
  candidates.clear();
  for (const auto& [logit, id] : args.top.first(count)) candidates.push_back({logit, id, 0});
  event.token_id = ChooseAmong(candidates, best.logit, args);
  return event;
}

struct LogprobArgs {
  std::span<const float> logits;
  float max;  // the largest
  int32_t num_top;
};

// Log-softmax of the raw logits: the chosen token's and the best ones.
void AddLogprobs(const LogprobArgs& args, TokenEvent& event, SamplerScratch& scratch) {
  const std::span<const float> logits = args.logits;
  const double log_sum = args.max + std::log(WeighAll(logits, args.max, 1, scratch));
  const auto logprob = [log_sum](float logit) { return static_cast<float>(logit - log_sum); };
  event.logprob = logprob(logits[static_cast<size_t>(event.token_id)]);
  ListBest(logits, args.num_top, scratch.candidates);
  for (const Candidate& candidate : scratch.candidates) {
    event.top.push_back({candidate.id, logprob(candidate.logit)});
  }
}

}  // namespace

SeenTokens SeenTokens::InPrompt(std::span<const int32_t> prompt) {
  SeenTokens seen;
  for (const int32_t token : prompt) seen.answer_counts_.try_emplace(token, 0);
  return seen;
}

bool UsesPenalties(const SamplingParams& params) {
  return params.repetition_penalty != 1 || params.presence_penalty != 0 ||
         params.frequency_penalty != 0;
}

int32_t NumTopLogits(const SamplingParams& params, std::span<const int32_t> masked) {
  if (AdjustsLogits(params, masked) || params.num_logprobs >= 0) return 0;
  if (IsGreedy(params)) return 1;
  return params.top_k <= kMaxTopLogits ? params.top_k : 0;
}

Result<TokenEvent> Sample(const SampleArgs& args, SamplerScratch& scratch) {
  if (!args.top.empty()) return SampleTop(args, scratch.candidates);
  ASSIGN_OR_RETURN(const float max, LargestOf(args.logits));
  TokenEvent event;
  if (AdjustsLogits(*args.params, args.masked)) {
    scratch.logits.assign(args.logits.begin(), args.logits.end());
    Adjust(args, scratch.logits);
    const float adjusted_max = BestLogitOps().largest(scratch.logits).value;
    event.token_id = Choose(args, scratch.logits, adjusted_max, scratch);
  } else {
    event.token_id = Choose(args, args.logits, max, scratch);
  }
  if (event.token_id < 0) {
    return Error{ErrorCode::kInternal, "every token is masked, none is left to choose"};
  }
  if (args.params->num_logprobs >= 0) {
    AddLogprobs({args.logits, max, args.params->num_logprobs}, event, scratch);
  }
  return event;
}

Result<TokenEvent> Score(std::span<const float> logits, int32_t token, int32_t num_top,
                         SamplerScratch& scratch) {
  ASSIGN_OR_RETURN(const float max, LargestOf(logits));
  TokenEvent event;
  event.token_id = token;
  AddLogprobs({logits, max, num_top}, event, scratch);
  return event;
}

std::span<Result<TokenEvent>> RowSampler::Run(std::span<const RowArgs> rows) {
  results_.assign(rows.size(), Error{ErrorCode::kInternal, "not sampled"});
  // A choice among the largest logits takes less than waking a thread.
  const auto passes = std::count_if(rows.begin(), rows.end(),
                                    [](const RowArgs& row) { return row.sample.top.empty(); });
  const int threads = passes > 1 ? static_cast<int>(scratch_.size()) : 1;
  RunInParallel(threads, std::ssize(rows), [&](int64_t task, int thread) {
    const RowArgs& row = rows[static_cast<size_t>(task)];
    Result<TokenEvent>& result = results_[static_cast<size_t>(task)];
    SamplerScratch& scratch = scratch_[static_cast<size_t>(thread)];
    if (row.scored) {
      result = Score(row.sample.logits, *row.scored, row.num_top, scratch);
    } else {
      result = Sample(row.sample, scratch);
    }
  });
  return results_;
}

uint64_t SeedOfChoice(uint64_t seed, int64_t choice) {
  return choice == 0 ? seed : Mix(Mix(seed) + static_cast<uint64_t>(choice));
}

}  // namespace innerq
