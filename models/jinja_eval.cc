// The expressions of a render: the other half of Renderer.
#include <algorithm>

#include "models/jinja_render.h"

namespace innerq::jinja {

Result<Value> Renderer::Eval(const Expr& expr) {
  const Limits& limits = budget_.limits();
  if (depth_ >= limits.max_render_depth) {
    return InvalidArgument("expected at most " + std::to_string(limits.max_render_depth) +
                           " levels of nesting while rendering, found more");
  }
  line_ = expr.line;
  RETURN_IF_ERROR(budget_.Spend(1));
  ++depth_;
  Result<Value> out = EvalKind(expr);
  --depth_;
  if (out.ok() && out->extent().depth > limits.max_value_depth) {
    return InvalidArgument("expected at most " + std::to_string(limits.max_value_depth) +
                           " lists or dicts within each other, found more");
  }
  return out;
}

Result<Value> Renderer::EvalKind(const Expr& expr) {
  switch (expr.kind) {
    case Expr::Kind::kLiteral:
      return expr.value;
    case Expr::Kind::kName:
      return Lookup(expr.name);
    case Expr::Kind::kList:
    case Expr::Kind::kTuple:
    case Expr::Kind::kItem:
    case Expr::Kind::kBinary:
      return EvalSimple(expr);
    case Expr::Kind::kDict:
      return EvalDict(expr);
    case Expr::Kind::kAttribute:
      return EvalAttribute(expr);
    case Expr::Kind::kSlice:
      return EvalSlice(expr);
    case Expr::Kind::kNegate:
    case Expr::Kind::kPlus:
      return EvalNegate(expr);
    case Expr::Kind::kNot:
    case Expr::Kind::kAnd:
    case Expr::Kind::kOr:
    case Expr::Kind::kConditional:
      return EvalLogic(expr);
    case Expr::Kind::kCompare:
      return EvalCompare(expr);
    case Expr::Kind::kBuiltin:
    case Expr::Kind::kTest:
      return EvalBuiltin(expr, nullptr);
    case Expr::Kind::kMap:
      return EvalMap(expr, nullptr);
    case Expr::Kind::kSelect:
    case Expr::Kind::kReject:
      return EvalSelect(expr, nullptr);
    case Expr::Kind::kCall:
      return EvalCall(expr);
    case Expr::Kind::kMethod:
      return EvalMethod(expr);
  }
  return Value();
}

Result<std::vector<Value>> Renderer::EvalAll(const Expr& expr) {
  std::vector<Value> out;
  for (const ExprPtr& arg : expr.args) {
    ASSIGN_OR_RETURN(Value value, Eval(*arg));
    out.push_back(std::move(value));
  }
  line_ = expr.line;
  return out;
}

Result<Value> Renderer::EvalSimple(const Expr& expr) {
  ASSIGN_OR_RETURN(std::vector<Value> values, EvalAll(expr));
  if (expr.kind == Expr::Kind::kList) return Value::List(std::move(values));
  if (expr.kind == Expr::Kind::kTuple) return Value::Tuple(std::move(values));
  if (expr.kind == Expr::Kind::kBinary) return Binary(expr.name, values[0], values[1], budget_);
  if (values[0].is(Value::Kind::kNamespace)) {
    const Dict& names = namespaces_[static_cast<size_t>(values[0].index())];
    if (values[1].is_string()) RETURN_IF_ERROR(budget_.SpendOn(values[1]));
    const Value* found = names.Find(values[1]);
    return found != nullptr ? *found : Value::Undefined("namespace has no such attribute");
  }
  return GetItem(values[0], values[1], budget_);
}

Result<Value> Renderer::EvalDict(const Expr& expr) {
  ASSIGN_OR_RETURN(std::vector<Value> values, EvalAll(expr));
  Dict out;
  for (size_t i = 0; i < values.size(); i += 2) {
    const bool hashable = values[i].is_string() || values[i].is_number() || values[i].is_none();
    if (!hashable) {
      return InvalidArgument("expected text, a number or none as a key, found " +
                             TypeName(values[i]));
    }
    if (values[i].is_string()) RETURN_IF_ERROR(budget_.SpendOn(values[i]));
    out.Set(values[i], values[i + 1]);
  }
  return Value::Of(std::move(out));
}

Result<Value> Renderer::EvalAttribute(const Expr& expr) {
  ASSIGN_OR_RETURN(const Value object, Eval(*expr.args[0]));
  line_ = expr.line;
  if (object.is(Value::Kind::kLoop)) return LoopAttribute(*object.loop(), expr.name);
  if (object.is(Value::Kind::kNamespace)) {
    const Value* found = namespaces_[static_cast<size_t>(object.index())].Find(expr.name);
    return found != nullptr
               ? *found
               : Value::Undefined("namespace has no attribute " + ReprString(expr.name));
  }
  return GetAttribute(object, expr.name);
}

Result<Value> Renderer::EvalSlice(const Expr& expr) {
  ASSIGN_OR_RETURN(const Value object, Eval(*expr.args[0]));
  std::optional<int64_t> range[3];
  for (size_t i = 0; i < 3; ++i) {
    if (expr.args[i + 1] == nullptr) continue;
    ASSIGN_OR_RETURN(const Value bound, Eval(*expr.args[i + 1]));
    line_ = expr.line;
    if (bound.is_none()) continue;
    if (!bound.is_integral()) {
      return InvalidArgument("expected an integer in a slice, found " + TypeName(bound));
    }
    range[i] = bound.integer();
  }
  line_ = expr.line;
  return Slice(object, range, budget_);
}

Result<Value> Renderer::EvalNegate(const Expr& expr) {
  ASSIGN_OR_RETURN(const Value value, Eval(*expr.args[0]));
  line_ = expr.line;
  const bool negate = expr.kind == Expr::Kind::kNegate;
  if (value.is(Value::Kind::kFloat)) return Value::Float(negate ? -value.number() : value.number());
  if (!negate && value.is_integral()) return Value::Int(value.integer());
  return Binary("-", Value::Int(0), value, budget_);
}

Result<Value> Renderer::EvalLogic(const Expr& expr) {
  if (expr.kind == Expr::Kind::kConditional) {
    ASSIGN_OR_RETURN(const Value condition, Eval(*expr.args[1]));
    if (Truthy(condition)) return Eval(*expr.args[0]);
    if (expr.args[2] != nullptr) return Eval(*expr.args[2]);
    return Value::Undefined("the inline if has no else and its condition is false");
  }
  ASSIGN_OR_RETURN(const Value left, Eval(*expr.args[0]));
  const bool truth = Truthy(left);
  if (expr.kind == Expr::Kind::kNot) return Value::Bool(!truth);
  if (truth == (expr.kind == Expr::Kind::kOr)) return left;
  return Eval(*expr.args[1]);
}

Result<Value> Renderer::EvalCompare(const Expr& expr) {
  ASSIGN_OR_RETURN(Value left, Eval(*expr.args[0]));
  for (size_t i = 0; i < expr.names.size(); ++i) {
    ASSIGN_OR_RETURN(Value right, Eval(*expr.args[i + 1]));
    line_ = expr.line;
    ASSIGN_OR_RETURN(const bool holds, Compare(expr.names[i], left, right, budget_));
    if (!holds) return Value::Bool(false);
    left = std::move(right);
  }
  return Value::Bool(true);
}

Result<Value> Renderer::EvalBuiltin(const Expr& expr, const Value* input) {
  Call call{std::vector<std::optional<Value>>(expr.args.size()), budget_, now_};
  if (input != nullptr) call.args[0] = *input;
  for (size_t i = 0; i < expr.args.size(); ++i) {
    if (expr.args[i] == nullptr) continue;
    ASSIGN_OR_RETURN(call.args[i], Eval(*expr.args[i]));
  }
  line_ = expr.line;
  // Sequences are charged by those filters that walk them.
  for (const std::optional<Value>& arg : call.args) {
    if (arg && arg->is_string()) RETURN_IF_ERROR(budget_.SpendOn(*arg));
  }
  return expr.callee->function(call);
}

Result<Value> Renderer::EvalOn(const Expr& expr, const Value& input) {
  RETURN_IF_ERROR(budget_.Spend(1));
  if (expr.kind == Expr::Kind::kMap) return EvalMap(expr, &input);
  if (expr.kind == Expr::Kind::kSelect || expr.kind == Expr::Kind::kReject)
    return EvalSelect(expr, &input);
  return EvalBuiltin(expr, &input);
}

Result<Value> Renderer::EvalMap(const Expr& expr, const Value* input) {
  Value source = input != nullptr ? *input : Value();
  if (input == nullptr) {
    ASSIGN_OR_RETURN(source, Eval(*expr.args[0]));
  }
  Value path;
  std::optional<Value> absent;
  if (expr.inner == nullptr) {
    ASSIGN_OR_RETURN(path, Eval(*expr.args[1]));
    if (expr.args[2] != nullptr) {
      ASSIGN_OR_RETURN(absent, Eval(*expr.args[2]));
    }
  }
  line_ = expr.line;
  std::vector<Value> out;
  // As in Jinja2, what is false has no elements, be it a number.
  if (!Truthy(source)) return Value::Of(Sequence::Flavor::kIterator, std::move(out));
  ASSIGN_OR_RETURN(const auto items, Iterate(source, budget_));
  for (const Value& item : *items) {
    RETURN_IF_ERROR(budget_.Spend(1));
    ASSIGN_OR_RETURN(Value mapped, expr.inner != nullptr ? EvalOn(*expr.inner, item)
                                                         : GetPath(item, path, budget_));
    out.push_back(mapped.is_undefined() && absent ? *absent : std::move(mapped));
  }
  return Value::Of(Sequence::Flavor::kIterator, std::move(out));
}

Result<Value> Renderer::EvalSelect(const Expr& expr, const Value* input) {
  Value source = input != nullptr ? *input : Value();
  if (input == nullptr) {
    ASSIGN_OR_RETURN(source, Eval(*expr.args[0]));
  }
  std::optional<Value> path;
  if (expr.args[1] != nullptr) {
    ASSIGN_OR_RETURN(path, Eval(*expr.args[1]));
  }
  line_ = expr.line;
  std::vector<Value> out;
  if (!Truthy(source)) return Value::Of(Sequence::Flavor::kIterator, std::move(out));
  ASSIGN_OR_RETURN(const auto items, Iterate(source, budget_));
  for (const Value& item : *items) {
    RETURN_IF_ERROR(budget_.Spend(1));
    Value judged = item;
    if (path) {
      ASSIGN_OR_RETURN(judged, GetPath(item, *path, budget_));
    }
    if (expr.inner != nullptr) {
      ASSIGN_OR_RETURN(judged, EvalOn(*expr.inner, judged));
    }
    if (Truthy(judged) == (expr.kind == Expr::Kind::kSelect)) out.push_back(item);
  }
  return Value::Of(Sequence::Flavor::kIterator, std::move(out));
}

Result<Value> Renderer::EvalCall(const Expr& expr) {
  ASSIGN_OR_RETURN(const Value callee, Lookup(expr.name));
  ASSIGN_OR_RETURN(std::vector<Value> args, EvalAll(expr));
  if (callee.is(Value::Kind::kMacro)) {
    return CallMacro(expr, *program_.macros[static_cast<size_t>(callee.index())], std::move(args),
                     nullptr);
  }
  if (callee.is(Value::Kind::kFunction)) {
    if (callee.index() < 0) return MakeNamespace(expr, std::move(args));
    return CallFunction(expr, Functions()[static_cast<size_t>(callee.index())], std::move(args));
  }
  if (callee.is_undefined() && expr.name == "caller" && caller_ != nullptr) return CallCaller(expr);
  if (callee.is_undefined()) return InvalidArgument(callee.why_undefined());
  return InvalidArgument("expected a function or macro to call, found " + TypeName(callee));
}

// A method that is not found by its name alone. That it is none is an error here, for a template
// may guard it by a condition that never holds.
Result<Value> Renderer::EvalMethod(const Expr& expr) {
  ASSIGN_OR_RETURN(std::vector<Value> args, EvalAll(expr));
  const Value object = std::move(args.front());
  args.erase(args.begin());
  if (object.is_undefined()) return InvalidArgument(object.why_undefined());
  if (!object.is(Value::Kind::kLoop) || (expr.name != "cycle" && expr.name != "changed")) {
    return InvalidArgument("the method " + ReprString(expr.name) + " of " + TypeName(object) +
                           " is not supported");
  }
  Loop& loop = *object.loop();
  if (loop.ended) return LoopHasEnded(expr.name);
  if (!expr.names.empty()) {
    return InvalidArgument(expr.name + " does not expect the argument " + expr.names[0]);
  }
  if (expr.name == "cycle") {
    if (args.empty()) return InvalidArgument("cycle expects values, found none");
    return args[static_cast<size_t>(loop.index0) % args.size()];
  }
  Value now = Value::Tuple(std::move(args));
  bool changed = true;
  if (loop.last_changed) {
    ASSIGN_OR_RETURN(changed, Compare("!=", *loop.last_changed, now, budget_));
  }
  loop.last_changed = std::move(now);
  return Value::Bool(changed);
}

// namespace(...) and dict(...): of a dict, then of keywords.
Result<Value> Renderer::MakeNamespace(const Expr& expr, std::vector<Value> args) {
  const size_t positional = args.size() - expr.names.size();
  const bool fits = positional == 0 || (positional == 1 && args[0].is(Value::Kind::kDict));
  if (!fits) return InvalidArgument(expr.name + " expects at most one dict and keywords");
  Dict out = positional == 1 ? args[0].dict() : Dict();
  RETURN_IF_ERROR(budget_.Spend(static_cast<int64_t>(out.items().size() + args.size())));
  for (size_t i = 0; i < expr.names.size(); ++i) {
    out.Set(Value::String(expr.names[i]), args[positional + i]);
  }
  if (expr.name == "dict") return Value::Of(std::move(out));
  constexpr int64_t kNamespaceSteps = 64;  // it stays until the render ends
  RETURN_IF_ERROR(budget_.Spend(kNamespaceSteps));
  namespaces_.push_back(std::move(out));
  return Value::Reference(Value::Kind::kNamespace, static_cast<int64_t>(namespaces_.size()) - 1);
}

Result<Value> Renderer::CallFunction(const Expr& expr, const Signature& function,
                                     std::vector<Value> args) {
  const std::string name(function.name);
  if (!expr.names.empty()) {
    return InvalidArgument(name + " does not expect the argument " + expr.names[0]);
  }
  if (args.size() < function.required || args.size() > function.params.size()) {
    return InvalidArgument(name + " expects " + std::to_string(function.required) + " to " +
                           std::to_string(function.params.size()) + " arguments, found " +
                           std::to_string(args.size()));
  }
  Call call{{}, budget_, now_};
  for (Value& arg : args) call.args.emplace_back(std::move(arg));
  return function.function(call);
}

// The text of the call block, with the names that it sees where it stands. It has no caller() of
// its own, as in Jinja2, even where it stands in a macro.
Result<Value> Renderer::CallCaller(const Expr& expr) {
  if (!expr.args.empty()) return InvalidArgument("caller expects no arguments");
  const Caller* const caller = std::exchange(caller_, nullptr);
  const size_t outer = Push(caller->frame);
  ASSIGN_OR_RETURN(Text text, Capture(*caller->body));
  Pop(outer);
  caller_ = caller;
  return Value::String(std::move(text));
}

Result<Value> Renderer::CallMacro(const Expr& expr, const Macro& macro, std::vector<Value> args,
                                  const Caller* caller) {
  const size_t positional = args.size() - expr.names.size();
  if (positional > macro.params.size()) {
    return InvalidArgument("macro " + macro.name + " expects at most " +
                           std::to_string(macro.params.size()) + " arguments, found " +
                           std::to_string(positional));
  }
  std::vector<std::optional<Value>> bound(macro.params.size());
  for (size_t i = 0; i < args.size(); ++i) {
    size_t place = i;
    if (i >= positional) {
      const std::string& name = expr.names[i - positional];
      const auto param = std::find(macro.params.begin(), macro.params.end(), name);
      place = static_cast<size_t>(param - macro.params.begin());
      if (param == macro.params.end() || bound[place]) {
        return InvalidArgument("macro " + macro.name + " does not expect the argument " + name);
      }
    }
    bound[place] = std::move(args[i]);
  }
  const Caller* const outer_caller = std::exchange(caller_, caller);
  const size_t outer = Push(0);
  for (size_t i = 0; i < bound.size(); ++i) {
    Value value =
        bound[i].value_or(Value::Undefined("parameter '" + macro.params[i] + "' was not provided"));
    if (!bound[i] && macro.defaults[i] != nullptr) {
      ASSIGN_OR_RETURN(value, Eval(*macro.defaults[i]));
    }
    Set(macro.params[i], std::move(value));
  }
  ASSIGN_OR_RETURN(Text text, Capture(macro.body));
  Pop(outer);
  caller_ = outer_caller;
  return Value::String(std::move(text));
}

}  // namespace innerq::jinja
