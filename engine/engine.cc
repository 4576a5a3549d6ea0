#include "engine/engine.h"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <list>
#include <mutex>
#include <stop_token>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/page_budget.h"
#include "engine/rate_window.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"

namespace innerq {
namespace {

using Clock = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

Error Unavailable(std::string message) { return {ErrorCode::kUnavailable, std::move(message)}; }

// What a request can bring: every prompt token but the first, and its answer.
int64_t MaxEvents(const Request& request) {
  const auto prompt_length = static_cast<int64_t>(request.prompt.size());
  return request.max_tokens + (request.prompt_logprobs >= 0 ? prompt_length - 1 : 0);
}

// Three kinds of state: what the engine thread owns (model, scheduler, sampler), what the mutex
// guards (queue, state, statistics), and what never changes (options).
class ThreadedEngine final : public Engine {
 public:
  ThreadedEngine(const EngineOptions& options, std::unique_ptr<StepModel> model, PageCounts pools)
      : options_(options),
        model_(std::move(model)),
        vocab_size_(model_->vocab_size()),
        scheduler_({.max_sequences = options.max_sequences,
                    .max_batch_tokens = options.max_batch_tokens,
                    .pools = pools,
                    .max_logit_rows = model_->max_logit_rows(),
                    .prefix_cache = options.prefix_cache},
                   model_->layout()),
        sampler_(model_->host_threads()),
        stats_(EmptyStats(pools)),
        finish_rate_(/*seconds=*/60, Clock::now()),
        thread_([this](std::stop_token stop) noexcept { Run(std::move(stop)); }) {}

  Result<ResponseGroup> SubmitGroup(std::vector<Request> requests) override;
  bool Drain(std::chrono::milliseconds timeout) override;
  bool ready() const override;
  EngineStats Stats() const override;
  std::vector<RunningRequest> Running() const override;
  const EngineOptions& options() const override { return options_; }

 private:
  enum class State { kServing, kDraining, kStopped };

  // The engine thread's loop and its parts.
  void Run(std::stop_token stop) noexcept;
  bool WaitForWork(const std::stop_token& stop);
  void EndCancelled();
  Result<void> Step();
  void EndFailed(const Error& error, ScheduledBatch* batch);
  std::vector<RowArgs> RowsOf(const ScheduledBatch& batch, std::span<const float> logits) const;
  void TakeScores(const ScheduledChunk& chunk, std::span<Result<TokenEvent>> scores);
  bool TakeToken(Sequence& sequence, Result<TokenEvent>& sampled);
  void DeliverFinished();
  void Stop(const Error& error);
  void PublishGauges(const Lock&);

  const EngineOptions options_;

  // Engine thread only.
  const std::unique_ptr<StepModel> model_;
  const int64_t vocab_size_;
  Scheduler scheduler_;
  RowSampler sampler_;
  int64_t num_admitted_ = 0;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::condition_variable_any work_;  // the queue has a sequence
  std::condition_variable idle_;      // all accepted requests have finished
  std::list<std::unique_ptr<Sequence>> queue_;
  State state_ = State::kServing;
  EngineStats stats_;          // `waiting` is the scheduler's part; the queue comes on top
  int64_t num_unstarted_ = 0;  // of the scheduler's part, those that have never been in a step
  std::vector<RunningRequest> running_;
  RateWindow finish_rate_;

  std::jthread thread_;  // last: stops and joins before the rest goes
};

Result<ResponseGroup> ThreadedEngine::SubmitGroup(std::vector<Request> requests) {
  const auto count = static_cast<int64_t>(requests.size());
  if (count < 1 || count > options_.max_queue) {
    return InvalidArgument("a group of " + std::to_string(count) +
                           " requests; the queue holds from 1 to " +
                           std::to_string(options_.max_queue));
  }
  for (const Request& request : requests) {
    RETURN_IF_ERROR(ValidateRequest(request, vocab_size_, options_.max_context));
  }
  ResponseGroup group{.readers = {}, .signal = std::make_shared<ResponseSignal>()};
  std::list<std::unique_ptr<Sequence>> sequences;  // so that joining the queue cannot fail
  for (Request& request : requests) {
    const int64_t capacity = MaxEvents(request);
    auto stream = std::make_shared<ResponseStream>(capacity, group.signal);
    group.readers.emplace_back(stream);
    const auto exact_before =
        options_.exact_prefill ? static_cast<int64_t>(request.prompt.size()) : 0;
    sequences.push_back(
        std::make_unique<Sequence>(std::move(request), std::move(stream), exact_before));
  }
  {
    const Lock lock(mutex_);
    if (state_ != State::kServing) {
      return Unavailable(state_ == State::kDraining ? "the engine is draining"
                                                    : "the engine has stopped");
    }
    const int64_t waiting = static_cast<int64_t>(queue_.size()) + num_unstarted_;
    if (waiting + count > options_.max_queue) {
      return Error{ErrorCode::kResourceExhausted,
                   "the queue has no room for " + std::to_string(count) +
                       " more: " + std::to_string(waiting) + " requests wait to start, at most " +
                       std::to_string(options_.max_queue) + " may"};
    }
    queue_.splice(queue_.end(), sequences);
    stats_.accepted += count;
  }
  work_.notify_one();
  return group;
}

bool ThreadedEngine::Drain(std::chrono::milliseconds timeout) {
  Lock lock(mutex_);
  if (state_ == State::kServing) state_ = State::kDraining;
  const auto all_finished = [this] { return stats_.accepted == stats_.finished; };
  if (!idle_.wait_for(lock, timeout, all_finished)) {
    thread_.request_stop();
    idle_.wait(lock, all_finished);
  }
  return state_ == State::kDraining;
}

bool ThreadedEngine::ready() const {
  const Lock lock(mutex_);
  return state_ == State::kServing;
}

EngineStats ThreadedEngine::Stats() const {
  const Lock lock(mutex_);
  EngineStats stats = stats_;
  stats.waiting += static_cast<int64_t>(queue_.size());
  stats.finish_per_second = finish_rate_.PerSecond(Clock::now());
  return stats;
}

std::vector<RunningRequest> ThreadedEngine::Running() const {
  const Lock lock(mutex_);
  return running_;
}

void ThreadedEngine::Run(std::stop_token stop) noexcept {
  pthread_setname_np(pthread_self(), "innerq-engine");
  while (WaitForWork(stop)) {
    EndCancelled();
    DeliverFinished();
    if (const Result<void> stepped = Step(); !stepped.ok()) {
      return Stop({ErrorCode::kInternal, "the device is lost: " + stepped.error().message});
    }
    DeliverFinished();
  }
  Stop(Unavailable("the engine is stopping"));
}

// Admits what was submitted, waiting for it if there is nothing else to do. False: stop.
bool ThreadedEngine::WaitForWork(const std::stop_token& stop) {
  Lock lock(mutex_);
  PublishGauges(lock);
  work_.wait(lock, stop, [this] { return !queue_.empty() || !scheduler_.empty(); });
  for (auto& sequence : queue_) {
    sequence->number = ++num_admitted_;
    stats_.prompt_tokens += NewlyComplete(sequence.get());
    scheduler_.Admit(std::move(sequence));
  }
  queue_.clear();
  PublishGauges(lock);
  return !stop.stop_requested();
}

void ThreadedEngine::EndCancelled() {
  for (const auto* line : {&scheduler_.running(), &scheduler_.waiting()}) {
    for (const auto& sequence : *line) {
      if (sequence->stream->cancelled()) sequence->End(FinishReason::kCancelled);
    }
  }
}

// Plans and runs one step and hands out its tokens. Sequences that end are left for
// DeliverFinished. Errors: unavailable if the device is lost.
Result<void> ThreadedEngine::Step() {
  if (scheduler_.empty()) return {};
  ScheduledBatch batch = scheduler_.Schedule();
  const Clock::time_point begin = Clock::now();
  for (const ScheduledChunk& chunk : batch.chunks) {
    Sequence& sequence = *chunk.sequence;
    if (sequence.started_at) continue;
    sequence.started_at = begin;
    sequence.stream->SetCachedTokens(*sequence.num_cached);
  }
  {
    const Lock lock(mutex_);
    PublishGauges(lock);
  }
  ForwardBatch forward = BuildForwardBatch(batch, model_->layout());
  Result<std::span<const float>> logits = model_->Step(forward);
  while (!logits.ok()) {
    if (logits.error().code == ErrorCode::kUnavailable) return logits.error();
    EndFailed(logits.error(), &batch);
    if (batch.chunks.empty()) return {};
    forward = BuildForwardBatch(batch, model_->layout());
    logits = model_->Step(forward);
  }
  CHECK(logits->size() == forward.logit_rows.size() * static_cast<size_t>(vocab_size_),
        "a step must return one row of logits per logit row");
  int64_t prompt_tokens = 0, computed = 0;
  for (const ScheduledChunk& chunk : batch.chunks) {
    const int64_t left = chunk.sequence->prompt_length() - chunk.sequence->num_computed;
    computed += std::clamp<int64_t>(left, 0, chunk.num_tokens);
  }
  scheduler_.Commit(batch);
  for (const ScheduledChunk& chunk : batch.chunks) prompt_tokens += NewlyComplete(chunk.sequence);
  int64_t generated = 0;
  std::span<Result<TokenEvent>> events = sampler_.Run(RowsOf(batch, *logits));
  for (const ScheduledChunk& chunk : batch.chunks) {
    const auto num_scores = static_cast<size_t>(chunk.num_scores);
    TakeScores(chunk, events.first(num_scores));
    events = events.subspan(num_scores);
    if (!chunk.samples) continue;
    if (TakeToken(*chunk.sequence, events.front())) ++generated;
    events = events.subspan(1);
  }
  const Lock lock(mutex_);
  ++stats_.steps;
  stats_.prompt_tokens += prompt_tokens;
  stats_.prompt_tokens_computed += computed;
  stats_.generation_tokens += generated;
  stats_.step_tokens.Observe(static_cast<double>(forward.num_rows()));
  if (!forward.seals.empty()) stats_.sealed_groups = model_->sealed_groups();
  return {};
}

// Ends the sequences whose pages made a step fail, or all if it was not theirs, and takes them out
// of the step. The others compute again what they already had: the same rows into the same pages.
void ThreadedEngine::EndFailed(const Error& error, ScheduledBatch* batch) {
  const std::vector<int64_t> failed = model_->failed_seals();
  const size_t num_chunks = batch->chunks.size();
  int64_t seals_begin = 0;  // of the chunk, in ForwardBatch::seals
  for (const ScheduledChunk& chunk : batch->chunks) {
    const int64_t seals_end = seals_begin + chunk.seals.size();
    const auto first = std::lower_bound(failed.begin(), failed.end(), seals_begin);
    const bool owns = first != failed.end() && *first < seals_end;
    if (owns || failed.empty()) chunk.sequence->End(FinishReason::kError, error);
    seals_begin = seals_end;
  }
  std::erase_if(batch->chunks,
                [](const ScheduledChunk& chunk) { return chunk.sequence->finish.has_value(); });
  CHECK(batch->chunks.size() < num_chunks, "a seal that no sequence asked for has failed");
}

// What is wanted of each row of a step's logits [R][V].
std::vector<RowArgs> ThreadedEngine::RowsOf(const ScheduledBatch& batch,
                                            std::span<const float> logits) const {
  std::vector<RowArgs> rows;
  const auto width = static_cast<size_t>(vocab_size_);
  const auto next_logits = [&] { return logits.subspan(rows.size() * width, width); };
  for (const ScheduledChunk& chunk : batch.chunks) {
    const Sequence& sequence = *chunk.sequence;
    const Request& request = sequence.request;
    for (int64_t i = 0; i < chunk.num_scores; ++i) {
      rows.push_back({.sample = {.logits = next_logits()},
                      .scored = request.prompt[static_cast<size_t>(chunk.first_score + i + 1)],
                      .num_top = request.prompt_logprobs});
    }
    if (!chunk.samples) continue;
    rows.push_back({.sample = {.logits = next_logits(),
                               .params = &request.sampling,
                               .seen = &sequence.seen,
                               .masked = sequence.masked(),
                               .index = sequence.num_generated(),
                               .top = model_->top_logits(std::ssize(rows))}});
  }
  return rows;
}

// Passes on the log-probabilities of the prompt tokens that a chunk scored.
void ThreadedEngine::TakeScores(const ScheduledChunk& chunk, std::span<Result<TokenEvent>> scores) {
  Sequence& sequence = *chunk.sequence;
  const Request& request = sequence.request;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (!scores[i].ok()) return sequence.End(FinishReason::kError, scores[i].error());
    scores[i]->is_prompt = true;
    sequence.stream->Push(std::move(*scores[i]));
    sequence.num_scored = chunk.first_score + static_cast<int64_t>(i) + 1;
  }
  if (request.max_tokens == 0 && sequence.num_uncomputed() == 0) {
    sequence.End(FinishReason::kLength);
  }
}

// Passes on the next token of a sequence. False: sampling failed.
bool ThreadedEngine::TakeToken(Sequence& sequence, Result<TokenEvent>& sampled) {
  if (sequence.finish.has_value()) return false;
  const Request& request = sequence.request;
  if (!sampled.ok()) {
    sequence.End(FinishReason::kError, sampled.error());
    return false;
  }
  TokenEvent event = std::move(*sampled);
  const auto& stops = request.stop_token_ids;
  event.is_stop = std::find(stops.begin(), stops.end(), event.token_id) != stops.end();
  sequence.Append(event.token_id);
  sequence.last_token_at = Clock::now();
  if (!sequence.first_token_at) sequence.first_token_at = sequence.last_token_at;
  if (event.is_stop) {
    sequence.End(FinishReason::kStop);
  } else if (sequence.num_generated() == request.max_tokens) {
    sequence.End(FinishReason::kLength);
  }
  sequence.stream->Push(std::move(event));
  return true;
}

// Ends the streams of finished sequences. Counters and streams change together, pages are free
// already: who sees a Finish sees statistics that include it.
void ThreadedEngine::DeliverFinished() {
  const std::vector<std::unique_ptr<Sequence>> finished = scheduler_.TakeFinished();
  if (finished.empty()) return;
  const Lock lock(mutex_);
  PublishGauges(lock);
  for (const auto& sequence : finished) {
    ++stats_.finished;
    ++stats_.finished_by_reason[sequence->finish->reason];
    ObserveFinished(*sequence, &stats_);
    sequence->stream->Close(*sequence->finish);
  }
  finish_rate_.Add(static_cast<int64_t>(finished.size()), Clock::now());
  if (stats_.accepted == stats_.finished) idle_.notify_all();
}

// Ends everything; nothing is accepted from now on.
void ThreadedEngine::Stop(const Error& error) {
  {
    const Lock lock(mutex_);
    state_ = State::kStopped;
    for (auto& sequence : queue_) scheduler_.Admit(std::move(sequence));
    queue_.clear();
  }
  for (const auto* line : {&scheduler_.running(), &scheduler_.waiting()}) {
    for (const auto& sequence : *line) sequence->End(FinishReason::kError, error);
  }
  DeliverFinished();
}

void ThreadedEngine::PublishGauges(const Lock&) {
  ReadScheduler(scheduler_, &stats_);
  ReadRunning(scheduler_, &running_);
  const auto& waiting = scheduler_.waiting();  // preempted ones first, which are the eldest
  num_unstarted_ = waiting.end() - std::find_if(waiting.begin(), waiting.end(), [](const auto& s) {
                     return !s->started_at.has_value();
                   });
}

}  // namespace

Result<ResponseReader> Engine::Submit(Request request) {
  std::vector<Request> requests;
  requests.push_back(std::move(request));
  ASSIGN_OR_RETURN(ResponseGroup group, SubmitGroup(std::move(requests)));
  return std::move(group.readers.front());
}

Result<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options,
                                               std::unique_ptr<StepModel> model) {
  const auto at_least = [](const char* name, int64_t value, int64_t low) -> Result<void> {
    if (value >= low) return {};
    return InvalidArgument(std::string(name) + " must be at least " + std::to_string(low) +
                               ", not " + std::to_string(value),
                           name);
  };
  RETURN_IF_ERROR(at_least("scheduler.max_sequences", options.max_sequences, 1));
  RETURN_IF_ERROR(at_least("scheduler.max_batch_tokens", options.max_batch_tokens, 1));
  RETURN_IF_ERROR(at_least("scheduler.max_queue", options.max_queue, 1));
  RETURN_IF_ERROR(at_least("scheduler.max_context", options.max_context, 2));
  const PageCounts pools{model->num_open_pages(), model->num_sealed_pages(),
                         model->num_norm_slots()};
  const PageCounts need =
      WorstPeakPages(model->layout(), options.max_context - 1, options.exact_prefill);
  if (!need.FitsIn(pools)) {
    return InvalidArgument("a sequence of max_context = " + std::to_string(options.max_context) +
                               " tokens needs " + ToString(need) + "; the cache has " +
                               ToString(pools),
                           "scheduler.max_context");
  }
  return std::unique_ptr<Engine>(
      std::make_unique<ThreadedEngine>(options, std::move(model), pools));
}

}  // namespace innerq
