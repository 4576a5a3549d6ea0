#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "kernels/float16.h"

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

Result<void> CheckFinite(std::span<const float> logits) {
  constexpr uint32_t kExponent = 0x7f800000;  // all set: infinity or NaN
  uint32_t num_bad = 0;
  for (const float logit : logits) num_bad += (FloatBits(logit) & kExponent) == kExponent ? 1 : 0;
  if (num_bad == 0) return {};
  const auto bad = std::find_if_not(logits.begin(), logits.end(),
                                    [](float logit) { return std::isfinite(logit); });
  return NotFinite({*bad, static_cast<int32_t>(bad - logits.begin())});
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

// Makes `candidates` all choosable tokens in id order.
void List(std::span<const float> logits, std::vector<Candidate>& candidates) {
  candidates.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] != kMasked) candidates.push_back({logits[i], static_cast<int32_t>(i), 0});
  }
}

// Makes `candidates` the k most likely tokens, the best first. For small k: one comparison per
// token.
void ListBest(std::span<const float> logits, int32_t k, std::vector<Candidate>& candidates) {
  candidates.clear();
  if (k == 0) return;
  for (size_t i = 0; i < logits.size(); ++i) {
    const bool full = candidates.size() == static_cast<size_t>(k);
    if (full && logits[i] <= candidates.back().logit) continue;  // of equals the lower id stays
    if (full) candidates.pop_back();
    const Candidate candidate{logits[i], static_cast<int32_t>(i), 0};
    candidates.insert(std::upper_bound(candidates.begin(), candidates.end(), candidate, MoreLikely),
                      candidate);
  }
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

// Keeps the k most likely.
void KeepTopK(int64_t k, std::vector<Candidate>& candidates) {
  if (k >= static_cast<int64_t>(candidates.size())) return;
  constexpr int64_t kSmall = 1024;  // few enough for a heap to beat selection
  const auto end = candidates.begin() + k;
  if (k <= kSmall) {
    std::partial_sort(candidates.begin(), end, candidates.end(), MoreLikely);
  } else {
    std::nth_element(candidates.begin(), end, candidates.end(), MoreLikely);
  }
  candidates.erase(end, candidates.end());
}

// Keeps the fewest most likely tokens whose share reaches `top_p`: quickselect by weight.
void KeepTopP(float top_p, std::vector<Candidate>& candidates) {
  const double total = TotalWeight(candidates);
  const double wanted = total * top_p;
  // All tokens below this weight together weigh less than what is to be dropped.
  const double low = total * (1.0 - top_p) / static_cast<double>(candidates.size());
  std::erase_if(candidates, [low](const Candidate& candidate) { return candidate.weight < low; });
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

bool IsGreedy(const SamplingParams& params) { return params.temperature == 0 || params.top_p == 0; }

// Draws from what top_k left, `max` being the largest logit.
int32_t ChooseAmong(std::vector<Candidate>& candidates, float max, const SampleArgs& args) {
  const SamplingParams& params = *args.params;
  Weigh(max, params.temperature, candidates);
  if (params.top_p < 1) KeepTopP(params.top_p, candidates);
  if (params.min_p > 0) {
    std::erase_if(candidates, [&](const Candidate& c) { return c.weight < params.min_p; });
  }
  return Draw(candidates, Uniform(params.seed, args.index));
}

// From the adjusted logits. -1: all tokens are masked.
int32_t Choose(const SampleArgs& args, std::span<const float> logits,
               std::vector<Candidate>& candidates) {
  const auto best = std::max_element(logits.begin(), logits.end());  // the first among equals
  if (*best == kMasked) return -1;
  if (IsGreedy(*args.params)) return static_cast<int32_t>(best - logits.begin());
  List(logits, candidates);
  if (args.params->top_k > 0) KeepTopK(args.params->top_k, candidates);
  return ChooseAmong(candidates, *best, args);
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

// Log-softmax of the raw logits: the chosen token's and the best ones.
void AddLogprobs(std::span<const float> logits, int32_t num_top, TokenEvent& event,
                 std::vector<Candidate>& candidates) {
  const float max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - max);
  const double log_sum = max + std::log(sum);
  const auto logprob = [log_sum](float logit) { return static_cast<float>(logit - log_sum); };
  event.logprob = logprob(logits[static_cast<size_t>(event.token_id)]);
  ListBest(logits, num_top, candidates);
  for (const Candidate& candidate : candidates) {
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
  const bool adjusted = !params.logit_bias.empty() || UsesPenalties(params) || !masked.empty();
  if (adjusted || params.num_logprobs >= 0) return 0;
  if (IsGreedy(params)) return 1;
  return params.top_k <= kMaxTopLogits ? params.top_k : 0;
}

Result<TokenEvent> Sample(const SampleArgs& args, SamplerScratch& scratch) {
  if (!args.top.empty()) return SampleTop(args, scratch.candidates);
  RETURN_IF_ERROR(CheckFinite(args.logits));
  scratch.logits.assign(args.logits.begin(), args.logits.end());
  Adjust(args, scratch.logits);
  TokenEvent event;
  event.token_id = Choose(args, scratch.logits, scratch.candidates);
  if (event.token_id < 0) {
    return Error{ErrorCode::kInternal, "every token is masked, none is left to choose"};
  }
  if (args.params->num_logprobs >= 0) {
    AddLogprobs(args.logits, args.params->num_logprobs, event, scratch.candidates);
  }
  return event;
}

Result<TokenEvent> Score(std::span<const float> logits, int32_t token, int32_t num_top,
                         SamplerScratch& scratch) {
  RETURN_IF_ERROR(CheckFinite(logits));
  TokenEvent event;
  event.token_id = token;
  AddLogprobs(logits, num_top, event, scratch.candidates);
  return event;
}

uint64_t SeedOfChoice(uint64_t seed, int64_t choice) {
  return choice == 0 ? seed : Mix(Mix(seed) + static_cast<uint64_t>(choice));
}

}  // namespace innerq
