#include "server/openai_response.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "server/utf8.h"

namespace innerq {
namespace {

using OrderedJson = nlohmann::ordered_json;

// JSON has no infinities; OpenAI prints this for what cannot happen.
double Logprob(float value) { return std::max(static_cast<double>(value), -9999.0); }

OrderedJson ChatToken(const std::string& bytes, float logprob) {
  OrderedJson list = OrderedJson::array();
  for (const char c : bytes) list.push_back(static_cast<uint8_t>(c));
  return {{"token", ReplaceInvalidUtf8(bytes)},
          {"logprob", Logprob(logprob)},
          {"bytes", std::move(list)}};
}

// Keys of the older format must differ where tokens differ: parts of characters are spelled out.
std::string CompletionToken(const std::string& bytes) {
  if (ReplaceInvalidUtf8(bytes) == bytes) return bytes;
  std::string text = "bytes:";
  for (const char c : bytes) {
    char hex[8];
    std::snprintf(hex, sizeof(hex), "\\x%02x", static_cast<uint8_t>(c));
    text += hex;
  }
  return text;
}

// The most likely tokens and always the chosen one, which has the key that it has in `tokens`. A
// token that would take the key of another (both spell the same text) goes by its id.
OrderedJson CompletionTop(const TokenText& token) {
  const std::string chosen = CompletionToken(token.bytes);
  OrderedJson top = OrderedJson::object();
  for (const TokenText::Alternative& other : token.top) {
    if (other.id == token.id) {
      top[chosen] = Logprob(*token.logprob);
      continue;
    }
    const std::string key = CompletionToken(other.bytes);
    const bool taken = key == chosen || top.contains(key);
    top[taken ? "token_id:" + std::to_string(other.id) : key] = Logprob(other.logprob);
  }
  top[chosen] = Logprob(*token.logprob);
  return top;
}

OrderedJson CompletionLogprobs(const std::vector<TokenText>& tokens) {
  OrderedJson texts = OrderedJson::array(), values = OrderedJson::array(),
              tops = OrderedJson::array(), offsets = OrderedJson::array();
  for (const TokenText& token : tokens) {
    texts.push_back(CompletionToken(token.bytes));
    values.push_back(token.logprob ? OrderedJson(Logprob(*token.logprob)) : OrderedJson(nullptr));
    tops.push_back(token.logprob ? CompletionTop(token) : OrderedJson(nullptr));
    offsets.push_back(token.offset);
  }
  return {{"tokens", std::move(texts)},
          {"token_logprobs", std::move(values)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

OrderedJson ChatLogprobs(const std::vector<TokenText>& tokens) {
  OrderedJson content = OrderedJson::array();
  for (const TokenText& token : tokens) {
    OrderedJson entry = ChatToken(token.bytes, token.logprob.value_or(0));
    entry["top_logprobs"] = OrderedJson::array();
    for (const TokenText::Alternative& top : token.top) {
      entry["top_logprobs"].push_back(ChatToken(top.bytes, top.logprob));
    }
    content.push_back(std::move(entry));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

OrderedJson Logprobs(const AnswerHead& head, const std::vector<TokenText>& tokens) {
  if (!head.logprobs) return nullptr;
  return head.chat ? ChatLogprobs(tokens) : CompletionLogprobs(tokens);
}

OrderedJson UsageObject(const Usage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens},
          {"completion_tokens", usage.completion_tokens},
          {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens}}}};
}

OrderedJson Head(const AnswerHead& head, bool chunk) {
  const char* const object =
      head.chat ? (chunk ? "chat.completion.chunk" : "chat.completion") : "text_completion";
  return {{"id", head.id}, {"object", object}, {"created", head.created}, {"model", head.model}};
}

// Texts are valid UTF-8 but for the client's own strings, which are echoed with U+FFFD.
std::string Dump(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

std::string Chunk(const AnswerHead& head, OrderedJson choice, const Usage& usage) {
  OrderedJson json = Head(head, true);
  json["choices"] = OrderedJson::array({std::move(choice)});
  if (head.include_usage) json["usage"] = head.continuous_usage ? UsageObject(usage) : nullptr;
  return Dump(json);
}

OrderedJson Model(std::string_view id, int64_t created, int64_t max_context) {
  return {{"id", id},
          {"object", "model"},
          {"created", created},
          {"owned_by", "innerq"},
          {"max_model_len", max_context}};
}

}  // namespace

std::string AnswerJson(const AnswerHead& head, const std::vector<AnswerChoice>& choices,
                       const Usage& usage) {
  OrderedJson json = Head(head, false);
  json["choices"] = OrderedJson::array();
  for (const AnswerChoice& choice : choices) {
    OrderedJson entry = {{"index", json["choices"].size()}};
    if (head.chat) {
      entry["message"] = {
          {"role", "assistant"}, {"content", choice.piece.text}, {"refusal", nullptr}};
    } else {
      entry["text"] = choice.piece.text;
    }
    entry["logprobs"] = Logprobs(head, choice.piece.tokens);
    entry["finish_reason"] = choice.finish_reason;
    json["choices"].push_back(std::move(entry));
  }
  json["usage"] = UsageObject(usage);
  return Dump(json);
}

std::string RoleChunkJson(const AnswerHead& head, int64_t index, const Usage& usage) {
  return Chunk(head,
               {{"index", index},
                {"delta", {{"role", "assistant"}, {"content", ""}}},
                {"logprobs", nullptr},
                {"finish_reason", nullptr}},
               usage);
}

std::string TextChunkJson(const AnswerHead& head, int64_t index, const AnswerPiece& piece,
                          const Usage& usage) {
  OrderedJson choice = {{"index", index}};
  if (head.chat) {
    choice["delta"] = {{"content", piece.text}};
  } else {
    choice["text"] = piece.text;
  }
  choice["logprobs"] = Logprobs(head, piece.tokens);
  choice["finish_reason"] = nullptr;
  return Chunk(head, std::move(choice), usage);
}

std::string EndChunkJson(const AnswerHead& head, int64_t index, std::string_view finish_reason,
                         const Usage& usage) {
  OrderedJson choice = {{"index", index}};
  if (head.chat) {
    choice["delta"] = OrderedJson::object();
  } else {
    choice["text"] = "";
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = finish_reason;
  return Chunk(head, std::move(choice), usage);
}

std::string UsageChunkJson(const AnswerHead& head, const Usage& usage) {
  OrderedJson json = Head(head, true);
  json["choices"] = OrderedJson::array();
  json["usage"] = UsageObject(usage);
  return Dump(json);
}

std::string ModelJson(std::string_view id, int64_t created, int64_t max_context) {
  return Dump(Model(id, created, max_context));
}

std::string ModelListJson(std::string_view id, int64_t created, int64_t max_context) {
  return Dump(
      {{"object", "list"}, {"data", OrderedJson::array({Model(id, created, max_context)})}});
}

}  // namespace innerq
