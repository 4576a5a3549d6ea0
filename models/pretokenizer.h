// Pretokenizer: what tokenizer.json does to a text before BPE: rewrites it and cuts it into pieces.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "kernels/result.h"

namespace innerq {

// What to look for in a text.
struct TextPattern {
  std::string text;  // not empty; a literal, or a regular expression in Oniguruma's syntax
  bool is_regex = false;
  std::string path = {};  // where in tokenizer.json it stands, for errors
};

// Puts `text` before a piece that is not empty.
struct PrependStep {
  std::string text;
  bool unless_present = false;  // not before a piece that begins with it
  bool only_at_start = false;   // only before the piece that begins the whole text
};

// Replaces every match.
struct ReplaceStep {
  TextPattern pattern;
  std::string content;
};

// What becomes of the matches that a piece is cut at.
enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct SplitStep {
  TextPattern pattern;
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  // what does not match is the delimiter
};

// Writes every byte as a character of ByteAlphabet.
struct ByteAlphabetStep {};

using TextStep = std::variant<PrependStep, ReplaceStep, SplitStep, ByteAlphabetStep>;

// The visible character, in UTF-8, that stands for each byte (GPT-2, encoder.py, bytes_to_unicode):
// the Latin-1 character if that is visible, else U+0100 and following in order.
std::array<std::string, 256> ByteAlphabet();

// A piece of text for BPE.
struct TextPiece {
  std::string text;
  bool raw = false;     // bytes that no step changes: not UTF-8, or text that steps would confuse
  bool joined = false;  // continues the piece before it, from which only raw bytes cut it off
};

// Runs the steps of a tokenizer.json. Immutable; any thread may call it. The patterns run in PCRE2
// (JIT where the system allows it); none recurses on the machine stack.
class Pretokenizer {
 public:
  // Errors: invalid argument for a pattern that PCRE2 cannot run as Oniguruma would, with its path.
  static Result<Pretokenizer> Create(std::vector<TextStep> steps);
  Pretokenizer();  // without steps
  Pretokenizer(Pretokenizer&& other) noexcept;
  Pretokenizer& operator=(Pretokenizer&& other) noexcept;
  ~Pretokenizer();

  // Cuts a text without added tokens into pieces, none empty. `begins_text`: no token precedes it.
  // `mark`: text that is passed through as raw bytes, or empty. A step may try so many ways to
  // match its pattern per byte, and one match take so much memory; should it reach that (no real
  // pattern does), the rest of each piece stays whole.
  std::vector<TextPiece> Split(std::string_view text, bool begins_text,
                               std::string_view mark) const;

 private:
  struct CompiledStep;
  std::vector<CompiledStep> steps_;
};

}  // namespace innerq
