#include "models/turn_marks.h"

#include <algorithm>
#include <functional>
#include <utility>

namespace innerq {
namespace {

constexpr size_t kMaxWords = 256;
constexpr size_t kMaxMarkBytes = 200;

bool IsLetter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || static_cast<unsigned char>(c) >= 0x80;
}
bool IsPunctuation(char c) {
  const bool is_digit = c >= '0' && c <= '9';
  return c > ' ' && c < 0x7f && !is_digit && !IsLetter(c);
}

// A word in brackets, or where to go on looking for one.
struct Word {
  size_t end;
  bool found;
};

// Looks at the opening bracket at `begin`: brackets, what is not space, as many closing ones as
// follow.
Word ReadWord(std::string_view text, size_t begin) {
  const char open = text[begin];
  const char close = open == '[' ? ']' : '>';
  size_t at = begin;
  while (at < text.size() && text[at] == open) ++at;
  bool has_letter = false;
  for (; at < text.size() && text[at] != open && text[at] != close; ++at) {
    if (jinja::SpaceLength(text.substr(at)) > 0) return {at, false};
    has_letter = has_letter || IsLetter(text[at]);
  }
  const size_t inner_end = at;
  while (at < text.size() && text[at] == close) ++at;
  return {at, at > inner_end && has_letter && at - begin <= kMaxMarkBytes};
}

// Calls `use` with every word in brackets.
void ForEachWord(std::string_view text, const std::function<void(std::string_view)>& use) {
  for (size_t at = 0; (at = text.find_first_of("[<", at)) != text.npos;) {
    const Word word = ReadWord(text, at);
    if (word.found) use(text.substr(at, word.end - at));
    at = word.end;
  }
}

}  // namespace

TurnMarks::TurnMarks(std::shared_ptr<const Tokenizer> tokenizer)
    : tokenizer_(std::move(tokenizer)) {}

bool TurnMarks::HasToken(std::string_view text) const {
  if (tokenizer_ == nullptr) return false;
  return tokenizer_->Encode(text, {.add_bos = false, .parse_special = true}) !=
         tokenizer_->Encode(text, {.add_bos = false, .parse_special = false});
}

void TurnMarks::Add(std::string_view mark) {
  begins_[static_cast<unsigned char>(mark.front())] = true;
  marks_.emplace(mark);
}

Result<void> TurnMarks::LearnWords(const jinja::Text& rendered) {
  for (const TextSegment& segment : rendered.Segments()) {
    if (!segment.trusted) continue;
    ForEachWord(segment.text, [this](std::string_view word) {
      if (marks_.contains(word) || tokens_.contains(word)) return;
      if (marks_.size() + tokens_.size() > kMaxWords) return;
      if (HasToken(word)) {
        tokens_.emplace(word);
      } else {
        Add(word);
      }
    });
  }
  if (marks_.size() + tokens_.size() <= kMaxWords) return {};
  return InvalidArgument("expected at most " + std::to_string(kMaxWords) +
                         " different words in brackets, found more");
}

void TurnMarks::LearnSeparators(const jinja::Text& rendered) {
  const std::vector<TextSegment> segments = rendered.Segments();
  for (size_t i = 1; i < segments.size(); ++i) {  // what precedes all messages separates nothing
    if (!segments[i].trusted) continue;
    bool has_word = false;
    ForEachWord(segments[i].text, [&has_word](std::string_view) { has_word = true; });
    const std::string_view text = jinja::TrimSpace(segments[i].text, {});
    const bool is_mark = std::any_of(text.begin(), text.end(), IsLetter) &&
                         std::any_of(text.begin(), text.end(), IsPunctuation) &&
                         text.size() <= kMaxMarkBytes;
    if (is_mark && !has_word && !HasToken(text)) Add(text);
  }
}

std::optional<std::string> TurnMarks::FindForged(const jinja::Text& rendered) const {
  if (!rendered.any_untrusted()) return std::nullopt;
  const std::string_view bytes = rendered.bytes;
  const std::string_view untrusted = rendered.untrusted;
  for (size_t at = 0; at < bytes.size(); ++at) {
    if (!begins_[static_cast<unsigned char>(bytes[at])]) continue;
    for (auto mark = marks_.lower_bound(bytes.substr(at, 1));
         mark != marks_.end() && mark->front() == bytes[at]; ++mark) {
      const bool spelled = bytes.substr(at).starts_with(*mark);
      if (spelled && untrusted.substr(at, mark->size()).find('\1') != untrusted.npos) return *mark;
    }
  }
  return std::nullopt;
}

}  // namespace innerq
