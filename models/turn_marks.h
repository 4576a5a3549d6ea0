// TurnMarks: the texts by which a chat template tells turns apart and which a message could spell.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>

#include "kernels/result.h"
#include "models/jinja_text.h"
#include "models/tokenizer.h"

namespace innerq {

// A special or added token that a template writes is safe: message text never becomes it. A mark
// that is ordinary text, [INST] of Llama 2 say, is the same to the model whoever wrote it. What is
// a mark is seen in what templates write:
// - a word in square or pointed brackets with a letter in it: [/INST], <<SYS>>, <|user|>;
// - all that stands between two messages, or after the last one, if it has no such word and no
//   token of its own, but a letter and a punctuation character: "ASSISTANT:", "### Response:".
class TurnMarks {
 public:
  // `tokenizer` tells which texts are tokens (null: none).
  explicit TurnMarks(std::shared_ptr<const Tokenizer> tokenizer);

  // Learns the words in brackets that the template wrote in a rendered conversation. Errors:
  // invalid argument for more than 256 of them in all.
  Result<void> LearnWords(const jinja::Text& rendered);
  // Learns what stands between the messages. Each must be of one untrusted stretch, and all that
  // is trusted be the template's notion of turns: for conversations made to learn from.
  void LearnSeparators(const jinja::Text& rendered);

  // A mark in the text that is not wholly of the template's making, or nullopt. O(bytes * marks
  // that begin with the same byte).
  std::optional<std::string> FindForged(const jinja::Text& rendered) const;

 private:
  // Whether trusted text becomes other tokens than text of messages does.
  bool HasToken(std::string_view text) const;
  void Add(std::string_view mark);

  std::shared_ptr<const Tokenizer> tokenizer_;
  std::set<std::string, std::less<>> marks_;
  std::set<std::string, std::less<>> tokens_;  // words in brackets that are tokens
  std::array<bool, 256> begins_{};             // by the first byte of a mark
};

}  // namespace innerq
