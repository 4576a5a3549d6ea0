// The tests of templates (`value is test`).
#include <algorithm>

#include "models/jinja_program.h"

namespace innerq::jinja {
namespace {

template <bool (*kTest)(const Value&)>
Result<Value> OfValue(Call& call) {
  return Value::Bool(kTest(call.input()));
}

template <Value::Kind kKind>
Result<Value> OfKind(Call& call) {
  return Value::Bool(call.input().is(kKind));
}

bool IsDefined(const Value& value) { return !value.is_undefined(); }
bool IsNumber(const Value& value) { return value.is_number(); }
bool IsTrue(const Value& value) { return value.is(Value::Kind::kBool) && value.boolean(); }
bool IsFalse(const Value& value) { return value.is(Value::Kind::kBool) && !value.boolean(); }

bool IsIterable(const Value& value) {
  return value.is_undefined() || value.is_string() || value.is(Value::Kind::kSequence) ||
         value.is(Value::Kind::kDict) || value.is(Value::Kind::kLoop);
}

bool IsSequence(const Value& value) {
  return value.is_undefined() || value.is_string() || value.is_list() ||
         value.is(Value::Kind::kDict);
}

bool IsCallable(const Value& value) {
  return value.is(Value::Kind::kMacro) || value.is(Value::Kind::kFunction) ||
         value.is(Value::Kind::kMethod);
}

constexpr char kEq[] = "==", kNe[] = "!=", kLt[] = "<", kLe[] = "<=", kGt[] = ">",
               kGe[] = ">=", kIn[] = "in";

template <const char* kOp>
Result<Value> Compares(Call& call) {
  ASSIGN_OR_RETURN(const bool holds, Compare(kOp, call.input(), call.arg(1), call.budget));
  return Value::Bool(holds);
}

// Whether input % divisor == remainder.
Result<Value> Remainder(Call& call, const Value& divisor, int64_t remainder) {
  ASSIGN_OR_RETURN(const Value rest, Binary("%", call.input(), divisor, call.budget));
  return Value::Bool(Equal(rest, Value::Int(remainder)));
}

Result<Value> OddTest(Call& call) { return Remainder(call, Value::Int(2), 1); }
Result<Value> EvenTest(Call& call) { return Remainder(call, Value::Int(2), 0); }
Result<Value> DivisibleTest(Call& call) { return Remainder(call, call.arg(1), 0); }

}  // namespace

const Signature* FindTest(std::string_view name) {
  static const std::vector<Signature> kTests = {
      {"boolean", {}, 0, OfKind<Value::Kind::kBool>},
      {"callable", {}, 0, OfValue<IsCallable>},
      {"defined", {}, 0, OfValue<IsDefined>},
      {"divisibleby", {"num"}, 1, DivisibleTest},
      {"eq", {"other"}, 1, Compares<kEq>},
      {"==", {"other"}, 1, Compares<kEq>},
      {"equalto", {"other"}, 1, Compares<kEq>},
      {"even", {}, 0, EvenTest},
      {"false", {}, 0, OfValue<IsFalse>},
      {"float", {}, 0, OfKind<Value::Kind::kFloat>},
      {"ge", {"other"}, 1, Compares<kGe>},
      {">=", {"other"}, 1, Compares<kGe>},
      {"greaterthan", {"other"}, 1, Compares<kGt>},
      {"gt", {"other"}, 1, Compares<kGt>},
      {">", {"other"}, 1, Compares<kGt>},
      {"in", {"seq"}, 1, Compares<kIn>},
      {"integer", {}, 0, OfKind<Value::Kind::kInt>},
      {"iterable", {}, 0, OfValue<IsIterable>},
      {"le", {"other"}, 1, Compares<kLe>},
      {"<=", {"other"}, 1, Compares<kLe>},
      {"lessthan", {"other"}, 1, Compares<kLt>},
      {"lt", {"other"}, 1, Compares<kLt>},
      {"<", {"other"}, 1, Compares<kLt>},
      {"mapping", {}, 0, OfKind<Value::Kind::kDict>},
      {"ne", {"other"}, 1, Compares<kNe>},
      {"!=", {"other"}, 1, Compares<kNe>},
      {"none", {}, 0, OfKind<Value::Kind::kNone>},
      {"number", {}, 0, OfValue<IsNumber>},
      {"odd", {}, 0, OddTest},
      {"sequence", {}, 0, OfValue<IsSequence>},
      {"string", {}, 0, OfKind<Value::Kind::kString>},
      {"true", {}, 0, OfValue<IsTrue>},
      {"undefined", {}, 0, OfKind<Value::Kind::kUndefined>},
  };
  const auto found = std::find_if(kTests.begin(), kTests.end(),
                                  [&](const Signature& test) { return test.name == name; });
  return found == kTests.end() ? nullptr : &*found;
}

}  // namespace innerq::jinja
