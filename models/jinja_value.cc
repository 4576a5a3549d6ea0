#include "models/jinja_value.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace innerq::jinja {
namespace {

using Kind = Value::Kind;

constexpr int64_t kWeightMax = std::numeric_limits<int64_t>::max() / 4;

Result<std::string> ReprDict(const Dict& dict) {
  std::string out = "{";
  for (const auto& [key, value] : dict.items()) {
    if (out.size() > 1) out += ", ";
    ASSIGN_OR_RETURN(const std::string k, Repr(key));
    ASSIGN_OR_RETURN(const std::string v, Repr(value));
    out += k + ": " + v;
  }
  return out + "}";
}

Result<std::string> ReprSequence(const Sequence& sequence) {
  std::string out;
  for (const Value& item : sequence.items) {
    if (!out.empty()) out += ", ";
    ASSIGN_OR_RETURN(const std::string one, Repr(item));
    out += one;
  }
  switch (sequence.flavor) {
    case Sequence::Flavor::kList:
      return "[" + out + "]";
    case Sequence::Flavor::kTuple:
      return sequence.items.size() == 1 ? "(" + out + ",)" : "(" + out + ")";
    case Sequence::Flavor::kKeys:
      return "dict_keys([" + out + "])";
    case Sequence::Flavor::kValues:
      return "dict_values([" + out + "])";
    case Sequence::Flavor::kItems:
      return "dict_items([" + out + "])";
    case Sequence::Flavor::kIterator:
      break;
  }
  return InvalidArgument("cannot print an iterator; expected a list (use the filter list)");
}

int Sign(const auto& a, const auto& b) { return a < b ? -1 : b < a ? 1 : 0; }

// Exact for integers beyond 2^53 against floats too: Python compares values, not roundings.
bool NumbersEqual(const Value& a, const Value& b) {
  if (a.is_integral() && b.is_integral()) return a.integer() == b.integer();
  return a.number() == b.number();
}

}  // namespace

void Extent::Add(const Value& value) {
  const Extent inner = value.extent();
  weight = std::min(kWeightMax, weight + inner.weight);
  depth = std::max(depth, inner.depth + 1);
  untrusted = untrusted || inner.untrusted;
}

void Dict::Set(const Value& key, const Value& value) {
  extent_.Add(key);
  extent_.Add(value);
  if (key.is_string()) {
    const auto [at, is_new] = by_text_.try_emplace(key.text().bytes, items_.size());
    if (!is_new) {
      items_[at->second].second = value;
      return;
    }
  } else if (const Value* found = Find(key); found != nullptr) {
    const auto same = [&](const auto& item) { return &item.second == found; };
    std::find_if(items_.begin(), items_.end(), same)->second = value;
    return;
  }
  items_.emplace_back(key, value);
}

const Value* Dict::Find(std::string_view key) const {
  const auto found = by_text_.find(key);
  return found == by_text_.end() ? nullptr : &items_[found->second].second;
}

const Value* Dict::Find(const Value& key) const {
  if (key.is_string()) return Find(key.text().bytes);
  if (by_text_.size() == items_.size()) return nullptr;
  for (const auto& [name, value] : items_) {
    if (!name.is_string() && Equal(name, key)) return &value;
  }
  return nullptr;
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

Kind Value::kind() const {
  constexpr Kind kKinds[] = {Kind::kUndefined, Kind::kNone,  Kind::kBool,
                             Kind::kInt,       Kind::kFloat, Kind::kString,
                             Kind::kSequence,  Kind::kDict,  Kind::kLoop};
  const Index* index = std::get_if<Index>(&data_);
  return index != nullptr ? index->kind : kKinds[data_.index()];
}

bool Value::is_list() const {
  return is(Kind::kSequence) && (sequence()->flavor == Sequence::Flavor::kList ||
                                 sequence()->flavor == Sequence::Flavor::kTuple);
}

int64_t Value::integer() const {
  return is(Kind::kBool) ? static_cast<int64_t>(boolean()) : std::get<int64_t>(data_);
}

double Value::number() const {
  return is(Kind::kFloat) ? std::get<double>(data_) : static_cast<double>(integer());
}

std::string Value::why_undefined() const {
  const auto* why = std::get_if<std::shared_ptr<const std::string>>(&data_);
  return why == nullptr || *why == nullptr ? "the value is undefined" : **why;
}

Extent Value::extent() const {
  if (is_string()) {
    return {1 + static_cast<int64_t>(text().bytes.size() / 64), 1, text().any_untrusted()};
  }
  if (is(Kind::kSequence)) return sequence()->extent;
  if (is(Kind::kDict)) return dict().extent();
  return {};
}

std::string TypeName(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return "Undefined";
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return "bool";
    case Kind::kInt:
      return "int";
    case Kind::kFloat:
      return "float";
    case Kind::kString:
      return "str";
    case Kind::kSequence: {
      constexpr const char* kNames[] = {"list",      "tuple",       "iterator",
                                        "dict_keys", "dict_values", "dict_items"};
      return kNames[static_cast<size_t>(value.sequence()->flavor)];
    }
    case Kind::kDict:
      return "dict";
    case Kind::kLoop:
      return "loop";
    case Kind::kNamespace:
      return "namespace";
    case Kind::kMacro:
      return "macro";
    case Kind::kFunction:
      return "function";
    case Kind::kMethod:
      return "method";
  }
  return "unknown";
}

bool Truthy(const Value& value) {
  if (value.is_undefined() || value.is_none()) return false;
  if (value.is_number()) return value.number() != 0;
  if (value.is_string()) return !value.text().bytes.empty();
  if (value.is(Kind::kDict)) return !value.dict().items().empty();
  if (!value.is(Kind::kSequence)) return true;
  const Sequence& sequence = *value.sequence();
  return sequence.flavor == Sequence::Flavor::kIterator || !sequence.items.empty();
}

bool Equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return NumbersEqual(a, b);
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Kind::kUndefined:
    case Kind::kNone:
      return true;
    case Kind::kString:
      return a.text().bytes == b.text().bytes;
    case Kind::kSequence: {
      const Sequence& x = *a.sequence();
      const Sequence& y = *b.sequence();
      if (x.flavor == Sequence::Flavor::kIterator) return &x == &y;
      return x.flavor == y.flavor &&
             std::equal(x.items.begin(), x.items.end(), y.items.begin(), y.items.end(), Equal);
    }
    case Kind::kDict: {
      const auto& items = a.dict().items();
      return items.size() == b.dict().items().size() &&
             std::all_of(items.begin(), items.end(), [&](const auto& item) {
               const Value* other = b.dict().Find(item.first);
               return other != nullptr && Equal(item.second, *other);
             });
    }
    case Kind::kLoop:
      return a.loop() == b.loop();
    case Kind::kNamespace:
    case Kind::kMacro:
    case Kind::kFunction:
    case Kind::kMethod:
      return a.index() == b.index();
    case Kind::kBool:
    case Kind::kInt:
    case Kind::kFloat:
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

Result<std::string> Repr(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return std::string("Undefined");
    case Kind::kNone:
      return std::string("None");
    case Kind::kBool:
      return std::string(value.boolean() ? "True" : "False");
    case Kind::kInt:
      return std::to_string(value.integer());
    case Kind::kFloat:
      return FloatRepr(value.number());
    case Kind::kString:
      return ReprString(value.text().bytes);
    case Kind::kSequence:
      return ReprSequence(*value.sequence());
    case Kind::kDict:
      return ReprDict(value.dict());
    case Kind::kLoop:
    case Kind::kNamespace:
    case Kind::kMacro:
    case Kind::kFunction:
    case Kind::kMethod:
      break;
  }
  return InvalidArgument("cannot print a " + TypeName(value) + "; expected a plain value");
}

Result<Text> Str(const Value& value) {
  if (value.is_string()) return value.text();
  if (value.is_undefined()) return Text();
  ASSIGN_OR_RETURN(const std::string text, Repr(value));
  return Text::From(text, value.extent().untrusted);
}

}  // namespace innerq::jinja
