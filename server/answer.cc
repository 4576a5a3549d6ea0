#include "server/answer.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace innerq {

Answer::Answer(ResponseGroup group, const Tokenizer* tokenizer, Metrics* metrics,
               std::vector<Generation::Options> choices)
    : signal_(std::move(group.signal)) {
  CHECK(choices.size() == group.readers.size(), "one choice per response");
  for (size_t i = 0; i < choices.size(); ++i) {
    choices_.push_back(std::make_unique<Generation>(std::move(group.readers[i]), tokenizer, metrics,
                                                    std::move(choices[i])));
  }
}

void Answer::Read(std::chrono::milliseconds timeout) {
  signal_->Wait(timeout);
  for (const auto& choice : choices_) choice->Read();
}

std::vector<size_t> Answer::Best(size_t begin, size_t size, size_t count) const {
  std::vector<size_t> order(size);
  std::iota(order.begin(), order.end(), begin);
  if (count == size) return order;
  std::stable_sort(order.begin(), order.end(), [this](size_t a, size_t b) {
    return choices_[a]->mean_logprob() > choices_[b]->mean_logprob();
  });
  order.resize(count);
  return order;
}

bool Answer::started() const {
  return std::any_of(choices_.begin(), choices_.end(),
                     [](const auto& choice) { return choice->started(); });
}

bool Answer::ended() const {
  return error() || std::all_of(choices_.begin(), choices_.end(),
                                [](const auto& choice) { return choice->ended(); });
}

std::optional<Error> Answer::error() const {
  for (const auto& choice : choices_) {
    if (choice->error()) return choice->error();
  }
  return std::nullopt;
}

Usage Answer::usage() const {
  Usage sum;
  for (const auto& choice : choices_) {
    sum.prompt_tokens += choice->usage().prompt_tokens;
    sum.completion_tokens += choice->usage().completion_tokens;
    sum.cached_tokens += choice->usage().cached_tokens;
  }
  return sum;
}

}  // namespace innerq
