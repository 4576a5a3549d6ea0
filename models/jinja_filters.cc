// The filters of templates; those of lists and dicts are in jinja_collection_filters.cc.
#include <algorithm>
#include <charconv>
#include <cmath>

#include "models/jinja_program.h"

namespace innerq::jinja {
namespace {

// A text that says the same as `source` in other characters.
Value Like(std::string bytes, const Text& source) {
  return Value::String(Text::From(bytes, source.any_untrusted()));
}

Result<Text> InputText(Call& call) {
  RETURN_IF_ERROR(call.budget.SpendOn(call.input()));
  ASSIGN_OR_RETURN(Text text, Str(call.input()));
  RETURN_IF_ERROR(call.budget.SpendBytes(static_cast<int64_t>(text.bytes.size())));
  return text;
}

template <std::string (*kMap)(std::string_view)>
Result<Value> MapText(Call& call) {
  ASSIGN_OR_RETURN(const Text text, InputText(call));
  return Like(kMap(text.bytes), text);
}

Result<Value> TrimFilter(Call& call) {
  ASSIGN_OR_RETURN(Text text, InputText(call));
  call.args[0] = Value::String(std::move(text));
  return FindMethod("strip")->function(call);
}

Result<Value> LengthFilter(Call& call) {
  ASSIGN_OR_RETURN(const int64_t length, Length(call.input()));
  return Value::Int(length);
}

Result<Value> DefaultFilter(Call& call) {
  const bool absent = call.input().is_undefined() || (call.Flag(2) && !Truthy(call.input()));
  if (!absent) return call.input();
  return call.has(1) ? call.arg(1) : Value::String("");
}

Result<Value> ReplaceFilter(Call& call) {
  ASSIGN_OR_RETURN(Text text, InputText(call));
  call.args[0] = Value::String(std::move(text));
  for (size_t i : {1, 2}) {
    RETURN_IF_ERROR(call.budget.SpendOn(call.arg(i)));
    ASSIGN_OR_RETURN(Text argument, Str(call.arg(i)));
    call.args[i] = Value::String(std::move(argument));
  }
  return FindMethod("replace")->function(call);
}

Result<Value> ToJsonFilter(Call& call) {
  RETURN_IF_ERROR(call.budget.SpendOn(call.input()));
  JsonStyle style;
  style.ensure_ascii = call.Flag(1);
  style.sort_keys = call.Flag(4);
  if (call.has(2) && !call.arg(2).is_none()) {
    ASSIGN_OR_RETURN(const int64_t indent, call.Int(2, -1));
    constexpr int64_t kIndentMax = 32;
    if (indent < 0 || indent > kIndentMax) {
      return InvalidArgument("tojson expects an indent of 0 to 32, found " +
                             std::to_string(indent));
    }
    style.indent = static_cast<int>(indent);
    style.item_separator = ",";
  }
  if (call.has(3) && !call.arg(3).is_none()) {
    const Value& pair = call.arg(3);
    const bool fits = pair.is_list() && pair.sequence()->items.size() == 2 &&
                      pair.sequence()->items[0].is_string() &&
                      pair.sequence()->items[1].is_string();
    if (!fits) return InvalidArgument("tojson expects two texts as separators");
    style.item_separator = pair.sequence()->items[0].text().bytes;
    style.key_separator = pair.sequence()->items[1].text().bytes;
    const size_t bytes = style.item_separator.size() + style.key_separator.size();
    if (bytes > 64) return InvalidArgument("tojson expects separators of at most 64 bytes");
  }
  const Extent extent = call.input().extent();
  const int64_t per_value = std::max(style.indent, 0) * extent.depth +
                            static_cast<int64_t>(style.item_separator.size()) +
                            static_cast<int64_t>(style.key_separator.size());
  RETURN_IF_ERROR(call.budget.SpendBytes(extent.weight * per_value));
  ASSIGN_OR_RETURN(Text text, ToJson(call.input(), style));
  RETURN_IF_ERROR(call.budget.SpendBytes(static_cast<int64_t>(text.bytes.size())));
  if (call.has(3) && call.arg(3).extent().untrusted) text = Text::From(text.bytes, true);
  return Value::String(std::move(text));
}

Result<Value> StringFilter(Call& call) {
  ASSIGN_OR_RETURN(Text text, InputText(call));
  return Value::String(std::move(text));
}

Result<Value> IntFilter(Call& call) {
  const Value& input = call.input();
  const Value absent = call.has(1) ? call.arg(1) : Value::Int(0);
  ASSIGN_OR_RETURN(const int64_t base, call.Int(2, 10));
  if (base < 2 || base > 36) return InvalidArgument("int expects a base of 2 to 36");
  if (input.is_undefined()) return InvalidArgument(input.why_undefined());
  if (input.is_integral()) return Value::Int(input.integer());
  double number = 0;
  if (input.is_string()) {
    std::string_view text = TrimSpace(input.text().bytes, {});
    if (text.starts_with('+') && !text.starts_with("+-")) text.remove_prefix(1);
    const bool hex = base == 16 && (text.starts_with("0x") || text.starts_with("0X"));
    if (hex) text.remove_prefix(2);
    int64_t value = 0;
    const char* end = text.data() + text.size();
    auto parsed = std::from_chars(text.data(), end, value, static_cast<int>(base));
    if (parsed.ec == std::errc() && parsed.ptr == end) return Value::Int(value);
    parsed = std::from_chars(text.data(), end, number);
    if (parsed.ec != std::errc() || parsed.ptr != end || std::isinf(number)) return absent;
  } else if (input.is(Value::Kind::kFloat)) {
    number = input.number();
  } else {
    return absent;
  }
  constexpr double kTwo63 = 9223372036854775808.0;
  if (std::isnan(number)) return absent;  // as int(float("nan"))
  if (!(std::fabs(number) < kTwo63)) return InvalidArgument("int expects a value of 64 bits");
  return Value::Int(static_cast<int64_t>(number));
}

Result<Value> FloatFilter(Call& call) {
  const Value& input = call.input();
  if (input.is_undefined()) return InvalidArgument(input.why_undefined());
  if (input.is_number()) return Value::Float(input.number());
  const Value absent = call.has(1) ? call.arg(1) : Value::Float(0);
  if (!input.is_string()) return absent;
  std::string_view text = TrimSpace(input.text().bytes, {});
  if (text.starts_with('+') && !text.starts_with("+-")) text.remove_prefix(1);
  double number = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, number);
  return parsed.ec == std::errc() && parsed.ptr == end ? Value::Float(number) : absent;
}

Result<Value> AbsFilter(Call& call) {
  const Value& input = call.input();
  if (input.is(Value::Kind::kFloat)) return Value::Float(std::fabs(input.number()));
  if (!input.is_integral()) {
    return InvalidArgument("abs expects a number, found " + TypeName(input));
  }
  if (input.integer() >= 0) return Value::Int(input.integer());
  return Binary("-", Value::Int(0), input, call.budget);
}

Result<Value> RoundFilter(Call& call) {
  const Value& input = call.input();
  if (!input.is_number()) {
    return InvalidArgument("round expects a number, found " + TypeName(input));
  }
  ASSIGN_OR_RETURN(const int64_t places, call.Int(1, 0));
  ASSIGN_OR_RETURN(const std::string name, call.String(2, "common"));
  const std::string_view method = name;
  if (places < 0 || places > 100) return InvalidArgument("round expects a precision of 0 to 100");
  if (method == "common") {
    if (input.is_integral()) return Value::Int(input.integer());
    if (!std::isfinite(input.number())) return input;
    char buffer[512];
    const auto end = std::to_chars(buffer, buffer + sizeof buffer, input.number(),
                                   std::chars_format::fixed, static_cast<int>(places));
    double rounded = 0;
    std::from_chars(buffer, end.ptr, rounded);
    return Value::Float(rounded);
  }
  if (method != "ceil" && method != "floor") {
    return InvalidArgument("round expects the method common, ceil or floor, found " + name);
  }
  const double scale = std::pow(10.0, static_cast<double>(places));
  const double scaled = input.number() * scale;
  return Value::Float((method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / scale);
}

Result<Value> IndentFilter(Call& call) {
  ASSIGN_OR_RETURN(Text text, InputText(call));
  Text indent = Text::From("    ", false);
  if (call.has(1) && call.arg(1).is_string()) {
    indent = call.arg(1).text();
  } else if (call.has(1)) {
    ASSIGN_OR_RETURN(const int64_t width, call.Int(1, 4));
    constexpr int64_t kWidthMax = 1000;
    if (width > kWidthMax) return InvalidArgument("indent expects a width of at most 1000");
    indent.bytes.assign(static_cast<size_t>(std::max<int64_t>(width, 0)), ' ');
  }
  text.Append("\n", false);  // so that a text that ends a line has an empty last one
  Call split{{Value::String(std::move(text))}, call.budget, call.now};
  ASSIGN_OR_RETURN(const Value lines, FindMethod("splitlines")->function(split));
  Text out;
  const bool blank = call.Flag(3);
  for (const Value& line : lines.sequence()->items) {
    const bool first = &line == &lines.sequence()->items.front();
    const auto more = static_cast<int64_t>(line.text().bytes.size() + indent.bytes.size() + 1);
    const auto all = static_cast<int64_t>(out.bytes.size()) + more;
    RETURN_IF_ERROR(call.budget.Spend(1 + more / 64));
    if (all > call.budget.limits().max_output_bytes) return call.budget.SpendBytes(all).error();
    if (!first) out.Append("\n", false);
    if (first ? call.Flag(2) : blank || !line.text().bytes.empty()) out.Append(indent);
    out.Append(line.text());
  }
  return Value::String(std::move(out));
}

Result<Value> SafeFilter(Call& call) { return call.input(); }

}  // namespace

const Signature* FindFilter(std::string_view name) {
  static const std::vector<Signature> kFilters = {
      {"abs", {}, 0, AbsFilter},
      {"capitalize", {}, 0, MapText<Capitalize>},
      {"count", {}, 0, LengthFilter},
      {"d", {"default_value", "boolean"}, 0, DefaultFilter},
      {"default", {"default_value", "boolean"}, 0, DefaultFilter},
      {"float", {"default"}, 0, FloatFilter},
      {"indent", {"width", "first", "blank"}, 0, IndentFilter},
      {"int", {"default", "base"}, 0, IntFilter},
      {"length", {}, 0, LengthFilter},
      {"lower", {}, 0, MapText<Lower>},
      {"replace", {"old", "new", "count"}, 2, ReplaceFilter},
      {"round", {"precision", "method"}, 0, RoundFilter},
      {"safe", {}, 0, SafeFilter},
      {"string", {}, 0, StringFilter},
      {"title", {}, 0, MapText<TitleFilter>},
      {"tojson", {"ensure_ascii", "indent", "separators", "sort_keys"}, 0, ToJsonFilter},
      {"trim", {"chars"}, 0, TrimFilter},
      {"upper", {}, 0, MapText<Upper>},
  };
  for (const std::vector<Signature>* filters : {&kFilters, &CollectionFilters()}) {
    const auto found = std::find_if(filters->begin(), filters->end(),
                                    [&](const Signature& filter) { return filter.name == name; });
    if (found != filters->end()) return &*found;
  }
  return nullptr;
}

}  // namespace innerq::jinja
