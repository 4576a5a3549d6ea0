#include "engine/evaluate.h"

#include <algorithm>
#include <chrono>
#include <list>
#include <string>
#include <utility>

#include "engine/engine.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "kernels/cpu/host_memory.h"

namespace innerq {
namespace {

Error Cancelled() { return {ErrorCode::kCancelled, "interrupted"}; }

Result<void> CheckText(const ModelRunner& runner, const EvalText& text) {
  const auto size = static_cast<int64_t>(text.tokens.size());
  CHECK(text.first_scored >= 1 && text.first_scored < size, "a text without a token to score");
  const int64_t context = runner.engine_options().max_context;
  if (size > context) {
    return InvalidArgument("a text of " + std::to_string(size) +
                           " tokens does not fit a context of " + std::to_string(context));
  }
  for (const int32_t token : text.tokens) {
    if (token >= 0 && token < runner.vocab_size()) continue;
    return InvalidArgument("the tokenizer gave token " + std::to_string(token) +
                           ", the model has " + std::to_string(runner.vocab_size()));
  }
  return {};
}

std::unique_ptr<Sequence> SequenceToScore(const EvalText& text, bool exact_prefill) {
  Request request;
  request.prompt = text.tokens;
  request.max_tokens = 0;
  request.prompt_logprobs = 0;
  auto sequence = std::make_unique<Sequence>(std::move(request), nullptr,
                                             exact_prefill ? text.prompt_length : 0);
  sequence->num_scored = text.first_scored - 1;
  return sequence;
}

// Whether a greedy choice from the row is the token: the largest logit, the lowest id among equals.
bool Chooses(std::span<const float> logits, int32_t token, std::span<const int32_t> never_chosen) {
  const float chosen = logits[static_cast<size_t>(token)];
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto other = static_cast<int32_t>(i);
    if (logits[i] < chosen || (logits[i] == chosen && other >= token)) continue;
    if (std::find(never_chosen.begin(), never_chosen.end(), other) == never_chosen.end()) {
      return false;
    }
  }
  return true;
}

// One request that an engine answers.
struct InFlight {
  size_t index = 0;
  ResponseReader reader;
};

Error OfRequest(size_t index, const Error& error) {
  return {error.code, "request " + std::to_string(index + 1) + ": " + error.message};
}

}  // namespace

Result<void> ScoreText(ModelRunner& runner, const EvalText& text, const LogitSink& take,
                       const EvalProgress& progress) {
  RETURN_IF_ERROR(CheckText(runner, text));
  const KvLayout& layout = runner.layout();
  Scheduler scheduler(
      {.max_sequences = 1,
       .max_batch_tokens = runner.engine_options().max_batch_tokens,
       .pools = {runner.num_open_pages(), runner.num_sealed_pages(), runner.num_norm_slots()},
       .max_logit_rows = runner.max_logit_rows(),
       .prefix_cache = false},
      layout);
  auto admitted = SequenceToScore(text, runner.engine_options().exact_prefill);
  Sequence& sequence = *admitted;
  scheduler.Admit(std::move(admitted));
  const auto width = static_cast<size_t>(runner.vocab_size());
  while (sequence.num_uncomputed() > 0) {
    const ScheduledBatch batch = scheduler.Schedule();
    const ForwardBatch forward = BuildForwardBatch(batch, layout);
    ASSIGN_OR_RETURN(const std::span<const float> logits, runner.Step(forward));
    scheduler.Commit(batch);
    const ScheduledChunk& chunk = batch.chunks.front();
    for (int64_t i = 0; i < chunk.num_scores; ++i) {
      RETURN_IF_ERROR(
          take(chunk.first_score + i + 1, logits.subspan(static_cast<size_t>(i) * width, width)));
    }
    if (chunk.num_scores > 0) sequence.num_scored = chunk.first_score + chunk.num_scores;
    if (!progress(chunk.num_tokens)) return Cancelled();
  }
  return {};
}

Result<ReferenceLogits> ReferenceLogits::Create(int64_t num_rows, int64_t vocab_size) {
  auto memory = AllocateHost(num_rows * vocab_size * static_cast<int64_t>(sizeof(float)));
  if (!memory) {
    return Error{memory.error().code, "the reference's logits of " + std::to_string(num_rows) +
                                          " tokens: " + memory.error().message};
  }
  ReferenceLogits reference;
  reference.logits_ = std::move(memory).value();
  return reference;
}

void ReferenceLogits::Add(LogitRow row) {
  const auto bytes = static_cast<int64_t>(row.logits.size_bytes());
  const int64_t begin = bytes * static_cast<int64_t>(rows_.size());
  CHECK(begin + bytes <= logits_.bytes(), "more rows than there is room for");
  auto* const copy = reinterpret_cast<float*>(logits_.data() + begin);
  std::copy(row.logits.begin(), row.logits.end(), copy);
  row.logits = {copy, row.logits.size()};
  rows_.push_back(row);
}

Result<std::vector<TokenScore>> ScoreTokens(ModelRunner& runner, const EvalText& text,
                                            std::optional<ReferenceLogits>* reference,
                                            const EvalProgress& progress) {
  RETURN_IF_ERROR(CheckText(runner, text));
  const bool fills = reference != nullptr && !reference->has_value();
  if (fills) {
    const auto count = static_cast<int64_t>(text.tokens.size()) - text.first_scored;
    ASSIGN_OR_RETURN(*reference, ReferenceLogits::Create(count, runner.vocab_size()));
  }
  std::vector<TokenScore> scores;
  const int64_t exact_before = runner.engine_options().exact_prefill ? text.prompt_length : 0;
  const LogitSink take = [&](int64_t position, std::span<const float> logits) -> Result<void> {
    ASSIGN_OR_RETURN(const LogitRow row, Normalize(logits));
    const int32_t token = text.tokens[static_cast<size_t>(position)];
    TokenScore& score = scores.emplace_back();
    score.position = position;
    score.reads_sealed = runner.layout().SealedPages(position - 1, exact_before).size() > 0;
    score.nll = -row.LogProbability(token);
    score.chosen = Chooses(logits, token, text.never_chosen);
    if (fills) {
      (*reference)->Add(row);
    } else if (reference != nullptr) {
      const LogitRow& expected = (*reference)->row(position - text.first_scored);
      score.divergence = KlDivergence(expected, row);
      score.same_top = expected.top == row.top;
    }
    return {};
  };
  RETURN_IF_ERROR(ScoreText(runner, text, take, progress));
  return scores;
}

Result<std::vector<CacheScores>> ScoreTexts(std::span<const std::unique_ptr<ModelRunner>> runners,
                                            std::span<const EvalText> texts, bool compare,
                                            const EvalProgress& progress) {
  std::vector<CacheScores> scores(runners.size());
  double total = 0;
  for (size_t text = 0; text < texts.size(); ++text) {
    const auto length = static_cast<int64_t>(texts[text].tokens.size());
    total += static_cast<double>(length);
    std::optional<ReferenceLogits> reference;
    for (size_t i = 0; i < runners.size(); ++i) {
      ASSIGN_OR_RETURN(auto tokens, ScoreTokens(*runners[i], texts[text],
                                                compare ? &reference : nullptr, progress));
      for (TokenScore& token : tokens) token.text = static_cast<int64_t>(text);
      scores[i].tokens.insert(scores[i].tokens.end(), tokens.begin(), tokens.end());
      scores[i].effective_bits +=
          runners[i]->layout().effective_bits_per_element(length) * static_cast<double>(length);
    }
  }
  for (CacheScores& cache : scores) cache.effective_bits /= std::max(total, 1.0);
  return scores;
}

Result<void> AnswerAll(std::unique_ptr<ModelRunner> runner, std::vector<Request> requests,
                       const TokenSink& take, const EvalProgress& progress) {
  const EngineOptions options = runner->engine_options();
  ASSIGN_OR_RETURN(const auto engine, Engine::Create(options, std::move(runner)));
  const auto limit = static_cast<size_t>(options.max_sequences);
  std::list<InFlight> in_flight;
  size_t next = 0;
  while (next < requests.size() || !in_flight.empty()) {
    while (next < requests.size() && in_flight.size() < limit) {
      auto reader = engine->Submit(Request(requests[next]));  // a copy: it may have to come again
      if (!reader && reader.error().code == ErrorCode::kResourceExhausted && !in_flight.empty()) {
        break;  // the queue is shorter than what may run: later
      }
      if (!reader) return OfRequest(next, reader.error());
      in_flight.push_back({next, std::move(reader).value()});
      ++next;
    }
    int64_t ended = 0;
    // The oldest one gets a token in nearly every step: waiting for it paces the others.
    auto wait = std::chrono::milliseconds(50);
    for (auto it = in_flight.begin(); it != in_flight.end();) {
      bool wanted = true;
      for (const TokenEvent& event : it->reader->NextBatch(wait)) {
        wanted = wanted && take(it->index, event);
      }
      wait = std::chrono::milliseconds(0);
      const std::optional<Finish> finish = it->reader->finish();
      if (finish && finish->error) return OfRequest(it->index, *finish->error);
      if (wanted && !finish) {
        ++it;
        continue;
      }
      it = in_flight.erase(it);
      ++ended;
    }
    if (!progress(ended)) return Cancelled();
  }
  return {};
}

}  // namespace innerq
