// Parser: tokens to a Program; expressions in jinja_expressions.cc, statements in jinja_parser.cc.
#pragma once

#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/jinja_program.h"

namespace innerq::jinja {

// Recursive descent in the order of Jinja2's own parser. Used once.
class Parser {
 public:
  Parser(std::vector<Token> tokens, const Limits& limits)
      : tokens_(std::move(tokens)), limits_(limits) {}
  Result<std::shared_ptr<const Program>> Run();

 private:
  // Counts one level of nesting while it lives.
  class Level {
   public:
    explicit Level(Parser& parser) : parser_(parser) { ++parser_.depth_; }
    ~Level() { --parser_.depth_; }
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;

   private:
    Parser& parser_;
  };
  struct Arguments {
    std::vector<ExprPtr> values;     // positional, then named
    std::vector<std::string> names;  // of the last values
  };

  // Tokens.
  const Token& now() const { return tokens_[at_]; }
  const Token& after() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  bool IsOp(std::string_view text) const;
  bool IsName(std::string_view text) const;
  bool TakeOp(std::string_view text);
  bool TakeName(std::string_view text);
  Result<void> ExpectOp(std::string_view text);
  Result<std::string> ExpectName(std::string_view what);
  Error Unexpected(std::string_view expected) const;
  Result<void> CheckDepth(int depth) const;

  // Statements.
  Result<Body> ParseBody(std::initializer_list<std::string_view> ends);
  Result<void> ParseStatement(Body& body);
  Result<Stmt> ParseIf(int line);
  Result<Stmt> ParseFor(int line);
  Result<Stmt> ParseSet(int line);
  Result<Stmt> ParseMacro(int line);
  Result<Stmt> ParseCallBlock(int line);
  Result<Stmt> ParseWith(int line);
  Result<Stmt> ParseFilterBlock(int line);
  Result<Stmt> ParseGeneration(int line);
  Result<std::vector<Stmt::Target>> ParseTargets(bool attributes, bool& unpack);
  Result<void> EndBlock();
  // What the filters of a block are applied to.
  Result<ExprPtr> MakeBlockText(int line);
  // A body in which break and continue do not reach the loop around it.
  Result<Body> ParseClosedBody(std::string_view end);

  // Expressions.
  Result<ExprPtr> Make(Expr::Kind kind, int line, std::vector<ExprPtr> args);
  Result<ExprPtr> ParseTuple(bool conditional);
  Result<ExprPtr> ParseExpression();
  Result<ExprPtr> ParseOr();
  Result<ExprPtr> ParseAnd();
  Result<ExprPtr> ParseNot();
  Result<ExprPtr> ParseCompare();
  Result<ExprPtr> ParseArithmetic(int level);
  Result<ExprPtr> ParseUnary(bool filters);
  Result<ExprPtr> ParsePrimary();
  Result<ExprPtr> ParseList();
  Result<ExprPtr> ParseDict();
  Result<ExprPtr> ParsePostfix(ExprPtr object);
  Result<ExprPtr> ParseSubscript(ExprPtr object, int line);
  Result<ExprPtr> ParseMethod(ExprPtr object, const std::string& name, int line);
  Result<ExprPtr> ParseFilters(ExprPtr input);
  Result<ExprPtr> ParseFilter(ExprPtr input);
  Result<ExprPtr> ParseTest(ExprPtr input);
  Result<ExprPtr> MakeFilter(const std::string& name, ExprPtr input, Arguments args, int line);
  Result<ExprPtr> MakeSelect(const std::string& name, ExprPtr input, Arguments args, int line);
  Result<ExprPtr> MakeMap(ExprPtr input, Arguments args, int line);
  Result<ExprPtr> MakeTest(const std::string& name, ExprPtr input, Arguments args, int line);
  Result<ExprPtr> MakeCall(const std::string& name, int line);
  Result<Arguments> ParseArguments();
  // Puts arguments in the order of the signature, behind `input`.
  Result<std::vector<ExprPtr>> Bind(const Signature& callee, ExprPtr input, Arguments args,
                                    int line) const;

  std::vector<Token> tokens_;
  const Limits& limits_;
  size_t at_ = 0;
  int depth_ = 0;
  int loops_ = 0;                   // for blocks that a break here would end
  Macro* macro_ = nullptr;          // whose body is read
  bool nested_ = false;             // inside a for, macro or other block with names of its own
  std::set<std::string> assigned_;  // names that the template itself gives values
  std::vector<std::pair<std::string, int>> calls_;  // names called, with lines
  std::shared_ptr<Program> program_ = std::make_shared<Program>();
};

}  // namespace innerq::jinja
