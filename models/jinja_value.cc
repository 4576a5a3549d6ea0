#include "models/jinja_value.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace innerq::jinja {
namespace {

constexpr int64_t kWeightMax = std::numeric_limits<int64_t>::max() / 4;

Result<void> AppendRepr(const Value& value, std::string* out);

Result<void> AppendItems(const std::vector<Value>& items, std::string* out) {
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) *out += ", ";
    RETURN_IF_ERROR(AppendRepr(items[i], out));
  }
  return {};
}

Result<void> AppendDict(const Dict& dict, std::string* out) {
  *out += "{";
  const char* separator = "";
  for (const auto& [key, value] : dict.items()) {
    *out += std::exchange(separator, ", ");
    RETURN_IF_ERROR(AppendRepr(key, out));
    *out += ": ";
    RETURN_IF_ERROR(AppendRepr(value, out));
  }
  *out += "}";
  return {};
}

Result<void> AppendSequence(const Sequence& sequence, std::string* out) {
  constexpr std::pair<const char*, const char*> kBrackets[] = {{"[", "]"},
                                                               {"(", ")"},
                                                               {"", ""},
                                                               {"dict_keys([", "])"},
                                                               {"dict_values([", "])"},
                                                               {"dict_items([", "])"}};
  if (sequence.flavor == Sequence::Flavor::kIterator) {
    return InvalidArgument("cannot print an iterator; expected a list (use the filter list)");
  }
  const auto& [open, close] = kBrackets[static_cast<size_t>(sequence.flavor)];
  *out += open;
  RETURN_IF_ERROR(AppendItems(sequence.items, out));
  const bool lone = sequence.flavor == Sequence::Flavor::kTuple && sequence.items.size() == 1;
  *out += lone ? "," : "";
  *out += close;
  return {};
}

// Appends repr(value), as inside a printed list.
Result<void> AppendRepr(const Value& value, std::string* out) {
  switch (value.kind()) {
    case Value::Kind::kUndefined:
      *out += "Undefined";
      return {};
    case Value::Kind::kNone:
      *out += "None";
      return {};
    case Value::Kind::kBool:
      *out += value.boolean() ? "True" : "False";
      return {};
    case Value::Kind::kInt:
      *out += std::to_string(value.integer());
      return {};
    case Value::Kind::kFloat:
      *out += FloatRepr(value.number());
      return {};
    case Value::Kind::kString:
      *out += ReprString(value.text().bytes);
      return {};
    case Value::Kind::kSequence:
      return AppendSequence(*value.sequence(), out);
    case Value::Kind::kDict:
      return AppendDict(value.dict(), out);
    case Value::Kind::kLoop:
    case Value::Kind::kNamespace:
    case Value::Kind::kMacro:
    case Value::Kind::kFunction:
    case Value::Kind::kMethod:
      break;
  }
  return InvalidArgument("cannot print a " + TypeName(value) + "; expected a plain value");
}

int Sign(const auto& a, const auto& b) { return a < b ? -1 : b < a ? 1 : 0; }

// A number, with the type that it has as an integer if it is whole: then equal is the same, exactly
// beyond 2^53 too, as Python compares values and not roundings.
std::variant<int64_t, double> Number(const Value& value) {
  constexpr double kTwo63 = 9223372036854775808.0;
  if (value.is_integral()) return value.integer();
  const double number = value.number();
  if (number != std::floor(number) || !(number >= -kTwo63 && number < kTwo63)) return number;
  return static_cast<int64_t>(number);
}

}  // namespace

void Extent::Add(const Value& value) {
  const Extent inner = value.extent();
  weight = std::min(kWeightMax, weight + inner.weight);
  depth = std::max(depth, inner.depth + 1);
  untrusted = untrusted || inner.untrusted;
}

std::optional<Dict::Index> Dict::IndexOf(const Value& key) {
  if (key.is_string()) return std::string_view(key.text().bytes);
  if (key.is_none()) return std::monostate();
  if (!key.is_number() || std::isnan(key.number())) return std::nullopt;
  return std::visit([](auto number) { return Index(number); }, Number(key));
}

void Dict::Set(const Value& key, const Value& value) {
  extent_.Add(key);
  extent_.Add(value);
  if (const std::optional<Index> index = IndexOf(key)) {
    const auto [at, is_new] = places_.try_emplace(*index, items_.size());
    if (!is_new) {
      items_[at->second].second = value;
      return;
    }
  }
  items_.emplace_back(key, value);
}

const Value* Dict::Find(std::string_view key) const {
  const auto found = places_.find(key);
  return found == places_.end() ? nullptr : &items_[found->second].second;
}

const Value* Dict::Find(const Value& key) const {
  const std::optional<Index> index = IndexOf(key);
  const auto found = index ? places_.find(*index) : places_.end();
  return found == places_.end() ? nullptr : &items_[found->second].second;
}

Value Value::Undefined(std::string why) {
  return Value(Data(std::make_shared<const std::string>(std::move(why))));
}

Value Value::String(std::string_view bytes, bool trusted) {
  return String(Text::From(bytes, !trusted));
}

Value Value::String(Text text) {
  return Value(Data(std::make_shared<const Text>(std::move(text))));
}

Value Value::Of(Sequence::Flavor flavor, std::vector<Value> items) {
  Sequence out{flavor, std::move(items), {}, false};
  for (const Value& item : out.items) out.extent.Add(item);
  return Value(Data(std::make_shared<Sequence>(std::move(out))));
}

Value Value::List(std::vector<Value> items) {
  return Of(Sequence::Flavor::kList, std::move(items));
}

Value Value::Tuple(std::vector<Value> items) {
  return Of(Sequence::Flavor::kTuple, std::move(items));
}

Value Value::Of(Dict dict) { return Value(Data(std::make_shared<const Dict>(std::move(dict)))); }

Value::Kind Value::kind() const {
  constexpr Value::Kind kKinds[] = {
      Value::Kind::kUndefined, Value::Kind::kNone,  Value::Kind::kBool,
      Value::Kind::kInt,       Value::Kind::kFloat, Value::Kind::kString,
      Value::Kind::kSequence,  Value::Kind::kDict,  Value::Kind::kLoop};
  const Index* index = std::get_if<Index>(&data_);
  return index != nullptr ? index->kind : kKinds[data_.index()];
}

bool Value::is_list() const {
  return is(Value::Kind::kSequence) && (sequence()->flavor == Sequence::Flavor::kList ||
                                        sequence()->flavor == Sequence::Flavor::kTuple);
}

int64_t Value::integer() const {
  return is(Value::Kind::kBool) ? static_cast<int64_t>(boolean()) : std::get<int64_t>(data_);
}

double Value::number() const {
  return is(Value::Kind::kFloat) ? std::get<double>(data_) : static_cast<double>(integer());
}

std::string Value::why_undefined() const {
  const auto* why = std::get_if<std::shared_ptr<const std::string>>(&data_);
  return why == nullptr || *why == nullptr ? "the value is undefined" : **why;
}

Extent Value::extent() const {
  if (is_string()) {
    return {1 + static_cast<int64_t>(text().bytes.size() / 64), 1, text().any_untrusted()};
  }
  if (is(Value::Kind::kSequence)) return sequence()->extent;
  if (is(Value::Kind::kDict)) return dict().extent();
  return {};
}

std::string TypeName(const Value& value) {
  switch (value.kind()) {
    case Value::Kind::kUndefined:
      return "Undefined";
    case Value::Kind::kNone:
      return "None";
    case Value::Kind::kBool:
      return "bool";
    case Value::Kind::kInt:
      return "int";
    case Value::Kind::kFloat:
      return "float";
    case Value::Kind::kString:
      return "str";
    case Value::Kind::kSequence: {
      constexpr const char* kNames[] = {"list",      "tuple",       "iterator",
                                        "dict_keys", "dict_values", "dict_items"};
      return kNames[static_cast<size_t>(value.sequence()->flavor)];
    }
    case Value::Kind::kDict:
      return "dict";
    case Value::Kind::kLoop:
      return "loop";
    case Value::Kind::kNamespace:
      return "namespace";
    case Value::Kind::kMacro:
      return "macro";
    case Value::Kind::kFunction:
      return "function";
    case Value::Kind::kMethod:
      return "method";
  }
  return "unknown";
}

bool Truthy(const Value& value) {
  if (value.is_undefined() || value.is_none()) return false;
  if (value.is_number()) return value.number() != 0;
  if (value.is_string()) return !value.text().bytes.empty();
  if (value.is(Value::Kind::kDict)) return !value.dict().items().empty();
  if (!value.is(Value::Kind::kSequence)) return true;
  const Sequence& sequence = *value.sequence();
  return sequence.flavor == Sequence::Flavor::kIterator || !sequence.items.empty();
}

bool Equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return Number(a) == Number(b);
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Value::Kind::kUndefined:
    case Value::Kind::kNone:
      return true;
    case Value::Kind::kString:
      return a.text().bytes == b.text().bytes;
    case Value::Kind::kSequence: {
      const Sequence& x = *a.sequence();
      const Sequence& y = *b.sequence();
      if (x.flavor == Sequence::Flavor::kIterator) return &x == &y;
      return x.flavor == y.flavor &&
             std::equal(x.items.begin(), x.items.end(), y.items.begin(), y.items.end(), Equal);
    }
    case Value::Kind::kDict: {
      const auto& items = a.dict().items();
      return items.size() == b.dict().items().size() &&
             std::all_of(items.begin(), items.end(), [&](const auto& item) {
               const Value* other = b.dict().Find(item.first);
               return other != nullptr && Equal(item.second, *other);
             });
    }
    case Value::Kind::kLoop:
      return a.loop() == b.loop();
    case Value::Kind::kNamespace:
    case Value::Kind::kMacro:
    case Value::Kind::kFunction:
    case Value::Kind::kMethod:
      return a.index() == b.index();
    case Value::Kind::kBool:
    case Value::Kind::kInt:
    case Value::Kind::kFloat:
      break;
  }
  return false;
}

Result<int> Order(const Value& a, const Value& b) {
  if (a.is_integral() && b.is_integral()) return Sign(a.integer(), b.integer());
  if (a.is_number() && b.is_number()) return Sign(a.number(), b.number());
  if (a.is_string() && b.is_string()) return Sign(a.text().bytes, b.text().bytes);
  if (a.is_list() && b.is_list() && a.sequence()->flavor == b.sequence()->flavor) {
    const auto& x = a.sequence()->items;
    const auto& y = b.sequence()->items;
    for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
      if (!Equal(x[i], y[i])) return Order(x[i], y[i]);
    }
    return Sign(x.size(), y.size());
  }
  for (const Value& value : {a, b}) {
    if (value.is_undefined()) return InvalidArgument(value.why_undefined());
  }
  return InvalidArgument("expected two numbers, strings or lists to order, found " + TypeName(a) +
                         " and " + TypeName(b));
}

Result<Text> Str(const Value& value) {
  if (value.is_string()) return value.text();
  if (value.is_undefined()) return Text();
  std::string text;
  RETURN_IF_ERROR(AppendRepr(value, &text));
  return Text::From(text, value.extent().untrusted);
}

}  // namespace innerq::jinja
