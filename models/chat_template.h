// ChatTemplate: a conversation to the prompt text its model was trained on.
#pragma once

#include <ctime>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/result.h"
#include "models/tokenizer.h"

namespace innerq {

// The most messages of a conversation. A template takes dozens of steps for a message, so more
// would pass its limit; this bounds the memory before.
constexpr size_t kMaxMessages = 65536;

// One turn of a conversation. `content` is plain text.
struct ChatMessage {
  std::string role;  // system, developer, user, assistant, tool, function
  std::string content;
};

// What a template may use beside the messages.
struct ChatOptions {
  bool add_generation_prompt = true;          // end with the header of an assistant turn
  std::optional<std::tm> now = std::nullopt;  // local; without it templates see no clock
};

// Renders conversations: a model's own template, in the Jinja language as transformers runs it, or
// one of ours. Immutable; any thread may call it.
class ChatTemplate {
 public:
  // Names accepted by Load besides "auto" and "none": templates of ours for models that ship none.
  static std::vector<std::string> Names();

  // `name` is "auto", "none" or one of Names(): chatml, llama2, llama3, zephyr. "auto" takes the
  // model's own: chat_template.jinja of the directory, else chat_template of tokenizer_config.json,
  // of several the one named "default". `tokenizer` tells which texts are tokens (null: none). Null
  // if "auto" finds no template at all, and for "none", which looks for none: the model cannot
  // chat. Errors: invalid argument for a template that the interpreter cannot run, with file, line
  // and reason, or that cannot even render a user's message; data loss for a damaged file.
  static Result<std::shared_ptr<const ChatTemplate>> Load(
      const std::filesystem::path& directory, std::string_view name,
      std::shared_ptr<const Tokenizer> tokenizer);

  virtual ~ChatTemplate() = default;

  // One of Names(), or the file that the model's own comes from.
  virtual std::string_view name() const = 0;
  // Its Jinja text.
  virtual std::string_view source() const = 0;
  // The special token that the template writes right after an answer: the model ends its turn with
  // it. Absent if there is none.
  virtual std::optional<int32_t> end_of_turn() const = 0;

  // Text for EncodePrompt. What the template writes is trusted, message text is not, so a message
  // that spells a special token cannot forge a turn. Steps, depth and output are bounded (see
  // jinja::Limits). Errors: invalid argument, with the message's place in `param`, for
  // - no messages, more than kMaxMessages, a role that is not one of ChatMessage's or whose
  //   messages the template leaves out;
  // - text of messages that spells a mark of turns which is no token of the model and hence could
  //   not be told from the template's own ([INST], say; TurnMarks has the rule);
  // - what the template itself refuses (raise_exception), with its words, and what it cannot do.
  virtual Result<std::vector<TextSegment>> Render(const std::vector<ChatMessage>& messages,
                                                  const ChatOptions& options) const = 0;
};

// The ids of a prompt: a rendered conversation, or a client's text. If `add_bos`, the tokenizer's
// BOS comes first, where it puts one before texts, unless the first segment is trusted to write it.
std::vector<int32_t> EncodePrompt(const std::vector<TextSegment>& segments,
                                  const Tokenizer& tokenizer, bool add_bos = true);

}  // namespace innerq
