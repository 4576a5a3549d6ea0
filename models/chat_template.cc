#include "models/chat_template.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "models/files.h"
#include "models/tokenizer_config.h"

namespace innerq {
namespace {

using Segment = ChatTemplate::Segment;

// Whitespace beyond ASCII that Python's str.strip, and so Jinja's trim, removes.
constexpr std::array<std::string_view, 19> kWideSpaces = {
    "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\x80", "\xe2\x80\x81",
    "\xe2\x80\x82", "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86",
    "\xe2\x80\x87", "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a", "\xe2\x80\xa8",
    "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"};

bool IsAsciiSpace(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r') || (c >= '\x1c' && c <= '\x1f');
}

std::string_view TrimLeft(std::string_view text) {
  while (!text.empty()) {
    const auto wide = std::find_if(kWideSpaces.begin(), kWideSpaces.end(),
                                   [&](std::string_view space) { return text.starts_with(space); });
    if (!IsAsciiSpace(text.front()) && wide == kWideSpaces.end()) break;
    text.remove_prefix(wide == kWideSpaces.end() ? 1 : wide->size());
  }
  return text;
}

std::string_view TrimRight(std::string_view text) {
  while (!text.empty()) {
    const auto wide = std::find_if(kWideSpaces.begin(), kWideSpaces.end(),
                                   [&](std::string_view space) { return text.ends_with(space); });
    if (!IsAsciiSpace(text.back()) && wide == kWideSpaces.end()) break;
    text.remove_suffix(wide == kWideSpaces.end() ? 1 : wide->size());
  }
  return text;
}

std::string_view Trim(std::string_view text) { return TrimRight(TrimLeft(text)); }

// Collects segments; neighbours of the same trust are joined, empty ones left out.
class SegmentList {
 public:
  void Template(std::string_view text) { Add(text, true); }
  void Message(std::string_view text) { Add(text, false); }
  std::vector<Segment> Take() { return std::move(segments_); }

 private:
  void Add(std::string_view text, bool trusted) {
    if (text.empty()) return;
    if (segments_.empty() || segments_.back().trusted != trusted) {
      segments_.push_back({"", trusted});
    }
    segments_.back().text += text;
  }
  std::vector<Segment> segments_;
};

std::string Place(size_t message, const char* key) {
  return "messages[" + std::to_string(message) + "]." + key;
}

Result<void> CheckRoles(const std::vector<ChatMessage>& messages,
                        std::initializer_list<std::string_view> roles) {
  if (messages.empty()) return InvalidArgument("messages must not be empty", "messages");
  for (size_t i = 0; i < messages.size(); ++i) {
    if (std::find(roles.begin(), roles.end(), messages[i].role) != roles.end()) continue;
    std::string expected;
    for (const std::string_view role : roles) {
      expected += (expected.empty() ? "" : ", ") + std::string(role);
    }
    return InvalidArgument("the model's chat template knows the roles " + expected + ", not \"" +
                               messages[i].role + "\"",
                           Place(i, "role"));
  }
  return {};
}

// What the templates below share: `plain_marks` are their marks of turns that are no special tokens
// of the model.
class MarkedTemplate : public ChatTemplate {
 public:
  explicit MarkedTemplate(std::vector<std::string> plain_marks)
      : plain_marks_(std::move(plain_marks)) {}

 protected:
  // Refuses roles beside `roles`, and message text with marks that the model would take for ours.
  Result<void> Check(const std::vector<ChatMessage>& messages,
                     std::initializer_list<std::string_view> roles) const {
    RETURN_IF_ERROR(CheckRoles(messages, roles));
    for (size_t i = 0; i < messages.size(); ++i) {
      for (const std::string& mark : plain_marks_) {
        if (messages[i].content.find(mark) == std::string::npos) continue;
        return InvalidArgument("message text must not contain " + mark +
                                   ", with which the model's chat template marks turns",
                               Place(i, "content"));
      }
    }
    return {};
  }

 private:
  const std::vector<std::string> plain_marks_;
};

// <|im_start|>role \n content <|im_end|> \n
class ChatMl : public MarkedTemplate {
 public:
  using MarkedTemplate::MarkedTemplate;
  std::string_view name() const override { return "chatml"; }
  Result<std::vector<Segment>> Render(const std::vector<ChatMessage>& messages,
                                      bool add_generation_prompt) const override {
    RETURN_IF_ERROR(Check(messages, {"system", "user", "assistant", "tool"}));
    SegmentList out;
    for (const ChatMessage& message : messages) {
      out.Template("<|im_start|>" + message.role + "\n");
      out.Message(message.content);
      out.Template("<|im_end|>\n");
    }
    if (add_generation_prompt) out.Template("<|im_start|>assistant\n");
    return out.Take();
  }
};

// [INST] <<SYS>> system <</SYS>> user [/INST] assistant </s><s>[INST] ...
class Llama2 : public MarkedTemplate {
 public:
  Llama2(std::string bos, std::string eos, std::vector<std::string> plain_marks)
      : MarkedTemplate(std::move(plain_marks)), bos_(std::move(bos)), eos_(std::move(eos)) {}
  std::string_view name() const override { return "llama2"; }
  Result<std::vector<Segment>> Render(const std::vector<ChatMessage>& messages,
                                      bool /*add_generation_prompt*/) const override {
    RETURN_IF_ERROR(Check(messages, {"system", "user", "assistant"}));
    const size_t first = messages[0].role == "system" ? 1 : 0;
    if (first == messages.size()) {
      return InvalidArgument("a user message must follow the system message", "messages");
    }
    SegmentList out;
    for (size_t i = first; i < messages.size(); ++i) {
      const bool is_user = (i - first) % 2 == 0;
      if (messages[i].role != (is_user ? "user" : "assistant")) {
        return InvalidArgument(
            "after an optional system message, roles must alternate user, assistant, user, ...",
            Place(i, "role"));
      }
      if (!is_user) {
        out.Template(" ");
        out.Message(Trim(messages[i].content));
        out.Template(" " + eos_);
        continue;
      }
      if (i > first) out.Template(bos_);
      out.Template("[INST] ");
      if (first == 1 && i == first) {
        RenderSystem(messages[0].content, messages[i].content, out);
      } else {
        out.Message(Trim(messages[i].content));
      }
      out.Template(" [/INST]");
    }
    return out.Take();
  }

 private:
  // The system message and the first user message are trimmed as one text.
  static void RenderSystem(std::string_view system, std::string_view user, SegmentList& out) {
    const std::string_view kept = TrimRight(user);
    out.Template("<<SYS>>\n");
    out.Message(system);
    out.Template(kept.empty() ? "\n<</SYS>>" : "\n<</SYS>>\n\n");
    out.Message(kept);
  }
  std::string bos_;
  std::string eos_;
};

// <|start_header_id|>role<|end_header_id|> \n\n content <|eot_id|>
class Llama3 : public MarkedTemplate {
 public:
  using MarkedTemplate::MarkedTemplate;
  std::string_view name() const override { return "llama3"; }
  Result<std::vector<Segment>> Render(const std::vector<ChatMessage>& messages,
                                      bool add_generation_prompt) const override {
    RETURN_IF_ERROR(Check(messages, {"system", "user", "assistant"}));
    SegmentList out;
    for (const ChatMessage& message : messages) {
      out.Template(Header(message.role));
      out.Message(Trim(message.content));
      out.Template("<|eot_id|>");
    }
    if (add_generation_prompt) out.Template(Header("assistant"));
    return out.Take();
  }

 private:
  static std::string Header(const std::string& role) {
    return "<|start_header_id|>" + role + "<|end_header_id|>\n\n";
  }
};

// <|role|> \n content </s> \n
class Zephyr : public MarkedTemplate {
 public:
  Zephyr(std::string eos, std::vector<std::string> plain_marks)
      : MarkedTemplate(std::move(plain_marks)), eos_(std::move(eos)) {}
  std::string_view name() const override { return "zephyr"; }
  Result<std::vector<Segment>> Render(const std::vector<ChatMessage>& messages,
                                      bool add_generation_prompt) const override {
    RETURN_IF_ERROR(Check(messages, {"system", "user", "assistant"}));
    SegmentList out;
    for (const ChatMessage& message : messages) {
      out.Template("<|" + message.role + "|>\n");
      out.Message(message.content);
      out.Template(eos_ + "\n");
    }
    if (add_generation_prompt) out.Template("<|assistant|>\n");
    return out.Take();
  }

 private:
  std::string eos_;
};

// The model's Jinja text: chat_template.jinja, else that of tokenizer_config.json; may be empty.
Result<std::string> ReadJinja(const std::filesystem::path& directory,
                              const TokenizerConfig& config) {
  Result<std::string> file = ReadTextFile(directory / "chat_template.jinja", kMaxTextFileBytes);
  if (file.ok() || file.error().code != ErrorCode::kNotFound) return file;
  return config.chat_template;
}

// The name of the template whose control tokens a Jinja text uses.
std::optional<std::string_view> Recognize(std::string_view jinja) {
  const auto has = [jinja](std::string_view text) { return jinja.find(text) != jinja.npos; };
  if (has("<|im_start|>") && has("<|im_end|>")) return "chatml";
  if (has("<|start_header_id|>") && has("<|eot_id|>")) return "llama3";
  if (has("[INST]") && has("<<SYS>>")) return "llama2";
  if (has("<|user|>") && has("<|assistant|>") && has("eos_token")) return "zephyr";
  return std::nullopt;
}

}  // namespace

Result<std::string> ChatTemplate::ReadSource(const std::filesystem::path& directory) {
  ASSIGN_OR_RETURN(const TokenizerConfig config, ReadTokenizerConfig(directory));
  return ReadJinja(directory, config);
}

std::vector<std::string> ChatTemplate::Names() { return {"chatml", "llama2", "llama3", "zephyr"}; }

Result<std::shared_ptr<const ChatTemplate>> ChatTemplate::Load(
    const std::filesystem::path& directory, std::string_view name, const Tokenizer* tokenizer) {
  using Pointer = std::shared_ptr<const ChatTemplate>;
  ASSIGN_OR_RETURN(const TokenizerConfig config, ReadTokenizerConfig(directory));
  std::string wanted(name);
  if (name == "auto") {
    ASSIGN_OR_RETURN(const std::string jinja, ReadJinja(directory, config));
    if (jinja.empty()) return Pointer();
    const std::optional<std::string_view> recognized = Recognize(jinja);
    if (!recognized) {
      return InvalidArgument(directory.string() +
                             ": the model's chat template is none of those built in (chatml, "
                             "llama2, llama3, zephyr)");
    }
    wanted = *recognized;
  }
  const auto plain = [tokenizer](std::vector<std::string> marks) {
    std::erase_if(marks, [tokenizer](const std::string& mark) {
      const auto id = tokenizer != nullptr ? tokenizer->TokenId(mark) : std::nullopt;
      return id && tokenizer->IsSpecial(*id);
    });
    return marks;
  };
  const std::string bos = config.bos_token.value_or("<s>");
  const std::string eos = config.eos_token.value_or("</s>");
  if (wanted == "chatml") {
    return Pointer(std::make_shared<ChatMl>(plain({"<|im_start|>", "<|im_end|>"})));
  }
  if (wanted == "llama2") {
    return Pointer(std::make_shared<Llama2>(
        bos, eos, plain({"[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", bos, eos})));
  }
  if (wanted == "llama3") {
    return Pointer(std::make_shared<Llama3>(
        plain({"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"})));
  }
  if (wanted == "zephyr") {
    return Pointer(
        std::make_shared<Zephyr>(eos, plain({"<|system|>", "<|user|>", "<|assistant|>", eos})));
  }
  return InvalidArgument(
      "chat template: expected auto, chatml, llama2, llama3 or zephyr, found \"" + wanted + "\"");
}

}  // namespace innerq
