#include "models/jinja_parser.h"

#include <algorithm>

namespace innerq::jinja {
namespace {

std::string Describe(const Token& token) {
  switch (token.kind) {
    case Token::Kind::kData:
      return "text";
    case Token::Kind::kVariableBegin:
      return "{{";
    case Token::Kind::kVariableEnd:
      return "}}";
    case Token::Kind::kBlockBegin:
      return "{%";
    case Token::Kind::kBlockEnd:
      return "%}";
    case Token::Kind::kString:
      return "a string";
    case Token::Kind::kName:
    case Token::Kind::kInt:
    case Token::Kind::kFloat:
    case Token::Kind::kOperator:
      return token.text;
    case Token::Kind::kEnd:
      break;
  }
  return "the end of the template";
}

}  // namespace

bool Parser::IsOp(std::string_view text) const {
  return now().kind == Token::Kind::kOperator && now().text == text;
}

bool Parser::IsName(std::string_view text) const {
  return now().kind == Token::Kind::kName && now().text == text;
}

bool Parser::TakeOp(std::string_view text) {
  const bool taken = IsOp(text);
  at_ += taken ? 1 : 0;
  return taken;
}

bool Parser::TakeName(std::string_view text) {
  const bool taken = IsName(text);
  at_ += taken ? 1 : 0;
  return taken;
}

Error Parser::Unexpected(std::string_view expected) const {
  return ErrorAt(now().line, "expected " + std::string(expected) + ", found " + Describe(now()));
}

Result<void> Parser::ExpectOp(std::string_view text) {
  if (TakeOp(text)) return {};
  return Unexpected(text);
}

Result<std::string> Parser::ExpectName(std::string_view what) {
  if (now().kind != Token::Kind::kName) return Unexpected(what);
  return tokens_[at_++].text;
}

Result<void> Parser::CheckDepth(int depth) const {
  if (depth <= limits_.max_parse_depth) return {};
  return ErrorAt(now().line, "expected nesting of at most " +
                                 std::to_string(limits_.max_parse_depth) + " levels, found more");
}

Result<void> Parser::EndBlock() {
  if (now().kind != Token::Kind::kBlockEnd) return Unexpected("%}");
  ++at_;
  return {};
}

Result<std::shared_ptr<const Program>> Parser::Run() {
  ASSIGN_OR_RETURN(program_->body, ParseBody({}));
  for (const auto& [name, line] : calls_) {
    if (assigned_.contains(name) || FindFunction(name) != nullptr) continue;
    if (name == "namespace" || name == "dict" || name == "caller") continue;
    return ErrorAt(line, "the function " + name + " is not supported");
  }
  return std::shared_ptr<const Program>(program_);
}

// Stops at the name of a block that is in `ends`, which is not taken.
Result<Body> Parser::ParseBody(std::initializer_list<std::string_view> ends) {
  const Level level(*this);
  RETURN_IF_ERROR(CheckDepth(depth_));
  Body body;
  const int first_line = now().line;
  while (now().kind != Token::Kind::kEnd) {
    const Token token = tokens_[at_++];
    if (token.kind == Token::Kind::kData) {
      body.push_back({.kind = Stmt::Kind::kText, .line = token.line, .text = token.text});
    } else if (token.kind == Token::Kind::kVariableBegin) {
      ASSIGN_OR_RETURN(ExprPtr expr, ParseTuple(true));
      if (now().kind != Token::Kind::kVariableEnd) return Unexpected("}}");
      ++at_;
      body.push_back({.kind = Stmt::Kind::kPrint, .line = token.line});
      body.back().exprs.push_back(std::move(expr));
    } else {
      const bool ended = std::any_of(ends.begin(), ends.end(),
                                     [this](std::string_view end) { return IsName(end); });
      if (ended) return body;
      RETURN_IF_ERROR(ParseStatement(body));
    }
  }
  if (ends.size() == 0) return body;
  return ErrorAt(now().line, "expected " + std::string(*(ends.end() - 1)) +
                                 " for the block that begins in line " +
                                 std::to_string(first_line) + ", found the end of the template");
}

Result<void> Parser::ParseStatement(Body& body) {
  const int line = now().line;
  ASSIGN_OR_RETURN(const std::string name, ExpectName("the name of a statement"));
  using Method = Result<Stmt> (Parser::*)(int);
  constexpr std::pair<std::string_view, Method> kStatements[] = {
      {"if", &Parser::ParseIf},
      {"for", &Parser::ParseFor},
      {"set", &Parser::ParseSet},
      {"macro", &Parser::ParseMacro},
      {"call", &Parser::ParseCallBlock},
      {"with", &Parser::ParseWith},
      {"filter", &Parser::ParseFilterBlock},
      {"generation", &Parser::ParseGeneration}};
  for (const auto& [known, method] : kStatements) {
    if (name != known) continue;
    ASSIGN_OR_RETURN(Stmt statement, (this->*method)(line));
    body.push_back(std::move(statement));
    return EndBlock();
  }
  if (name == "break" || name == "continue") {
    if (loops_ == 0) return ErrorAt(line, name + " expects a for around it");
    body.push_back(
        {.kind = name == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue, .line = line});
    return EndBlock();
  }
  if (name.starts_with("end") || name == "else" || name == "elif") {
    return ErrorAt(line, "found " + name + ", which ends no open block");
  }
  return ErrorAt(line, "the statement " + name + " is not supported; expected if, for, set, " +
                           "macro, call, with, filter, generation, break, continue or raw");
}

Result<Stmt> Parser::ParseIf(int line) {
  Stmt out{.kind = Stmt::Kind::kIf, .line = line};
  do {
    ASSIGN_OR_RETURN(ExprPtr condition, ParseTuple(false));
    out.exprs.push_back(std::move(condition));
    RETURN_IF_ERROR(EndBlock());
    ASSIGN_OR_RETURN(Body body, ParseBody({"elif", "else", "endif"}));
    out.bodies.push_back(std::move(body));
  } while (TakeName("elif"));
  if (TakeName("else")) {
    RETURN_IF_ERROR(EndBlock());
    ASSIGN_OR_RETURN(Body body, ParseBody({"endif"}));
    out.bodies.push_back(std::move(body));
  }
  TakeName("endif");
  return out;
}

Result<std::vector<Stmt::Target>> Parser::ParseTargets(bool attributes, bool& unpack) {
  std::vector<Stmt::Target> out;
  const bool parenthesized = TakeOp("(");
  unpack = false;
  do {
    if (!out.empty() && now().kind != Token::Kind::kName) break;  // a comma at the end
    ASSIGN_OR_RETURN(std::string name, ExpectName("a name to assign to"));
    for (const std::string_view reserved : {"true", "false", "none", "True", "False", "None"}) {
      if (name == reserved) return ErrorAt(now().line, "cannot assign to " + name);
    }
    Stmt::Target target{std::move(name), ""};
    if (attributes && TakeOp(".")) {
      ASSIGN_OR_RETURN(target.attribute, ExpectName("the name of an attribute"));
    } else {
      assigned_.insert(target.name);
    }
    out.push_back(std::move(target));
    unpack = unpack || IsOp(",");
  } while (TakeOp(","));
  if (parenthesized) RETURN_IF_ERROR(ExpectOp(")"));
  return out;
}

Result<Stmt> Parser::ParseFor(int line) {
  Stmt out{.kind = Stmt::Kind::kFor, .line = line};
  ASSIGN_OR_RETURN(out.targets, ParseTargets(false, out.unpack));
  for (const Stmt::Target& target : out.targets) {
    if (target.name == "loop") return ErrorAt(line, "cannot assign to loop in a for");
  }
  if (!TakeName("in")) return Unexpected("in");
  ASSIGN_OR_RETURN(ExprPtr iterable, ParseTuple(false));
  out.exprs.push_back(std::move(iterable));
  out.exprs.push_back(nullptr);
  if (TakeName("if")) {
    ASSIGN_OR_RETURN(out.exprs[1], ParseExpression());
  }
  if (IsName("recursive")) return ErrorAt(line, "recursive in a for is not supported");
  RETURN_IF_ERROR(EndBlock());
  const bool outer = std::exchange(nested_, true);
  ++loops_;
  ASSIGN_OR_RETURN(Body body, ParseBody({"else", "endfor"}));
  --loops_;
  out.bodies.push_back(std::move(body));
  if (TakeName("else")) {
    RETURN_IF_ERROR(EndBlock());
    ASSIGN_OR_RETURN(Body otherwise, ParseBody({"endfor"}));
    out.bodies.push_back(std::move(otherwise));
  }
  nested_ = outer;
  TakeName("endfor");
  return out;
}

Result<Body> Parser::ParseClosedBody(std::string_view end) {
  const bool outer = std::exchange(nested_, true);
  const int loops = std::exchange(loops_, 0);
  ASSIGN_OR_RETURN(Body body, ParseBody({end}));
  nested_ = outer;
  loops_ = loops;
  TakeName(end);
  return body;
}

Result<ExprPtr> Parser::MakeBlockText(int line) {
  ASSIGN_OR_RETURN(ExprPtr text, Make(Expr::Kind::kName, line, {}));
  text->name = kBlockText;
  return text;
}

Result<Stmt> Parser::ParseSet(int line) {
  Stmt out{.kind = Stmt::Kind::kSet, .line = line};
  ASSIGN_OR_RETURN(out.targets, ParseTargets(true, out.unpack));
  if (TakeOp("=")) {
    ASSIGN_OR_RETURN(ExprPtr value, ParseTuple(true));
    out.exprs.push_back(std::move(value));
    return out;
  }
  out.kind = Stmt::Kind::kSetBlock;
  if (out.unpack) return Unexpected("=");
  ExprPtr filters;
  if (IsOp("|")) {
    ASSIGN_OR_RETURN(filters, MakeBlockText(line));
    ASSIGN_OR_RETURN(filters, ParseFilters(std::move(filters)));
  }
  out.exprs.push_back(std::move(filters));
  if (now().kind != Token::Kind::kBlockEnd) return Unexpected("= or %}");
  ++at_;
  ASSIGN_OR_RETURN(Body body, ParseClosedBody("endset"));
  out.bodies.push_back(std::move(body));
  return out;
}

Result<Stmt> Parser::ParseMacro(int line) {
  if (nested_) return ErrorAt(line, "a macro inside another block than if is not supported");
  auto macro = std::make_unique<Macro>();
  ASSIGN_OR_RETURN(macro->name, ExpectName("the name of the macro"));
  assigned_.insert(macro->name);
  RETURN_IF_ERROR(ExpectOp("("));
  while (!IsOp(")")) {
    if (!macro->params.empty()) RETURN_IF_ERROR(ExpectOp(","));
    ASSIGN_OR_RETURN(std::string param, ExpectName("the name of a parameter"));
    assigned_.insert(param);
    ExprPtr absent;
    if (TakeOp("=")) {
      ASSIGN_OR_RETURN(absent, ParseExpression());
    } else if (!macro->defaults.empty() && macro->defaults.back() != nullptr) {
      return ErrorAt(line, "expected a default for " + param + ", as for the parameter before it");
    }
    constexpr size_t kParams = 255;  // as CPython had it; a call looks names up one by one
    if (macro->params.size() == kParams) {
      return ErrorAt(line, "macro " + macro->name + " expects at most 255 parameters");
    }
    macro->params.push_back(std::move(param));
    macro->defaults.push_back(std::move(absent));
  }
  RETURN_IF_ERROR(ExpectOp(")"));
  RETURN_IF_ERROR(EndBlock());
  macro_ = macro.get();
  ASSIGN_OR_RETURN(macro->body, ParseClosedBody("endmacro"));
  macro_ = nullptr;
  Stmt out{.kind = Stmt::Kind::kMacro, .line = line};
  out.macro = program_->macros.size();
  program_->macros.push_back(std::move(macro));
  return out;
}

Result<Stmt> Parser::ParseCallBlock(int line) {
  if (IsOp("(")) return ErrorAt(line, "a call block with parameters is not supported");
  Stmt out{.kind = Stmt::Kind::kCall, .line = line};
  ASSIGN_OR_RETURN(ExprPtr call, ParseExpression());
  if (call->kind != Expr::Kind::kCall) return ErrorAt(line, "a call block expects a macro's call");
  out.exprs.push_back(std::move(call));
  RETURN_IF_ERROR(EndBlock());
  ASSIGN_OR_RETURN(Body body, ParseClosedBody("endcall"));
  out.bodies.push_back(std::move(body));
  return out;
}

Result<Stmt> Parser::ParseWith(int line) {
  Stmt out{.kind = Stmt::Kind::kScope, .line = line};
  while (now().kind != Token::Kind::kBlockEnd) {
    if (!out.targets.empty()) RETURN_IF_ERROR(ExpectOp(","));
    ASSIGN_OR_RETURN(std::string name, ExpectName("a name to assign to"));
    assigned_.insert(name);
    RETURN_IF_ERROR(ExpectOp("="));
    ASSIGN_OR_RETURN(ExprPtr value, ParseExpression());
    out.targets.push_back({std::move(name), ""});
    out.exprs.push_back(std::move(value));
  }
  RETURN_IF_ERROR(EndBlock());
  const bool outer = std::exchange(nested_, true);
  ASSIGN_OR_RETURN(Body body, ParseBody({"endwith"}));
  nested_ = outer;
  TakeName("endwith");
  out.bodies.push_back(std::move(body));
  return out;
}

Result<Stmt> Parser::ParseFilterBlock(int line) {
  Stmt out{.kind = Stmt::Kind::kFilter, .line = line};
  ASSIGN_OR_RETURN(ExprPtr filters, MakeBlockText(line));
  do {
    ASSIGN_OR_RETURN(filters, ParseFilter(std::move(filters)));
  } while (TakeOp("|"));
  out.exprs.push_back(std::move(filters));
  RETURN_IF_ERROR(EndBlock());
  ASSIGN_OR_RETURN(Body body, ParseClosedBody("endfilter"));
  out.bodies.push_back(std::move(body));
  return out;
}

Result<Stmt> Parser::ParseGeneration(int line) {
  RETURN_IF_ERROR(EndBlock());
  Stmt out{.kind = Stmt::Kind::kScope, .line = line};
  ASSIGN_OR_RETURN(Body body, ParseClosedBody("endgeneration"));
  out.bodies.push_back(std::move(body));
  return out;
}

Result<std::shared_ptr<const Program>> ParseProgram(std::string_view source, const Limits& limits) {
  if (static_cast<int64_t>(source.size()) > limits.max_source_bytes) {
    return InvalidArgument("expected a template of at most " +
                           std::to_string(limits.max_source_bytes) + " bytes, found " +
                           std::to_string(source.size()));
  }
  ASSIGN_OR_RETURN(std::vector<Token> tokens, Lex(source));
  return Parser(std::move(tokens), limits).Run();
}

}  // namespace innerq::jinja
