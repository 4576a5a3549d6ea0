#include "server/openai_request.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>

#include "server/request_parser.h"

namespace innerq {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxStops = 16;
constexpr size_t kMaxStopBytes = 4096;
constexpr size_t kMaxStopTokenIds = 128;
constexpr size_t kMaxSaltBytes = 256;

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

// Of these, the values beside null that ask for nothing, as JSON.
constexpr std::pair<std::string_view, std::string_view> kAskForNothing[] = {
    {"metadata", "{}"},
    {"modalities", R"(["text"])"},
    {"response_format", R"({"type": "text"})"},
    {"service_tier", R"("auto")"},
    {"service_tier", R"("default")"},
    {"store", "false"},
    {"suffix", R"("")"},
    {"tool_choice", R"("none")"},
    {"tools", "[]"},
};

bool Contains(std::span<const std::string_view> names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// Which endpoints have a parameter; anything else is unsupported.
constexpr unsigned kCompletions = 1, kChat = 2, kBoth = kCompletions | kChat;

// Reads one request.
class OpenAiParser : public RequestParser<Json> {
 public:
  explicit OpenAiParser(bool chat) { out_.chat = chat; }

  std::variant<ApiRequest, ApiError> Run(std::string_view body) {
    Json json;
    if (!Object(body, &json)) return *error_;
    for (const auto& [name, value] : json.items()) {
      if (!Parameter(name, value)) return *error_;
    }
    if (!Complete(json)) return *error_;
    return std::move(out_);
  }

  static std::vector<std::string_view> Names(bool chat) {
    std::vector<std::string_view> names = NamesOf(Entries(), chat ? kChat : kCompletions);
    const auto others = chat ? std::span<const std::string_view>(kOtherChat) : kOtherCompletions;
    names.insert(names.end(), others.begin(), others.end());
    return names;
  }

 private:
  // Ranges of numbers are ValidateSamplingParams' business.
  bool Number(const std::string& name, const Json& value, float* result) {
    if (!value.is_number()) return WrongType(name, "a number");
    *result = value.get<float>();
    return true;
  }

  static std::span<const Entry<OpenAiParser>> Entries() {
    static constexpr Entry<OpenAiParser> kEntries[] = {
        {"model", kBoth, &OpenAiParser::Model},
        {"prompt", kCompletions, &OpenAiParser::Prompt},
        {"messages", kChat, &OpenAiParser::Conversation},
        {"n", kBoth, &OpenAiParser::N},
        {"best_of", kCompletions, &OpenAiParser::BestOf},
        {"max_tokens", kBoth, &OpenAiParser::MaxTokens},
        {"max_completion_tokens", kChat, &OpenAiParser::MaxTokens},
        {"min_tokens", kBoth, &OpenAiParser::MinTokens},
        {"temperature", kBoth, &OpenAiParser::Sampling},
        {"top_p", kBoth, &OpenAiParser::Sampling},
        {"min_p", kBoth, &OpenAiParser::Sampling},
        {"repetition_penalty", kBoth, &OpenAiParser::Sampling},
        {"presence_penalty", kBoth, &OpenAiParser::Sampling},
        {"frequency_penalty", kBoth, &OpenAiParser::Sampling},
        {"top_k", kBoth, &OpenAiParser::TopK},
        {"seed", kBoth, &OpenAiParser::Seed},
        {"logit_bias", kBoth, &OpenAiParser::LogitBias},
        {"logprobs", kCompletions, &OpenAiParser::NumLogprobs},
        {"logprobs", kChat, &OpenAiParser::Logprobs},
        {"top_logprobs", kChat, &OpenAiParser::TopLogprobs},
        {"stop", kBoth, &OpenAiParser::Stop},
        {"stop_token_ids", kBoth, &OpenAiParser::StopTokenIds},
        {"ignore_eos", kBoth, &OpenAiParser::Flag},
        {"echo", kCompletions, &OpenAiParser::Flag},
        {"include_stop_str_in_output", kBoth, &OpenAiParser::Flag},
        {"skip_special_tokens", kBoth, &OpenAiParser::Flag},
        {"add_special_tokens", kCompletions, &OpenAiParser::Flag},
        {"parse_special", kCompletions, &OpenAiParser::Flag},
        {"stream", kBoth, &OpenAiParser::Flag},
        {"stream_options", kBoth, &OpenAiParser::StreamOptions},
        {"cache_salt", kBoth, &OpenAiParser::CacheSalt},
        {"user", kBoth, &OpenAiParser::User},
    };
    return kEntries;
  }

  bool Parameter(const std::string& name, const Json& value) {
    if (const auto* entry = Find(Entries(), name, out_.chat ? kChat : kCompletions)) {
      return value.is_null() || (this->*entry->method)(name, value);
    }
    return AsksForNothing(name, value) || Unsupported(name);
  }

  // A parameter that is not implemented, with a value that is its absence.
  bool AsksForNothing(std::string_view name, const Json& value) const {
    if (out_.chat ? !Contains(kOtherChat, name) : !Contains(kOtherCompletions, name)) return false;
    return value.is_null() ||
           std::any_of(std::begin(kAskForNothing), std::end(kAskForNothing),
                       [&](const auto& entry) {
                         return entry.first == name && value == Json::parse(entry.second);
                       });
  }

  bool Model(const std::string& name, const Json& value) {
    return String(name, value, &out_.model);
  }
  bool CacheSalt(const std::string& name, const Json& value) {
    if (!String(name, value, &out_.cache_salt)) return false;
    if (out_.cache_salt.empty()) return WrongValue(name, "an empty string");
    return out_.cache_salt.size() <= kMaxSaltBytes ||
           WrongValue(name, "longer than " + std::to_string(kMaxSaltBytes) + " bytes");
  }
  bool User(const std::string& name, const Json& value) {
    std::string unused;
    return String(name, value, &unused);
  }

  bool Prompt(const std::string& name, const Json& value) {
    const bool ids = value.is_array() && !value.empty() && value[0].is_number();
    if (value.is_string() || ids) return OnePrompt(name, value);
    const bool list = value.is_array() && !value.empty();
    if (!list || !(value[0].is_string() || value[0].is_array())) {
      return WrongType(name, "a string, token ids, or a list of either");
    }
    if (std::ssize(value) > kMaxChoices) {
      return WrongValue(name, "more than " + std::to_string(kMaxChoices) + " prompts");
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

  bool Conversation(const std::string& name, const Json& value) {
    return Messages(name, value, &out_.messages);
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
        return WrongValue(name, "\"" + Quotable(key) + "\" is not a token id");
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
    if (name == "parse_special") return Bool(name, value, &out_.parse_special);
    CHECK(name == "stream", name);
    return Bool(name, value, &out_.stream);
  }
  bool StreamOptions(const std::string& name, const Json& value) {
    if (!value.is_object()) return WrongType(name, "an object");
    for (const auto& [key, member] : value.items()) {
      const std::string at = name + "." + key;
      // What is served; OpenAI pads events unless it is told not to.
      if (key == "include_obfuscation" && (member.is_null() || member == false)) continue;
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

  // What only shows once all parameters are known.
  bool Complete(const Json& json) {
    const char* const input = out_.chat ? "messages" : "prompt";
    if (out_.model.empty()) return Missing("model");
    if (!Has(json, input)) return Missing(input);
    if (stream_options_ && !out_.stream) {
      return WrongValue("stream_options", "only allowed with stream: true");
    }
    if (top_logprobs_.value_or(0) > 0 && !logprobs_) {
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
    const auto refusal = CheckNumChoices(out_, kMaxChoices);
    return !refusal || Fail(*refusal);
  }

  ApiRequest out_;
  std::optional<int64_t> best_of_;
  bool logprobs_ = false;
  std::optional<int32_t> top_logprobs_;
  bool stream_options_ = false;
};

}  // namespace

std::variant<ApiRequest, ApiError> ParseApiRequest(std::string_view body, bool chat) {
  return OpenAiParser(chat).Run(body);
}

std::optional<ApiError> CheckNumChoices(const ApiRequest& request, int64_t most,
                                        const std::string& why) {
  const int64_t prompts = request.chat ? 1 : std::ssize(request.prompts);
  if (prompts * request.best_of <= most) return std::nullopt;
  return WrongValueError(prompts > most                ? "prompt"
                         : request.best_of > request.n ? "best_of"
                                                       : "n",
                         "more than " + std::to_string(most) + " choices in all" + why);
}

std::vector<std::string_view> ApiParameterNames(bool chat) { return OpenAiParser::Names(chat); }

}  // namespace innerq
