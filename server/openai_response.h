// Answers of the OpenAI API as JSON text.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/request.h"
#include "server/openai_request.h"

namespace innerq {

// A token for a logprobs block.
struct TokenText {
  struct Alternative {
    int32_t id = 0;
    std::string bytes;
    float logprob = 0;
  };

  int32_t id = 0;
  std::string bytes;             // may be part of a UTF-8 character
  std::optional<float> logprob;  // nullopt: nothing came before it that could tell
  int64_t offset = 0;            // characters of the answer before it
  std::vector<Alternative> top;  // most likely first
};

// A part of a choice.
struct AnswerPiece {
  std::string text;
  std::vector<TokenText> tokens;  // if asked for
  bool empty() const { return text.empty() && tokens.empty(); }
};

// A whole choice. `finish_reason` is stop or length.
struct AnswerChoice {
  AnswerPiece piece;
  std::string finish_reason;
};

// What all JSON objects of one answer have in common.
struct AnswerHead {
  bool chat = false;
  std::string id;
  int64_t created = 0;  // seconds since 1970
  std::string model;
  bool logprobs = false;          // asked for
  bool include_usage = false;     // streaming: a last chunk has the usage, in all others it is null
  bool continuous_usage = false;  // or, if this is set, what it is so far
};

// A whole answer; the choices in the order of their indices.
std::string AnswerJson(const AnswerHead& head, const std::vector<AnswerChoice>& choices,
                       const Usage& usage);

// Chunks of a streamed answer: of the choice `index` the role (chat only), text, and the end; and
// the usage. `usage` is that of all choices so far.
std::string RoleChunkJson(const AnswerHead& head, int64_t index, const Usage& usage);
std::string TextChunkJson(const AnswerHead& head, int64_t index, const AnswerPiece& piece,
                          const Usage& usage);
std::string EndChunkJson(const AnswerHead& head, int64_t index, std::string_view finish_reason,
                         const Usage& usage);
std::string UsageChunkJson(const AnswerHead& head, const Usage& usage);

// The list of models (one), or that one alone.
std::string ModelJson(std::string_view id, int64_t created, int64_t max_context);
std::string ModelListJson(std::string_view id, int64_t created, int64_t max_context);

}  // namespace innerq
