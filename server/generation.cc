#include "server/generation.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace innerq {
namespace {

double Seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

}  // namespace

Generation::Generation(ResponseReader reader, const Tokenizer* tokenizer, Metrics* metrics,
                       Options options)
    : reader_(std::move(reader)),
      tokenizer_(tokenizer),
      metrics_(metrics),
      options_(std::move(options)),
      text_(tokenizer, options_.text),
      usage_{.prompt_tokens = options_.prompt_tokens} {
  if (options_.notes != nullptr) options_.notes->prompt_tokens += usage_.prompt_tokens;
  if (options_.echo == nullptr || !options_.logprobs) return;
  // No distribution comes before the first token.
  const PromptEcho::Token& first = options_.echo->tokens.front();
  TokenEvent event;
  event.token_id = first.id;
  prompt_.push_back(Describe(event, first.first, first.offset));
  prompt_.back().logprob.reset();
}

Generation::~Generation() {
  if (!ended()) CountFinished("abort");
}

void Generation::CountFinished(const std::string& reason) const {
  metrics_->CountFinished(reason, Seconds(std::chrono::steady_clock::now() - options_.arrival));
}

void Generation::Read() {
  if (ended()) return;
  const std::vector<TokenEvent> events = (*reader_)->NextBatch(std::chrono::milliseconds(0));
  if (options_.prompt_tokens > 0) usage_.cached_tokens = (*reader_)->cached_tokens();
  Measure(std::count_if(events.begin(), events.end(),
                        [](const TokenEvent& event) { return !event.is_prompt; }));
  for (const TokenEvent& event : events) {
    Take(event);
    if (text_.stopped()) return Close("stop");
  }
  ReleaseTokens(false);
  if (const auto finish = (*reader_)->finish()) End(*finish);
}

double Generation::mean_logprob() const {
  return started() ? logprob_sum_ / static_cast<double>(usage_.completion_tokens) : 0;
}

void Generation::Measure(int64_t num_tokens) {
  if (num_tokens == 0) return;
  const auto now = std::chrono::steady_clock::now();
  if (started()) {
    metrics_->ObserveInterToken(Seconds(now - last_token_) / static_cast<double>(num_tokens),
                                num_tokens);
  } else {
    metrics_->ObserveFirstToken(Seconds(now - options_.arrival));
    metrics_->ObserveInterToken(0, num_tokens - 1);  // they came together with the first
  }
  last_token_ = now;
}

void Generation::Take(const TokenEvent& event) {
  if (event.is_prompt) {
    const PromptEcho::Token& token = options_.echo->tokens[prompt_.size()];
    prompt_.push_back(Describe(event, token.first, token.offset));
    return;
  }
  BeginAnswer();
  ++usage_.completion_tokens;
  if (options_.notes != nullptr) ++options_.notes->completion_tokens;
  logprob_sum_ += event.logprob;
  const bool has_text = !event.is_stop || options_.text.include_stop;
  if (options_.logprobs && (has_text || options_.stop_logprobs)) {
    held_.push_back(Describe(event, /*first=*/false, echo_characters_ + text_.next_offset()));
  }
  if (!has_text) return;
  piece_.text += text_.Push(event.token_id, usage_.completion_tokens > options_.min_tokens);
}

// The echo leaves as a whole, when nothing more will come for it.
void Generation::BeginAnswer() {
  if (std::exchange(answer_begun_, true) || options_.echo == nullptr) return;
  echo_characters_ = CountCharacters(options_.echo->text);
  piece_.text += options_.echo->text;
  std::move(prompt_.begin(), prompt_.end(), std::back_inserter(piece_.tokens));
  prompt_.clear();
}

TokenText Generation::Describe(const TokenEvent& event, bool first, int64_t offset) const {
  const auto bytes = [&](int32_t id) {
    return tokenizer_->TokenBytes(id, first, /*special=*/true);
  };
  TokenText token{.id = event.token_id,
                  .bytes = bytes(event.token_id),
                  .logprob = event.logprob,
                  .offset = offset,
                  .top = {}};
  for (const TokenLogprob& top : event.top) {
    token.top.push_back({.id = top.token_id, .bytes = bytes(top.token_id), .logprob = top.logprob});
  }
  return token;
}

void Generation::End(const Finish& finish) {
  switch (finish.reason) {
    case FinishReason::kStop:
      return Close("stop");
    case FinishReason::kLength:
      return Close("length");
    case FinishReason::kCancelled:  // not by us: we are still here
    case FinishReason::kError:
      error_ = finish.error.value_or(Error{ErrorCode::kInternal, "the request was cancelled"});
      return Close("error");
  }
}

void Generation::Close(std::string reason) {
  BeginAnswer();
  finish_reason_ = std::move(reason);
  CountFinished(finish_reason_);
  if (options_.notes != nullptr) options_.notes->finish_reason = finish_reason_;
  piece_.text += text_.Flush();
  ReleaseTokens(!text_.stopped());
  reader_.reset();
}

void Generation::ReleaseTokens(bool all) {
  const int64_t released = echo_characters_ + text_.released_characters();
  while (!held_.empty() && (all || held_.front().offset < released)) {
    piece_.tokens.push_back(std::move(held_.front()));
    held_.pop_front();
  }
}

}  // namespace innerq
