#include "models/jinja_render.h"

#include <algorithm>

namespace innerq::jinja {

// Counts one level of nesting while it lives.
class Renderer::Level {
 public:
  explicit Level(Renderer& renderer) : renderer_(renderer) { ++renderer_.depth_; }
  ~Level() { --renderer_.depth_; }
  Level(const Level&) = delete;
  Level& operator=(const Level&) = delete;
  Result<void> Check() const {
    const int most = renderer_.budget_.limits().max_render_depth;
    if (renderer_.depth_ <= most) return renderer_.budget_.Spend(1);
    return InvalidArgument("expected at most " + std::to_string(most) +
                           " levels of nesting while rendering, found more");
  }

 private:
  Renderer& renderer_;
};

Result<void> Budget::Spend(int64_t steps) {
  if (steps <= steps_left_) {
    steps_left_ -= steps;
    return {};
  }
  return InvalidArgument("expected at most " + std::to_string(limits_.max_steps) +
                         " steps, found more");
}

Result<void> Budget::SpendBytes(int64_t bytes) {
  if (bytes <= limits_.max_output_bytes) return Spend(1 + bytes / 64);
  return InvalidArgument("expected texts of at most " + std::to_string(limits_.max_output_bytes) +
                         " bytes, found more");
}

Result<Text> Renderer::Run() {
  Push(0);
  const Result<Flow> flow = RunBody(program_.body);
  if (!flow.ok()) return ErrorAt(line_, flow.error().message);
  return std::move(out_);
}

Result<Renderer::Flow> Renderer::RunBody(const Body& body) {
  const Level level(*this);
  RETURN_IF_ERROR(level.Check());
  for (const Stmt& stmt : body) {
    ASSIGN_OR_RETURN(const Flow flow, RunStatement(stmt));
    if (flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

Result<Renderer::Flow> Renderer::RunStatement(const Stmt& stmt) {
  line_ = stmt.line;
  RETURN_IF_ERROR(budget_.Spend(1));
  switch (stmt.kind) {
    case Stmt::Kind::kText:
      RETURN_IF_ERROR(Write(Text{stmt.text, {}}));
      return Flow::kNext;
    case Stmt::Kind::kPrint: {
      ASSIGN_OR_RETURN(const Value value, Eval(*stmt.exprs[0]));
      line_ = stmt.line;
      RETURN_IF_ERROR(budget_.SpendOn(value));
      ASSIGN_OR_RETURN(const Text text, Str(value));
      RETURN_IF_ERROR(Write(text));
      return Flow::kNext;
    }
    case Stmt::Kind::kIf:
      return RunIf(stmt);
    case Stmt::Kind::kFor:
      return RunFor(stmt);
    case Stmt::Kind::kSet:
      RETURN_IF_ERROR(RunSet(stmt));
      return Flow::kNext;
    case Stmt::Kind::kSetBlock:
      RETURN_IF_ERROR(RunSetBlock(stmt));
      return Flow::kNext;
    case Stmt::Kind::kFilter:
      RETURN_IF_ERROR(RunFilterBlock(stmt));
      return Flow::kNext;
    case Stmt::Kind::kMacro:
      Set(program_.macros[stmt.macro]->name,
          Value::Reference(Value::Kind::kMacro, static_cast<int64_t>(stmt.macro)));
      return Flow::kNext;
    case Stmt::Kind::kScope:
      return RunScope(stmt);
    case Stmt::Kind::kCall:
      RETURN_IF_ERROR(RunCallBlock(stmt));
      return Flow::kNext;
    case Stmt::Kind::kBreak:
      return Flow::kBreak;
    case Stmt::Kind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNext;
}

Result<void> Renderer::RunCallBlock(const Stmt& stmt) {
  const Expr& call = *stmt.exprs[0];
  ASSIGN_OR_RETURN(const Value callee, Lookup(call.name));
  ASSIGN_OR_RETURN(std::vector<Value> args, EvalAll(call));
  line_ = stmt.line;
  if (!callee.is(Value::Kind::kMacro)) {
    return InvalidArgument("a call block expects a macro, found " + TypeName(callee));
  }
  const Macro& macro = *program_.macros[static_cast<size_t>(callee.index())];
  if (!macro.has_caller) return InvalidArgument("macro " + macro.name + " calls no caller()");
  const Caller caller{&stmt.bodies[0], frame_};
  ASSIGN_OR_RETURN(const Value text, CallMacro(call, macro, std::move(args), &caller));
  return Write(text.text());
}

Result<Renderer::Flow> Renderer::RunScope(const Stmt& stmt) {
  std::vector<Value> values;
  for (const ExprPtr& expr : stmt.exprs) {
    ASSIGN_OR_RETURN(Value value, Eval(*expr));
    values.push_back(std::move(value));
  }
  const size_t outer = Push(frame_);
  for (size_t i = 0; i < values.size(); ++i) {
    RETURN_IF_ERROR(AssignOne(stmt.targets[i], std::move(values[i])));
  }
  ASSIGN_OR_RETURN(const Flow flow, RunBody(stmt.bodies[0]));
  Pop(outer);
  return flow;
}

Result<Renderer::Flow> Renderer::RunIf(const Stmt& stmt) {
  for (size_t i = 0; i < stmt.exprs.size(); ++i) {
    ASSIGN_OR_RETURN(const Value condition, Eval(*stmt.exprs[i]));
    if (Truthy(condition)) return RunBody(stmt.bodies[i]);
  }
  if (stmt.bodies.size() > stmt.exprs.size()) return RunBody(stmt.bodies.back());
  return Flow::kNext;
}

Result<Renderer::Flow> Renderer::RunFor(const Stmt& stmt) {
  ASSIGN_OR_RETURN(const Value iterable, Eval(*stmt.exprs[0]));
  line_ = stmt.line;
  auto loop = std::make_shared<Loop>();
  loop->statement = &stmt;
  loop->frame = frame_;
  ASSIGN_OR_RETURN(loop->items, Iterate(iterable, budget_));
  const Result<Flow> flow = RunLoop(stmt, loop);
  // A template may keep the loop, and a loop itself; what it saw is let go, also after an error.
  loop->ended = true;
  loop->items = nullptr;
  loop->ahead.clear();
  loop->previous.reset();
  loop->current.reset();
  loop->last_changed.reset();
  if (!flow.ok()) return flow;
  if (loop->index0 >= 0 || stmt.bodies.size() == 1) return flow;
  const size_t outer = Push(frame_);
  ASSIGN_OR_RETURN(const Flow otherwise, RunBody(stmt.bodies[1]));
  Pop(outer);
  return otherwise;
}

Result<Renderer::Flow> Renderer::RunLoop(const Stmt& stmt, const std::shared_ptr<Loop>& loop) {
  while (true) {
    ASSIGN_OR_RETURN(std::optional<Value> item, Advance(*loop));
    if (!item) return Flow::kNext;
    const size_t outer = Push(frame_);
    line_ = stmt.line;
    RETURN_IF_ERROR(Assign(stmt, *item));
    Set("loop", Value::Of(loop));
    ASSIGN_OR_RETURN(const Flow flow, RunBody(stmt.bodies[0]));
    Pop(outer);
    if (flow == Flow::kBreak) return Flow::kNext;
  }
}

// Moves to the next element that passes the filter.
Result<std::optional<Value>> Renderer::Advance(Loop& loop) {
  ASSIGN_OR_RETURN(const bool more, Peek(loop, 1));
  if (!more) return std::optional<Value>();
  loop.previous = std::exchange(loop.current, loop.ahead.front());
  loop.ahead.pop_front();
  ++loop.index0;
  return loop.current;
}

// Looks for `count` elements ahead; whether there are as many.
Result<bool> Renderer::Peek(Loop& loop, size_t count) {
  const size_t running = frame_;
  while (loop.ahead.size() < count && !loop.ended && loop.next < loop.items->size()) {
    RETURN_IF_ERROR(budget_.Spend(1));
    const Value& item = (*loop.items)[loop.next++];
    const Expr* filter = loop.statement->exprs[1].get();
    if (filter != nullptr) {
      Push(loop.frame);
      RETURN_IF_ERROR(Assign(*loop.statement, item));
      ASSIGN_OR_RETURN(const Value passes, Eval(*filter));
      Pop(running);
      if (!Truthy(passes)) continue;
    }
    loop.ahead.push_back(item);
  }
  return loop.ahead.size() >= count;
}

Error Renderer::LoopHasEnded(const std::string& name) {
  return InvalidArgument("the loop has ended; expected loop." + name + " inside");
}

Result<Value> Renderer::LoopAttribute(Loop& loop, const std::string& name) {
  if (loop.ended) return LoopHasEnded(name);
  if (name == "index0") return Value::Int(loop.index0);
  if (name == "index") return Value::Int(loop.index0 + 1);
  if (name == "first") return Value::Bool(loop.index0 == 0);
  if (name == "depth") return Value::Int(1);
  if (name == "depth0") return Value::Int(0);
  if (name == "previtem") {
    return loop.previous.value_or(Value::Undefined("there is no previous item"));
  }
  if (name == "last" || name == "nextitem") {
    ASSIGN_OR_RETURN(const bool more, Peek(loop, 1));
    if (name == "last") return Value::Bool(!more);
    return more ? loop.ahead.front() : Value::Undefined("there is no next item");
  }
  const bool counted = name == "length" || name == "revindex" || name == "revindex0";
  if (!counted) return Value::Undefined("loop has no attribute " + ReprString(name));
  int64_t rest = 0;
  if (loop.statement->exprs[1] == nullptr) {
    rest = static_cast<int64_t>(loop.items->size() - loop.next + loop.ahead.size());
  } else {
    ASSIGN_OR_RETURN(const bool all, Peek(loop, loop.items->size() + 1));
    rest = static_cast<int64_t>(all ? 0 : loop.ahead.size());
  }
  if (name == "length") return Value::Int(loop.index0 + 1 + rest);
  return Value::Int(name == "revindex" ? rest + 1 : rest);
}

Result<void> Renderer::RunSet(const Stmt& stmt) {
  ASSIGN_OR_RETURN(const Value value, Eval(*stmt.exprs[0]));
  line_ = stmt.line;
  return Assign(stmt, value);
}

Result<void> Renderer::RunSetBlock(const Stmt& stmt) {
  const size_t outer = Push(frame_);
  ASSIGN_OR_RETURN(Text text, Capture(stmt.bodies[0]));
  Pop(outer);
  Value value = Value::String(std::move(text));
  if (stmt.exprs[0] != nullptr) {
    Push(frame_);
    Set(std::string(kBlockText), value);
    ASSIGN_OR_RETURN(value, Eval(*stmt.exprs[0]));
    Pop(outer);
  }
  line_ = stmt.line;
  return AssignOne(stmt.targets[0], std::move(value));
}

// The filters see the names that the body gives values.
Result<void> Renderer::RunFilterBlock(const Stmt& stmt) {
  const size_t outer = Push(frame_);
  ASSIGN_OR_RETURN(Text text, Capture(stmt.bodies[0]));
  Set(std::string(kBlockText), Value::String(std::move(text)));
  ASSIGN_OR_RETURN(const Value value, Eval(*stmt.exprs[0]));
  Pop(outer);
  line_ = stmt.line;
  if (!value.is_string()) {
    return InvalidArgument("expected text of the filters of a block, found " + TypeName(value));
  }
  return Write(value.text());
}

Result<void> Renderer::Assign(const Stmt& stmt, const Value& value) {
  if (!stmt.unpack) return AssignOne(stmt.targets[0], value);
  ASSIGN_OR_RETURN(const auto items, Iterate(value, budget_));
  if (items->size() != stmt.targets.size()) {
    return InvalidArgument("expected " + std::to_string(stmt.targets.size()) +
                           " values to assign, found " + std::to_string(items->size()));
  }
  for (size_t i = 0; i < items->size(); ++i) {
    RETURN_IF_ERROR(AssignOne(stmt.targets[i], (*items)[i]));
  }
  return {};
}

Result<void> Renderer::AssignOne(const Stmt::Target& target, Value value) {
  if (target.attribute.empty()) {
    Set(target.name, std::move(value));
    return {};
  }
  ASSIGN_OR_RETURN(const Value object, Lookup(target.name));
  if (!object.is(Value::Kind::kNamespace)) {
    return InvalidArgument("expected a namespace to set " + target.name + "." + target.attribute +
                           " in, found " + TypeName(object));
  }
  namespaces_[static_cast<size_t>(object.index())].Set(Value::String(target.attribute), value);
  return {};
}

Result<void> Renderer::Write(const Text& text) {
  const size_t size = out_.bytes.size() + text.bytes.size();
  if (static_cast<int64_t>(size) > budget_.limits().max_output_bytes) {
    return InvalidArgument("expected an output of at most " +
                           std::to_string(budget_.limits().max_output_bytes) +
                           " bytes, found more");
  }
  RETURN_IF_ERROR(budget_.SpendBytes(static_cast<int64_t>(text.bytes.size())));
  out_.Append(text);
  return {};
}

Result<Text> Renderer::Capture(const Body& body) {
  Text saved = std::exchange(out_, Text());
  ASSIGN_OR_RETURN(const Flow flow, RunBody(body));
  CHECK(flow == Flow::kNext, "break or continue out of a block that the parser closes");
  return std::exchange(out_, std::move(saved));
}

size_t Renderer::Push(size_t parent) {
  frames_.push_back({parent, {}});
  return std::exchange(frame_, frames_.size() - 1);
}

// Drops the newest frame and goes back to `outer`.
void Renderer::Pop(size_t outer) {
  frames_.pop_back();
  frame_ = outer;
}

void Renderer::Set(const std::string& name, Value value) {
  frames_[frame_].names.insert_or_assign(name, std::move(value));
}

Result<Value> Renderer::Lookup(const std::string& name) {
  for (size_t at = frame_;; at = frames_[at].parent) {
    RETURN_IF_ERROR(budget_.Spend(1));
    const auto found = frames_[at].names.find(name);
    if (found != frames_[at].names.end()) return found->second;
    if (at == 0) break;
  }
  if (const Value* value = variables_.Find(name)) return *value;
  const Signature* function = FindFunction(name);
  const bool is_function = function != nullptr || name == "namespace" || name == "dict";
  if (is_function && (name != "strftime_now" || now_)) {
    const int64_t index = function == nullptr ? -1 : function - Functions().data();
    return Value::Reference(Value::Kind::kFunction, index);
  }
  return Value::Undefined("'" + name + "' is undefined");
}

Result<Text> RenderProgram(const Program& program, const Dict& variables,
                           const std::optional<Time>& now, const Limits& limits) {
  return Renderer(program, variables, now, limits).Run();
}

Result<Template> Template::Parse(std::string_view source, const Limits& limits) {
  ASSIGN_OR_RETURN(auto program, ParseProgram(source, limits));
  return Template(std::move(program));
}

Result<Text> Template::Render(const Dict& variables, const std::optional<Time>& now,
                              const Limits& limits) const {
  return RenderProgram(*program_, variables, now, limits);
}

}  // namespace innerq::jinja
