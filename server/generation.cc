#include "server/generation.h"

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
      text_(tokenizer, options_.stops),
      usage_{.prompt_tokens = options_.prompt_tokens} {
  if (options_.notes != nullptr) options_.notes->prompt_tokens += usage_.prompt_tokens;
}

Generation::~Generation() {
  metrics_->CountFinished(ended() ? finish_reason_ : "abort",
                          Seconds(std::chrono::steady_clock::now() - options_.arrival));
}

Generation::Piece Generation::Next(std::chrono::milliseconds timeout) {
  CHECK(!ended(), "a generation was read beyond its end");
  Piece piece;
  const std::vector<TokenEvent> events = (*reader_)->NextBatch(timeout);
  Measure(static_cast<int64_t>(events.size()));
  for (const TokenEvent& event : events) {
    Take(event, &piece);
    if (text_.stopped()) {
      Close("stop", &piece);
      return piece;
    }
  }
  ReleaseTokens(false, &piece);
  if (const auto finish = (*reader_)->finish()) End(*finish, &piece);
  return piece;
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

void Generation::Take(const TokenEvent& event, Piece* piece) {
  ++usage_.completion_tokens;
  if (options_.notes != nullptr) ++options_.notes->completion_tokens;
  if (event.is_stop) return;
  if (options_.logprobs) {
    const auto bytes = [this](int32_t id) {
      return tokenizer_->TokenBytes(id, /*first=*/false, /*special=*/true);
    };
    TokenText token{.bytes = bytes(event.token_id),
                    .logprob = event.logprob,
                    .offset = text_.next_offset(),
                    .top = {}};
    for (const TokenLogprob& top : event.top) {
      token.top.emplace_back(bytes(top.token_id), top.logprob);
    }
    held_.push_back(std::move(token));
  }
  piece->text += text_.Push(event.token_id);
}

void Generation::End(const Finish& finish, Piece* piece) {
  usage_.cached_tokens = finish.usage.cached_tokens;
  switch (finish.reason) {
    case FinishReason::kStop:
      return Close("stop", piece);
    case FinishReason::kLength:
      return Close("length", piece);
    case FinishReason::kCancelled:  // not by us: we are still here
    case FinishReason::kError:
      error_ = finish.error.value_or(Error{ErrorCode::kInternal, "the request was cancelled"});
      return Close("error", piece);
  }
}

void Generation::Close(std::string reason, Piece* piece) {
  finish_reason_ = std::move(reason);
  if (options_.notes != nullptr) options_.notes->finish_reason = finish_reason_;
  piece->text += text_.Flush();
  ReleaseTokens(!text_.stopped(), piece);
  reader_.reset();
}

void Generation::ReleaseTokens(bool all, Piece* piece) {
  while (!held_.empty() && (all || held_.front().offset < text_.released_characters())) {
    piece->tokens.push_back(std::move(held_.front()));
    held_.pop_front();
  }
}

}  // namespace innerq
