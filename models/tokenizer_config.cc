#include "models/tokenizer_config.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "models/files.h"

namespace innerq {
namespace {

using nlohmann::json;

// A flag that may be absent or null.
Result<std::optional<bool>> ReadFlag(const json& file, const char* key) {
  const auto at = file.find(key);
  if (at == file.end() || at->is_null()) return std::optional<bool>();
  if (!at->is_boolean()) {
    return Error{ErrorCode::kDataLoss, std::string(key) + ": expected true or false"};
  }
  return std::optional<bool>(at->get<bool>());
}

Result<bool> ReadFlag(const json& file, const char* key, bool fallback) {
  ASSIGN_OR_RETURN(const std::optional<bool> flag, ReadFlag(file, key));
  return flag.value_or(fallback);
}

// A string member of an object, if there is one.
std::optional<std::string> ReadText(const json& object, const char* key) {
  const auto at = object.find(key);
  if (at == object.end() || !at->is_string()) return std::nullopt;
  return at->get<std::string>();
}

// The text of a token: a string, or an object with "content".
std::optional<std::string> TokenText(const json& token) {
  if (token.is_string()) return token.get<std::string>();
  return token.is_object() ? ReadText(token, "content") : std::nullopt;
}

// Tokens by their names: "bos_token" and the like, and the members of "extra_special_tokens".
void ReadSpecialTokens(const json& file, TokenizerConfig& out) {
  const auto add = [&out](const std::string& name, const json& token) {
    if (const auto text = TokenText(token)) out.special_tokens.push_back({name, *text});
  };
  for (const auto& [key, value] : file.items()) {
    if (key.ends_with("_token")) add(key, value);
    if (key == "bos_token") out.bos_token = TokenText(value);
    if (key == "eos_token") out.eos_token = TokenText(value);
    if (key == "extra_special_tokens" && value.is_object()) {
      for (const auto& [name, token] : value.items()) add(name, token);
    }
    if (key == "additional_special_tokens" && value.is_array()) {
      for (const json& token : value) {
        if (const auto text = TokenText(token)) out.additional_special_tokens.push_back(*text);
      }
    }
  }
}

bool HasAddedTokens(const json& file) {
  const auto decoder = file.find("added_tokens_decoder");
  return decoder != file.end() && !decoder->is_null();
}

// "added_tokens_decoder": id -> {"content", "special", ...}.
Result<std::vector<AddedToken>> ReadAddedTokens(const json& file) {
  std::vector<AddedToken> tokens;
  if (!HasAddedTokens(file)) return tokens;
  const auto decoder = file.find("added_tokens_decoder");
  const Error error{ErrorCode::kDataLoss,
                    "added_tokens_decoder: expected ids in [0, 2^20) with \"content\" texts"};
  if (!decoder->is_object()) return error;
  for (const auto& [key, value] : decoder->items()) {
    AddedToken token;
    const char* end = key.data() + key.size();
    const auto parsed = std::from_chars(key.data(), end, token.id);
    if (parsed.ec != std::errc() || parsed.ptr != end || token.id < 0 || token.id > kMaxTokenId ||
        !value.is_object()) {
      return error;
    }
    token.content = ReadText(value, "content").value_or("");
    if (token.content.empty()) return error;
    ASSIGN_OR_RETURN(token.special, ReadFlag(value, "special", false));
    ASSIGN_OR_RETURN(token.lstrip, ReadFlag(value, "lstrip", false));
    ASSIGN_OR_RETURN(token.rstrip, ReadFlag(value, "rstrip", false));
    tokens.push_back(std::move(token));
  }
  return tokens;
}

// The special tokens that `more` has and `out` does not.
void AddSpecialTokens(const TokenizerConfig& more, TokenizerConfig& out) {
  if (!out.bos_token) out.bos_token = more.bos_token;
  if (!out.eos_token) out.eos_token = more.eos_token;
  for (const TokenizerConfig::Named& token : more.special_tokens) {
    const bool known = std::any_of(out.special_tokens.begin(), out.special_tokens.end(),
                                   [&](const auto& one) { return one.name == token.name; });
    if (!known) out.special_tokens.push_back(token);
  }
  if (out.additional_special_tokens.empty()) {
    out.additional_special_tokens = more.additional_special_tokens;
  }
}

// added_tokens.json: text -> id. Special are those of `special`.
Result<void> ReadAddedTokensFile(const json& file, const std::set<std::string>& special,
                                 TokenizerConfig& out) {
  for (const auto& [text, id] : file.items()) {
    const bool fits = !text.empty() && id.is_number_unsigned() &&
                      id.get<uint64_t>() <= static_cast<uint64_t>(kMaxTokenId);
    if (!fits) return Error{ErrorCode::kDataLoss, "expected texts with ids in [0, 2^20)"};
    out.added_tokens.push_back(
        {.id = id.get<int32_t>(), .content = text, .special = special.contains(text)});
  }
  return {};
}

// "chat_template": a string, or a list of {"name", "template"}, one of them named "default".
Result<std::vector<TokenizerConfig::Named>> ReadChatTemplates(const json& file) {
  std::vector<TokenizerConfig::Named> out;
  const auto at = file.find("chat_template");
  if (at == file.end() || at->is_null()) return out;
  if (at->is_string()) {
    out.push_back({"default", at->get<std::string>()});
    return out;
  }
  const Error error{ErrorCode::kDataLoss,
                    "chat_template: expected a string, or a list with one named default"};
  if (!at->is_array()) return error;
  bool has_default = false;
  for (const json& entry : *at) {
    const auto name = ReadText(entry, "name");
    const auto text = ReadText(entry, "template");
    if (!name || !text) continue;
    has_default = has_default || name == "default";
    out.push_back({*name, *text});
  }
  if (has_default) return out;
  return error;
}

// Of all classes, transformers' Llama tokenizers put BOS and EOS around texts themselves, and by
// these keys; others do what tokenizer.json says. A file that names no class is read as Llama's
// where the key is there.
Result<std::optional<bool>> ReadAddBos(const json& file) {
  ASSIGN_OR_RETURN(const std::optional<bool> add_bos, ReadFlag(file, "add_bos_token"));
  ASSIGN_OR_RETURN(const bool add_eos, ReadFlag(file, "add_eos_token", false));
  const auto name = ReadText(file, "tokenizer_class");
  constexpr std::string_view kLlama[] = {"LlamaTokenizer", "LlamaTokenizerFast",
                                         "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"};
  const bool is_llama =
      name && std::find(std::begin(kLlama), std::end(kLlama), *name) != std::end(kLlama);
  if (name && !is_llama) return std::optional<bool>();
  if (add_eos) {
    return InvalidArgument(
        "add_eos_token: expected false, for a prompt that ends with EOS leaves nothing to complete;"
        " found true");
  }
  return !add_bos && is_llama ? std::optional<bool>(true) : add_bos;
}

Result<TokenizerConfig> ParseConfig(const json& file) {
  TokenizerConfig config;
  ASSIGN_OR_RETURN(config.add_bos, ReadAddBos(file));
  ASSIGN_OR_RETURN(config.legacy, ReadFlag(file, "legacy", true));
  ASSIGN_OR_RETURN(config.add_prefix_space, ReadFlag(file, "add_prefix_space", true));
  ASSIGN_OR_RETURN(config.added_tokens, ReadAddedTokens(file));
  ReadSpecialTokens(file, config);
  return config;
}

Error InFile(const std::filesystem::path& path, const Error& error) {
  return {error.code, path.string() + ": " + error.message};
}

// An object without members if there is no such file.
Result<json> ReadObject(const std::filesystem::path& path) {
  const Result<std::string> text = ReadTextFile(path, kMaxTextFileBytes);
  if (!text.ok()) {
    if (text.error().code == ErrorCode::kNotFound) return json::object();
    return text.error();
  }
  json file = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!file.is_object()) return InFile(path, {ErrorCode::kDataLoss, "not a JSON object"});
  return file;
}

// The files in whose place "added_tokens_decoder" came.
Result<void> ReadOlderFiles(const std::filesystem::path& directory, TokenizerConfig& out) {
  ASSIGN_OR_RETURN(const json map, ReadObject(directory / "special_tokens_map.json"));
  TokenizerConfig names;
  ReadSpecialTokens(map, names);
  std::set<std::string> special;
  for (const TokenizerConfig* config : {&out, &names}) {
    for (const TokenizerConfig::Named& token : config->special_tokens) special.insert(token.text);
    special.insert(config->additional_special_tokens.begin(),
                   config->additional_special_tokens.end());
  }
  AddSpecialTokens(names, out);
  const std::filesystem::path path = directory / "added_tokens.json";
  ASSIGN_OR_RETURN(const json added, ReadObject(path));
  const auto read = ReadAddedTokensFile(added, special, out);
  return read.ok() ? read : InFile(path, read.error());
}

}  // namespace

Result<TokenizerConfig> ReadTokenizerConfig(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "tokenizer_config.json";
  ASSIGN_OR_RETURN(const json file, ReadObject(path));
  Result<TokenizerConfig> config = ParseConfig(file);
  if (!config.ok()) return InFile(path, config.error());
  config->chat_templates = ReadChatTemplates(file);
  if (!config->chat_templates.ok()) {
    config->chat_templates = InFile(path, config->chat_templates.error());
  }
  if (HasAddedTokens(file)) return config;
  RETURN_IF_ERROR(ReadOlderFiles(directory, *config));
  return config;
}

}  // namespace innerq
