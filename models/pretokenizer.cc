#include "models/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "models/utf8.h"

namespace innerq {
namespace {

constexpr size_t kMaxPatternBytes = 10'000;
// What PCRE2 counts as its match limit, for all of a text. The patterns of real models take a few
// a byte; each match, and the search that finds no more, is charged for at least kFirstTry.
constexpr int64_t kTriesPerByte = 200;
constexpr int64_t kTriesPerText = 1000;
constexpr uint32_t kFirstTry = 50;
constexpr uint32_t kHeapLimitKib = 256 * 1024;  // of one match

struct Range {
  size_t begin = 0;
  size_t end = 0;
};

Error BadPattern(const TextPattern& pattern, size_t at, const std::string& what) {
  return InvalidArgument(pattern.path + ": " + what + " at byte " + std::to_string(at));
}

// Rewrites an Oniguruma pattern (Ruby syntax) for PCRE2: white space is the Unicode property (to
// PCRE2, \s is also U+180E). Refuses what the two read differently.
class PatternReader {
 public:
  explicit PatternReader(const TextPattern& pattern) : pattern_(pattern) {}

  Result<std::string> Read() {
    while (at_ < text().size()) RETURN_IF_ERROR(in_class_ ? ReadInClass() : ReadOutside());
    return std::move(out_);
  }

 private:
  const std::string& text() const { return pattern_.text; }
  bool Next(std::string_view prefix) const {
    return std::string_view(text()).substr(at_).starts_with(prefix);
  }
  void Copy(size_t count) {
    out_ += text().substr(at_, count);
    at_ += count;
  }

  Result<void> ReadOutside() {
    if (Next("\\")) return ReadEscape();
    if (Next("(*")) return BadPattern(pattern_, at_, "expected no verb (*");
    if (Next("(?")) return ReadGroup();
    if (Next("[")) {
      in_class_ = true;
      Copy(Next("[^") ? 2 : 1);
      if (Next("]")) return BadPattern(pattern_, at_, "expected no ] as first member of a class");
      return {};
    }
    if (Next("{,")) return BadPattern(pattern_, at_, "expected a number after {");
    if (Next("{")) {
      const size_t end = text().find('}', at_);
      if (end == std::string::npos) return BadPattern(pattern_, at_, "expected } after {");
      Copy(end + 1 - at_);
      if (Next("+")) return BadPattern(pattern_, at_, "expected no + after }");
      return {};
    }
    Copy(1);
    return {};
  }

  Result<void> ReadInClass() {
    if (Next("\\")) return ReadEscape();
    if (Next("[")) return BadPattern(pattern_, at_, "expected no [ in a class");
    if (Next("&&")) return BadPattern(pattern_, at_, "expected no && in a class");
    if (Next("]")) in_class_ = false;
    Copy(1);
    return {};
  }

  Result<void> ReadGroup() {
    for (const std::string_view known : {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"}) {
      if (!Next(known)) continue;
      Copy(known.size());
      return {};
    }
    return BadPattern(pattern_, at_, "expected (?:, (?i:, (?=, (?!, (?<=, (?<! or (?>");
  }

  Result<void> ReadEscape() {
    const char kind = at_ + 1 < text().size() ? text()[at_ + 1] : '\0';
    if (kind == 's' || kind == 'S') {
      out_ += kind == 's' ? "\\p{White_Space}" : "\\P{White_Space}";
      at_ += 2;
      return {};
    }
    if (kind == 'p' || kind == 'P') {
      const size_t end = text().find('}', at_);
      if (at_ + 2 >= text().size() || text()[at_ + 2] != '{' || end == std::string::npos) {
        return BadPattern(pattern_, at_, "expected a property in braces");
      }
      // General categories have names of one or two letters. Other names are scripts, which PCRE2
      // would take to include the characters that several scripts share.
      const std::string name = text().substr(at_ + 3, end - at_ - 3);
      const bool category = name.size() <= (name.starts_with('^') ? 3 : 2);
      out_ += std::string("\\") + kind + (category ? "{" : "{sc:") + name + "}";
      at_ = end + 1;
      return {};
    }
    const bool punctuation = kind > ' ' && kind < '\x7f' && !(kind >= '0' && kind <= '9') &&
                             !((kind | 0x20) >= 'a' && (kind | 0x20) <= 'z');
    if (!punctuation && std::string_view("dDrntf").find(kind) == std::string_view::npos) {
      return BadPattern(pattern_, at_,
                        "expected an escape of \\s \\S \\d \\D \\p \\P \\r \\n \\t "
                        "\\f or of punctuation");
    }
    Copy(2);
    return {};
  }

  const TextPattern& pattern_;
  std::string out_;
  size_t at_ = 0;
  bool in_class_ = false;
};

struct FreePcre2 {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

// What the matches of one pattern in one text may still cost, and PCRE2's memory for them.
class MatchWork {
 public:
  explicit MatchWork(size_t bytes)
      : left_(kTriesPerText + kTriesPerByte * static_cast<int64_t>(bytes)),
        data_(pcre2_match_data_create(1, nullptr)),
        context_(pcre2_match_context_create(nullptr)) {
    CHECK(data_ != nullptr && context_ != nullptr, "out of memory");
    pcre2_set_heap_limit(context_.get(), kHeapLimitKib);
  }

  // The first match in text[at, end), or nullopt if there is none or it would cost too much. PCRE2
  // does not tell what a match took, so limits are tried that grow, and all of them are paid for.
  std::optional<Range> Find(const pcre2_code* code, std::string_view text, size_t at) {
    for (int64_t limit = kFirstTry; left_ > 0; limit *= 8) {
      limit = std::min({limit, left_, int64_t{std::numeric_limits<uint32_t>::max()}});
      left_ -= limit;
      pcre2_set_match_limit(context_.get(), static_cast<uint32_t>(limit));
      int rc = Match(code, text, at, 0);
      if (rc == PCRE2_ERROR_JIT_STACKLIMIT) rc = Match(code, text, at, PCRE2_NO_JIT);
      if (rc == PCRE2_ERROR_MATCHLIMIT) continue;
      if (rc < 0) return std::nullopt;  // else 0: there is room for the whole match, not for groups
      const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data_.get());
      return Range{bounds[0], bounds[1]};
    }
    return std::nullopt;
  }

 private:
  int Match(const pcre2_code* code, std::string_view text, size_t at, uint32_t options) const {
    return pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                       options | PCRE2_NO_UTF_CHECK, data_.get(), context_.get());
  }

  int64_t left_;
  const std::unique_ptr<pcre2_match_data, FreePcre2> data_;
  const std::unique_ptr<pcre2_match_context, FreePcre2> context_;
};

// A compiled literal or regular expression. Immutable.
class Matcher {
 public:
  static Result<Matcher> Compile(const TextPattern& pattern) {
    Matcher matcher;
    if (!pattern.is_regex) {
      matcher.literal_ = pattern.text;
      return matcher;
    }
    if (pattern.text.size() > kMaxPatternBytes) {
      return InvalidArgument(pattern.path + ": expected at most " +
                             std::to_string(kMaxPatternBytes) + " bytes, found " +
                             std::to_string(pattern.text.size()));
    }
    ASSIGN_OR_RETURN(const std::string text, PatternReader(pattern).Read());
    int error = 0;
    PCRE2_SIZE error_at = 0;
    matcher.code_.reset(
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error,
                      &error_at, nullptr));
    if (matcher.code_ == nullptr) {
      std::array<PCRE2_UCHAR, 256> message{};
      pcre2_get_error_message(error, message.data(), message.size());
      return InvalidArgument(pattern.path + ": not a regular expression: " +
                             reinterpret_cast<const char*>(message.data()));
    }
    // Where the system forbids to make code at run time, this fails and matches are interpreted.
    pcre2_jit_compile(matcher.code_.get(), PCRE2_JIT_COMPLETE);
    return matcher;
  }

  // Calls `found` with every match in UTF-8 text, left to right, none overlapping.
  template <typename Found>
  void ForEach(std::string_view text, MatchWork& work, Found found) const {
    code_ != nullptr ? FindRegex(text, work, found) : FindLiteral(text, found);
  }

 private:
  template <typename Found>
  void FindLiteral(std::string_view text, Found found) const {
    for (size_t at = 0; (at = text.find(literal_, at)) != text.npos; at += literal_.size()) {
      found(Range{at, at + literal_.size()});
    }
  }

  template <typename Found>
  void FindRegex(std::string_view text, MatchWork& work, Found found) const {
    std::optional<size_t> last_end;
    for (size_t at = 0; at <= text.size();) {
      const std::optional<Range> match = work.Find(code_.get(), text, at);
      if (!match) return;
      // As in Oniguruma's find_iter, an empty match right after a match does not count.
      if (match->begin != match->end || last_end != match->end) found(*match);
      last_end = match->end;
      at = match->end;
      if (match->begin == match->end) at += std::max<size_t>(1, Utf8CharLength(text.substr(at)));
    }
  }

  std::string literal_;
  std::unique_ptr<pcre2_code, FreePcre2> code_;  // null: literal
};

// A stretch of a piece: a match or what lies between two.
struct Cut {
  Range range;
  bool is_match = false;
};

// Decides which stretches stay and which grow together.
std::vector<Range> Arrange(const std::vector<Cut>& cuts, SplitBehavior behavior) {
  std::vector<Range> out;
  const size_t count = cuts.size();
  for (size_t i = 0; i < count; ++i) {
    const bool follows_match = i > 0 && cuts[i - 1].is_match;
    switch (behavior) {
      case SplitBehavior::kRemoved:
        if (!cuts[i].is_match) out.push_back(cuts[i].range);
        break;
      case SplitBehavior::kIsolated:
        out.push_back(cuts[i].range);
        break;
      case SplitBehavior::kMergedWithPrevious:
        if (i > 0 && cuts[i].is_match && !follows_match) {
          out.back().end = cuts[i].range.end;
        } else {
          out.push_back(cuts[i].range);
        }
        break;
      case SplitBehavior::kMergedWithNext:
        // Of adjacent matches, only the last grows into what follows it.
        if (i > 0 && follows_match && !cuts[i].is_match) {
          out.back().end = cuts[i].range.end;
        } else {
          out.push_back(cuts[i].range);
        }
        break;
      case SplitBehavior::kContiguous:
        if (i > 0 && cuts[i].is_match == follows_match) {
          out.back().end = cuts[i].range.end;
        } else {
          out.push_back(cuts[i].range);
        }
        break;
    }
  }
  return out;
}

// Runs each kind of step on the pieces.
class StepRunner {
 public:
  StepRunner(std::vector<TextPiece>& pieces, bool begins_text, const Matcher* matcher)
      : pieces_(pieces), begins_text_(begins_text), matcher_(matcher) {}

  void operator()(const PrependStep& step) {
    // Before a first piece that is raw, the text becomes a piece of its own.
    if (!pieces_.empty() && pieces_[0].raw) {
      pieces_.insert(pieces_.begin(), TextPiece{});
      pieces_[1].joined = true;
    }
    for (size_t i = 0; i < pieces_.size(); ++i) {
      TextPiece& piece = pieces_[i];
      const bool here = !step.only_at_start || (begins_text_ && i == 0);
      const bool present = step.unless_present && piece.text.starts_with(step.text);
      if (here && !piece.raw && !piece.joined && !present) piece.text.insert(0, step.text);
    }
    std::erase_if(pieces_, [](const TextPiece& piece) { return piece.text.empty(); });
  }

  void operator()(const ReplaceStep& step) {
    MatchWork work(Bytes());
    for (TextPiece& piece : pieces_) {
      if (piece.raw) continue;
      std::string text;
      size_t end = 0;
      matcher_->ForEach(piece.text, work, [&](Range match) {
        text.append(piece.text, end, match.begin - end).append(step.content);
        end = match.end;
      });
      piece.text = text.append(piece.text, end);
    }
    std::erase_if(pieces_, [](const TextPiece& piece) { return piece.text.empty(); });
  }

  void operator()(const SplitStep& step) {
    MatchWork work(Bytes());
    std::vector<TextPiece> out;
    std::vector<Cut> cuts;
    for (TextPiece& piece : pieces_) {
      if (piece.raw) {
        out.push_back(std::move(piece));
        continue;
      }
      cuts.clear();
      size_t end = 0;
      matcher_->ForEach(piece.text, work, [&](Range match) {
        if (end != match.begin) cuts.push_back({{end, match.begin}, step.invert});
        cuts.push_back({match, !step.invert});
        end = match.end;
      });
      if (end != piece.text.size()) cuts.push_back({{end, piece.text.size()}, step.invert});
      bool joined = piece.joined;
      for (const Range& range : Arrange(cuts, step.behavior)) {
        if (range.begin == range.end) continue;
        out.push_back({piece.text.substr(range.begin, range.end - range.begin), false, joined});
        joined = false;
      }
    }
    pieces_ = std::move(out);
  }

  void operator()(const ByteAlphabetStep&) {
    const std::array<std::string, 256> alphabet = ByteAlphabet();
    for (TextPiece& piece : pieces_) {
      if (piece.raw) continue;
      std::string text;
      text.reserve(piece.text.size() * 2);
      for (const char byte : piece.text) text += alphabet[static_cast<uint8_t>(byte)];
      piece.text = std::move(text);
    }
  }

 private:
  size_t Bytes() const {
    size_t bytes = 0;
    for (const TextPiece& piece : pieces_) bytes += piece.text.size();
    return bytes;
  }

  std::vector<TextPiece>& pieces_;
  const bool begins_text_;
  const Matcher* const matcher_;  // null for steps without a pattern
};

// Cuts a text into stretches of UTF-8 and of raw bytes.
std::vector<TextPiece> SeparateRaw(std::string_view text, std::string_view mark) {
  std::vector<TextPiece> pieces;
  while (!text.empty()) {
    const bool is_mark = !mark.empty() && text.starts_with(mark);
    const size_t length = is_mark ? mark.size() : Utf8CharLength(text);
    const bool raw = is_mark || length == 0;
    if (pieces.empty() || pieces.back().raw != raw) pieces.push_back({"", raw, !pieces.empty()});
    pieces.back().text += text.substr(0, std::max<size_t>(length, 1));
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return pieces;
}

}  // namespace

std::array<std::string, 256> ByteAlphabet() {
  std::array<std::string, 256> alphabet;
  uint32_t next = 0x100;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
    const uint32_t character = visible ? byte : next++;  // below U+0800: at most two bytes
    if (character >= 0x80) alphabet[byte] += static_cast<char>(0xc0 | (character >> 6));
    alphabet[byte] += static_cast<char>(character < 0x80 ? character : 0x80 | (character & 0x3f));
  }
  return alphabet;
}

struct Pretokenizer::CompiledStep {
  TextStep step;
  std::optional<Matcher> matcher;  // of the step's pattern, if it has one
};

Pretokenizer::Pretokenizer() = default;
Pretokenizer::Pretokenizer(Pretokenizer&& other) noexcept = default;
Pretokenizer& Pretokenizer::operator=(Pretokenizer&& other) noexcept = default;
Pretokenizer::~Pretokenizer() = default;

Result<Pretokenizer> Pretokenizer::Create(std::vector<TextStep> steps) {
  Pretokenizer compiled;
  for (TextStep& step : steps) {
    const TextPattern* pattern = nullptr;
    if (const auto* replace = std::get_if<ReplaceStep>(&step)) pattern = &replace->pattern;
    if (const auto* split = std::get_if<SplitStep>(&step)) pattern = &split->pattern;
    std::optional<Matcher> matcher;
    if (pattern != nullptr) {
      ASSIGN_OR_RETURN(matcher, Matcher::Compile(*pattern));
    }
    compiled.steps_.push_back({std::move(step), std::move(matcher)});
  }
  return compiled;
}

std::vector<TextPiece> Pretokenizer::Split(std::string_view text, bool begins_text,
                                           std::string_view mark) const {
  std::vector<TextPiece> pieces = SeparateRaw(text, mark);
  for (const CompiledStep& step : steps_) {
    StepRunner runner(pieces, begins_text, step.matcher ? &*step.matcher : nullptr);
    std::visit(runner, step.step);
  }
  return pieces;
}

}  // namespace innerq
