// Generation: one answer in progress, from the engine's tokens to text.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "engine/request.h"
#include "models/tokenizer.h"
#include "server/http_messages.h"
#include "server/metrics.h"
#include "server/openai_response.h"
#include "server/text_stream.h"

namespace innerq {

// Reads a response, measures it, and turns it into text and logprobs. Dropping it before its end
// cancels the request. One thread at a time.
class Generation {
 public:
  struct Options {
    std::vector<std::string> stops;
    bool logprobs = false;
    int64_t prompt_tokens = 0;
    std::chrono::steady_clock::time_point arrival;  // of the request
    AnswerNotes* notes = nullptr;                   // kept up to date, if not null; must outlive it
  };
  // What came since the last call. Empty if nothing did.
  struct Piece {
    std::string text;
    std::vector<TokenText> tokens;  // whose text has left with this piece or before; if asked for
    bool empty() const { return text.empty() && tokens.empty(); }
  };

  // `tokenizer` and `metrics` must outlive it.
  Generation(ResponseReader reader, const Tokenizer* tokenizer, Metrics* metrics, Options options);
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  // Waits for tokens, the end, or the timeout.
  Piece Next(std::chrono::milliseconds timeout);

  bool started() const { return usage_.completion_tokens > 0; }  // a token has come
  bool ended() const { return !finish_reason_.empty(); }
  // After the end: stop, length or error.
  const std::string& finish_reason() const { return finish_reason_; }
  const std::optional<Error>& error() const { return error_; }  // set if it is "error"
  // Completion tokens are counted as they come, one that stops the answer included.
  const Usage& usage() const { return usage_; }

 private:
  void Take(const TokenEvent& event, Piece* piece);
  void Measure(int64_t num_tokens);
  void End(const Finish& finish, Piece* piece);
  void Close(std::string reason, Piece* piece);
  void ReleaseTokens(bool all, Piece* piece);

  std::optional<ResponseReader> reader_;  // reset at the end, which cancels what still runs
  const Tokenizer* tokenizer_;
  Metrics* metrics_;
  const Options options_;
  TextStream text_;
  std::deque<TokenText> held_;  // tokens whose text has not left
  Usage usage_;
  std::string finish_reason_;
  std::optional<Error> error_;
  std::chrono::steady_clock::time_point last_token_;
};

}  // namespace innerq
