// Template: chat templates in the Jinja language, as Hugging Face's transformers runs them.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "kernels/result.h"
#include "models/jinja_value.h"

namespace innerq::jinja {

// Templates are untrusted; passing any of these is an error.
struct Limits {
  int64_t max_source_bytes = 1 << 20;
  int max_parse_depth = 300;           // nesting of blocks and of expressions
  int max_render_depth = 600;          // the same while rendering, through macros
  int max_value_depth = 64;            // lists in lists
  int64_t max_steps = 4'000'000;       // nodes visited, elements made, bytes copied / 64
  int64_t max_output_bytes = 1 << 24;  // of the output and of any one text
};

// The local time that strftime_now formats.
struct Time {
  int year = 1970;
  int month = 1;  // from 1
  int day = 1;    // from 1
  int hour = 0;
  int minute = 0;
  int second = 0;
};

struct Program;

// A parsed template. Immutable; any thread may render. The language is Jinja2's with trim_blocks,
// lstrip_blocks and loopcontrols in an immutable sandbox; what is left out is an error of Parse, a
// method that is left out one of Render.
class Template {
 public:
  // Errors: invalid argument, "line N: what was expected and found".
  static Result<Template> Parse(std::string_view source, const Limits& limits = {});

  // Without `now`, strftime_now is undefined. Errors: invalid argument, "line N: reason": what the
  // template asked by raise_exception, an operation its values do not have, a limit.
  Result<Text> Render(const Dict& variables, const std::optional<Time>& now = std::nullopt,
                      const Limits& limits = {}) const;

 private:
  explicit Template(std::shared_ptr<const Program> program) : program_(std::move(program)) {}
  std::shared_ptr<const Program> program_;
};

}  // namespace innerq::jinja
