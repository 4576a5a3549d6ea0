// Sampling a row of logits on the host: one thread, V tokens, logits as spread as a real model's.
//   sampler_bench --benchmark_filter=/131072
#include <benchmark/benchmark.h>

#include <random>
#include <string>
#include <vector>

#include "engine/sampler.h"
#include "kernels/result.h"

namespace innerq {
namespace {

void SampleRow(benchmark::State& state, const SamplingParams& params) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(static_cast<size_t>(state.range(0)));
  for (float& logit : logits) logit = normal(random);
  const SeenTokens seen = SeenTokens::InPrompt(std::vector<int32_t>{1, 2, 3});
  SamplerScratch scratch;
  int64_t index = 0;
  for (auto _ : state) {
    const auto event =
        Sample({.logits = logits, .params = &params, .seen = &seen, .index = index++}, scratch);
    CHECK(event.ok(), "sampling failed");
    benchmark::DoNotOptimize(event->token_id);
  }
}

void Register(const std::string& name, const SamplingParams& params) {
  benchmark::RegisterBenchmark(("Sample/" + name).c_str(), SampleRow, params)
      ->Arg(32768)
      ->Arg(131072)
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace
}  // namespace innerq

int main(int argc, char** argv) {
  using innerq::Register;
  using innerq::SamplingParams;
  const auto with = [](auto change) {
    SamplingParams params;
    change(params);
    return params;
  };
  Register("temperature_1", {});
  Register("top_p_0.9", with([](SamplingParams& p) { p.top_p = 0.9f; }));
  Register("min_p_0.05", with([](SamplingParams& p) { p.min_p = 0.05f; }));
  Register("top_k_100", with([](SamplingParams& p) { p.top_k = 100; }));
  Register("top_k_50000", with([](SamplingParams& p) { p.top_k = 50000; }));
  Register("penalties", with([](SamplingParams& p) { p.repetition_penalty = 1.1f; }));
  Register("greedy_logprobs_5", with([](SamplingParams& p) {
             p.temperature = 0;
             p.num_logprobs = 5;
           }));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
