// ChatTemplate: a conversation to the prompt text its model was trained on.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/result.h"
#include "models/tokenizer.h"

namespace innerq {

// One turn of a conversation. `content` is plain text.
struct ChatMessage {
  std::string role;  // system, user, assistant, ...
  std::string content;
};

// Renders conversations. Immutable; any thread may call it. The templates are native code; a
// model's Jinja text is only recognized, and what it may add by itself (a default system message,
// dates, tools) is left out.
class ChatTemplate {
 public:
  // Names accepted by Load besides "auto".
  static std::vector<std::string> Names();

  // `name` is "auto" (recognize the template in tokenizer_config.json or chat_template.jinja of the
  // directory by the control tokens it uses) or one of Names(): chatml, llama2, llama3, zephyr.
  // `tokenizer` tells which marks of turns are special tokens (null: none); used by Load only. Null
  // if "auto" finds no template at all: the model cannot chat. Errors: invalid argument for a
  // template that is not recognized, data loss for a damaged file.
  static Result<std::shared_ptr<const ChatTemplate>> Load(const std::filesystem::path& directory,
                                                          std::string_view name,
                                                          const Tokenizer* tokenizer);
  // The Jinja text of a model directory: chat_template.jinja, else that of tokenizer_config.json;
  // empty if there is none. Errors: data loss for a damaged file.
  static Result<std::string> ReadSource(const std::filesystem::path& directory);
  virtual ~ChatTemplate() = default;

  virtual std::string_view name() const = 0;
  using Segment = TextSegment;
  // Text for Tokenizer::EncodeSegments, without the first BOS. What the template writes is trusted,
  // message text is not, so a message that spells a special token cannot forge a turn. Ends with
  // the header of an assistant turn if `add_generation_prompt` (llama2 has none to add).
  // Errors: invalid argument, with the message's place in `param`, for a role or an order that the
  // template does not know, and for message text that spells a mark of turns which is no special
  // token of the model and hence could not be told from the template's own ([INST], say).
  virtual Result<std::vector<Segment>> Render(const std::vector<ChatMessage>& messages,
                                              bool add_generation_prompt) const = 0;
};

}  // namespace innerq
