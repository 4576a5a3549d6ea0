// The expressions of a template: the other half of Parser.
#include <algorithm>
#include <charconv>

#include "models/jinja_parser.h"

namespace innerq::jinja {
namespace {

constexpr std::string_view kCompareOps[] = {"==", "!=", "<", "<=", ">", ">="};

// std::vector's initializer list cannot hold what only moves.
template <typename... Exprs>
std::vector<ExprPtr> Args(Exprs... exprs) {
  std::vector<ExprPtr> out;
  (out.push_back(std::move(exprs)), ...);
  return out;
}

}  // namespace

Result<ExprPtr> Parser::Make(Expr::Kind kind, int line, std::vector<ExprPtr> args) {
  auto out = std::make_unique<Expr>(Expr{.kind = kind, .line = line});
  for (const ExprPtr& arg : args) {
    if (arg != nullptr) out->depth = std::max(out->depth, arg->depth + 1);
  }
  out->args = std::move(args);
  RETURN_IF_ERROR(CheckDepth(out->depth));
  return out;
}

Result<ExprPtr> Parser::ParseTuple(bool conditional) {
  const int line = now().line;
  const auto one = [&] { return conditional ? ParseExpression() : ParseOr(); };
  ASSIGN_OR_RETURN(ExprPtr first, one());
  if (!IsOp(",")) return first;
  std::vector<ExprPtr> items = Args(std::move(first));
  while (TakeOp(",")) {
    const bool ends = now().kind == Token::Kind::kVariableEnd ||
                      now().kind == Token::Kind::kBlockEnd || IsOp(")");
    if (ends) break;
    ASSIGN_OR_RETURN(ExprPtr item, one());
    items.push_back(std::move(item));
  }
  return Make(Expr::Kind::kTuple, line, std::move(items));
}

Result<ExprPtr> Parser::ParseExpression() {
  const Level level(*this);
  RETURN_IF_ERROR(CheckDepth(depth_));
  ASSIGN_OR_RETURN(ExprPtr value, ParseOr());
  while (IsName("if")) {
    const int line = tokens_[at_++].line;
    ASSIGN_OR_RETURN(ExprPtr condition, ParseOr());
    ExprPtr otherwise;
    if (TakeName("else")) {
      ASSIGN_OR_RETURN(otherwise, ParseExpression());
    }
    ASSIGN_OR_RETURN(value,
                     Make(Expr::Kind::kConditional, line,
                          Args(std::move(value), std::move(condition), std::move(otherwise))));
  }
  return value;
}

Result<ExprPtr> Parser::ParseOr() {
  ASSIGN_OR_RETURN(ExprPtr left, ParseAnd());
  while (IsName("or")) {
    const int line = tokens_[at_++].line;
    ASSIGN_OR_RETURN(ExprPtr right, ParseAnd());
    ASSIGN_OR_RETURN(left, Make(Expr::Kind::kOr, line, Args(std::move(left), std::move(right))));
  }
  return left;
}

Result<ExprPtr> Parser::ParseAnd() {
  ASSIGN_OR_RETURN(ExprPtr left, ParseNot());
  while (IsName("and")) {
    const int line = tokens_[at_++].line;
    ASSIGN_OR_RETURN(ExprPtr right, ParseNot());
    ASSIGN_OR_RETURN(left, Make(Expr::Kind::kAnd, line, Args(std::move(left), std::move(right))));
  }
  return left;
}

Result<ExprPtr> Parser::ParseNot() {
  const Level level(*this);
  RETURN_IF_ERROR(CheckDepth(depth_));
  if (!IsName("not")) return ParseCompare();
  const int line = tokens_[at_++].line;
  ASSIGN_OR_RETURN(ExprPtr value, ParseNot());
  return Make(Expr::Kind::kNot, line, Args(std::move(value)));
}

Result<ExprPtr> Parser::ParseCompare() {
  const int line = now().line;
  ASSIGN_OR_RETURN(ExprPtr first, ParseArithmetic(0));
  std::vector<ExprPtr> operands = Args(std::move(first));
  std::vector<std::string> ops;
  while (true) {
    const auto op = std::find_if(std::begin(kCompareOps), std::end(kCompareOps),
                                 [this](std::string_view text) { return IsOp(text); });
    if (op != std::end(kCompareOps)) {
      ops.emplace_back(*op);
    } else if (IsName("in")) {
      ops.emplace_back("in");
    } else if (IsName("not") && after().kind == Token::Kind::kName && after().text == "in") {
      ops.emplace_back("not in");
      ++at_;
    } else {
      break;
    }
    ++at_;
    ASSIGN_OR_RETURN(ExprPtr operand, ParseArithmetic(0));
    operands.push_back(std::move(operand));
  }
  if (ops.empty()) return std::move(operands[0]);
  ASSIGN_OR_RETURN(ExprPtr out, Make(Expr::Kind::kCompare, line, std::move(operands)));
  out->names = std::move(ops);
  return out;
}

Result<ExprPtr> Parser::ParseArithmetic(int level) {
  static constexpr std::string_view kOps[4][4] = {
      {"+", "-", "", ""}, {"~", "", "", ""}, {"*", "/", "//", "%"}, {"**", "", "", ""}};
  if (level == 4) return ParseUnary(true);
  ASSIGN_OR_RETURN(ExprPtr left, ParseArithmetic(level + 1));
  while (true) {
    const auto op = std::find_if(std::begin(kOps[level]), std::end(kOps[level]),
                                 [this](std::string_view text) { return IsOp(text); });
    if (op == std::end(kOps[level])) return left;
    const int line = tokens_[at_++].line;
    if (*op == "%" && left->kind == Expr::Kind::kLiteral && left->value.is_string()) {
      return ErrorAt(line, "the operator % on a string is not supported");
    }
    ASSIGN_OR_RETURN(ExprPtr right, ParseArithmetic(level + 1));
    ASSIGN_OR_RETURN(left,
                     Make(Expr::Kind::kBinary, line, Args(std::move(left), std::move(right))));
    left->name = *op;
  }
}

Result<ExprPtr> Parser::ParseUnary(bool filters) {
  const Level level(*this);
  RETURN_IF_ERROR(CheckDepth(depth_));
  const int line = now().line;
  ExprPtr out;
  if (IsOp("-") || IsOp("+")) {
    const bool negate = tokens_[at_++].text == "-";
    ASSIGN_OR_RETURN(ExprPtr value, ParseUnary(false));
    ASSIGN_OR_RETURN(
        out, Make(negate ? Expr::Kind::kNegate : Expr::Kind::kPlus, line, Args(std::move(value))));
  } else {
    ASSIGN_OR_RETURN(out, ParsePrimary());
  }
  ASSIGN_OR_RETURN(out, ParsePostfix(std::move(out)));
  return filters ? ParseFilters(std::move(out)) : std::move(out);
}

Result<ExprPtr> Parser::ParsePrimary() {
  const Token token = now();
  const auto literal = [&](Value value) -> Result<ExprPtr> {
    ASSIGN_OR_RETURN(ExprPtr out, Make(Expr::Kind::kLiteral, token.line, {}));
    out->value = std::move(value);
    return out;
  };
  if (IsOp("[")) return ParseList();
  if (IsOp("{")) return ParseDict();
  if (TakeOp("(")) {
    if (TakeOp(")")) return Make(Expr::Kind::kTuple, token.line, {});
    ASSIGN_OR_RETURN(ExprPtr out, ParseTuple(true));
    RETURN_IF_ERROR(ExpectOp(")"));
    return out;
  }
  if (token.kind == Token::Kind::kString) {
    std::string text;
    while (now().kind == Token::Kind::kString) text += tokens_[at_++].text;
    return literal(Value::String(text));
  }
  if (token.kind == Token::Kind::kInt) {
    ++at_;
    int64_t value = 0;
    const char* end = token.text.data() + token.text.size();
    const bool fits = std::from_chars(token.text.data(), end, value).ec == std::errc();
    if (!fits) return ErrorAt(token.line, "expected an integer of 64 bits, found " + token.text);
    if (token.text.size() > 1 && token.text[0] == '0' && value != 0) {
      return ErrorAt(token.line, "expected an integer without leading zeros, found " + token.text);
    }
    return literal(Value::Int(value));
  }
  if (token.kind == Token::Kind::kFloat) {
    ++at_;
    double value = 0;
    const char* end = token.text.data() + token.text.size();
    const bool fits = std::from_chars(token.text.data(), end, value).ec == std::errc();
    if (!fits) return ErrorAt(token.line, "expected a float of 64 bits, found " + token.text);
    return literal(Value::Float(value));
  }
  if (token.kind != Token::Kind::kName) return Unexpected("an expression");
  ++at_;
  if (token.text == "true" || token.text == "True") return literal(Value::Bool(true));
  if (token.text == "false" || token.text == "False") return literal(Value::Bool(false));
  if (token.text == "none" || token.text == "None") return literal(Value::None());
  const bool calls_caller = token.text == "caller" && macro_ != nullptr && IsOp("(");
  if (calls_caller) macro_->has_caller = true;
  for (const std::string_view special : {"caller", "varargs", "kwargs", "self"}) {
    if (calls_caller) break;
    if (token.text == special && !assigned_.contains(token.text)) {
      return ErrorAt(token.line, "the variable " + token.text + " is not supported");
    }
  }
  ASSIGN_OR_RETURN(ExprPtr out, Make(Expr::Kind::kName, token.line, {}));
  out->name = token.text;
  return out;
}

Result<ExprPtr> Parser::ParseList() {
  const int line = tokens_[at_++].line;
  std::vector<ExprPtr> items;
  while (!IsOp("]")) {
    if (!items.empty()) RETURN_IF_ERROR(ExpectOp(","));
    if (IsOp("]")) break;
    ASSIGN_OR_RETURN(ExprPtr item, ParseExpression());
    items.push_back(std::move(item));
  }
  ++at_;
  return Make(Expr::Kind::kList, line, std::move(items));
}

Result<ExprPtr> Parser::ParseDict() {
  const int line = tokens_[at_++].line;
  std::vector<ExprPtr> items;
  while (!IsOp("}")) {
    if (!items.empty()) RETURN_IF_ERROR(ExpectOp(","));
    if (IsOp("}")) break;
    ASSIGN_OR_RETURN(ExprPtr key, ParseExpression());
    RETURN_IF_ERROR(ExpectOp(":"));
    ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
    items.push_back(std::move(key));
    items.push_back(std::move(value));
  }
  ++at_;
  return Make(Expr::Kind::kDict, line, std::move(items));
}

Result<ExprPtr> Parser::ParsePostfix(ExprPtr object) {
  while (true) {
    const int line = now().line;
    if (TakeOp(".")) {
      if (now().kind == Token::Kind::kInt) {
        ASSIGN_OR_RETURN(ExprPtr index, ParsePrimary());
        ASSIGN_OR_RETURN(object,
                         Make(Expr::Kind::kItem, line, Args(std::move(object), std::move(index))));
        continue;
      }
      ASSIGN_OR_RETURN(const std::string name, ExpectName("the name of an attribute"));
      if (IsOp("(")) {
        ASSIGN_OR_RETURN(object, ParseMethod(std::move(object), name, line));
        continue;
      }
      ASSIGN_OR_RETURN(object, Make(Expr::Kind::kAttribute, line, Args(std::move(object))));
      object->name = name;
    } else if (TakeOp("[")) {
      ASSIGN_OR_RETURN(object, ParseSubscript(std::move(object), line));
    } else if (IsOp("(")) {
      if (object->kind != Expr::Kind::kName) {
        return ErrorAt(line, "the call of something other than a name is not supported");
      }
      ASSIGN_OR_RETURN(object, MakeCall(object->name, line));
    } else {
      return object;
    }
  }
}

Result<ExprPtr> Parser::ParseSubscript(ExprPtr object, int line) {
  std::vector<ExprPtr> args = Args(std::move(object));
  bool slice = false;
  while (true) {
    ExprPtr part;
    if (!IsOp(":") && !IsOp("]")) {
      ASSIGN_OR_RETURN(part, ParseExpression());
    }
    if (part == nullptr && !slice && IsOp("]")) return Unexpected("an index");
    args.push_back(std::move(part));
    if (args.size() == 4 || !TakeOp(":")) break;
    slice = true;
  }
  RETURN_IF_ERROR(ExpectOp("]"));
  if (slice) args.resize(4);
  return Make(slice ? Expr::Kind::kSlice : Expr::Kind::kItem, line, std::move(args));
}

}  // namespace innerq::jinja
