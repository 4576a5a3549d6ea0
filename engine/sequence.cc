#include "engine/sequence.h"

#include <utility>

namespace innerq {

Sequence::Sequence(Request from, std::shared_ptr<ResponseStream> to, int64_t exact)
    : request(std::move(from)),
      stream(std::move(to)),
      exact_before(exact),
      tokens(request.prompt),
      seen(UsesPenalties(request.sampling) ? SeenTokens::InPrompt(request.prompt) : SeenTokens()) {
  if (num_to_compute() == 0) End(FinishReason::kLength);
}

int64_t Sequence::num_to_compute() const {
  return request.max_tokens > 0 ? num_tokens() : num_to_score();
}

std::span<const int32_t> Sequence::masked() const {
  if (num_generated() >= request.min_tokens) return {};
  return request.stop_token_ids;
}

void Sequence::Append(int32_t token) {
  tokens.push_back(token);
  if (UsesPenalties(request.sampling)) seen.AddToAnswer(token);
}

void Sequence::End(FinishReason reason, std::optional<Error> error) {
  if (finish.has_value()) return;
  finish = Finish{reason,
                  Usage{.prompt_tokens = prompt_length(),
                        .completion_tokens = num_generated(),
                        .cached_tokens = num_cached.value_or(0)},
                  std::move(error)};
}

}  // namespace innerq
