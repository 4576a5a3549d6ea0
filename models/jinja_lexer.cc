// Tokens of a template, with Jinja2's whitespace control under trim_blocks and lstrip_blocks.
#include <algorithm>
#include <utility>

#include "models/jinja_program.h"

namespace innerq::jinja {
namespace {

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameStart(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

// Ends lines with \n and drops one newline at the end.
std::string NormalizeNewlines(std::string_view source) {
  std::string out;
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out += source[i];
    }
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {}

  Result<std::vector<Token>> Run() {
    while (pos_ < source_.size()) RETURN_IF_ERROR(Next());
    Emit(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  std::string_view rest(size_t at) const { return std::string_view(source_).substr(at); }
  bool At(std::string_view text) const { return rest(pos_).starts_with(text); }
  void Emit(Token::Kind kind, std::string text) {
    tokens_.push_back({kind, std::move(text), line_});
  }

  void Advance(size_t to) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(pos_),
                                         source_.begin() + static_cast<ptrdiff_t>(to), '\n'));
    pos_ = to;
    line_starting_ = to > 0 && source_[to - 1] == '\n';
  }

  size_t AfterSpace(size_t at) const {
    const std::string_view kept = TrimSpace(rest(at), {true, false});
    return source_.size() - kept.size();
  }

  size_t FindTag() const {
    for (size_t at = source_.find('{', pos_); at != std::string::npos;
         at = source_.find('{', at + 1)) {
      const char next = at + 1 < source_.size() ? source_[at + 1] : '\0';
      if (next == '{' || next == '%' || next == '#') return at;
    }
    return source_.size();
  }

  // Emits the text before a tag that opens with `sign` after its two characters.
  void EmitData(size_t end, char sign, bool is_variable) {
    std::string_view text = std::string_view(source_).substr(pos_, end - pos_);
    if (sign == '-') {
      text = TrimSpace(text, {false, true});
    } else if (sign != '+' && !is_variable) {
      const size_t line_begin = text.rfind('\n') + 1;
      if ((line_begin > 0 || line_starting_) &&
          TrimSpace(text.substr(line_begin), {true, false}).empty()) {
        text = text.substr(0, line_begin);
      }
    }
    if (!text.empty()) Emit(Token::Kind::kData, std::string(text));
  }

  char SignAt(size_t at) const {
    const char c = at < source_.size() ? source_[at] : '\0';
    return c == '-' || c == '+' ? c : '\0';
  }

  Result<void> Next() {
    const size_t tag = FindTag();
    if (tag == source_.size()) {
      Emit(Token::Kind::kData, source_.substr(pos_));
      Advance(tag);
      return {};
    }
    const char type = source_[tag + 1];
    const char sign = SignAt(tag + 2);
    EmitData(tag, sign, type == '{');
    Advance(tag + (sign == '\0' ? 2 : 3));
    if (type == '#') return Comment();
    if (type == '%') {
      if (const size_t after = AfterRawTag("raw", false)) return Raw(after);
    }
    Emit(type == '{' ? Token::Kind::kVariableBegin : Token::Kind::kBlockBegin, "");
    return Expression(type == '{');
  }

  // The end of a tag whose closing mark `mark` (2 characters) is at `at`, or at at + 1 after a
  // sign; 0 if it is neither.
  size_t AfterEnd(size_t at, std::string_view mark, bool trim_newline) const {
    const char sign = SignAt(at);
    if (sign == '+' && !trim_newline) return 0;
    const size_t mark_at = at + (sign == '\0' ? 0 : 1);
    if (!rest(mark_at).starts_with(mark)) return 0;
    const size_t end = mark_at + mark.size();
    if (sign == '-') return AfterSpace(end);
    return trim_newline && sign == '\0' && rest(end).starts_with('\n') ? end + 1 : end;
  }

  Result<void> Comment() {
    const size_t end = source_.find("#}", pos_);
    if (end == std::string::npos) {
      return ErrorAt(line_, "expected #} to end the comment, found the end of the template");
    }
    const bool signed_end = end > pos_ && SignAt(end - 1) != '\0';
    Advance(AfterEnd(end - (signed_end ? 1 : 0), "#}", true));
    return {};
  }

  // After `name` and the end of its tag if that is what is here, else 0.
  size_t AfterRawTag(std::string_view name, bool trim_newline) const {
    size_t at = AfterSpace(pos_);
    if (!rest(at).starts_with(name)) return 0;
    at = AfterSpace(at + name.size());
    return AfterEnd(at, "%}", trim_newline);
  }

  Result<void> Raw(size_t begin) {
    const int first_line = line_;
    Advance(begin);
    for (size_t tag = source_.find("{%", pos_); tag != std::string::npos;
         tag = source_.find("{%", tag + 2)) {
      const char sign = SignAt(tag + 2);
      const size_t saved = std::exchange(pos_, tag + (sign == '\0' ? 2 : 3));
      const size_t after = AfterRawTag("endraw", true);
      pos_ = saved;
      if (after == 0) continue;
      EmitData(tag, sign, false);
      Advance(after);
      return {};
    }
    return ErrorAt(first_line, "expected endraw, found the end of the template");
  }

  Result<void> Expression(bool is_variable) {
    const int first_line = line_;
    std::string open;  // brackets not closed yet
    while (true) {
      Advance(AfterSpace(pos_));
      if (pos_ == source_.size()) {
        return ErrorAt(first_line, std::string("expected ") + (is_variable ? "}}" : "%}") +
                                       ", found the end of the template");
      }
      if (open.empty()) {
        if (const size_t after = AfterEnd(pos_, is_variable ? "}}" : "%}", !is_variable)) {
          Emit(is_variable ? Token::Kind::kVariableEnd : Token::Kind::kBlockEnd, "");
          Advance(after);
          return {};
        }
      }
      RETURN_IF_ERROR(ExpressionToken(open));
    }
  }

  Result<void> ExpressionToken(std::string& open) {
    const char c = source_[pos_];
    if (IsNameStart(c)) return Name();
    if (IsDigit(c)) return Number();
    if (c == '"' || c == '\'') return StringLiteral();
    for (const std::string_view op : {"//", "**", "==", "!=", ">=", "<="}) {
      if (!At(op)) continue;
      Emit(Token::Kind::kOperator, std::string(op));
      Advance(pos_ + 2);
      return {};
    }
    if (std::string_view("+-*/%~[](){}<>=.:|,").find(c) == std::string_view::npos) {
      return ErrorAt(line_, "unexpected character " +
                                ReprString(rest(pos_).substr(0, CharLength(rest(pos_)))));
    }
    RETURN_IF_ERROR(Balance(c, open));
    Emit(Token::Kind::kOperator, std::string(1, c));
    Advance(pos_ + 1);
    return {};
  }

  Result<void> Balance(char c, std::string& open) const {
    const std::string_view opening = "([{";
    const std::string_view closing = ")]}";
    if (opening.find(c) != std::string_view::npos) open += c;
    const size_t kind = closing.find(c);
    if (kind == std::string_view::npos) return {};
    if (open.empty() || open.back() != opening[kind]) {
      return ErrorAt(line_, std::string("unexpected ") + c);
    }
    open.pop_back();
    return {};
  }

  Result<void> Name() {
    constexpr size_t kNameBytes = 256;  // so that looking one up is one step
    size_t end = pos_ + 1;
    while (end < source_.size() && (IsNameStart(source_[end]) || IsDigit(source_[end]))) ++end;
    if (end - pos_ > kNameBytes) {
      return ErrorAt(line_, "expected a name of at most " + std::to_string(kNameBytes) +
                                " bytes, found " + std::to_string(end - pos_));
    }
    Emit(Token::Kind::kName, source_.substr(pos_, end - pos_));
    Advance(end);
    return {};
  }

  Result<void> Number() {
    size_t end = pos_;
    const auto digits = [&] {
      const size_t begin = end;
      while (end < source_.size() &&
             (IsDigit(source_[end]) || (end > begin && source_[end] == '_' &&
                                        end + 1 < source_.size() && IsDigit(source_[end + 1]))))
        ++end;
      return end > begin;
    };
    digits();
    bool is_float = false;
    const bool after_dot = pos_ > 0 && source_[pos_ - 1] == '.';
    if (!after_dot && end + 1 < source_.size() && source_[end] == '.' &&
        IsDigit(source_[end + 1])) {
      ++end;
      is_float = digits();
    }
    if (!after_dot && end < source_.size() && (source_[end] == 'e' || source_[end] == 'E')) {
      const size_t mantissa = end++;
      if (SignAt(end) != '\0') ++end;
      if (digits()) {
        is_float = true;
      } else {
        end = mantissa;
      }
    }
    std::string text = source_.substr(pos_, end - pos_);
    std::erase(text, '_');
    Emit(is_float ? Token::Kind::kFloat : Token::Kind::kInt, std::move(text));
    Advance(end);
    return {};
  }

  Result<void> StringLiteral() {
    const char quote = source_[pos_];
    const int first_line = line_;
    std::string out;
    size_t at = pos_ + 1;
    while (at < source_.size() && source_[at] != quote) {
      if (source_[at] == '\\') {
        ASSIGN_OR_RETURN(at, Escape(at + 1, out));
      } else {
        out += source_[at++];
      }
    }
    if (at >= source_.size()) {
      return ErrorAt(first_line, std::string("expected ") + quote +
                                     " to end the string, found the end of the template");
    }
    Emit(Token::Kind::kString, std::move(out));
    Advance(at + 1);
    return {};
  }

  // Appends what the escape after a backslash means; returns the place behind it.
  Result<size_t> Escape(size_t at, std::string& out) const {
    const char c = at < source_.size() ? source_[at] : '\0';
    constexpr std::string_view kNames = "ntr\\'\"abfv";
    constexpr std::string_view kMeanings = "\n\t\r\\'\"\a\b\f\v";
    if (const size_t simple = kNames.find(c); c != '\0' && simple != std::string_view::npos) {
      out += kMeanings[simple];
      return at + 1;
    }
    if (c == '\n') return at + 1;
    if (c == 'N') return ErrorAt(line_, "the escape \\N in a string is not supported");
    const size_t width = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    const bool octal = c >= '0' && c <= '7';
    if (width == 0 && !octal) {
      out += '\\';
      return at;
    }
    size_t end = at + (octal ? 0 : 1);
    const size_t limit = end + (octal ? 3 : width);
    const std::string_view digits = octal ? "01234567" : "0123456789abcdef0123456789ABCDEF";
    uint32_t code = 0;
    for (; end < limit && end < source_.size(); ++end) {
      const size_t digit = digits.find(source_[end]);
      if (digit == std::string_view::npos) break;
      code = octal ? code * 8 + static_cast<uint32_t>(digit)
                   : code * 16 + static_cast<uint32_t>(digit % 16);
    }
    if ((!octal && end != limit) || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) {
      return ErrorAt(line_, std::string("the escape \\") + c + " in a string names no character");
    }
    AppendUtf8(out, code);
    return end;
  }

  const std::string source_;
  size_t pos_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

Error ErrorAt(int line, const std::string& message) {
  return InvalidArgument("line " + std::to_string(line) + ": " + message);
}

Result<std::vector<Token>> Lex(std::string_view source) {
  return Lexer(NormalizeNewlines(source)).Run();
}

}  // namespace innerq::jinja
