#include "server/json_check.h"

#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "server/utf8.h"

namespace innerq {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxReasonBytes = 300;  // the parser's message quotes the text

// Follows the events of a parser; every method returns whether to go on.
class Checker : public nlohmann::json_sax<Json> {
 public:
  explicit Checker(IndexStyle style) : style_(style) {}
  const Error& error() const { return error_; }

  bool null() override { return Value(); }
  bool boolean(bool) override { return Value(); }
  bool number_integer(number_integer_t) override { return Value(); }
  bool number_unsigned(number_unsigned_t) override { return Value(); }
  bool number_float(number_float_t, const string_t&) override { return Value(); }
  bool string(string_t&) override { return Value(); }
  bool binary(binary_t&) override { return Value(); }
  bool start_array(size_t) override { return Enter({.index = 0}); }
  bool start_object(size_t) override { return Enter({}); }
  bool end_array() override { return Leave(); }
  bool end_object() override { return Leave(); }

  bool key(string_t& name) override {
    Level& level = levels_.back();
    level.key = name;
    if (level.keys.insert(name).second) return true;
    error_ = InvalidArgument("the key stands twice in one object", Path());
    return false;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& error) override {
    const std::string reason = error.what();  // "[the exception's name] parse error at line 1, ..."
    error_ = InvalidArgument(
        "not JSON: " +
        ShortenUtf8(ReplaceInvalidUtf8(reason.substr(reason.find("] ") + 2)), kMaxReasonBytes));
    return false;
  }

 private:
  // Where the parser is within an object or an array.
  struct Level {
    int64_t index = -1;  // of the element; -1: an object
    std::string key = {};
    std::set<std::string> keys = {};
  };

  bool Enter(Level level) {
    levels_.push_back(std::move(level));
    if (levels_.size() <= kMaxJsonLevels) return true;
    error_ =
        InvalidArgument("the JSON nests deeper than " + std::to_string(kMaxJsonLevels) + " levels");
    return false;
  }
  bool Leave() {
    levels_.pop_back();
    return Value();
  }
  bool Value() {
    if (!levels_.empty() && levels_.back().index >= 0) ++levels_.back().index;
    return true;
  }
  std::string Path() const {
    std::string path;
    for (const Level& level : levels_) {
      const bool in_brackets = level.index >= 0 && style_ == IndexStyle::kBrackets;
      if (in_brackets) {
        path += '[';
      } else if (!path.empty()) {
        path += '.';
      }
      path += level.index >= 0 ? std::to_string(level.index) : level.key;
      if (in_brackets) path += ']';
    }
    return path;
  }

  const IndexStyle style_;
  std::vector<Level> levels_;
  Error error_;
};

}  // namespace

Result<void> CheckJson(std::string_view text, IndexStyle style) {
  Checker checker(style);
  if (Json::sax_parse(text, &checker)) return {};
  return checker.error();
}

std::optional<int64_t> WholeNumber(double number) {
  constexpr double kExact = 9007199254740992.0;  // 2^53
  if (!(std::abs(number) < kExact) || number != std::trunc(number)) return std::nullopt;
  return static_cast<int64_t>(number);
}

}  // namespace innerq
