// Requests of the OpenAI API: JSON to plain values, refusing whatever would not be honoured.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "engine/request.h"
#include "models/chat_template.h"
#include "server/api_error.h"

namespace innerq {

// The most choices of one request: prompts times best_of.
constexpr int64_t kMaxChoices = 128;

// The most log-probabilities that one request may have at once, alternatives included: those of
// prompts are held until their answers begin, those of answers to their end, or until a client that
// streams them has read them, which may be as late.
constexpr int64_t kMaxHeldLogprobs = int64_t{1} << 20;

// What a completion continues: text or, not empty, ids.
using ApiPrompt = std::variant<std::string, std::vector<int32_t>>;

// A request for text, of either endpoint.
struct ApiRequest {
  bool chat = false;
  std::string model;
  std::vector<ApiPrompt> prompts;     // completions: at least one
  std::vector<ChatMessage> messages;  // chat
  int64_t n = 1;                      // choices per prompt
  int64_t best_of = 1;                // candidates for them; at least n
  SamplingParams sampling;            // num_logprobs: as asked for; seed: see has_seed
  bool has_seed = false;
  std::optional<int64_t> max_tokens;
  int64_t min_tokens = 0;
  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
  std::string cache_salt;           // see Request
  bool echo = false;                // the prompt is part of the answer
  bool add_special_tokens = true;   // of the tokenizer, to a prompt's text
  bool parse_special = false;       // a prompt's text may spell special tokens
  bool skip_special_tokens = true;  // they are no part of the answer's text
  bool include_stop = false;        // what stopped the answer is part of it
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage = false;
};

// Parses the body of POST /v1/completions, or of /v1/chat/completions if `chat`.
//
// Honoured: model, prompt (text, ids, or lists of either) | messages, n, best_of (completions),
// max_tokens, max_completion_tokens (chat), min_tokens, temperature, top_p, top_k, min_p, seed,
// repetition_penalty, presence_penalty, frequency_penalty, logit_bias, logprobs, top_logprobs
// (chat), echo (completions), stop (up to 16), stop_token_ids (up to 128), ignore_eos,
// include_stop_str_in_output, skip_special_tokens, add_special_tokens and parse_special
// (completions), stream, stream_options.include_usage and continuous_usage_stats, cache_salt.
// max_tokens 0 needs echo.
// `user` is accepted: by definition it does not change the answer. null means "not given".
// Parameters of OpenAI's that are not implemented pass only with null or with the value that asks
// for nothing, such as a response_format of text; every other name is refused with the code
// "unsupported_parameter".
// Beyond JSON's own rules, keys must not repeat and nesting is bounded (CheckJson).
std::variant<ApiRequest, ApiError> ParseApiRequest(std::string_view body, bool chat);

// Refuses a request for more choices, of all prompts, than `most`, by the parameter that asks for
// them. `why`, if not empty, is put behind the limit: " (...)".
std::optional<ApiError> CheckNumChoices(const ApiRequest& request, int64_t most,
                                        const std::string& why = "");

// The names that ParseApiRequest knows, those that pass with null alone included. The texts are
// static.
std::vector<std::string_view> ApiParameterNames(bool chat);

}  // namespace innerq
