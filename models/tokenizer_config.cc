#include "models/tokenizer_config.h"

#include <charconv>
#include <nlohmann/json.hpp>

#include "models/files.h"

namespace innerq {
namespace {

using nlohmann::json;

constexpr int32_t kMaxTokenId = (1 << 20) - 1;

// A flag that may be absent or null.
Result<bool> ReadFlag(const json& file, const char* key, bool fallback) {
  const auto at = file.find(key);
  if (at == file.end() || at->is_null()) return fallback;
  if (!at->is_boolean()) {
    return Error{ErrorCode::kDataLoss, std::string(key) + ": expected true or false"};
  }
  return at->get<bool>();
}

// A string member of an object, if there is one.
std::optional<std::string> ReadText(const json& object, const char* key) {
  const auto at = object.find(key);
  if (at == object.end() || !at->is_string()) return std::nullopt;
  return at->get<std::string>();
}

// The text of "bos_token" or the like: a string, or an object with "content".
std::optional<std::string> ReadTokenText(const json& file, const char* key) {
  const auto at = file.find(key);
  return at != file.end() && at->is_object() ? ReadText(*at, "content") : ReadText(file, key);
}

// "added_tokens_decoder": id -> {"content", "special", ...}.
Result<std::vector<TokenizerConfig::AddedToken>> ReadAddedTokens(const json& file) {
  std::vector<TokenizerConfig::AddedToken> tokens;
  const auto decoder = file.find("added_tokens_decoder");
  if (decoder == file.end() || decoder->is_null()) return tokens;
  const Error error{ErrorCode::kDataLoss,
                    "added_tokens_decoder: expected ids in [0, 2^20) with \"content\" texts"};
  if (!decoder->is_object()) return error;
  for (const auto& [key, value] : decoder->items()) {
    TokenizerConfig::AddedToken token;
    const char* end = key.data() + key.size();
    const auto parsed = std::from_chars(key.data(), end, token.id);
    if (parsed.ec != std::errc() || parsed.ptr != end || token.id < 0 || token.id > kMaxTokenId ||
        !value.is_object()) {
      return error;
    }
    token.content = ReadText(value, "content").value_or("");
    if (token.content.empty()) return error;
    ASSIGN_OR_RETURN(token.special, ReadFlag(value, "special", false));
    tokens.push_back(std::move(token));
  }
  return tokens;
}

// "chat_template": a string, or a list of {"name", "template"}, one of them named "default".
Result<std::string> ReadChatTemplate(const json& file) {
  const auto at = file.find("chat_template");
  if (at == file.end() || at->is_null()) return std::string();
  if (at->is_string()) return at->get<std::string>();
  if (at->is_array()) {
    for (const json& entry : *at) {
      if (ReadText(entry, "name") != "default") continue;
      return ReadText(entry, "template").value_or("");
    }
  }
  return Error{ErrorCode::kDataLoss,
               "chat_template: expected a string, or a list with one named default"};
}

Result<TokenizerConfig> ParseConfig(const json& file) {
  TokenizerConfig config;
  ASSIGN_OR_RETURN(config.add_bos, ReadFlag(file, "add_bos_token", true));
  ASSIGN_OR_RETURN(config.legacy, ReadFlag(file, "legacy", true));
  ASSIGN_OR_RETURN(config.add_prefix_space, ReadFlag(file, "add_prefix_space", true));
  ASSIGN_OR_RETURN(config.added_tokens, ReadAddedTokens(file));
  config.bos_token = ReadTokenText(file, "bos_token");
  config.eos_token = ReadTokenText(file, "eos_token");
  return config;
}

}  // namespace

Result<TokenizerConfig> ReadTokenizerConfig(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "tokenizer_config.json";
  const auto damaged = [&path](const std::string& what) {
    return Error{ErrorCode::kDataLoss, path.string() + ": " + what};
  };
  const Result<std::string> text = ReadTextFile(path, kMaxTextFileBytes);
  if (!text.ok()) {
    if (text.error().code == ErrorCode::kNotFound) return TokenizerConfig();
    return text.error();
  }
  const json file = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!file.is_object()) return damaged("not a JSON object");
  Result<TokenizerConfig> config = ParseConfig(file);
  if (!config.ok()) return damaged(config.error().message);
  config->chat_template = ReadChatTemplate(file);
  if (!config->chat_template.ok()) {
    config->chat_template = damaged(config->chat_template.error().message);
  }
  return config;
}

}  // namespace innerq
