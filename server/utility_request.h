// Requests of the endpoints beside generation: JSON to plain values, as strictly as
// ParseApiRequest.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "server/openai_request.h"

namespace innerq {

// What POST /tokenize, /detokenize and /apply-template ask.
struct UtilityRequest {
  std::optional<std::string> model;
  std::string text;                   // to tokenize ...
  std::vector<ChatMessage> messages;  // ... or, if not empty, these
  std::vector<int32_t> tokens;        // to turn into text
  bool add_bos = true;                // before `text`, where the model has one
  bool parse_special = false;         // `text` may spell special tokens
  bool add_generation_prompt = true;  // after `messages`
  bool with_pieces = false;           // llama.cpp's: tokens as objects of id and piece
  bool return_token_strs = false;     // vLLM's: a list of texts beside the ids
};

enum class UtilityEndpoint { kTokenize, kDetokenize, kApplyTemplate };

// Parses a body. Names and defaults are vLLM's and llama.cpp's:
//   kTokenize       prompt (vLLM's; by default the ids that /v1/completions makes of it), content
//                   (llama.cpp's; by default without BOS, and special tokens may be spelled) or
//                   messages (the ids that /v1/chat/completions makes of them);
//                   add_special_tokens or add_special, parse_special (both for texts only),
//                   add_generation_prompt (for messages only), return_token_strs, with_pieces
//   kDetokenize     tokens
//   kApplyTemplate  messages, add_generation_prompt
// and `model` for all. null means "not given"; what would not be honoured is refused by name.
std::variant<UtilityRequest, ApiError> ParseUtilityRequest(std::string_view body,
                                                           UtilityEndpoint endpoint);

// The names that ParseUtilityRequest knows. The texts are static.
std::vector<std::string_view> UtilityParameterNames(UtilityEndpoint endpoint);

}  // namespace innerq
