#include "engine/evaluate.h"

#include <algorithm>
#include <chrono>
#include <list>
#include <string>
#include <utility>

#include "engine/engine.h"
#include "engine/page_budget.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"

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

// The logits of one text through the reference.
struct ReferenceRows {
  std::vector<float> logits;   // [rows][V]
  std::vector<LogitRow> rows;  // over `logits`
};

// Scores one text through one cache. Fills `reference` if it is empty, else compares with it;
// null: does neither.
Result<void> ScoreOne(ModelRunner& runner, const EvalText& text, int64_t text_index,
                      ReferenceRows* reference, CacheScores* scores, const EvalProgress& progress) {
  const bool fills = reference != nullptr && reference->rows.empty();
  if (fills) {
    // Never grows later, so that rows may point into it.
    const auto count = static_cast<int64_t>(text.tokens.size()) - text.first_scored;
    reference->logits.reserve(static_cast<size_t>(count * runner.vocab_size()));
  }
  const int64_t exact_before = runner.engine_options().exact_prefill ? text.prompt_length : 0;
  const LogitSink take = [&](int64_t position, std::span<const float> logits) -> Result<void> {
    ASSIGN_OR_RETURN(LogitRow row, Normalize(logits));
    TokenScore score{.text = text_index, .position = position};
    score.reads_sealed = runner.layout().SealedPages(position - 1, exact_before).size() > 0;
    score.nll = -row.LogProbability(text.tokens[static_cast<size_t>(position)]);
    if (fills) {
      const float* const begin = reference->logits.data() + reference->logits.size();
      reference->logits.insert(reference->logits.end(), logits.begin(), logits.end());
      row.logits = {begin, logits.size()};
      reference->rows.push_back(row);
    } else if (reference != nullptr) {
      const LogitRow& expected = reference->rows[static_cast<size_t>(position - text.first_scored)];
      score.divergence = KlDivergence(expected, row);
      score.same_top = expected.top == row.top;
    }
    scores->tokens.push_back(score);
    return {};
  };
  return ScoreText(runner, text, take, progress);
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

Result<std::vector<CacheScores>> ScoreTexts(std::span<const std::unique_ptr<ModelRunner>> runners,
                                            std::span<const EvalText> texts, bool compare,
                                            const EvalProgress& progress) {
  std::vector<CacheScores> scores(runners.size());
  double total = 0;
  for (size_t text = 0; text < texts.size(); ++text) {
    const auto length = static_cast<int64_t>(texts[text].tokens.size());
    total += static_cast<double>(length);
    ReferenceRows reference;
    for (size_t i = 0; i < runners.size(); ++i) {
      RETURN_IF_ERROR(ScoreOne(*runners[i], texts[text], static_cast<int64_t>(text),
                               compare ? &reference : nullptr, &scores[i], progress));
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
      auto reader = engine->Submit(std::move(requests[next]));
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

KvCacheOptions WithoutSpareMemory(KvCacheOptions options, const ModelConfig& model,
                                  int64_t num_sequences, int64_t context,
                                  int64_t max_batch_tokens) {
  const int64_t page = options.page_tokens;
  const int64_t heads = model.num_layers * model.num_kv_heads;
  const int64_t page_bytes = heads * 2 * RoundUp(model.head_dim, kPanelWidth) * 2 * page;
  // No page is larger than one of F16. Pages of either kind may take half of the memory, and a
  // sequence leaves its last page, and the one that it seals, in part unused.
  const int64_t windows = CeilDiv(options.sink_tokens + options.recent_tokens, page) + 2;
  const int64_t pages =
      num_sequences * (CeilDiv(context, page) + windows + 2) + CeilDiv(max_batch_tokens, page);
  const int64_t norms = num_sequences * heads * model.head_dim * 4;
  const int64_t useful = 2 * pages * page_bytes + norms + 4096;
  options.memory_bytes = std::min(options.memory_bytes, useful);
  return options;
}

}  // namespace innerq
