#include "models/chat_template.h"

#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include "models/files.h"
#include "models/jinja.h"
#include "models/tokenizer_config.h"
#include "models/turn_marks.h"

namespace innerq {
namespace {

// As many characters of UTF-8 as fit into `max_bytes`.
std::string FirstCharacters(const std::string& text, size_t max_bytes) {
  if (text.size() <= max_bytes) return text;
  size_t end = max_bytes;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return text.substr(0, end) + "...";
}

constexpr std::array<std::string_view, 6> kRoles = {"system",    "developer", "user",
                                                    "assistant", "tool",      "function"};
// Texts that no template writes by itself, for conversations that show what it does: that of the
// message looked at and that of the others.
constexpr std::string_view kProbe = "qzjvxk";
constexpr std::string_view kFiller = "wqxjvz";

struct BuiltIn {
  std::string_view name;
  std::string_view source;
};

constexpr BuiltIn kBuiltIns[] = {
    {"chatml", R"jinja(
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
)jinja"},
    // The system message becomes a part of the first user message and is trimmed with it.
    {"llama2", R"jinja(
{%- set turn = namespace(system='', number=0) -%}
{%- for message in messages -%}
  {%- if loop.first and message.role == 'system' -%}
    {%- set turn.system = '<<SYS>>\n' + message.content + '\n<</SYS>>\n\n' -%}
  {%- elif message.role != ('user' if turn.number is even else 'assistant') -%}
    {{- raise_exception('expected roles user, assistant, user, ... after an optional system message,'
                        ' found ' + message.role) -}}
  {%- else -%}
    {%- if message.role == 'user' -%}
      {%- if turn.number > 0 -%}
        {{- bos_token | default('<s>') -}}
      {%- endif -%}
      {{- '[INST] ' + (turn.system + message.content) | trim + ' [/INST]' -}}
      {%- set turn.system = '' -%}
    {%- else -%}
      {{- ' ' + message.content | trim + ' ' + eos_token | default('</s>') -}}
    {%- endif -%}
    {%- set turn.number = turn.number + 1 -%}
  {%- endif -%}
{%- endfor -%}
{%- if turn.number == 0 -%}
  {{- raise_exception('expected a user message after the system message, found none') -}}
{%- endif -%}
)jinja"},
    {"llama3", R"jinja(
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' -}}
  {{- message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
)jinja"},
    {"zephyr", R"jinja(
{%- for message in messages -%}
  {{- '<|' + message.role + '|>\n' + message.content + eos_token | default('</s>') + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>\n' -}}
{%- endif -%}
)jinja"}};

std::string Place(size_t message, const char* key) {
  return "messages[" + std::to_string(message) + "]." + key;
}

// A template and where it comes from.
struct Source {
  std::string name;
  std::string text;
};

// The text of a template file, if there is one.
Result<std::optional<Source>> ReadTemplateFile(const std::filesystem::path& path) {
  Result<std::string> text = ReadTextFile(path, kMaxTextFileBytes);
  if (text.ok()) return std::optional<Source>({path.string(), *std::move(text)});
  if (text.error().code == ErrorCode::kNotFound) return std::optional<Source>();
  return text.error();
}

// The model's own template, if it has one.
Result<std::optional<Source>> ReadSource(const std::filesystem::path& directory,
                                         const TokenizerConfig& config) {
  ASSIGN_OR_RETURN(auto file, ReadTemplateFile(directory / "chat_template.jinja"));
  if (file) return file;
  if (!config.chat_templates.ok()) return config.chat_templates.error();
  for (const TokenizerConfig::Named& one : *config.chat_templates) {
    if (one.name != "default" || one.text.empty()) continue;
    return std::optional<Source>({(directory / "tokenizer_config.json").string(), one.text});
  }
  return std::optional<Source>();
}

Result<std::optional<Source>> FindSource(const std::filesystem::path& directory,
                                         std::string_view name, const TokenizerConfig& config) {
  if (name == "auto") return ReadSource(directory, config);
  for (const BuiltIn& one : kBuiltIns) {
    if (one.name != name) continue;
    return std::optional<Source>({std::string(name), std::string(one.source)});
  }
  return InvalidArgument(
      "chat template: expected auto, none, chatml, llama2, llama3 or zephyr, found \"" +
      std::string(name) + "\"");
}

// Special tokens by their names, as templates know them.
jinja::Dict TokenVariables(const TokenizerConfig& config, const Tokenizer* tokenizer) {
  jinja::Dict out;
  const auto text = [tokenizer](std::optional<int32_t> id) {
    return jinja::Value::String(tokenizer->TokenBytes(*id, false, true));
  };
  if (tokenizer != nullptr && tokenizer->bos_id()) {
    out.Set(jinja::Value::String("bos_token"), text(tokenizer->bos_id()));
  }
  if (tokenizer != nullptr && tokenizer->eos_id()) {
    out.Set(jinja::Value::String("eos_token"), text(tokenizer->eos_id()));
  }
  for (const TokenizerConfig::Named& token : config.special_tokens) {
    out.Set(jinja::Value::String(token.name), jinja::Value::String(token.text));
  }
  std::vector<jinja::Value> additional;
  for (const std::string& token : config.additional_special_tokens) {
    additional.push_back(jinja::Value::String(token));
  }
  if (!additional.empty()) {
    out.Set(jinja::Value::String("additional_special_tokens"),
            jinja::Value::List(std::move(additional)));
  }
  return out;
}

jinja::Value MessagesValue(const std::vector<ChatMessage>& messages) {
  const jinja::Value role = jinja::Value::String("role");
  const jinja::Value content = jinja::Value::String("content");
  std::vector<jinja::Value> out;
  out.reserve(messages.size());
  for (const ChatMessage& message : messages) {
    jinja::Dict one;
    one.Set(role, jinja::Value::String(message.role));  // one of kRoles
    one.Set(content, jinja::Value::String(message.content, /*trusted=*/false));
    out.push_back(jinja::Value::Of(std::move(one)));
  }
  return jinja::Value::List(std::move(out));
}

std::optional<jinja::Time> ToTime(const std::optional<std::tm>& time) {
  if (!time) return std::nullopt;
  return jinja::Time{.year = time->tm_year + 1900,
                     .month = time->tm_mon + 1,
                     .day = time->tm_mday,
                     .hour = time->tm_hour,
                     .minute = time->tm_min,
                     .second = time->tm_sec};
}

// A short conversation with a message of this role.
std::vector<ChatMessage> ProbeConversation(std::string_view role) {
  const ChatMessage message{std::string(role), std::string(kProbe)};
  const ChatMessage user{"user", std::string(kFiller)};
  if (role == "user") return {message};
  if (role == "system" || role == "developer") return {message, user};
  if (role == "assistant") return {user, message, user};
  return {user, {"assistant", std::string(kFiller)}, message};
}

bool IsOfProbeConversation(std::string_view text) {
  return text.find(kProbe) != text.npos || text.find(kFiller) != text.npos;
}

// The special token that follows kProbe in a rendered conversation, spaces aside.
std::optional<int32_t> TokenAfterProbe(const jinja::Text& rendered, const Tokenizer& tokenizer) {
  const std::vector<TextSegment> segments = rendered.Segments();
  for (size_t i = 0; i + 1 < segments.size(); ++i) {
    if (segments[i].trusted || !jinja::TrimSpace(segments[i].text, {}).ends_with(kProbe)) continue;
    const std::string_view rest = jinja::TrimSpace(segments[i + 1].text, {});
    const auto ids = tokenizer.Encode(rest, {.add_bos = false, .parse_special = true});
    if (!ids.empty() && tokenizer.IsSpecial(ids.front())) return ids.front();
  }
  return std::nullopt;
}

// Error of a template, with where it comes from.
Error InSource(const Source& source, const Error& error) {
  return {error.code, source.name + ": chat template, " + error.message};
}

class JinjaChatTemplate : public ChatTemplate {
 public:
  JinjaChatTemplate(const TokenizerConfig& config, std::shared_ptr<const Tokenizer> tokenizer)
      : tokenizer_(std::move(tokenizer)),
        tokens_(TokenVariables(config, tokenizer_.get())),
        marks_(tokenizer_) {}

  Result<void> Load(const Source& source) {
    name_ = source.name;
    source_ = source.text;
    Result<jinja::Template> parsed = jinja::Template::Parse(source.text);
    if (!parsed.ok()) return InSource(source, parsed.error());
    template_ = *std::move(parsed);
    const auto probed = Probe();
    return probed.ok() ? probed : InSource(source, probed.error());
  }

  std::string_view name() const override { return name_; }
  std::string_view source() const override { return source_; }
  std::optional<int32_t> end_of_turn() const override { return end_of_turn_; }

  Result<std::vector<TextSegment>> Render(const std::vector<ChatMessage>& messages,
                                          const ChatOptions& options) const override {
    RETURN_IF_ERROR(Check(messages));
    const auto refuse = [](const Error& error) {
      return Error{error.code, "the model's chat template, " + error.message, "messages"};
    };
    const Result<jinja::Text> rendered = Run(messages, options);
    if (!rendered.ok()) return refuse(rendered.error());
    // With those that only this conversation made the template write.
    TurnMarks marks = marks_;
    if (const auto learned = marks.LearnWords(*rendered); !learned.ok()) {
      return refuse(learned.error());
    }
    const std::optional<std::string> forged = marks.FindForged(*rendered);
    if (!forged) return rendered->Segments();
    const std::string rest =
        " must not contain " + *forged + ", with which the model's chat template marks turns";
    const auto message = std::find_if(messages.begin(), messages.end(), [&](const auto& one) {
      return marks.FindForged(jinja::Text::From(one.content, /*is_untrusted=*/true)).has_value();
    });
    if (message != messages.end()) {
      return InvalidArgument("message text" + rest,
                             Place(static_cast<size_t>(message - messages.begin()), "content"));
    }
    return InvalidArgument("message text" + rest, "messages");
  }

 private:
  // Runs the template, without a look at what comes out.
  Result<jinja::Text> Run(const std::vector<ChatMessage>& messages,
                          const ChatOptions& options) const {
    jinja::Dict variables = tokens_;
    variables.Set(jinja::Value::String("messages"), MessagesValue(messages));
    variables.Set(jinja::Value::String("add_generation_prompt"),
                  jinja::Value::Bool(options.add_generation_prompt));
    variables.Set(jinja::Value::String("tools"), jinja::Value::None());
    variables.Set(jinja::Value::String("documents"), jinja::Value::None());
    return template_->Render(variables, ToTime(options.now));
  }

  // Renders a conversation for each role, and learns from it.
  Result<void> Probe() {
    std::tm new_year{};
    new_year.tm_mday = 1;
    new_year.tm_year = 100;
    const ChatOptions options{.now = new_year};
    for (const std::string_view role : kRoles) {
      const Result<jinja::Text> rendered = Run(ProbeConversation(role), options);
      if (!rendered.ok()) {
        if (role == "user") return rendered.error();
        continue;  // it says what it does not like when it is asked
      }
      RETURN_IF_ERROR(marks_.LearnWords(*rendered));
      marks_.LearnSeparators(*rendered, IsOfProbeConversation);
      if (rendered->bytes.find(kProbe) == std::string::npos) left_out_.insert(role);
      if (role == "assistant" && tokenizer_ != nullptr) {
        end_of_turn_ = TokenAfterProbe(*rendered, *tokenizer_);
      }
    }
    return {};
  }

  Result<void> Check(const std::vector<ChatMessage>& messages) const {
    if (messages.empty()) return InvalidArgument("messages must not be empty", "messages");
    if (messages.size() > kMaxMessages) {
      return InvalidArgument("expected at most " + std::to_string(kMaxMessages) +
                                 " messages, found " + std::to_string(messages.size()),
                             "messages");
    }
    for (size_t i = 0; i < messages.size(); ++i) {
      const std::string& role = messages[i].role;
      if (std::find(kRoles.begin(), kRoles.end(), role) == kRoles.end()) {
        return InvalidArgument(
            "expected the role system, developer, user, assistant, tool or function, found \"" +
                FirstCharacters(role, 40) + "\"",
            Place(i, "role"));
      }
      if (left_out_.contains(role)) {
        return InvalidArgument("the model's chat template leaves out messages of the role " + role,
                               Place(i, "role"));
      }
    }
    return {};
  }

  const std::shared_ptr<const Tokenizer> tokenizer_;  // may be null
  const jinja::Dict tokens_;
  std::string name_, source_;
  std::optional<jinja::Template> template_;
  TurnMarks marks_;
  std::set<std::string_view> left_out_;  // those of kRoles whose messages it does not write
  std::optional<int32_t> end_of_turn_;
};

}  // namespace

std::vector<std::string> ChatTemplate::Names() {
  std::vector<std::string> names;
  for (const BuiltIn& one : kBuiltIns) names.emplace_back(one.name);
  return names;
}

Result<std::shared_ptr<const ChatTemplate>> ChatTemplate::Load(
    const std::filesystem::path& directory, std::string_view name,
    std::shared_ptr<const Tokenizer> tokenizer) {
  if (name == "none") return std::shared_ptr<const ChatTemplate>();
  ASSIGN_OR_RETURN(const TokenizerConfig config, ReadTokenizerConfig(directory));
  ASSIGN_OR_RETURN(const auto source, FindSource(directory, name, config));
  if (!source) return std::shared_ptr<const ChatTemplate>();
  auto out = std::make_shared<JinjaChatTemplate>(config, std::move(tokenizer));
  RETURN_IF_ERROR(out->Load(*source));
  return std::shared_ptr<const ChatTemplate>(std::move(out));
}

std::vector<int32_t> EncodePrompt(const std::vector<TextSegment>& segments,
                                  const Tokenizer& tokenizer, bool add_bos) {
  std::string bos;
  if (tokenizer.bos_id()) bos = tokenizer.TokenBytes(*tokenizer.bos_id(), false, true);
  const bool has_bos = !bos.empty() && !segments.empty() && segments.front().trusted &&
                       segments.front().text.starts_with(bos);
  return tokenizer.EncodeSegments(segments, add_bos && !has_bos);
}

}  // namespace innerq
