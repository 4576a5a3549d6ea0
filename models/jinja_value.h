// Value: what template variables hold; Python's data model as far as templates see it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/result.h"
#include "models/jinja_text.h"

namespace innerq::jinja {

class Value;
struct Loop;  // state of a running for, owned by the renderer

// What a container holds below it, so that cost and nesting are known without a walk.
struct Extent {
  int64_t weight = 1;  // values and bytes of texts / 64, shared parts counted as often as met
  int depth = 1;
  bool untrusted = false;
  void Add(const Value& value);
};

struct Sequence {
  enum class Flavor { kList, kTuple, kIterator, kKeys, kValues, kItems };
  Flavor flavor = Flavor::kList;
  std::vector<Value> items;
  Extent extent;
  bool consumed = false;  // of an iterator: whoever asks again finds nothing
};

// Keys in the order of insertion: texts, numbers and none. Numbers that are equal are one key,
// whatever their types; NaN is none that can be found. A key costs the logarithm of their number.
class Dict {
 public:
  void Set(const Value& key, const Value& value);
  // Null if there is no such key, or `key` is no value that can be one.
  const Value* Find(const Value& key) const;
  const Value* Find(std::string_view key) const;
  const std::vector<std::pair<Value, Value>>& items() const { return items_; }
  const Extent& extent() const { return extent_; }

 private:
  // What is the same for equal keys; the texts are those that items_ keeps alive.
  using Index = std::variant<std::monostate, int64_t, double, std::string_view>;
  static std::optional<Index> IndexOf(const Value& key);

  std::vector<std::pair<Value, Value>> items_;
  std::map<Index, size_t> places_;
  Extent extent_;
};

// Immutable but for iterators, so values never form cycles; copies share.
class Value {
 public:
  enum class Kind {
    kUndefined,
    kNone,
    kBool,
    kInt,
    kFloat,
    kString,
    kSequence,
    kDict,
    kLoop,
    kNamespace,  // index into the renderer's namespaces
    kMacro,      // index into the program's macros
    kFunction,   // index into the built-in functions
    kMethod,     // a method that was named and not called
  };

  Value() = default;  // undefined
  static Value Undefined(std::string why);
  static Value None() { return Value(NoneTag{}); }
  static Value Bool(bool value) { return Value(value); }
  static Value Int(int64_t value) { return Value(value); }
  static Value Float(double value) { return Value(value); }
  // Context strings that come from outside are not `trusted`: the output says which bytes are.
  static Value String(std::string_view bytes, bool trusted = true);
  static Value String(Text text);
  static Value Of(Sequence::Flavor flavor, std::vector<Value> items);
  static Value List(std::vector<Value> items);
  static Value Tuple(std::vector<Value> items);
  static Value Of(Dict dict);
  static Value Of(std::shared_ptr<Loop> loop) { return Value(std::move(loop)); }
  static Value Reference(Kind kind, int64_t index) { return Value(Index{kind, index}); }

  Kind kind() const;
  bool is(Kind wanted) const { return kind() == wanted; }
  bool is_none() const { return is(Kind::kNone); }
  bool is_undefined() const { return is(Kind::kUndefined); }
  bool is_string() const { return is(Kind::kString); }
  bool is_list() const;  // a list or a tuple
  bool is_number() const { return is(Kind::kBool) || is(Kind::kInt) || is(Kind::kFloat); }
  bool is_integral() const { return is(Kind::kBool) || is(Kind::kInt); }

  // CHECK: the kind fits.
  bool boolean() const { return std::get<bool>(data_); }
  int64_t integer() const;  // of a bool or an integer
  double number() const;    // of any number
  const Text& text() const { return *std::get<std::shared_ptr<const Text>>(data_); }
  const std::shared_ptr<Sequence>& sequence() const {
    return std::get<std::shared_ptr<Sequence>>(data_);
  }
  const Dict& dict() const { return *std::get<std::shared_ptr<const Dict>>(data_); }
  const std::shared_ptr<Loop>& loop() const { return std::get<std::shared_ptr<Loop>>(data_); }
  int64_t index() const { return std::get<Index>(data_).index; }
  // Why an undefined value is: "'x' is undefined".
  std::string why_undefined() const;

  Extent extent() const;

 private:
  struct NoneTag {};
  struct Index {
    Kind kind;
    int64_t index;
  };
  using Data = std::variant<std::shared_ptr<const std::string>, NoneTag, bool, int64_t, double,
                            std::shared_ptr<const Text>, std::shared_ptr<Sequence>,
                            std::shared_ptr<const Dict>, std::shared_ptr<Loop>, Index>;
  explicit Value(Data data) : data_(std::move(data)) {}
  Data data_;
};

// Python's name of the type, for messages.
std::string TypeName(const Value& value);
bool Truthy(const Value& value);
// Python's ==. Costs the smaller extent.
bool Equal(const Value& a, const Value& b);
// Python's <: below 0, 0, above 0. Errors: the types have no order.
Result<int> Order(const Value& a, const Value& b);
// str(value): undefined is empty. Errors: values whose text means nothing (iterators, methods).
Result<Text> Str(const Value& value);

struct JsonStyle {
  int indent = -1;  // columns, below 0: one line
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool ensure_ascii = false;
  bool sort_keys = false;
};
// json.dumps. Errors: values that JSON has no form for.
Result<Text> ToJson(const Value& value, const JsonStyle& style);
// The value of a JSON text; its strings are not trusted, keys and their order are kept. Errors:
// invalid argument for what is not JSON, for nesting beyond `max_depth` and integers beyond 64
// bits.
Result<Value> ParseJson(std::string_view text, int max_depth);

}  // namespace innerq::jinja
