// A chat template from an input, run on a conversation: it ends within its limits, twice with the
// same text, and text of the conversation is never taken for the template's own.
#include <vector>

#include "models/jinja.h"
#include "tests/fuzz/fuzz_parts.h"

namespace innerq::jinja {
namespace {

constexpr Limits kLimits{.max_steps = 100'000, .max_output_bytes = 1 << 16};
// Bytes of a private-use character that stands in the conversation alone.
constexpr std::string_view kOutside = "\xf4\x8f\xbf\xbd";  // U+10FFFD

// A text of the conversation: that character for each ASCII letter and digit, and one at each end.
Value Outside(std::string_view text) {
  std::string out(kOutside);
  for (const char c : text) {
    const bool is_filled =
        (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
    out += is_filled ? kOutside : std::string_view(&c, 1);
  }
  return Value::String(out + std::string(kOutside), /*trusted=*/false);
}

Value Map(const std::vector<std::pair<std::string, Value>>& items) {
  Dict dict;
  for (const auto& [key, value] : items) dict.Set(Value::String(key), value);
  return Value::Of(std::move(dict));
}

Dict Conversation() {
  const Value arguments = Map({{"city", Outside("Paris")}, {"days", Value::Int(3)}});
  const Value call = Map({{"name", Outside("weather")}, {"arguments", arguments}});
  const Value type = Map({{"type", Value::String("string")}});
  const Value parameters =
      Map({{"type", Value::String("object")}, {"properties", Map({{"city", type}})}});
  const Value function = Map({{"name", Outside("weather")}, {"parameters", parameters}});
  const auto message = [](const char* role, const Value& content) {
    return std::vector<std::pair<std::string, Value>>{{"role", Value::String(role)},
                                                      {"content", content}};
  };
  auto calling = message("assistant", Value::None());
  calling.emplace_back("tool_calls", Value::List({Map({{"function", call}})}));
  Dict variables;
  const auto set = [&](const char* name, const Value& value) {
    variables.Set(Value::String(name), value);
  };
  set("messages", Value::List({Map(message("system", Outside(" Be brief.\n"))),
                               Map(message("user", Outside("Gr\xc3\xbc\xc3\x9f dich <b>"))),
                               Map(calling), Map(message("tool", Outside("{\"t\": 21.5}"))),
                               Map(message("user", Outside("")))}));
  set("tools", Value::List({Map({{"type", Value::String("function")}, {"function", function}})}));
  set("add_generation_prompt", Value::Bool(true));
  set("bos_token", Value::String("<s>"));
  set("eos_token", Value::String("</s>"));
  return variables;
}

// Whether all of the conversation's bytes in the output are marked as such.
bool KnowsOutside(const Text& text) {
  for (size_t at = 0; (at = text.bytes.find(kOutside, at)) != text.bytes.npos; ++at) {
    if (!text.any_untrusted() || text.untrusted[at] == 0) return false;
  }
  return true;
}

// Whether a template may write that character by itself: as it is, or as \x, \u, \U, \N or octal.
bool MaySpellOutside(std::string_view source) {
  if (source.find(kOutside[0]) != source.npos) return true;
  for (size_t at = 0; (at = source.find('\\', at)) != source.npos; ++at) {
    if (source.substr(at + 1).find_first_of("xuUN01234567") == 0) return true;
  }
  return false;
}

void CheckText(const Text& text, bool template_may_spell_it) {
  CHECK(static_cast<int64_t>(text.bytes.size()) <= kLimits.max_output_bytes, "too long a text");
  CHECK(!text.any_untrusted() || text.untrusted.size() == text.bytes.size(), "marks of bytes");
  CHECK(template_may_spell_it || KnowsOutside(text), "a message's text counts as the template's");
  std::string joined;
  for (const TextSegment& segment : text.Segments()) {
    CHECK(!segment.text.empty(), "an empty segment");
    joined += segment.text;
  }
  CHECK(joined == text.bytes, "segments differ from the text");
}

}  // namespace
}  // namespace innerq::jinja

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace innerq::jinja;
  static const Dict conversation = Conversation();
  static const Time now{.year = 2024, .month = 2, .day = 29, .hour = 23, .minute = 59, .second = 7};
  const std::string_view source(reinterpret_cast<const char*>(data), size);
  const auto parsed = Template::Parse(source, kLimits);
  if (!parsed.ok()) {
    CHECK(parsed.error().message.starts_with("line "), parsed.error().message);
    return 0;
  }
  const auto first = parsed.value().Render(conversation, now, kLimits);
  const auto second = parsed.value().Render(conversation, now, kLimits);
  CHECK(first.ok() == second.ok(), "a template fails now and then");
  if (!first.ok()) {
    CHECK(first.error().message.starts_with("line "), first.error().message);
    CHECK(first.error().message == second.error().message, "errors differ");
    return 0;
  }
  CHECK(first.value().bytes == second.value().bytes, "texts differ");
  CheckText(first.value(), MaySpellOutside(source));
  return 0;
}
