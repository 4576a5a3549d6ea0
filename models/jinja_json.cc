// JSON of templates: Python's json.dumps on Value, and Values from JSON text.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "models/jinja_value.h"

namespace innerq::jinja {
namespace {

class JsonWriter {
 public:
  explicit JsonWriter(const JsonStyle& style) : style_(style) {}

  Result<void> Write(const Value& value) {
    switch (value.kind()) {
      case Value::Kind::kNone:
      case Value::Kind::kBool:
      case Value::Kind::kInt:
      case Value::Kind::kFloat:
        out += Scalar(value);
        return {};
      case Value::Kind::kString:
        out += JsonString(value.text().bytes, style_.ensure_ascii);
        return {};
      case Value::Kind::kDict:
        return WriteDict(value.dict());
      case Value::Kind::kSequence:
        if (value.is_list()) return WriteList(value.sequence()->items);
        break;
      case Value::Kind::kUndefined:
      case Value::Kind::kLoop:
      case Value::Kind::kNamespace:
      case Value::Kind::kMacro:
      case Value::Kind::kFunction:
      case Value::Kind::kMethod:
        break;
    }
    return InvalidArgument("tojson: expected a plain value, found " + TypeName(value));
  }

  std::string out;

 private:
  static std::string Scalar(const Value& value) {
    if (value.is_none()) return "null";
    if (value.is(Value::Kind::kBool)) return value.boolean() ? "true" : "false";
    if (value.is(Value::Kind::kInt)) return std::to_string(value.integer());
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

// Builds a Value from the events of a JSON parser; nothing here recurses.
class JsonReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit JsonReader(int max_depth) : max_depth_(max_depth) {}

  Result<Value> Take() {
    if (!error_.empty()) return InvalidArgument(error_);
    return std::move(root_);
  }

  bool null() override { return Add(Value::None()); }
  bool boolean(bool value) override { return Add(Value::Bool(value)); }
  bool number_integer(int64_t value) override { return Add(Value::Int(value)); }
  bool number_unsigned(uint64_t value) override {
    if (value <= INT64_MAX) return Add(Value::Int(static_cast<int64_t>(value)));
    return Fail("expected an integer of 64 bits, found " + std::to_string(value));
  }
  bool number_float(double value, const std::string& /*text*/) override {
    return Add(Value::Float(value));
  }
  bool string(std::string& value) override { return Add(Value::String(value, false)); }
  bool binary(nlohmann::json::binary_t& /*value*/) override {
    return Fail("expected JSON, found bytes");
  }
  bool start_object(size_t /*size*/) override { return Open(true); }
  bool start_array(size_t /*size*/) override { return Open(false); }
  bool key(std::string& key) override {
    open_.back().key = key;
    return true;
  }
  bool end_object() override {
    Value done = Value::Of(std::move(open_.back().dict));
    open_.pop_back();
    return Add(std::move(done));
  }
  bool end_array() override {
    Value done = Value::List(std::move(open_.back().items));
    open_.pop_back();
    return Add(std::move(done));
  }
  bool parse_error(size_t at, const std::string& /*token*/,
                   const nlohmann::json::exception& /*error*/) override {
    return Fail("not JSON at byte " + std::to_string(at));
  }

 private:
  struct Container {
    bool is_dict;
    std::string key;
    Dict dict;
    std::vector<Value> items;
  };

  bool Fail(std::string error) {
    error_ = std::move(error);
    return false;
  }
  bool Open(bool is_dict) {
    if (static_cast<int>(open_.size()) >= max_depth_) {
      return Fail("expected at most " + std::to_string(max_depth_) +
                  " lists or dicts within each other, found more");
    }
    open_.push_back({.is_dict = is_dict, .key = {}, .dict = {}, .items = {}});
    return true;
  }
  bool Add(Value value) {
    if (open_.empty()) {
      root_ = std::move(value);
    } else if (open_.back().is_dict) {
      open_.back().dict.Set(Value::String(open_.back().key, false), value);
    } else {
      open_.back().items.push_back(std::move(value));
    }
    return true;
  }

  const int max_depth_;
  std::vector<Container> open_;  // lists and dicts that have not ended, outermost first
  Value root_;
  std::string error_;
};

}  // namespace

Result<Value> ParseJson(std::string_view text, int max_depth) {
  JsonReader reader(max_depth);
  nlohmann::json::sax_parse(text.begin(), text.end(), &reader);
  return reader.Take();
}

Result<Text> ToJson(const Value& value, const JsonStyle& style) {
  JsonWriter writer(style);
  RETURN_IF_ERROR(writer.Write(value));
  return Text::From(writer.out, value.extent().untrusted);
}

}  // namespace innerq::jinja
