#include "engine/request.h"

#include <cstdio>

namespace innerq {
namespace {

// Whether `value` is in [low, high], or in (low, high] if `open_low`; NaN is not.
Result<void> CheckRange(const char* name, double value, double low, double high,
                        bool open_low = false) {
  if (value >= low && value <= high && !(open_low && value == low)) return {};
  char text[128];
  std::snprintf(text, sizeof(text), "%s must be in %c%g, %g], not %g", name, open_low ? '(' : '[',
                low, high, value);
  return InvalidArgument(text, name);
}

}  // namespace

void ResponseSignal::Raise() {
  {
    const std::lock_guard lock(mutex_);
    raised_ = true;
  }
  changed_.notify_one();
}

void ResponseSignal::Wait(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, timeout, [this] { return raised_; });
  raised_ = false;
}

void ResponseStream::Push(TokenEvent event) {
  {
    const std::lock_guard lock(mutex_);
    CHECK(!finish_.has_value(), "token after the end of a response");
    CHECK(static_cast<int64_t>(events_.size()) < capacity_, "response stream over its capacity");
    events_.push_back(std::move(event));
  }
  Notify();
}

void ResponseStream::Close(Finish finish) {
  {
    const std::lock_guard lock(mutex_);
    CHECK(!finish_.has_value(), "a request finished twice");
    finish_ = std::move(finish);
  }
  Notify();
}

void ResponseStream::Notify() {
  ready_.notify_one();
  if (signal_) signal_->Raise();
}

std::vector<TokenEvent> ResponseStream::NextBatch(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  ready_.wait_for(lock, timeout, [this] { return !events_.empty() || finish_.has_value(); });
  std::vector<TokenEvent> events(std::make_move_iterator(events_.begin()),
                                 std::make_move_iterator(events_.end()));
  events_.clear();
  return events;
}

std::optional<Finish> ResponseStream::finish() const {
  const std::lock_guard lock(mutex_);
  if (!events_.empty()) return std::nullopt;
  return finish_;
}

Result<void> ValidateSamplingParams(const SamplingParams& params, int64_t vocab_size) {
  RETURN_IF_ERROR(CheckRange("temperature", params.temperature, 0, 2));
  RETURN_IF_ERROR(CheckRange("top_p", params.top_p, 0, 1));
  if (params.top_k < 0) {
    return InvalidArgument("top_k must be at least 0, not " + std::to_string(params.top_k),
                           "top_k");
  }
  RETURN_IF_ERROR(CheckRange("min_p", params.min_p, 0, 1));
  RETURN_IF_ERROR(
      CheckRange("repetition_penalty", params.repetition_penalty, 0, 2, /*open_low=*/true));
  RETURN_IF_ERROR(CheckRange("presence_penalty", params.presence_penalty, -2, 2));
  RETURN_IF_ERROR(CheckRange("frequency_penalty", params.frequency_penalty, -2, 2));
  for (const auto& [id, bias] : params.logit_bias) {
    if (id < 0 || id >= vocab_size) {
      return InvalidArgument("logit_bias names token " + std::to_string(id) +
                                 ", outside the vocabulary [0, " + std::to_string(vocab_size) + ")",
                             "logit_bias");
    }
    RETURN_IF_ERROR(CheckRange("logit_bias", bias, -100, 100));
  }
  RETURN_IF_ERROR(CheckRange("top_logprobs", params.num_logprobs, -1, kMaxLogprobs));
  return {};
}

Result<void> ValidateRequest(const Request& request, int64_t vocab_size, int64_t max_context) {
  if (request.prompt.empty()) return InvalidArgument("the prompt has no tokens", "prompt");
  const auto outside = [vocab_size](int32_t id) { return id < 0 || id >= vocab_size; };
  const std::string vocabulary = ", outside the vocabulary [0, " + std::to_string(vocab_size) + ")";
  for (const int32_t id : request.prompt) {
    if (outside(id)) {
      return InvalidArgument("the prompt holds token " + std::to_string(id) + vocabulary, "prompt");
    }
  }
  for (const int32_t id : request.stop_token_ids) {
    if (outside(id)) {
      return InvalidArgument("stop_token_ids holds token " + std::to_string(id) + vocabulary,
                             "stop_token_ids");
    }
  }
  RETURN_IF_ERROR(ValidateSamplingParams(request.sampling, vocab_size));
  if (request.prompt_logprobs < -1 || request.prompt_logprobs > kMaxLogprobs) {
    return InvalidArgument("prompt_logprobs must be in [-1, " + std::to_string(kMaxLogprobs) +
                               "], not " + std::to_string(request.prompt_logprobs),
                           "prompt_logprobs");
  }
  if (request.max_tokens < 0) {
    return InvalidArgument(
        "max_tokens must be at least 0, not " + std::to_string(request.max_tokens), "max_tokens");
  }
  if (request.min_tokens < 0 || request.min_tokens > request.max_tokens) {
    return InvalidArgument(
        "min_tokens must be in [0, max_tokens = " + std::to_string(request.max_tokens) + "], not " +
            std::to_string(request.min_tokens),
        "min_tokens");
  }
  const int64_t prompt_length = static_cast<int64_t>(request.prompt.size());
  // Subtracting keeps clear of overflow for any max_tokens.
  if (request.max_tokens > max_context - prompt_length) {
    return InvalidArgument("the context holds " + std::to_string(max_context) +
                               " tokens; the prompt has " + std::to_string(prompt_length) +
                               " and max_tokens is " + std::to_string(request.max_tokens),
                           "max_tokens");
  }
  return {};
}

}  // namespace innerq
