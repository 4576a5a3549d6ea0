// Program: a template between Parse and Render: tokens, syntax tree, built-in names.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/result.h"
#include "models/jinja.h"
#include "models/jinja_value.h"

namespace innerq::jinja {

struct Token {
  enum class Kind {
    kData,
    kVariableBegin,
    kVariableEnd,
    kBlockBegin,
    kBlockEnd,
    kName,
    kString,
    kInt,
    kFloat,
    kOperator,
    kEnd,
  };
  Kind kind = Kind::kEnd;
  std::string text;
  int line = 1;
};

// The last token is kEnd. Errors: "line N: ...".
Result<std::vector<Token>> Lex(std::string_view source);

Error ErrorAt(int line, const std::string& message);

// What a render may still spend.
class Budget {
 public:
  explicit Budget(const Limits& limits) : limits_(limits), steps_left_(limits.max_steps) {}
  Result<void> Spend(int64_t steps);
  // Before `bytes` of text are made.
  Result<void> SpendBytes(int64_t bytes);
  // Before `value` is walked, compared or printed.
  Result<void> SpendOn(const Value& value) { return Spend(value.extent().weight); }
  const Limits& limits() const { return limits_; }

 private:
  const Limits& limits_;
  int64_t steps_left_;
};

// A call of a built-in: its values in the order of the signature, those not given are absent; first
// what a filter, test or method is applied to.
struct Call {
  std::vector<std::optional<Value>> args;
  Budget& budget;
  const std::optional<Time>& now;

  const Value& input() const { return *args[0]; }
  bool has(size_t i) const { return i < args.size() && args[i].has_value(); }
  const Value& arg(size_t i) const { return *args[i]; }
  Result<int64_t> Int(size_t i, int64_t absent) const;
  Result<std::string> String(size_t i, std::string_view absent) const;
  bool Flag(size_t i) const { return has(i) && Truthy(arg(i)); }
};

struct Signature {
  std::string_view name;
  std::vector<std::string_view> params;  // beside the input of filters, tests and methods
  size_t required;
  Result<Value> (*function)(Call& call);
};

// The filters of lists and dicts, a part of those that FindFilter knows.
const std::vector<Signature>& CollectionFilters();
// Null if there is none of that name.
const Signature* FindFilter(std::string_view name);
const Signature* FindTest(std::string_view name);
const Signature* FindMethod(std::string_view name);
// Functions; `namespace` and `dict` take any keywords and are known to the renderer.
const std::vector<Signature>& Functions();
const Signature* FindFunction(std::string_view name);

struct Expr {
  enum class Kind {
    kLiteral,      // value
    kName,         // name
    kList,         // args
    kTuple,        // args
    kDict,         // args: key, value, key, value, ...
    kAttribute,    // args[0].name
    kItem,         // args[0][args[1]]
    kSlice,        // args[0][args[1]:args[2]:args[3]], null where absent
    kNegate,       // -args[0]
    kPlus,         // +args[0]
    kNot,          // not args[0]
    kAnd,          // args[0] and args[1]
    kOr,           // args[0] or args[1]
    kBinary,       // args[0] name args[1]
    kCompare,      // args[0] names[0] args[1] names[1] args[2] ...
    kConditional,  // args[0] if args[1] else args[2], which may be null
    kBuiltin,      // a filter or method: callee on args, null where absent
    kTest,         // the same, of a test
    kMap,          // args[0] | map(inner), or map(attribute=args[1], default=args[2])
    kSelect,       // args[0] | select(inner), of its attribute args[1] if not null
    kReject,
    kCall,    // name(args, names=the last of args)
    kMethod,  // args[0].name(the other args, names=the last): of a loop, or of no value we know
  };
  Kind kind;
  int line = 1;
  int depth = 1;
  Value value = {};
  std::string name = {};
  std::vector<std::string> names = {};
  std::vector<std::unique_ptr<Expr>> args = {};
  const Signature* callee = nullptr;
  // A filter or test whose args[0] is null: the element takes its place. Null: truth itself.
  std::unique_ptr<Expr> inner = nullptr;
};
using ExprPtr = std::unique_ptr<Expr>;

struct Stmt;
using Body = std::vector<Stmt>;

struct Stmt {
  enum class Kind {
    kText,      // text
    kPrint,     // exprs[0]
    kIf,        // exprs[i] runs bodies[i]; one body more is the else
    kFor,       // targets in exprs[0], if exprs[1] (may be null): bodies[0], else bodies[1]
    kSet,       // targets = exprs[0]
    kSetBlock,  // targets[0] = the text of bodies[0] through exprs[0], a filter chain or null
    kMacro,     // macro
    kCall,      // prints exprs[0], a call of a macro whose caller() is the text of bodies[0]
    kFilter,    // prints the text of bodies[0] through exprs[0], a filter chain
    kScope,     // bodies[0] with names of its own: targets[i] = exprs[i], all read outside
    kBreak,
    kContinue,
  };
  struct Target {
    std::string name;
    std::string attribute;  // of a namespace; empty: a variable
  };
  Kind kind;
  int line = 1;
  std::string text = {};
  std::vector<ExprPtr> exprs = {};
  std::vector<Body> bodies = {};
  std::vector<Target> targets = {};
  bool unpack = false;  // targets is a tuple, perhaps of one
  size_t macro = 0;
};

struct Macro {
  std::string name;
  std::vector<std::string> params;
  std::vector<ExprPtr> defaults;  // one per parameter, null where it has none
  Body body;
  bool has_caller = false;  // calls caller()
};

struct Program {
  Body body;
  std::vector<std::unique_ptr<Macro>> macros;
};

// A filter chain on the text of a block reads its input from this name.
inline constexpr std::string_view kBlockText = " block";

Result<std::shared_ptr<const Program>> ParseProgram(std::string_view source, const Limits& limits);
Result<Text> RenderProgram(const Program& program, const Dict& variables,
                           const std::optional<Time>& now, const Limits& limits);

// Python's operators by their spelling. Errors: the types have none, an integer leaves 64 bits.
Result<Value> Binary(std::string_view op, const Value& a, const Value& b, Budget& budget);
Result<bool> Compare(std::string_view op, const Value& a, const Value& b, Budget& budget);
Result<bool> Contains(const Value& container, const Value& item, Budget& budget);
// object[key] and object.name as Jinja2 finds them; undefined where there is nothing.
Result<Value> GetItem(const Value& object, const Value& key, Budget& budget);
Result<Value> GetAttribute(const Value& object, const std::string& name);
// The attribute of filters: names and indices with dots between.
Result<Value> GetPath(const Value& object, const Value& path, Budget& budget);
// object[start:stop:step].
Result<Value> Slice(const Value& object, const std::optional<int64_t> (&range)[3], Budget& budget);
// The elements that a for visits; empties iterators.
Result<std::shared_ptr<const std::vector<Value>>> Iterate(const Value& value, Budget& budget);
Result<int64_t> Length(const Value& value);

}  // namespace innerq::jinja
