#include "server/utility_request.h"

#include <nlohmann/json.hpp>
#include <span>

#include "server/request_parser.h"

namespace innerq {
namespace {

using Json = nlohmann::json;

// Which endpoints have a parameter.
constexpr unsigned Bit(UtilityEndpoint endpoint) { return 1u << static_cast<unsigned>(endpoint); }
constexpr unsigned kTokenize = Bit(UtilityEndpoint::kTokenize);
constexpr unsigned kDetokenize = Bit(UtilityEndpoint::kDetokenize);
constexpr unsigned kApplyTemplate = Bit(UtilityEndpoint::kApplyTemplate);

// Reads one request.
class UtilityParser : public RequestParser<Json> {
 public:
  explicit UtilityParser(UtilityEndpoint endpoint) : endpoint_(endpoint) {}

  std::variant<UtilityRequest, ApiError> Run(std::string_view body) {
    Json json;
    if (!Object(body, &json)) return *error_;
    for (const auto& [name, value] : json.items()) {
      if (!Parameter(name, value)) return *error_;
    }
    if (!Complete()) return *error_;
    return std::move(out_);
  }

  static std::vector<std::string_view> Names(UtilityEndpoint endpoint) {
    return NamesOf(Entries(), Bit(endpoint));
  }

 private:
  static std::span<const Entry<UtilityParser>> Entries() {
    static constexpr Entry<UtilityParser> kEntries[] = {
        {"model", kTokenize | kDetokenize | kApplyTemplate, &UtilityParser::Model},
        {"prompt", kTokenize, &UtilityParser::Text},
        {"content", kTokenize, &UtilityParser::Text},
        {"messages", kTokenize | kApplyTemplate, &UtilityParser::Conversation},
        {"tokens", kDetokenize, &UtilityParser::Tokens},
        {"add_special_tokens", kTokenize, &UtilityParser::AddSpecial},
        {"add_special", kTokenize, &UtilityParser::AddSpecial},
        {"parse_special", kTokenize, &UtilityParser::ParseSpecial},
        {"add_generation_prompt", kTokenize | kApplyTemplate, &UtilityParser::AddGenerationPrompt},
        {"return_token_strs", kTokenize, &UtilityParser::ReturnTokenStrs},
        {"with_pieces", kTokenize, &UtilityParser::WithPieces},
    };
    return kEntries;
  }

  bool Parameter(const std::string& name, const Json& value) {
    const auto* entry = Find(Entries(), name, Bit(endpoint_));
    if (entry == nullptr) return Unsupported(name);
    return value.is_null() || (this->*entry->method)(name, value);
  }

  // Takes note of what is to be tokenized; there must be one such parameter.
  bool Input(const std::string& name) {
    if (!input_.empty()) {
      return WrongValue(name, "'" + input_ + "' is given, too; expected one of them");
    }
    input_ = name;
    return true;
  }

  bool Model(const std::string& name, const Json& value) {
    return String(name, value, &out_.model.emplace());
  }
  bool Text(const std::string& name, const Json& value) {
    return Input(name) && String(name, value, &out_.text);
  }
  bool Conversation(const std::string& name, const Json& value) {
    return Input(name) && Messages(name, value, &out_.messages);
  }
  bool Tokens(const std::string& name, const Json& value) {
    return Input(name) && TokenIds(name, value, &out_.tokens);
  }
  bool AddSpecial(const std::string& name, const Json& value) {
    bool add = false;
    if (!Bool(name, value, &add)) return false;
    if (add_special_ && *add_special_ != add) {
      return WrongValue(name, "add_special_tokens and add_special differ");
    }
    add_special_ = add;
    add_special_name_ = name;
    return true;
  }
  bool ParseSpecial(const std::string& name, const Json& value) {
    return Bool(name, value, &parse_special_.emplace());
  }
  bool AddGenerationPrompt(const std::string& name, const Json& value) {
    add_generation_prompt_ = true;
    return Bool(name, value, &out_.add_generation_prompt);
  }
  bool ReturnTokenStrs(const std::string& name, const Json& value) {
    return Bool(name, value, &out_.return_token_strs);
  }
  bool WithPieces(const std::string& name, const Json& value) {
    return Bool(name, value, &out_.with_pieces);
  }

  // What only shows once all parameters are known.
  bool Complete() {
    if (input_.empty()) {
      switch (endpoint_) {
        case UtilityEndpoint::kTokenize:
          return Missing("prompt");
        case UtilityEndpoint::kDetokenize:
          return Missing("tokens");
        case UtilityEndpoint::kApplyTemplate:
          return Missing("messages");
      }
    }
    if (input_ == "messages") {
      // vLLM's default for messages, false, adds to what the template writes: nothing.
      if (add_special_.value_or(false)) return OnlyWithText(add_special_name_);
      if (parse_special_) return OnlyWithText("parse_special");
      return true;
    }
    if (add_generation_prompt_) {
      return WrongValue("add_generation_prompt", "only allowed with messages");
    }
    out_.add_bos = add_special_.value_or(input_ == "prompt");
    out_.parse_special = parse_special_.value_or(input_ == "content");
    return true;
  }
  bool OnlyWithText(const std::string& name) {
    return WrongValue(name, "with messages, the chat template decides");
  }

  const UtilityEndpoint endpoint_;
  UtilityRequest out_;
  std::string input_;  // the parameter that is tokenized, turned into text or rendered
  std::optional<bool> add_special_;
  std::string add_special_name_;  // as the client spelled it
  std::optional<bool> parse_special_;
  bool add_generation_prompt_ = false;  // given
};

}  // namespace

std::variant<UtilityRequest, ApiError> ParseUtilityRequest(std::string_view body,
                                                           UtilityEndpoint endpoint) {
  return UtilityParser(endpoint).Run(body);
}

std::vector<std::string_view> UtilityParameterNames(UtilityEndpoint endpoint) {
  return UtilityParser::Names(endpoint);
}

}  // namespace innerq
