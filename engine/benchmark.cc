#include "engine/benchmark.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>

#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"

namespace innerq {
namespace {

// The cache in as much memory as its sequences need.
KvCacheOptions Unbounded(KvCacheOptions options) {
  options.memory_bytes.reset();
  return options;
}

Result<void> CheckLoad(const EngineOptions& engine, const BenchLoad& load) {
  CHECK(load.batch > 0 && load.depth >= 0 && load.prompt > 0 && load.generate > 0,
        "a load without work");
  if (load.batch <= engine.max_sequences) return {};
  return InvalidArgument("a batch of " + std::to_string(load.batch) + " sequences; at most " +
                             std::to_string(engine.max_sequences) + " run at once",
                         "scheduler.max_sequences");
}

RunnerLimits LimitsOf(const BenchLoad& load) {
  return {.max_context = load.context(), .max_sequences = load.batch};
}

// Of two middle values the larger.
double Median(std::vector<double> values) {
  CHECK(!values.empty(), "the median of nothing");
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Bytes of cache that a row at `position` must read: nothing that its sequence has not written.
double BytesRead(const KvLayout& layout, int64_t position) {
  const int64_t sealed = layout.SealedPages(position).size();
  const int64_t open_tokens = position + 1 - sealed * layout.page_tokens();
  return static_cast<double>(sealed * layout.sealed_page_bytes()) +
         static_cast<double>(open_tokens * layout.open_page_bytes()) /
             static_cast<double>(layout.page_tokens());
}

// The sequences of one run on their way through a scheduler. Those whose tokens are all computed
// keep their pages and wait for Continue.
class Batch {
 public:
  Batch(ModelRunner& runner, const BenchLoad& load, const EvalProgress& progress)
      : runner_(runner),
        progress_(progress),
        random_(load.seed),
        scheduler_(
            {.max_sequences = load.batch,
             .max_batch_tokens = runner.engine_options().max_batch_tokens,
             .pools = {runner.num_open_pages(), runner.num_sealed_pages(), runner.num_norm_slots()},
             .max_logit_rows = runner.max_logit_rows(),
             .prefix_cache = runner.engine_options().prefix_cache},
            runner.layout()),
        next_tokens_(static_cast<size_t>(load.batch)),
        sampler_(runner.host_threads()) {
    const int64_t first = load.depth > 0 ? load.depth : load.prompt;
    const bool exact = runner.engine_options().exact_prefill;
    for (int64_t i = 0; i < load.batch; ++i) {
      Request request;
      request.sampling.temperature = load.temperature;
      request.prompt = RandomTokens(first);
      request.max_tokens = load.context() - first + 1;
      auto sequence = std::make_unique<Sequence>(std::move(request), nullptr,
                                                 exact ? load.depth + load.prompt : 0);
      sequence->number = i + 1;
      sequences_.push_back(sequence.get());
      scheduler_.Admit(std::move(sequence));
    }
  }

  // Computes all tokens that there are; returns the seconds that it took.
  Result<double> ComputeAll() {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point begin = Clock::now();
    const auto computed = [](const Sequence* sequence) { return sequence->num_uncomputed() == 0; };
    while (!std::all_of(sequences_.begin(), sequences_.end(), computed)) RETURN_IF_ERROR(Step());
    return std::chrono::duration<double>(Clock::now() - begin).count();
  }

  // Gives every sequence so many random tokens more.
  void ContinueAtRandom(int64_t count) {
    for (Sequence* sequence : sequences_) {
      for (const int32_t token : RandomTokens(count)) sequence->Append(token);
    }
  }

  // Gives every sequence the token that it chose last.
  void Continue() {
    for (size_t i = 0; i < sequences_.size(); ++i) sequences_[i]->Append(next_tokens_[i]);
  }

 private:
  std::vector<int32_t> RandomTokens(int64_t count) {
    std::vector<int32_t> tokens(static_cast<size_t>(count));
    const auto vocab_size = static_cast<uint64_t>(runner_.vocab_size());
    for (int32_t& token : tokens) token = static_cast<int32_t>(random_() % vocab_size);
    return tokens;
  }

  Result<void> Step() {
    const ScheduledBatch batch = scheduler_.Schedule();
    const ForwardBatch forward = BuildForwardBatch(batch, runner_.layout());
    ASSIGN_OR_RETURN(const std::span<const float> logits, runner_.Step(forward));
    scheduler_.Commit(batch);
    const auto width = static_cast<size_t>(runner_.vocab_size());
    std::vector<RowArgs> rows;
    std::vector<int32_t*> tokens;
    for (const ScheduledChunk& chunk : batch.chunks) {
      if (!chunk.samples) continue;
      const Sequence& sequence = *chunk.sequence;
      rows.push_back({.sample = {.logits = logits.subspan(rows.size() * width, width),
                                 .params = &sequence.request.sampling,
                                 .seen = &sequence.seen,
                                 .index = sequence.num_generated(),
                                 .top = runner_.top_logits(std::ssize(rows))}});
      tokens.push_back(&next_tokens_[static_cast<size_t>(sequence.number - 1)]);
    }
    const std::span<const Result<TokenEvent>> sampled = sampler_.Run(rows);
    for (size_t i = 0; i < sampled.size(); ++i) {
      if (!sampled[i]) return sampled[i].error();
      *tokens[i] = sampled[i]->token_id;
    }
    CHECK(scheduler_.num_preemptions() == 0 && scheduler_.num_prefix_hits() == 0,
          "every token is computed once");
    if (!progress_(forward.num_rows())) return Error{ErrorCode::kCancelled, "interrupted"};
    return {};
  }

  ModelRunner& runner_;
  const EvalProgress& progress_;
  std::mt19937_64 random_;
  Scheduler scheduler_;
  std::vector<Sequence*> sequences_;  // [B], the scheduler's
  std::vector<int32_t> next_tokens_;  // [B], as sampled last
  RowSampler sampler_;
};

}  // namespace

double BenchRun::decode_seconds() const {
  return std::accumulate(step_seconds.begin(), step_seconds.end(), 0.0);
}

Result<int64_t> PlanLoad(const ModelConfig& config, const EngineOptions& engine,
                         const KvCacheOptions& kv_cache, const BenchLoad& load) {
  RETURN_IF_ERROR(CheckLoad(engine, load));
  ASSIGN_OR_RETURN(const KvPoolPlan pools,
                   PlanFurtherCache(config, engine, Unbounded(kv_cache), LimitsOf(load)));
  return pools.bytes;
}

Result<BenchRun> RunLoad(const ModelRunner& model, const KvCacheOptions& kv_cache,
                         const BenchLoad& load, const EvalProgress& progress) {
  RETURN_IF_ERROR(CheckLoad(model.engine_options(), load));
  ASSIGN_OR_RETURN(const auto runner, model.WithCache(Unbounded(kv_cache), LimitsOf(load)));
  const KvLayout& layout = runner->layout();
  Batch batch(*runner, load, progress);
  if (load.depth > 0) {
    RETURN_IF_ERROR(batch.ComputeAll());
    batch.ContinueAtRandom(load.prompt);
  }
  BenchRun run;
  ASSIGN_OR_RETURN(run.prefill_seconds, batch.ComputeAll());
  for (int64_t i = 0; i < load.generate; ++i) {
    batch.Continue();
    ASSIGN_OR_RETURN(const double seconds, batch.ComputeAll());
    run.step_seconds.push_back(seconds);
    run.step_cache_bytes += static_cast<double>(load.batch) *
                            BytesRead(layout, load.depth + load.prompt + i) /
                            static_cast<double>(load.generate);
  }
  run.cache_bytes = runner->report().pools.bytes;
  run.sealed_bits = layout.sealed_bits_per_element();
  run.effective_bits = layout.effective_bits_per_element(load.context());
  const int64_t elements = 2 * layout.num_layers() * layout.kv_heads() * layout.head_dim();
  run.bytes_per_token = run.effective_bits / 8 * static_cast<double>(elements);
  return run;
}

BenchSpeed Summarize(const BenchLoad& load, std::span<const BenchRun> runs) {
  std::vector<double> prefill, decode, both;
  for (const BenchRun& run : runs) {
    prefill.push_back(run.prefill_seconds);
    decode.push_back(run.decode_seconds());
    both.push_back(prefill.back() + decode.back());
  }
  const auto prompts = static_cast<double>(load.batch * load.prompt);
  const auto answers = static_cast<double>(load.batch * load.generate);
  const double decode_seconds = Median(decode);
  return {.prefill_tokens_per_second = prompts / Median(prefill),
          .decode_tokens_per_second = answers / decode_seconds,
          .step_seconds = decode_seconds / static_cast<double>(load.generate),
          .total_tokens_per_second = (prompts + answers) / Median(both)};
}

}  // namespace innerq
