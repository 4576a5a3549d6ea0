// Calls in templates: filters, tests, methods, functions and macros, bound to their signatures.
#include <algorithm>

#include "models/jinja_parser.h"

namespace innerq::jinja {
namespace {

std::string Quoted(std::string_view name) { return "\"" + std::string(name) + "\""; }

}  // namespace

Result<Parser::Arguments> Parser::ParseArguments() {
  Arguments out;
  RETURN_IF_ERROR(ExpectOp("("));
  while (!IsOp(")")) {
    if (!out.values.empty()) RETURN_IF_ERROR(ExpectOp(","));
    if (IsOp(")")) break;
    if (IsOp("*") || IsOp("**")) {
      return ErrorAt(now().line, now().text + " before an argument is not supported");
    }
    const bool named = now().kind == Token::Kind::kName && after().kind == Token::Kind::kOperator &&
                       after().text == "=";
    if (named) {
      out.names.push_back(now().text);
      at_ += 2;
    } else if (!out.names.empty()) {
      return Unexpected("a named argument, as the one before");
    }
    ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
    out.values.push_back(std::move(value));
  }
  ++at_;
  return out;
}

Result<std::vector<ExprPtr>> Parser::Bind(const Signature& callee, ExprPtr input, Arguments args,
                                          int line) const {
  std::vector<ExprPtr> out(1 + callee.params.size());
  out[0] = std::move(input);
  const size_t positional = args.values.size() - args.names.size();
  if (positional > callee.params.size()) {
    return ErrorAt(line, std::string(callee.name) + " expects at most " +
                             std::to_string(callee.params.size()) + " arguments, found " +
                             std::to_string(args.values.size()));
  }
  for (size_t i = 0; i < args.values.size(); ++i) {
    size_t place = i;
    if (i >= positional) {
      const std::string& name = args.names[i - positional];
      const auto param = std::find(callee.params.begin(), callee.params.end(), name);
      place = static_cast<size_t>(param - callee.params.begin());
      if (param == callee.params.end() || out[1 + place] != nullptr) {
        return ErrorAt(line, std::string(callee.name) + " does not expect the argument " + name);
      }
    }
    out[1 + place] = std::move(args.values[i]);
  }
  for (size_t i = 0; i < callee.required; ++i) {
    if (out[1 + i] != nullptr) continue;
    return ErrorAt(line, std::string(callee.name) + " expects the argument " +
                             std::string(callee.params[i]) + ", found none");
  }
  return out;
}

Result<ExprPtr> Parser::ParseMethod(ExprPtr object, const std::string& name, int line) {
  const Signature* method = FindMethod(name);
  ASSIGN_OR_RETURN(Arguments arguments, ParseArguments());
  if (method == nullptr) {
    std::vector<ExprPtr> all;
    all.push_back(std::move(object));
    for (ExprPtr& value : arguments.values) all.push_back(std::move(value));
    ASSIGN_OR_RETURN(ExprPtr out, Make(Expr::Kind::kMethod, line, std::move(all)));
    out->name = name;
    out->names = std::move(arguments.names);
    return out;
  }
  ASSIGN_OR_RETURN(std::vector<ExprPtr> args,
                   Bind(*method, std::move(object), std::move(arguments), line));
  ASSIGN_OR_RETURN(ExprPtr out, Make(Expr::Kind::kBuiltin, line, std::move(args)));
  out->callee = method;
  return out;
}

Result<ExprPtr> Parser::MakeCall(const std::string& name, int line) {
  if (name == "loop") return ErrorAt(line, "the call of loop (a recursive for) is not supported");
  calls_.emplace_back(name, line);
  ASSIGN_OR_RETURN(Arguments arguments, ParseArguments());
  ASSIGN_OR_RETURN(ExprPtr out, Make(Expr::Kind::kCall, line, std::move(arguments.values)));
  out->name = name;
  out->names = std::move(arguments.names);
  return out;
}

Result<ExprPtr> Parser::ParseFilters(ExprPtr input) {
  while (true) {
    if (TakeOp("|")) {
      ASSIGN_OR_RETURN(input, ParseFilter(std::move(input)));
    } else if (TakeName("is")) {
      ASSIGN_OR_RETURN(input, ParseTest(std::move(input)));
    } else if (IsOp("(")) {
      return ErrorAt(now().line, "the call of something other than a name is not supported");
    } else {
      return input;
    }
  }
}

Result<ExprPtr> Parser::ParseFilter(ExprPtr input) {
  const int line = now().line;
  ASSIGN_OR_RETURN(std::string name, ExpectName("the name of a filter"));
  while (TakeOp(".")) {
    ASSIGN_OR_RETURN(const std::string part, ExpectName("the name of a filter"));
    name += "." + part;
  }
  Arguments args;
  if (IsOp("(")) {
    ASSIGN_OR_RETURN(args, ParseArguments());
  }
  return MakeFilter(name, std::move(input), std::move(args), line);
}

Result<ExprPtr> Parser::MakeFilter(const std::string& name, ExprPtr input, Arguments args,
                                   int line) {
  if (name == "map") return MakeMap(std::move(input), std::move(args), line);
  for (const std::string_view select : {"select", "reject", "selectattr", "rejectattr"}) {
    if (name == select) return MakeSelect(name, std::move(input), std::move(args), line);
  }
  const Signature* filter = FindFilter(name);
  if (filter == nullptr) return ErrorAt(line, "the filter " + Quoted(name) + " is not supported");
  ASSIGN_OR_RETURN(std::vector<ExprPtr> bound,
                   Bind(*filter, std::move(input), std::move(args), line));
  ASSIGN_OR_RETURN(ExprPtr out, Make(Expr::Kind::kBuiltin, line, std::move(bound)));
  out->callee = filter;
  return out;
}

// map("filter", arguments...) or map(attribute=path, default=value).
Result<ExprPtr> Parser::MakeMap(ExprPtr input, Arguments args, int line) {
  std::vector<ExprPtr> bound;
  if (args.values.size() == args.names.size()) {
    const Signature by_attribute{"map", {"attribute", "default"}, 1, nullptr};
    ASSIGN_OR_RETURN(bound, Bind(by_attribute, std::move(input), std::move(args), line));
    return Make(Expr::Kind::kMap, line, std::move(bound));
  }
  const Expr& name = *args.values[0];
  if (name.kind != Expr::Kind::kLiteral || !name.value.is_string()) {
    return ErrorAt(line, "map expects a filter's name in quotes or attribute=");
  }
  const std::string filter = name.value.text().bytes;
  args.values.erase(args.values.begin());
  ASSIGN_OR_RETURN(ExprPtr inner, MakeFilter(filter, nullptr, std::move(args), line));
  bound.push_back(std::move(input));
  ASSIGN_OR_RETURN(ExprPtr out, Make(Expr::Kind::kMap, line, std::move(bound)));
  out->depth = std::max(out->depth, inner->depth + 1);
  out->inner = std::move(inner);
  return out;
}

// select(test, arguments...), selectattr(path, test, arguments...) and their opposites.
Result<ExprPtr> Parser::MakeSelect(const std::string& name, ExprPtr input, Arguments args,
                                   int line) {
  std::vector<ExprPtr> bound;
  bound.push_back(std::move(input));
  bound.push_back(nullptr);
  const size_t positional = args.values.size() - args.names.size();
  const bool by_attribute = name.ends_with("attr");
  if (by_attribute) {
    if (positional == 0) return ErrorAt(line, name + " expects an attribute, found no argument");
    bound[1] = std::move(args.values[0]);
    args.values.erase(args.values.begin());
  }
  ExprPtr inner;
  if (!args.values.empty()) {
    const Expr& test = *args.values[0];
    if (args.values.size() == args.names.size() || test.kind != Expr::Kind::kLiteral ||
        !test.value.is_string()) {
      return ErrorAt(line, name + " expects a test's name in quotes");
    }
    const std::string test_name = test.value.text().bytes;
    args.values.erase(args.values.begin());
    ASSIGN_OR_RETURN(inner, MakeTest(test_name, nullptr, std::move(args), line));
  }
  const bool reject = name.starts_with("reject");
  ASSIGN_OR_RETURN(ExprPtr out, Make(reject ? Expr::Kind::kReject : Expr::Kind::kSelect, line,
                                     std::move(bound)));
  if (inner != nullptr) out->depth = std::max(out->depth, inner->depth + 1);
  out->inner = std::move(inner);
  return out;
}

Result<ExprPtr> Parser::MakeTest(const std::string& name, ExprPtr input, Arguments args, int line) {
  const Signature* test = FindTest(name);
  if (test == nullptr) return ErrorAt(line, "the test " + Quoted(name) + " is not supported");
  ASSIGN_OR_RETURN(std::vector<ExprPtr> bound,
                   Bind(*test, std::move(input), std::move(args), line));
  ASSIGN_OR_RETURN(ExprPtr out, Make(Expr::Kind::kTest, line, std::move(bound)));
  out->callee = test;
  return out;
}

Result<ExprPtr> Parser::ParseTest(ExprPtr input) {
  const bool negated = TakeName("not");
  const int line = now().line;
  ASSIGN_OR_RETURN(const std::string name, ExpectName("the name of a test"));
  Arguments args;
  const Token::Kind next = now().kind;
  const bool is_value = next == Token::Kind::kString || next == Token::Kind::kInt ||
                        next == Token::Kind::kFloat || next == Token::Kind::kName || IsOp("[") ||
                        IsOp("{");
  const bool is_word = IsName("else") || IsName("or") || IsName("and") || IsName("if") ||
                       IsName("in") || IsName("not") || IsName("is") || IsName("recursive");
  if (IsOp("(")) {
    ASSIGN_OR_RETURN(args, ParseArguments());
  } else if (is_value && !is_word) {
    ASSIGN_OR_RETURN(ExprPtr arg, ParsePrimary());
    ASSIGN_OR_RETURN(arg, ParsePostfix(std::move(arg)));
    args.values.push_back(std::move(arg));
  }
  ASSIGN_OR_RETURN(ExprPtr out, MakeTest(name, std::move(input), std::move(args), line));
  if (!negated) return out;
  std::vector<ExprPtr> operand;
  operand.push_back(std::move(out));
  return Make(Expr::Kind::kNot, line, std::move(operand));
}

}  // namespace innerq::jinja
