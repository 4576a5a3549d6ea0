// Answer: the choices of one request, in progress.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/request.h"
#include "server/generation.h"

namespace innerq {

// Reads the responses to requests that were submitted together. Dropping it cancels those that
// still run. One thread at a time.
class Answer {
 public:
  // `choices` are as many as the group's readers. `tokenizer` and `metrics` must outlive it.
  Answer(ResponseGroup group, const Tokenizer* tokenizer, Metrics* metrics,
         std::vector<Generation::Options> choices);

  // Reads what has come for any choice, waiting for it at most `timeout`.
  void Read(std::chrono::milliseconds timeout);

  size_t size() const { return choices_.size(); }
  Generation& choice(size_t i) { return *choices_[i]; }
  // Of the `size` choices from `begin` on the `count` with the highest mean log-probability of
  // their tokens, the best first, the first of equals; in their order if that is all of them.
  std::vector<size_t> Best(size_t begin, size_t size, size_t count) const;

  bool started() const;                // a token of some choice has come
  bool ended() const;                  // all choices have, or one has failed
  std::optional<Error> error() const;  // of the first that failed
  Usage usage() const;                 // of all choices together

 private:
  const std::shared_ptr<ResponseSignal> signal_;
  std::vector<std::unique_ptr<Generation>> choices_;
};

}  // namespace innerq
