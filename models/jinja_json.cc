// tojson: Python's json.dumps on Value.
#include <algorithm>
#include <cmath>

#include "models/jinja_value.h"

namespace innerq::jinja {
namespace {

using Kind = Value::Kind;

class JsonWriter {
 public:
  explicit JsonWriter(const JsonStyle& style) : style_(style) {}

  Result<void> Write(const Value& value) {
    switch (value.kind()) {
      case Kind::kNone:
      case Kind::kBool:
      case Kind::kInt:
      case Kind::kFloat:
        out += Scalar(value);
        return {};
      case Kind::kString:
        out += JsonString(value.text().bytes, style_.ensure_ascii);
        return {};
      case Kind::kDict:
        return WriteDict(value.dict());
      case Kind::kSequence:
        if (value.is_list()) return WriteList(value.sequence()->items);
        break;
      case Kind::kUndefined:
      case Kind::kLoop:
      case Kind::kNamespace:
      case Kind::kMacro:
      case Kind::kFunction:
      case Kind::kMethod:
        break;
    }
    return InvalidArgument("tojson: expected a plain value, found " + TypeName(value));
  }

  std::string out;

 private:
  static std::string Scalar(const Value& value) {
    if (value.is_none()) return "null";
    if (value.is(Kind::kBool)) return value.boolean() ? "true" : "false";
    if (value.is(Kind::kInt)) return std::to_string(value.integer());
    if (std::isnan(value.number())) return "NaN";
    if (std::isinf(value.number())) return value.number() < 0 ? "-Infinity" : "Infinity";
    return FloatRepr(value.number());
  }

  void NewLine() {
    if (style_.indent < 0) return;
    out += '\n';
    out.append(static_cast<size_t>(style_.indent * level_), ' ');
  }

  void Begin(bool first) {
    if (!first) out += style_.item_separator;
    NewLine();
  }

  Result<void> WriteList(const std::vector<Value>& items) {
    out += '[';
    ++level_;
    for (size_t i = 0; i < items.size(); ++i) {
      Begin(i == 0);
      RETURN_IF_ERROR(Write(items[i]));
    }
    --level_;
    if (!items.empty()) NewLine();
    out += ']';
    return {};
  }

  Result<void> WriteDict(const Dict& dict) {
    std::vector<std::pair<Value, Value>> items = dict.items();
    if (style_.sort_keys) {
      for (const auto& [key, value] : items) {
        if (!key.is_string()) return InvalidArgument("tojson: sort_keys expects keys of text");
      }
      std::sort(items.begin(), items.end(), [](const auto& a, const auto& b) {
        return a.first.text().bytes < b.first.text().bytes;
      });
    }
    out += '{';
    ++level_;
    bool first = true;
    for (const auto& [key, value] : items) {
      if (!key.is_string() && !key.is_number() && !key.is_none()) {
        return InvalidArgument("tojson: expected a key of text, found " + TypeName(key));
      }
      Begin(first);
      first = false;
      out += JsonString(key.is_string() ? key.text().bytes : Scalar(key), style_.ensure_ascii);
      out += style_.key_separator;
      RETURN_IF_ERROR(Write(value));
    }
    --level_;
    if (!items.empty()) NewLine();
    out += '}';
    return {};
  }

  const JsonStyle& style_;
  int level_ = 0;
};

}  // namespace

Result<Text> ToJson(const Value& value, const JsonStyle& style) {
  JsonWriter writer(style);
  RETURN_IF_ERROR(writer.Write(value));
  return Text::From(writer.out, value.extent().untrusted);
}

}  // namespace innerq::jinja
