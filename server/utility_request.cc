#include "server/utility_request.h"

#include <limits>
#include <nlohmann/json.hpp>
#include <span>

#include "server/json_check.h"

namespace innerq {
namespace {

using Json = nlohmann::json;

// Reads one request. The first error stays; after it every method returns false.
class Parser {
 public:
  explicit Parser(UtilityEndpoint endpoint) : endpoint_(endpoint) {}

  std::variant<UtilityRequest, ApiError> Run(std::string_view body) {
    if (const auto valid = CheckJson(body, IndexStyle::kBrackets); !valid) {
      return InvalidJsonError(valid.error());
    }
    const Json json = Json::parse(body);
    if (!json.is_object()) {
      return InvalidJsonError(InvalidArgument("expected a JSON object"));
    }
    for (const auto& [name, value] : json.items()) {
      if (!Parameter(name, value)) return error_;
    }
    if (!Complete()) return error_;
    return std::move(out_);
  }

  static std::vector<std::string_view> Names(UtilityEndpoint endpoint) {
    std::vector<std::string_view> names;
    for (const Entry& entry : Entries()) {
      if (Has(entry, endpoint)) names.push_back(entry.name);
    }
    return names;
  }

 private:
  struct Entry {
    std::string_view name;
    bool tokenize, detokenize, apply_template;  // which endpoints have it
    bool (Parser::*method)(const std::string&, const Json&);
  };

  static std::span<const Entry> Entries() {
    static constexpr Entry kEntries[] = {
        {"model", true, true, true, &Parser::Model},
        {"prompt", true, false, false, &Parser::Text},
        {"content", true, false, false, &Parser::Text},
        {"messages", true, false, true, &Parser::Messages},
        {"tokens", false, true, false, &Parser::Tokens},
        {"add_special_tokens", true, false, false, &Parser::AddSpecial},
        {"add_special", true, false, false, &Parser::AddSpecial},
        {"parse_special", true, false, false, &Parser::ParseSpecial},
        {"add_generation_prompt", true, false, true, &Parser::AddGenerationPrompt},
        {"return_token_strs", true, false, false, &Parser::ReturnTokenStrs},
        {"with_pieces", true, false, false, &Parser::WithPieces},
    };
    return kEntries;
  }
  static bool Has(const Entry& entry, UtilityEndpoint endpoint) {
    switch (endpoint) {
      case UtilityEndpoint::kTokenize:
        return entry.tokenize;
      case UtilityEndpoint::kDetokenize:
        return entry.detokenize;
      case UtilityEndpoint::kApplyTemplate:
        return entry.apply_template;
    }
    return false;
  }

  bool Parameter(const std::string& name, const Json& value) {
    for (const Entry& entry : Entries()) {
      if (entry.name == name && Has(entry, endpoint_)) {
        return value.is_null() || (this->*entry.method)(name, value);
      }
    }
    return Fail(UnsupportedError(name));
  }

  bool Fail(ApiError error) {
    error_ = std::move(error);
    return false;
  }
  bool Bool(const std::string& name, const Json& value, bool* result) {
    if (!value.is_boolean()) return Fail(WrongTypeError(name, "a boolean"));
    *result = value.get<bool>();
    return true;
  }
  bool String(const std::string& name, const Json& value, std::string* result) {
    if (!value.is_string()) return Fail(WrongTypeError(name, "a string"));
    *result = value.get<std::string>();
    return true;
  }
  // Takes note of what is to be tokenized; there must be one such parameter.
  bool Input(const std::string& name) {
    if (!input_.empty()) {
      return Fail(WrongValueError(name, "'" + input_ + "' is given, too; expected one of them"));
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
  bool Messages(const std::string& name, const Json& value) {
    auto parsed = ParseMessages(value.dump());
    if (auto* error = std::get_if<ApiError>(&parsed)) return Fail(std::move(*error));
    out_.messages = std::get<std::vector<ChatMessage>>(std::move(parsed));
    if (out_.messages.empty()) return Fail(WrongValueError(name, "no messages"));
    return Input(name);
  }
  bool Tokens(const std::string& name, const Json& value) {
    if (!value.is_array()) return Fail(WrongTypeError(name, "an array of token ids"));
    constexpr int64_t kHighest = std::numeric_limits<int32_t>::max();
    for (const Json& item : value) {
      // Every id is exact as a double; what is not is refused all the same.
      const auto id = item.is_number() ? WholeNumber(item.get<double>()) : std::nullopt;
      if (!id) return Fail(WrongTypeError(name, "an array of token ids"));
      if (*id < 0 || *id > kHighest) {
        return Fail(WrongValueError(name, item.dump() + " is not a token id"));
      }
      out_.tokens.push_back(static_cast<int32_t>(*id));
    }
    return Input(name);
  }
  bool AddSpecial(const std::string& name, const Json& value) {
    bool add = false;
    if (!Bool(name, value, &add)) return false;
    if (add_special_ && *add_special_ != add) {
      return Fail(WrongValueError(name, "add_special_tokens and add_special differ"));
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
          return Fail(MissingError("prompt"));
        case UtilityEndpoint::kDetokenize:
          return Fail(MissingError("tokens"));
        case UtilityEndpoint::kApplyTemplate:
          return Fail(MissingError("messages"));
      }
    }
    if (input_ == "messages") {
      // vLLM's default for messages, false, adds to what the template writes: nothing.
      if (add_special_.value_or(false)) return OnlyWithText(add_special_name_);
      if (parse_special_) return OnlyWithText("parse_special");
      return true;
    }
    if (add_generation_prompt_) {
      return Fail(WrongValueError("add_generation_prompt", "only allowed with messages"));
    }
    out_.add_bos = add_special_.value_or(input_ == "prompt");
    out_.parse_special = parse_special_.value_or(input_ == "content");
    return true;
  }
  bool OnlyWithText(const std::string& name) {
    return Fail(WrongValueError(name, "with messages, the chat template decides"));
  }

  const UtilityEndpoint endpoint_;
  UtilityRequest out_;
  ApiError error_;
  std::string input_;  // the parameter that is tokenized, turned into text or rendered
  std::optional<bool> add_special_;
  std::string add_special_name_;  // as the client spelled it
  std::optional<bool> parse_special_;
  bool add_generation_prompt_ = false;  // given
};

}  // namespace

std::variant<UtilityRequest, ApiError> ParseUtilityRequest(std::string_view body,
                                                           UtilityEndpoint endpoint) {
  return Parser(endpoint).Run(body);
}

std::vector<std::string_view> UtilityParameterNames(UtilityEndpoint endpoint) {
  return Parser::Names(endpoint);
}

}  // namespace innerq
