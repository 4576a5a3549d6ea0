// Generation: one choice of an answer in progress, from the engine's tokens to text.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
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
    TextStream::Options text;
    int64_t min_tokens = 0;                  // no stop string ends the answer before so many
    bool logprobs = false;                   // tokens are asked for, with their log-probabilities
    bool stop_logprobs = false;              // and a token that stops the answer is one of them
    int64_t prompt_tokens = 0;               // of its prompt; 0 if another choice accounts for them
    std::shared_ptr<const PromptEcho> echo;  // if not null, the answer begins with it
    std::chrono::steady_clock::time_point arrival;  // of the request
    AnswerNotes* notes = nullptr;                   // kept up to date, if not null; must outlive it
  };

  // `tokenizer` and `metrics` must outlive it.
  Generation(ResponseReader reader, const Tokenizer* tokenizer, Metrics* metrics, Options options);
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  // Takes what has come, without waiting.
  void Read();
  // What may leave since the last call: text, and tokens whose text has left with it or before.
  AnswerPiece TakePiece() { return std::exchange(piece_, {}); }

  bool started() const { return usage_.completion_tokens > 0; }  // a token has come
  bool ended() const { return !finish_reason_.empty(); }
  // After the end: stop, length or error.
  const std::string& finish_reason() const { return finish_reason_; }
  const std::optional<Error>& error() const { return error_; }  // set if it is "error"
  // Completion tokens are counted as they come, one that stops the answer included.
  const Usage& usage() const { return usage_; }
  // Over the completion tokens; valid if the engine was asked for logprobs. 0 if there are none.
  double mean_logprob() const;

 private:
  void Take(const TokenEvent& event);
  void BeginAnswer();
  TokenText Describe(const TokenEvent& event, bool first, int64_t offset) const;
  void Measure(int64_t num_tokens);
  void End(const Finish& finish);
  void Close(std::string reason);
  void CountFinished(const std::string& reason) const;
  void ReleaseTokens(bool all);

  std::optional<ResponseReader> reader_;  // reset at the end, which cancels what still runs
  const Tokenizer* tokenizer_;
  Metrics* metrics_;
  const Options options_;
  TextStream text_;
  std::vector<TokenText> prompt_;  // tokens of the echo, until the answer begins
  bool answer_begun_ = false;      // and the echo has left
  int64_t echo_characters_ = 0;    // before the answer's own text
  std::deque<TokenText> held_;     // tokens whose text has not left
  AnswerPiece piece_;
  Usage usage_;
  double logprob_sum_ = 0;
  std::string finish_reason_;
  std::optional<Error> error_;
  std::chrono::steady_clock::time_point last_token_;
};

}  // namespace innerq
