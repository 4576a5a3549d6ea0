// Renderer: runs a Program once.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "models/jinja_program.h"

namespace innerq::jinja {

// A running for. The filter of the for is asked as late as Jinja2 asks it: a body may change what
// the filter reads.
struct Loop {
  const Stmt* statement = nullptr;
  std::shared_ptr<const std::vector<Value>> items;  // not filtered
  size_t next = 0;                                  // in items
  std::deque<Value> ahead;                          // filtered, not visited yet
  int64_t index0 = -1;
  std::optional<Value> previous, current;
  std::optional<Value> last_changed;  // what changed() was asked last
  size_t frame = 0;                   // where the filter finds its names
  bool ended = false;
};

class Renderer {
 public:
  Renderer(const Program& program, const Dict& variables, const std::optional<Time>& now,
           const Limits& limits)
      : program_(program), variables_(variables), now_(now), budget_(limits) {}
  Result<Text> Run();

 private:
  enum class Flow { kNext, kBreak, kContinue };
  struct Frame {
    size_t parent;
    std::map<std::string, Value, std::less<>> names;
  };
  class Level;
  // The body of a call block, and where that stands.
  struct Caller {
    const Body* body;
    size_t frame;
  };

  // Statements.
  Result<Flow> RunBody(const Body& body);
  Result<Flow> RunStatement(const Stmt& stmt);
  Result<void> RunCallBlock(const Stmt& stmt);
  Result<Flow> RunScope(const Stmt& stmt);
  Result<Flow> RunIf(const Stmt& stmt);
  Result<Flow> RunFor(const Stmt& stmt);
  Result<Flow> RunLoop(const Stmt& stmt, const std::shared_ptr<Loop>& loop);
  Result<void> RunSet(const Stmt& stmt);
  Result<void> RunSetBlock(const Stmt& stmt);
  Result<void> RunFilterBlock(const Stmt& stmt);
  Result<void> Assign(const Stmt& stmt, const Value& value);
  Result<void> AssignOne(const Stmt::Target& target, Value value);
  Result<void> Write(const Text& text);
  // Runs with an output of its own and returns that.
  Result<Text> Capture(const Body& body);

  // Names.
  size_t Push(size_t parent);
  void Pop(size_t outer);
  void Set(const std::string& name, Value value);
  Result<Value> Lookup(const std::string& name);

  // Loops.
  Result<std::optional<Value>> Advance(Loop& loop);
  Result<bool> Peek(Loop& loop, size_t count);
  static Error LoopHasEnded(const std::string& name);
  Result<Value> LoopAttribute(Loop& loop, const std::string& name);

  // Expressions.
  Result<Value> Eval(const Expr& expr);
  Result<Value> EvalKind(const Expr& expr);
  Result<Value> EvalSimple(const Expr& expr);
  Result<Value> EvalLogic(const Expr& expr);
  Result<Value> EvalCompare(const Expr& expr);
  Result<Value> EvalDict(const Expr& expr);
  Result<Value> EvalSlice(const Expr& expr);
  Result<Value> EvalAttribute(const Expr& expr);
  Result<Value> EvalNegate(const Expr& expr);
  // A built-in on its arguments; `input` stands for args[0] where that is null.
  Result<Value> EvalBuiltin(const Expr& expr, const Value* input);
  Result<Value> EvalMap(const Expr& expr, const Value* input);
  Result<Value> EvalSelect(const Expr& expr, const Value* input);
  Result<Value> EvalOn(const Expr& expr, const Value& input);
  Result<std::vector<Value>> EvalAll(const Expr& expr);
  Result<Value> EvalCall(const Expr& expr);
  Result<Value> EvalMethod(const Expr& expr);
  Result<Value> CallFunction(const Expr& expr, const Signature& function, std::vector<Value> args);
  Result<Value> CallMacro(const Expr& expr, const Macro& macro, std::vector<Value> args,
                          const Caller* caller);
  Result<Value> CallCaller(const Expr& expr);
  Result<Value> MakeNamespace(const Expr& expr, std::vector<Value> args);

  const Program& program_;
  const Dict& variables_;
  const std::optional<Time>& now_;
  Budget budget_;
  std::vector<Frame> frames_;
  size_t frame_ = 0;
  std::vector<Dict> namespaces_;
  const Caller* caller_ = nullptr;  // of the macro that runs, if it was called by a call block
  Text out_;
  int depth_ = 0;
  int line_ = 1;
};

}  // namespace innerq::jinja
