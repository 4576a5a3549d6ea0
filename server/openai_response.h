// Answers of the OpenAI API as JSON text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/request.h"
#include "server/openai_request.h"

namespace innerq {

// A generated token for a logprobs block.
struct TokenText {
  std::string bytes;  // may be part of a UTF-8 character
  float logprob = 0;
  int64_t offset = 0;                              // characters of the answer before it
  std::vector<std::pair<std::string, float>> top;  // bytes and logprob, most likely first
};

// What all JSON objects of one answer have in common.
struct AnswerHead {
  bool chat = false;
  std::string id;
  int64_t created = 0;  // seconds since 1970
  std::string model;
  bool logprobs = false;       // asked for
  bool include_usage = false;  // streaming: usage is null in all chunks but the last
};

// A whole answer. `finish_reason` is stop or length.
std::string AnswerJson(const AnswerHead& head, std::string_view text,
                       const std::vector<TokenText>& tokens, std::string_view finish_reason,
                       const Usage& usage);

// Chunks of a streamed answer: the role (chat only), text, the end, and the usage.
std::string RoleChunkJson(const AnswerHead& head);
std::string TextChunkJson(const AnswerHead& head, std::string_view text,
                          const std::vector<TokenText>& tokens);
std::string EndChunkJson(const AnswerHead& head, std::string_view finish_reason);
std::string UsageChunkJson(const AnswerHead& head, const Usage& usage);

// The list of models (one), or that one alone.
std::string ModelJson(std::string_view id, int64_t created, int64_t max_context);
std::string ModelListJson(std::string_view id, int64_t created, int64_t max_context);

}  // namespace innerq
