#include "server/openai_request.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>

#include "server/json_check.h"

namespace innerq {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxStops = 16;
constexpr size_t kMaxStopBytes = 4096;
constexpr size_t kMaxStopTokenIds = 128;

// OpenAI's parameters that are not implemented here.
constexpr std::string_view kOtherChat[] = {
    "audio",
    "function_call",
    "functions",
    "metadata",
    "modalities",
    "moderation",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "service_tier",
    "store",
    "tool_choice",
    "tools",
    "verbosity",
    "web_search_options",
};
constexpr std::string_view kOtherCompletions[] = {"suffix"};
// What OpenAI's messages have, in requests or answers.
constexpr std::string_view kMessageMembers[] = {"annotations",   "audio",        "content",
                                                "function_call", "name",         "refusal",
                                                "role",          "tool_call_id", "tool_calls"};

bool Contains(std::span<const std::string_view> names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// What the endpoints share and what one of them alone has; anything else is unsupported.
enum class Endpoint { kBoth, kCompletions, kChat };

// Reads one request. The first error stays; after it every method returns false.
class Parser {
 public:
  explicit Parser(bool chat) { out_.chat = chat; }

  std::variant<ApiRequest, ApiError> Run(std::string_view body) {
    if (const auto valid = CheckJson(body, IndexStyle::kBrackets); !valid) {
      return InvalidJsonError(valid.error());
    }
    const Json json = Json::parse(body);
    if (!json.is_object()) {
      return InvalidJsonError(InvalidArgument("expected a JSON object"));
    }
    for (const auto& [name, value] : json.items()) {
      if (!Parameter(name, value)) return *error_;
    }
    if (!Complete(json)) return *error_;
    return std::move(out_);
  }

  std::variant<std::vector<ChatMessage>, ApiError> RunMessages(std::string_view json) {
    if (!Messages("messages", Json::parse(json))) return *error_;
    return std::move(out_.messages);
  }

  static std::vector<std::string_view> Names(bool chat) {
    std::vector<std::string_view> names;
    for (const Entry& entry : Entries()) {
      if (entry.endpoint != (chat ? Endpoint::kCompletions : Endpoint::kChat)) {
        names.push_back(entry.name);
      }
    }
    const auto others = chat ? std::span<const std::string_view>(kOtherChat) : kOtherCompletions;
    names.insert(names.end(), others.begin(), others.end());
    return names;
  }

 private:
  bool Fail(ApiError error) {
    error_ = std::move(error);
    return false;
  }
  bool WrongType(const std::string& name, const char* expected) {
    return Fail(WrongTypeError(name, expected));
  }
  bool WrongValue(const std::string& name, const std::string& reason) {
    return Fail(WrongValueError(name, reason));
  }
  bool Unsupported(const std::string& name, const std::string& detail = "") {
    return Fail(UnsupportedError(name, detail));
  }

  bool Integer(const std::string& name, const Json& value, int64_t low, int64_t high,
               int64_t* result) {
    if (value.is_number_float()) {
      const auto whole = WholeNumber(value.get<double>());
      return whole ? Integer(name, *whole, low, high, result) : WrongType(name, "an integer");
    }
    if (!value.is_number_integer()) return WrongType(name, "an integer");
    const bool huge = value.is_number_unsigned() &&
                      value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()};
    const int64_t number = huge ? 0 : value.get<int64_t>();
    if (huge || number < low || number > high) {
      return WrongValue(
          name, "expected an integer from " + std::to_string(low) + " to " + std::to_string(high));
    }
    *result = number;
    return true;
  }
  // Ranges of numbers are ValidateSamplingParams' business.
  bool Number(const std::string& name, const Json& value, float* result) {
    if (!value.is_number()) return WrongType(name, "a number");
    *result = value.get<float>();
    return true;
  }
  bool Bool(const std::string& name, const Json& value, bool* result) {
    if (!value.is_boolean()) return WrongType(name, "a boolean");
    *result = value.get<bool>();
    return true;
  }
  bool String(const std::string& name, const Json& value, std::string* result) {
    if (!value.is_string()) return WrongType(name, "a string");
    *result = value.get<std::string>();
    return true;
  }
  bool TokenIds(const std::string& name, const Json& value, std::vector<int32_t>* result) {
    if (!value.is_array()) return WrongType(name, "an array of token ids");
    for (const Json& item : value) {
      int64_t id = 0;
      if (!Integer(name, item, 0, std::numeric_limits<int32_t>::max(), &id)) return false;
      result->push_back(static_cast<int32_t>(id));
    }
    return true;
  }

  struct Entry {
    std::string_view name;
    Endpoint endpoint;
    bool (Parser::*method)(const std::string&, const Json&);
  };
  static std::span<const Entry> Entries() {
    static constexpr Entry kEntries[] = {
        {"model", Endpoint::kBoth, &Parser::Model},
        {"prompt", Endpoint::kCompletions, &Parser::Prompt},
        {"messages", Endpoint::kChat, &Parser::Messages},
        {"n", Endpoint::kBoth, &Parser::N},
        {"best_of", Endpoint::kCompletions, &Parser::BestOf},
        {"max_tokens", Endpoint::kBoth, &Parser::MaxTokens},
        {"max_completion_tokens", Endpoint::kChat, &Parser::MaxTokens},
        {"min_tokens", Endpoint::kBoth, &Parser::MinTokens},
        {"temperature", Endpoint::kBoth, &Parser::Sampling},
        {"top_p", Endpoint::kBoth, &Parser::Sampling},
        {"min_p", Endpoint::kBoth, &Parser::Sampling},
        {"repetition_penalty", Endpoint::kBoth, &Parser::Sampling},
        {"presence_penalty", Endpoint::kBoth, &Parser::Sampling},
        {"frequency_penalty", Endpoint::kBoth, &Parser::Sampling},
        {"top_k", Endpoint::kBoth, &Parser::TopK},
        {"seed", Endpoint::kBoth, &Parser::Seed},
        {"logit_bias", Endpoint::kBoth, &Parser::LogitBias},
        {"logprobs", Endpoint::kCompletions, &Parser::NumLogprobs},
        {"logprobs", Endpoint::kChat, &Parser::Logprobs},
        {"top_logprobs", Endpoint::kChat, &Parser::TopLogprobs},
        {"stop", Endpoint::kBoth, &Parser::Stop},
        {"stop_token_ids", Endpoint::kBoth, &Parser::StopTokenIds},
        {"ignore_eos", Endpoint::kBoth, &Parser::Flag},
        {"echo", Endpoint::kCompletions, &Parser::Flag},
        {"include_stop_str_in_output", Endpoint::kBoth, &Parser::Flag},
        {"skip_special_tokens", Endpoint::kBoth, &Parser::Flag},
        {"add_special_tokens", Endpoint::kCompletions, &Parser::Flag},
        {"stream", Endpoint::kBoth, &Parser::Flag},
        {"stream_options", Endpoint::kBoth, &Parser::StreamOptions},
        {"user", Endpoint::kBoth, &Parser::User},
    };
    return kEntries;
  }

  bool Parameter(const std::string& name, const Json& value) {
    const Endpoint here = out_.chat ? Endpoint::kChat : Endpoint::kCompletions;
    for (const Entry& entry : Entries()) {
      if (entry.name == name && (entry.endpoint == Endpoint::kBoth || entry.endpoint == here)) {
        return value.is_null() || (this->*entry.method)(name, value);
      }
    }
    return AsksForNothing(name, value) || Unsupported(name);
  }

  // A parameter that is not implemented, with a value that is its absence.
  bool AsksForNothing(std::string_view name, const Json& value) const {
    if (out_.chat ? !Contains(kOtherChat, name) : !Contains(kOtherCompletions, name)) return false;
    return value.is_null() || (name == "store" && value == false) ||
           (name == "response_format" && value == Json{{"type", "text"}}) ||
           (name == "modalities" && value == Json::array({"text"}));
  }

  bool Model(const std::string& name, const Json& value) {
    return String(name, value, &out_.model);
  }
  bool User(const std::string& name, const Json& value) {
    std::string unused;
    return String(name, value, &unused);
  }

  bool Prompt(const std::string& name, const Json& value) {
    const bool ids = value.is_array() && !value.empty() && value[0].is_number();
    if (value.is_string() || ids) return OnePrompt(name, value);
    if (!value.is_array() || value.empty()) {
      return WrongType(name, "a string, token ids, or a list of either");
    }
    for (const Json& item : value) {
      if (item.type() != value[0].type()) return WrongType(name, "prompts of one kind");
      if (!OnePrompt(name, item)) return false;
    }
    return true;
  }
  bool OnePrompt(const std::string& name, const Json& value) {
    ApiPrompt& prompt = out_.prompts.emplace_back();
    if (!value.is_array()) return String(name, value, &prompt.emplace<std::string>());
    if (value.empty()) return WrongValue(name, "a prompt without tokens");
    return TokenIds(name, value, &prompt.emplace<std::vector<int32_t>>());
  }
  bool N(const std::string& name, const Json& value) {
    return Integer(name, value, 1, kMaxChoices, &out_.n);
  }
  bool BestOf(const std::string& name, const Json& value) {
    return Integer(name, value, 1, kMaxChoices, &best_of_.emplace());
  }

  bool Messages(const std::string& name, const Json& value) {
    if (!value.is_array()) return WrongType(name, "an array of messages");
    for (size_t i = 0; i < value.size(); ++i) {
      const std::string path = name + "[" + std::to_string(i) + "]";
      if (!value[i].is_object()) return WrongType(path, "an object");
      ChatMessage message;
      for (const auto& [key, member] : value[i].items()) {
        const std::string at = path + "." + key;
        if (member.is_null() && Contains(kMessageMembers, key)) continue;
        if (key == "role") {
          if (!String(at, member, &message.role)) return false;
        } else if (key == "content") {
          if (!Content(at, member, &message.content)) return false;
        } else {
          return Unsupported(at);
        }
      }
      if (message.role.empty()) return Missing(path + ".role");
      if (!Has(value[i], "content")) return Missing(path + ".content");
      if (message.role == "developer") message.role = "system";  // OpenAI's later name for it
      out_.messages.push_back(std::move(message));
    }
    return true;
  }

  static bool Has(const Json& object, const char* key) {
    const auto member = object.find(key);
    return member != object.end() && !member->is_null();
  }

  // Parts of a text are lines of it, as in vLLM.
  bool Content(const std::string& name, const Json& value, std::string* text) {
    if (value.is_string()) return String(name, value, text);
    if (!value.is_array()) return WrongType(name, "a string or an array of parts");
    for (size_t i = 0; i < value.size(); ++i) {
      const std::string path = name + "[" + std::to_string(i) + "]";
      const Json& part = value[i];
      if (!part.is_object()) return WrongType(path, "an object");
      if (!Has(part, "type") || part["type"] != "text") {
        return Unsupported(path + ".type", ": only text parts are understood");
      }
      for (const auto& [key, member] : part.items()) {
        if (key != "type" && key != "text") return Unsupported(path + "." + key);
      }
      std::string piece;
      if (!Has(part, "text")) return Missing(path + ".text");
      if (!String(path + ".text", part["text"], &piece)) return false;
      if (i > 0) *text += '\n';
      *text += piece;
    }
    return true;
  }

  bool MaxTokens(const std::string& name, const Json& value) {
    int64_t count = 0;
    const int64_t low = out_.chat ? 1 : 0;
    if (!Integer(name, value, low, std::numeric_limits<int32_t>::max(), &count)) return false;
    if (out_.max_tokens && *out_.max_tokens != count) {
      return WrongValue(name, "max_tokens and max_completion_tokens differ");
    }
    out_.max_tokens = count;
    return true;
  }
  bool MinTokens(const std::string& name, const Json& value) {
    return Integer(name, value, 0, std::numeric_limits<int32_t>::max(), &out_.min_tokens);
  }

  bool Sampling(const std::string& name, const Json& value) {
    SamplingParams& params = out_.sampling;
    if (name == "temperature") return Number(name, value, &params.temperature);
    if (name == "top_p") return Number(name, value, &params.top_p);
    if (name == "min_p") return Number(name, value, &params.min_p);
    if (name == "repetition_penalty") return Number(name, value, &params.repetition_penalty);
    if (name == "presence_penalty") return Number(name, value, &params.presence_penalty);
    CHECK(name == "frequency_penalty", name);
    return Number(name, value, &params.frequency_penalty);
  }
  bool TopK(const std::string& name, const Json& value) {
    int64_t k = 0;
    if (!Integer(name, value, -1, std::numeric_limits<int32_t>::max(), &k)) return false;
    out_.sampling.top_k = k < 0 ? 0 : static_cast<int32_t>(k);  // -1, too, is "off"
    return true;
  }
  bool Seed(const std::string& name, const Json& value) {
    int64_t seed = 0;
    using Limits = std::numeric_limits<int64_t>;
    if (!Integer(name, value, Limits::min(), Limits::max(), &seed)) return false;
    out_.sampling.seed = static_cast<uint64_t>(seed);
    out_.has_seed = true;
    return true;
  }
  bool LogitBias(const std::string& name, const Json& value) {
    if (!value.is_object()) return WrongType(name, "an object");
    for (const auto& [key, bias] : value.items()) {
      int32_t id = -1;
      const char* const end = key.data() + key.size();
      if (const auto [stop, error] = std::from_chars(key.data(), end, id);
          error != std::errc() || stop != end || id < 0 || std::to_string(id) != key) {
        return WrongValue(name, "\"" + key + "\" is not a token id");
      }
      if (!Number(name, bias, &out_.sampling.logit_bias[id])) return false;
    }
    return true;
  }

  bool NumLogprobs(const std::string& name, const Json& value) {
    int64_t count = 0;
    if (!Integer(name, value, 0, 20, &count)) return false;
    out_.sampling.num_logprobs = static_cast<int32_t>(count);
    return true;
  }
  bool Logprobs(const std::string& name, const Json& value) {
    return Bool(name, value, &logprobs_);
  }
  bool TopLogprobs(const std::string& name, const Json& value) {
    int64_t count = 0;
    if (!Integer(name, value, 0, 20, &count)) return false;
    top_logprobs_ = static_cast<int32_t>(count);
    return true;
  }

  bool Stop(const std::string& name, const Json& value) {
    if (!value.is_array()) return StopString(name, value);
    if (value.size() > kMaxStops) {
      return WrongValue(name, "more than " + std::to_string(kMaxStops) + " strings");
    }
    for (const Json& item : value) {
      if (!StopString(name, item)) return false;
    }
    return true;
  }
  bool StopString(const std::string& name, const Json& value) {
    std::string text;
    if (!String(name, value, &text)) return false;
    if (text.empty()) return WrongValue(name, "an empty string");
    if (text.size() > kMaxStopBytes) {
      return WrongValue(name, "longer than " + std::to_string(kMaxStopBytes) + " bytes");
    }
    out_.stop.push_back(std::move(text));
    return true;
  }
  bool StopTokenIds(const std::string& name, const Json& value) {
    if (value.size() > kMaxStopTokenIds) {
      return WrongValue(name, "more than " + std::to_string(kMaxStopTokenIds) + " ids");
    }
    return TokenIds(name, value, &out_.stop_token_ids);
  }
  bool Flag(const std::string& name, const Json& value) {
    if (name == "ignore_eos") return Bool(name, value, &out_.ignore_eos);
    if (name == "echo") return Bool(name, value, &out_.echo);
    if (name == "include_stop_str_in_output") return Bool(name, value, &out_.include_stop);
    if (name == "skip_special_tokens") return Bool(name, value, &out_.skip_special_tokens);
    if (name == "add_special_tokens") return Bool(name, value, &out_.add_special_tokens);
    CHECK(name == "stream", name);
    return Bool(name, value, &out_.stream);
  }
  bool StreamOptions(const std::string& name, const Json& value) {
    if (!value.is_object()) return WrongType(name, "an object");
    for (const auto& [key, member] : value.items()) {
      const std::string at = name + "." + key;
      if (member.is_null() && key == "include_obfuscation") continue;
      const bool continuous = key == "continuous_usage_stats";
      if (key != "include_usage" && !continuous) return Unsupported(at);
      bool& flag = continuous ? out_.continuous_usage : out_.include_usage;
      if (!member.is_null() && !Bool(at, member, &flag)) return false;
    }
    if (out_.continuous_usage && !out_.include_usage) {
      return WrongValue(name + ".continuous_usage_stats", "only allowed with include_usage: true");
    }
    stream_options_ = true;
    return true;
  }

  bool Missing(const std::string& name) { return Fail(MissingError(name)); }

  // What only shows once all parameters are known.
  bool Complete(const Json& json) {
    const char* const input = out_.chat ? "messages" : "prompt";
    if (out_.model.empty()) return Missing("model");
    if (!Has(json, input)) return Missing(input);
    if (out_.chat && out_.messages.empty()) return WrongValue("messages", "no messages");
    if (stream_options_ && !out_.stream) {
      return WrongValue("stream_options", "only allowed with stream: true");
    }
    if (top_logprobs_ && !logprobs_) {
      return WrongValue("top_logprobs", "only allowed with logprobs: true");
    }
    if (logprobs_) out_.sampling.num_logprobs = top_logprobs_.value_or(0);
    if (out_.max_tokens && out_.min_tokens > *out_.max_tokens) {
      return WrongValue("min_tokens", "greater than max_tokens");
    }
    if (out_.max_tokens == 0 && !out_.echo) {
      return WrongValue("max_tokens", "0 is only allowed with echo: true");
    }
    return CompleteChoices();
  }

  bool CompleteChoices() {
    out_.best_of = best_of_.value_or(out_.n);
    if (out_.best_of < out_.n) return WrongValue("best_of", "less than n");
    if (out_.best_of > out_.n && out_.stream) {
      return WrongValue("best_of", "an answer that is streamed cannot be chosen among several");
    }
    const auto prompts = static_cast<int64_t>(out_.prompts.size());
    if (prompts * out_.best_of > kMaxChoices) {
      return WrongValue(prompts > kMaxChoices ? "prompt"
                        : best_of_            ? "best_of"
                                              : "n",
                        "more than " + std::to_string(kMaxChoices) + " choices in all");
    }
    return true;
  }

  ApiRequest out_;
  std::optional<ApiError> error_;
  std::optional<int64_t> best_of_;
  bool logprobs_ = false;
  std::optional<int32_t> top_logprobs_;
  bool stream_options_ = false;
};

}  // namespace

std::variant<ApiRequest, ApiError> ParseApiRequest(std::string_view body, bool chat) {
  return Parser(chat).Run(body);
}

std::vector<std::string_view> ApiParameterNames(bool chat) { return Parser::Names(chat); }

std::variant<std::vector<ChatMessage>, ApiError> ParseMessages(std::string_view json) {
  return Parser(/*chat=*/true).RunMessages(json);
}

ApiError WrongTypeError(const std::string& name, const std::string& expected) {
  return {.message = "Invalid type for '" + name + "': expected " + expected + ".",
          .param = name,
          .code = "invalid_type"};
}

ApiError WrongValueError(const std::string& name, const std::string& reason) {
  return {.message = "Invalid value for '" + name + "': " + reason + ".",
          .param = name,
          .code = "invalid_value"};
}

ApiError UnsupportedError(const std::string& name, const std::string& detail) {
  return {.message = "Unsupported parameter: '" + name + "'" + detail + ".",
          .param = name,
          .code = "unsupported_parameter"};
}

ApiError MissingError(const std::string& name) {
  return {.message = "Missing required parameter: '" + name + "'.",
          .param = name,
          .code = "missing_required_parameter"};
}

ApiError InvalidJsonError(const Error& error) {
  const std::string place = error.param.empty() ? "" : "'" + error.param + "': ";
  return {.message = "Invalid request body: " + place + error.message + ".",
          .param = error.param,
          .code = error.param.empty() ? "invalid_json" : "duplicate_parameter"};
}

}  // namespace innerq
