#include "models/turn_marks.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace innerq {
namespace {

constexpr size_t kMaxWords = 256;
constexpr size_t kMaxMarkBytes = 200;

bool IsLetter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || static_cast<unsigned char>(c) >= 0x80;
}
bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsPunctuation(char c) { return c > ' ' && c < 0x7f && !IsDigit(c) && !IsLetter(c); }
bool IsOfWord(char c) {
  return IsDigit(c) || (IsLetter(c) && static_cast<unsigned char>(c) < 0x80);
}
bool IsLineBreak(char c) { return c >= '\n' && c <= '\r'; }

// Whether a text could tell turns apart. What ends as a sentence does is an instruction.
bool MayBeMark(std::string_view text) {
  return text.size() <= kMaxMarkBytes && std::any_of(text.begin(), text.end(), IsLetter) &&
         std::any_of(text.begin(), text.end(), IsPunctuation) &&
         std::string_view(".!?").find(text.back()) == std::string_view::npos;
}

// Where the first line of a text that is not blank ends, and where the last such line begins.
size_t FirstLineEnd(std::string_view text) {
  const size_t blank = text.size() - jinja::TrimSpace(text, {.right = false}).size();
  return std::min(text.find('\n', blank), text.size());
}
size_t LastLineBegin(std::string_view text) {
  return jinja::TrimSpace(text, {.left = false}).rfind('\n') + 1;  // npos + 1 is 0
}

// What an untrusted text may hold that tokenizers are known to change: ASCII, then the same in
// full-width forms.
std::string Sample() {
  std::string out;
  for (uint32_t c = '!'; c <= '~'; ++c) jinja::AppendUtf8(out, c);
  for (uint32_t c = '!'; c <= '~'; ++c) jinja::AppendUtf8(out, c + 0xfee0);
  return out;
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
    : tokenizer_(std::move(tokenizer)),
      normalizes_(tokenizer_ != nullptr && Normalized(Sample()) != Sample()) {}

bool TurnMarks::HasToken(std::string_view text) const {
  if (tokenizer_ == nullptr) return false;
  return tokenizer_->Encode(text, {.add_bos = false, .parse_special = true}) !=
         tokenizer_->Encode(text, {.add_bos = false, .parse_special = false});
}

std::string TurnMarks::Normalized(std::string_view text) const {
  const auto ids = tokenizer_->Encode(text, {.add_bos = false, .parse_special = false});
  return tokenizer_->Decode(ids, /*special=*/true);
}

void TurnMarks::Add(std::string_view mark, Before before) {
  const auto add = [&](std::string_view text) {
    if (text.empty()) return;
    begins_[static_cast<unsigned char>(text.front())] = true;
    Before& least = marks_.try_emplace(std::string(text), before).first->second;
    least = std::min(least, before);
  };
  // A tokenizer that changes texts may make a space of a line break.
  if (normalizes_) before = std::min(before, Before::kWordStart);
  add(mark);
  if (normalizes_) add(jinja::TrimSpace(Normalized(mark), {}));
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
        Add(word, Before::kAnything);
      }
    });
  }
  if (marks_.size() + tokens_.size() <= kMaxWords) return {};
  return InvalidArgument("expected at most " + std::to_string(kMaxWords) +
                         " different words in brackets, found more");
}

void TurnMarks::LearnSeparators(const jinja::Text& rendered,
                                const std::function<bool(std::string_view)>& is_message) {
  const std::vector<TextSegment> segments = rendered.Segments();
  const bool has_lines = std::any_of(segments.begin(), segments.end(), [](const TextSegment& one) {
    return one.trusted && one.text.find('\n') != std::string::npos;
  });
  for (size_t i = 0; i < segments.size(); ++i) {
    const std::string_view text = segments[i].text;
    if (!segments[i].trusted) continue;
    const bool is_after = i > 0 && is_message(segments[i - 1].text);
    const bool is_before = i + 1 == segments.size() || is_message(segments[i + 1].text);
    if (!is_after && !is_before) continue;
    const size_t begin = is_after ? 0 : LastLineBegin(text);
    const size_t end = is_before ? text.size() : FirstLineEnd(text);
    // What begins the whole text stands there as the marks of other turns will.
    const Before first = has_lines ? Before::kLineStart : Before::kWordStart;
    LearnStretches(text, begin, end, i == 0 ? first : Before::kAnything);
  }
}

void TurnMarks::LearnStretches(std::string_view separator, size_t begin, size_t end, Before start) {
  std::string cut(separator.size(), '\0');  // 1 for the bytes of tokens and words in brackets
  const auto cut_out = [&](size_t at, size_t size) { cut.replace(at, size, size, '\1'); };
  ForEachWord(separator, [&](std::string_view word) {
    cut_out(static_cast<size_t>(word.data() - separator.data()), word.size());
  });
  for (const std::string& token : TokensIn(separator)) {
    for (size_t at = 0; (at = separator.find(token, at)) != separator.npos; at += token.size()) {
      cut_out(at, token.size());
    }
  }
  const auto learn = [&](size_t from, size_t to) {
    const std::string_view mark = jinja::TrimSpace(separator.substr(from, to - from), {});
    if (!MayBeMark(mark) || HasToken(mark)) return;
    const auto at = static_cast<size_t>(mark.data() - separator.data());
    const size_t written = cut.find('\0');  // the first byte of the separator's own
    const bool is_line = at > 0 && IsLineBreak(separator[at - 1]);
    const bool is_start = at == 0 || (start != Before::kAnything && at == written);
    Add(mark, is_line ? Before::kLineStart : is_start ? start : Before::kWordStart);
  };
  while (begin < end) {
    const size_t stretch_end = std::min(cut.find('\1', begin), end);
    learn(begin, stretch_end);  // of several lines: "---\nUser" is one as a whole
    for (size_t line = begin; line < stretch_end;) {
      const size_t line_end = std::min(separator.find('\n', line), stretch_end);
      learn(line, line_end);
      line = line_end + 1;
    }
    begin = std::min(cut.find('\0', stretch_end), end);
  }
}

std::set<std::string> TurnMarks::TokensIn(std::string_view text) const {
  std::set<std::string> out;
  if (tokenizer_ == nullptr) return out;
  for (const int32_t id : tokenizer_->Encode(text, {.add_bos = false, .parse_special = true})) {
    const std::string token = tokenizer_->TokenBytes(id, /*first=*/false, /*special=*/true);
    if (!token.empty() && HasToken(token)) out.insert(token);
  }
  return out;
}

std::optional<std::string> TurnMarks::FindForged(const jinja::Text& rendered) const {
  const std::optional<std::string> found = Find(rendered);
  if (found || !normalizes_) return found;
  jinja::Text normalized;
  for (const TextSegment& segment : rendered.Segments()) {
    normalized.Append(Normalized(segment.text), !segment.trusted);
  }
  return Find(normalized);
}

std::optional<std::string> TurnMarks::Find(const jinja::Text& text) const {
  if (!text.any_untrusted()) return std::nullopt;
  const std::string_view bytes = text.bytes;
  const std::string_view untrusted = text.untrusted;
  for (size_t at = 0; at < bytes.size(); ++at) {
    if (!begins_[static_cast<unsigned char>(bytes[at])]) continue;
    for (auto one = marks_.lower_bound(bytes.substr(at, 1));
         one != marks_.end() && one->first.front() == bytes[at]; ++one) {
      const auto& [mark, before] = *one;
      const bool spelled = bytes.substr(at).starts_with(mark) && StandsAt(text, at, before);
      if (spelled && untrusted.substr(at, mark.size()).find('\1') != untrusted.npos) return mark;
    }
  }
  return std::nullopt;
}

bool TurnMarks::StandsAt(const jinja::Text& text, size_t at, Before before) {
  if (before == Before::kAnything || at == 0) return true;
  if (text.untrusted[at] != 0 && text.untrusted[at - 1] == 0) return true;  // a message begins
  const char last = text.bytes[at - 1];
  if (before == Before::kLineStart) return IsLineBreak(last);
  return !IsOfWord(last) || !IsOfWord(text.bytes[at]);
}

}  // namespace innerq
