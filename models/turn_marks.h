// TurnMarks: the texts by which a chat template tells turns apart and which a message could spell.
#pragma once

#include <array>
#include <functional>
#include <map>
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
// - of what stands between two messages, after the last one, and on the line that leads to the
//   first one, each stretch between such words, tokens and line breaks, if it has a letter and a
//   punctuation character and does not end as a sentence does: "ASSISTANT:", "### Response:".
// A mark of the second kind is one where it stands as the template has it: at the start of a line,
// if that is where the template puts it, else at the start of a word. The start of a message
// counts as both.
class TurnMarks {
 public:
  // `tokenizer` tells which texts are tokens, and how it changes texts before it looks for tokens
  // (null: no tokens, no changes).
  explicit TurnMarks(std::shared_ptr<const Tokenizer> tokenizer);

  // Learns the words in brackets that the template wrote in a rendered conversation. Errors:
  // invalid argument for more than 256 of them in all.
  Result<void> LearnWords(const jinja::Text& rendered);
  // Learns what stands around the messages: around the untrusted stretches that are one.
  void LearnSeparators(const jinja::Text& rendered,
                       const std::function<bool(std::string_view)>& is_message);

  // A mark in the text that is not wholly of the template's making, or nullopt; also one that the
  // tokenizer makes of other characters ([INST] in full-width letters). O(bytes * marks that begin
  // with the same byte), and for a tokenizer that changes texts what it takes to encode this one.
  std::optional<std::string> FindForged(const jinja::Text& rendered) const;

 private:
  // What has to stand before a mark, the least first.
  enum class Before { kAnything, kWordStart, kLineStart };

  // Whether trusted text becomes other tokens than text of messages does.
  bool HasToken(std::string_view text) const;
  // The texts of the tokens in a text of the template's.
  std::set<std::string> TokensIn(std::string_view text) const;
  // The text as the model sees it.
  std::string Normalized(std::string_view text) const;
  void Add(std::string_view mark, Before before);
  // Learns the stretches within [begin, end) of a separator. `start`: what stands before its first.
  void LearnStretches(std::string_view separator, size_t begin, size_t end, Before start);
  std::optional<std::string> Find(const jinja::Text& text) const;
  static bool StandsAt(const jinja::Text& text, size_t at, Before before);

  std::shared_ptr<const Tokenizer> tokenizer_;
  bool normalizes_ = false;  // whether the tokenizer changes texts
  std::map<std::string, Before, std::less<>> marks_;
  std::set<std::string, std::less<>> tokens_;  // words in brackets that are tokens
  std::array<bool, 256> begins_{};             // by the first byte of a mark
};

}  // namespace innerq
