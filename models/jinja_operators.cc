// Python's operators, subscripts and iteration on Value.
#include <algorithm>
#include <cmath>
#include <limits>

#include "models/jinja_program.h"

namespace innerq::jinja {
namespace {

using Flavor = Sequence::Flavor;

Error NoOperator(std::string_view op, const Value& a, const Value& b) {
  for (const Value* value : {&a, &b}) {
    if (value->is_undefined()) return InvalidArgument(value->why_undefined());
  }
  return InvalidArgument("the operator " + std::string(op) + " expects other values, found " +
                         TypeName(a) + " and " + TypeName(b));
}

Error TooLarge(std::string_view op) {
  return InvalidArgument("the operator " + std::string(op) +
                         " expects a result of 64 bits, found a larger one");
}

Result<Value> FloorDivide(std::string_view op, int64_t a, int64_t b) {
  if (b == 0) return InvalidArgument("expected a divisor other than 0");
  if (b == -1) {
    if (op == "%") return Value::Int(0);
    if (a == std::numeric_limits<int64_t>::min()) return TooLarge(op);
    return Value::Int(-a);
  }
  const bool below = a % b != 0 && (a < 0) != (b < 0);
  if (op == "%") return Value::Int(below ? a % b + b : a % b);
  return Value::Int(below ? a / b - 1 : a / b);
}

Result<Value> IntegerPower(int64_t base, int64_t exponent) {
  if (exponent < 0) {
    if (base == 0) return InvalidArgument("expected a base other than 0 for a negative power");
    return Value::Float(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
  }
  if (base == 0 || base == 1) return Value::Int(exponent == 0 ? 1 : base);
  if (base == -1) return Value::Int(exponent % 2 == 0 ? 1 : -1);
  int64_t out = 1;
  for (int64_t i = 0; i < exponent; ++i) {
    if (__builtin_mul_overflow(out, base, &out)) return TooLarge("**");
  }
  return Value::Int(out);
}

Result<Value> Integers(std::string_view op, int64_t a, int64_t b) {
  int64_t out = 0;
  if (op == "**") return IntegerPower(a, b);
  if (op == "//" || op == "%") return FloorDivide(op, a, b);
  if (op == "/") {
    if (b == 0) return InvalidArgument("expected a divisor other than 0");
    return Value::Float(static_cast<double>(a) / static_cast<double>(b));
  }
  const bool overflows = op == "+"   ? __builtin_add_overflow(a, b, &out)
                         : op == "-" ? __builtin_sub_overflow(a, b, &out)
                                     : __builtin_mul_overflow(a, b, &out);
  if (overflows) return TooLarge(op);
  return Value::Int(out);
}

Result<Value> Floats(std::string_view op, double a, double b) {
  if (op == "+") return Value::Float(a + b);
  if (op == "-") return Value::Float(a - b);
  if (op == "*") return Value::Float(a * b);
  if (op == "**") {
    if (a < 0 && b != std::floor(b)) return InvalidArgument("expected a real power");
    if (a == 0 && b < 0) return InvalidArgument("expected a base other than 0");
    return Value::Float(std::pow(a, b));
  }
  if (b == 0) return InvalidArgument("expected a divisor other than 0");
  if (op == "/") return Value::Float(a / b);
  double rest = std::fmod(a, b);
  if (rest != 0 && (rest < 0) != (b < 0)) rest += b;
  if (op == "%") return Value::Float(rest == 0 ? std::copysign(0.0, b) : rest);
  return Value::Float(std::round((a - rest) / b));
}

Result<Value> Repeat(const Value& what, int64_t count, Budget& budget) {
  count = std::max<int64_t>(count, 0);
  const bool is_text = what.is_string();
  const int64_t size =
      static_cast<int64_t>(is_text ? what.text().bytes.size() : what.sequence()->items.size());
  int64_t total = 0;
  if (__builtin_mul_overflow(size, count, &total)) return TooLarge("*");
  RETURN_IF_ERROR(is_text ? budget.SpendBytes(total) : budget.Spend(total));
  if (size == 0) count = 0;
  if (is_text) {
    Text out;
    for (int64_t i = 0; i < count; ++i) out.Append(what.text());
    return Value::String(std::move(out));
  }
  std::vector<Value> items;
  for (int64_t i = 0; i < count; ++i) {
    items.insert(items.end(), what.sequence()->items.begin(), what.sequence()->items.end());
  }
  return Value::Of(what.sequence()->flavor, std::move(items));
}

// The places that object[range] visits in something of `size` elements.
Result<std::vector<size_t>> PlacesIn(int64_t size, const std::optional<int64_t> (&range)[3]) {
  const int64_t step = range[2].value_or(1);
  if (step == 0) return InvalidArgument("expected a slice step other than 0");
  const int64_t low = step > 0 ? 0 : -1;
  const int64_t high = step > 0 ? size : size - 1;
  const auto clamp = [&](const std::optional<int64_t>& bound, int64_t absent) {
    if (!bound) return absent;
    return std::clamp(*bound < 0 ? *bound + size : *bound, low, high);
  };
  const int64_t begin = clamp(range[0], step > 0 ? low : high);
  const int64_t end = clamp(range[1], step > 0 ? high : low);
  std::vector<size_t> out;
  for (int64_t i = begin; step > 0 ? i < end : i > end;) {
    out.push_back(static_cast<size_t>(i));
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return out;
}

// The element at a place counted from the end if negative, else undefined.
Value ItemAt(const Value& object, int64_t at) {
  const Value absent = Value::Undefined(TypeName(object) + " has no element " + std::to_string(at));
  if (object.is_string()) {
    const Text& text = object.text();
    const std::vector<size_t> offsets = CharOffsets(text.bytes);
    const int64_t size = static_cast<int64_t>(offsets.size()) - 1;
    if (at < 0) at += size;
    if (at < 0 || at >= size) return absent;
    const size_t i = static_cast<size_t>(at);
    return Value::String(text.Sub(offsets[i], offsets[i + 1]));
  }
  const auto& items = object.sequence()->items;
  if (at < 0) at += static_cast<int64_t>(items.size());
  if (at < 0 || at >= static_cast<int64_t>(items.size())) return absent;
  return items[static_cast<size_t>(at)];
}

bool HasMethod(const Value& object, std::string_view name) {
  if (object.is(Value::Kind::kDict)) {
    for (const std::string_view known : {"items", "keys", "values", "get", "copy", "pop", "update",
                                         "clear", "setdefault", "popitem", "fromkeys"}) {
      if (name == known) return true;
    }
  }
  return object.is_string() && FindMethod(name) != nullptr && name != "items" && name != "keys" &&
         name != "values" && name != "get";
}

}  // namespace

Result<Value> Binary(std::string_view op, const Value& a, const Value& b, Budget& budget) {
  if (op == "~") {
    RETURN_IF_ERROR(budget.SpendOn(a));
    RETURN_IF_ERROR(budget.SpendOn(b));
    ASSIGN_OR_RETURN(Text out, Str(a));
    ASSIGN_OR_RETURN(const Text more, Str(b));
    RETURN_IF_ERROR(budget.SpendBytes(static_cast<int64_t>(out.bytes.size() + more.bytes.size())));
    out.Append(more);
    return Value::String(std::move(out));
  }
  if (a.is_integral() && b.is_integral()) return Integers(op, a.integer(), b.integer());
  if (a.is_number() && b.is_number()) return Floats(op, a.number(), b.number());
  if (op == "*") {
    if ((a.is_string() || a.is_list()) && b.is_integral()) return Repeat(a, b.integer(), budget);
    if ((b.is_string() || b.is_list()) && a.is_integral()) return Repeat(b, a.integer(), budget);
  }
  if (op == "+" && a.is_string() && b.is_string()) {
    const size_t size = a.text().bytes.size() + b.text().bytes.size();
    RETURN_IF_ERROR(budget.SpendBytes(static_cast<int64_t>(size)));
    Text out = a.text();
    out.Append(b.text());
    return Value::String(std::move(out));
  }
  if (op == "+" && a.is_list() && b.is_list() && a.sequence()->flavor == b.sequence()->flavor) {
    std::vector<Value> items = a.sequence()->items;
    const auto& more = b.sequence()->items;
    RETURN_IF_ERROR(budget.Spend(static_cast<int64_t>(items.size() + more.size())));
    items.insert(items.end(), more.begin(), more.end());
    return Value::Of(a.sequence()->flavor, std::move(items));
  }
  return NoOperator(op, a, b);
}

Result<bool> Compare(std::string_view op, const Value& a, const Value& b, Budget& budget) {
  if (op == "in") return Contains(b, a, budget);
  if (op == "not in") {
    ASSIGN_OR_RETURN(const bool inside, Contains(b, a, budget));
    return !inside;
  }
  RETURN_IF_ERROR(budget.Spend(std::min(a.extent().weight, b.extent().weight)));
  if (op == "==") return Equal(a, b);
  if (op == "!=") return !Equal(a, b);
  const bool either_nan = (a.is(Value::Kind::kFloat) && std::isnan(a.number())) ||
                          (b.is(Value::Kind::kFloat) && std::isnan(b.number()));
  const Result<int> order = Order(a, b);
  if (!order.ok()) return NoOperator(op, a, b);
  if (either_nan) return false;
  if (op == "<") return *order < 0;
  if (op == "<=") return *order <= 0;
  return op == ">" ? *order > 0 : *order >= 0;
}

Result<bool> Contains(const Value& container, const Value& item, Budget& budget) {
  if (container.is_string()) {
    if (!item.is_string()) return NoOperator("in", item, container);
    RETURN_IF_ERROR(budget.SpendOn(container));
    return FindPart(container.text().bytes, item.text().bytes) != std::string::npos;
  }
  if (container.is(Value::Kind::kDict)) {
    if (item.is_string()) RETURN_IF_ERROR(budget.SpendOn(item));
    return container.dict().Find(item) != nullptr;
  }
  if (container.is_undefined()) return false;
  if (!container.is(Value::Kind::kSequence)) return NoOperator("in", item, container);
  const int64_t most = item.extent().weight;  // of one comparison
  for (const Value& one : container.sequence()->items) {
    RETURN_IF_ERROR(budget.Spend(std::min(most, one.extent().weight)));
  }
  ASSIGN_OR_RETURN(const auto items, Iterate(container, budget));
  return std::any_of(items->begin(), items->end(),
                     [&](const Value& one) { return Equal(one, item); });
}

Result<Value> GetItem(const Value& object, const Value& key, Budget& budget) {
  if (object.is_undefined()) return InvalidArgument(object.why_undefined());
  for (const Value* text : {&object, &key}) {
    if (text->is_string()) RETURN_IF_ERROR(budget.SpendOn(*text));
  }
  const bool indexed = object.is_string() || object.is_list();
  if (indexed && key.is_integral()) return ItemAt(object, key.integer());
  if (object.is(Value::Kind::kDict)) {
    if (const Value* found = object.dict().Find(key)) return *found;
  }
  if (key.is_string()) {
    if (HasMethod(object, key.text().bytes)) return Value::Reference(Value::Kind::kMethod, 0);
    constexpr size_t kShownBytes = 100;
    const std::string_view name = key.text().bytes;
    return Value::Undefined(TypeName(object) + " has no " +
                            ReprString(name.substr(0, kShownBytes)));
  }
  return Value::Undefined(TypeName(object) + " has no such element");
}

Result<Value> GetAttribute(const Value& object, const std::string& name) {
  if (object.is_undefined()) return InvalidArgument(object.why_undefined());
  if (HasMethod(object, name)) return Value::Reference(Value::Kind::kMethod, 0);
  if (object.is(Value::Kind::kDict)) {
    if (const Value* found = object.dict().Find(name)) return *found;
  }
  return Value::Undefined(TypeName(object) + " has no attribute " + ReprString(name));
}

Result<Value> GetPath(const Value& object, const Value& path, Budget& budget) {
  if (!path.is_string()) return GetItem(object, path, budget);
  RETURN_IF_ERROR(budget.SpendOn(path));
  Value out = object;
  std::string_view rest = path.text().bytes;
  while (true) {
    const size_t dot = std::min(rest.find('.'), rest.size());
    const std::string part(rest.substr(0, dot));
    const bool is_index = !part.empty() && part.size() < 10 &&
                          part.find_first_not_of("0123456789") == std::string::npos;
    const Value key = is_index ? Value::Int(std::stoi(part)) : Value::String(part);
    ASSIGN_OR_RETURN(out, GetItem(out, key, budget));
    if (dot == rest.size()) return out;
    rest.remove_prefix(dot + 1);
  }
}

Result<Value> Slice(const Value& object, const std::optional<int64_t> (&range)[3], Budget& budget) {
  if (object.is_undefined()) return InvalidArgument(object.why_undefined());
  if (object.is_string()) {
    RETURN_IF_ERROR(budget.Spend(1 + static_cast<int64_t>(object.text().bytes.size() / 16)));
    const std::vector<size_t> offsets = CharOffsets(object.text().bytes);
    ASSIGN_OR_RETURN(const auto places, PlacesIn(static_cast<int64_t>(offsets.size()) - 1, range));
    if (places.empty()) return Value::String("");
    if (range[2].value_or(1) == 1) {
      return Value::String(object.text().Sub(offsets[places[0]], offsets[places.back() + 1]));
    }
    RETURN_IF_ERROR(budget.Spend(static_cast<int64_t>(places.size() / 4)));
    Text out;
    for (const size_t i : places) out.Append(object.text().Sub(offsets[i], offsets[i + 1]));
    return Value::String(std::move(out));
  }
  if (!object.is_list()) return Value::Undefined(TypeName(object) + " has no slices");
  const auto& items = object.sequence()->items;
  RETURN_IF_ERROR(budget.Spend(static_cast<int64_t>(items.size())));
  ASSIGN_OR_RETURN(const auto places, PlacesIn(static_cast<int64_t>(items.size()), range));
  std::vector<Value> out;
  for (const size_t i : places) out.push_back(items[i]);
  return Value::Of(object.sequence()->flavor, std::move(out));
}

Result<std::shared_ptr<const std::vector<Value>>> Iterate(const Value& value, Budget& budget) {
  using Items = std::shared_ptr<const std::vector<Value>>;
  auto out = std::make_shared<std::vector<Value>>();
  if (value.is_undefined()) return Items(out);
  if (value.is(Value::Kind::kSequence)) {
    Sequence& sequence = *value.sequence();
    if (sequence.flavor == Flavor::kIterator && std::exchange(sequence.consumed, true)) {
      return Items(out);
    }
    return Items(value.sequence(), &sequence.items);
  }
  if (value.is_string()) {
    RETURN_IF_ERROR(budget.Spend(4 * static_cast<int64_t>(value.text().bytes.size())));
    const std::vector<size_t> offsets = CharOffsets(value.text().bytes);
    for (size_t i = 0; i + 1 < offsets.size(); ++i) {
      out->push_back(Value::String(value.text().Sub(offsets[i], offsets[i + 1])));
    }
    return Items(out);
  }
  if (!value.is(Value::Kind::kDict)) {
    return InvalidArgument("expected something to iterate over, found " + TypeName(value));
  }
  RETURN_IF_ERROR(budget.Spend(static_cast<int64_t>(value.dict().items().size())));
  for (const auto& item : value.dict().items()) out->push_back(item.first);
  return Items(out);
}

Result<int64_t> Length(const Value& value) {
  if (value.is_undefined()) return 0;
  if (value.is_string()) return CountChars(value.text().bytes);
  if (value.is(Value::Kind::kDict)) return static_cast<int64_t>(value.dict().items().size());
  if (value.is(Value::Kind::kSequence) && value.sequence()->flavor != Flavor::kIterator) {
    return static_cast<int64_t>(value.sequence()->items.size());
  }
  return InvalidArgument("expected something with a length, found " + TypeName(value));
}

}  // namespace innerq::jinja
