#include "models/sentencepiece_tokenizer.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "models/files.h"
#include "models/utf8.h"

namespace innerq {
namespace {

using nlohmann::json;
using sentencepiece::SentencePieceProcessor;

constexpr std::string_view kSpaceMark = "\xe2\x96\x81";  // U+2581, a space within a piece
constexpr int32_t kMaxTokenId = (1 << 20) - 1;

// What tokenizer_config.json says; the defaults hold where it is silent.
struct TokenizerConfig {
  struct AddedToken {
    int32_t id = 0;
    std::string content;
    bool special = false;
  };
  bool add_bos = true;
  bool legacy = true;
  bool add_prefix_space = true;
  std::optional<std::string> bos_token;
  std::optional<std::string> eos_token;
  std::vector<AddedToken> added_tokens;
};

Error Damaged(const std::filesystem::path& path, const std::string& what) {
  return {ErrorCode::kDataLoss, path.string() + ": " + what};
}

// A flag that may be absent or null.
Result<bool> ReadFlag(const json& file, const char* key, bool fallback) {
  const auto at = file.find(key);
  if (at == file.end() || at->is_null()) return fallback;
  if (!at->is_boolean()) {
    return Error{ErrorCode::kDataLoss, std::string(key) + ": expected true or false"};
  }
  return at->get<bool>();
}

// The text of "bos_token" or the like: a string, or an object with "content".
std::optional<std::string> ReadTokenText(const json& file, const char* key) {
  const auto at = file.find(key);
  if (at == file.end()) return std::nullopt;
  if (at->is_string()) return at->get<std::string>();
  if (!at->is_object()) return std::nullopt;
  const auto content = at->find("content");
  if (content == at->end() || !content->is_string()) return std::nullopt;
  return content->get<std::string>();
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
    const auto content = value.find("content");
    if (content == value.end() || !content->is_string()) return error;
    token.content = content->get<std::string>();
    if (token.content.empty()) return error;
    ASSIGN_OR_RETURN(token.special, ReadFlag(value, "special", false));
    tokens.push_back(std::move(token));
  }
  return tokens;
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

Result<TokenizerConfig> ReadConfig(const std::filesystem::path& path) {
  const Result<std::string> text = ReadTextFile(path, kMaxTextFileBytes);
  if (!text.ok()) {
    if (text.error().code == ErrorCode::kNotFound) return TokenizerConfig();
    return text.error();
  }
  const json file = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!file.is_object()) return Damaged(path, "not a JSON object");
  Result<TokenizerConfig> config = ParseConfig(file);
  if (!config.ok()) return Damaged(path, config.error().message);
  return config;
}

// True if the model puts a space before each text: seen in how it encodes a letter.
bool AddsDummyPrefix(const SentencePieceProcessor& model) {
  std::vector<std::string> pieces;
  return model.Encode("a", &pieces).ok() && !pieces.empty() && pieces[0].starts_with(kSpaceMark);
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  Result<void> Load(const std::filesystem::path& directory) {
    ASSIGN_OR_RETURN(const TokenizerConfig config, ReadConfig(directory / "tokenizer_config.json"));
    const std::filesystem::path path = directory / "tokenizer.model";
    ASSIGN_OR_RETURN(std::string proto, ReadTextFile(path, kMaxTextFileBytes));
    if (const auto status = model_.LoadFromSerializedProto(proto); !status.ok()) {
      return Damaged(path, "not a SentencePiece model: " + status.ToString());
    }
    adds_space_ = AddsDummyPrefix(model_) && (config.legacy || config.add_prefix_space);
    prefix_every_run_ = config.legacy;
    // A protocol buffer message merges fields that come twice, the last one wins: this appends
    // normalizer_spec (3) { add_dummy_prefix (3): false }, for Encode puts the prefix itself.
    proto.append("\x1a\x02\x18\x00", 4);
    if (const auto status = model_.LoadFromSerializedProto(proto); !status.ok()) {
      return Damaged(path, "not a SentencePiece model: " + status.ToString());
    }
    ReadPieces();
    AddTokens(config.added_tokens);
    add_bos_ = config.add_bos;
    return SetEnds(config, directory / "tokenizer_config.json");
  }

  int64_t vocab_size() const override { return static_cast<int64_t>(tokens_.size()); }

  std::vector<int32_t> Encode(std::string_view text, const EncodeOptions& options) const override {
    const TextSegment segment{std::string(text), options.parse_special};
    return EncodeSegments({&segment, 1}, options.add_bos);
  }

  std::vector<int32_t> EncodeSegments(std::span<const TextSegment> segments,
                                      bool add_bos) const override {
    std::vector<int32_t> ids;
    if (add_bos && add_bos_ && bos_id_) ids.push_back(*bos_id_);
    std::string run;  // text since the last special token
    bool first_run = true;
    const auto end_run = [&] {
      EncodeRun(run, adds_space_ && (first_run || prefix_every_run_), ids);
      run.clear();
      first_run = false;
    };
    for (const TextSegment& segment : segments) {
      std::string_view rest = segment.text;
      while (segment.trusted && !rest.empty()) {
        const auto [at, id] = FindControl(rest);
        if (id < 0) break;
        run += rest.substr(0, at);
        end_run();
        ids.push_back(id);
        rest.remove_prefix(at + Token(id).text.size());
      }
      run += rest;
    }
    end_run();
    return ids;
  }

  std::string TokenBytes(int32_t id, bool first, bool special) const override {
    CHECK(id >= 0, "token id " + std::to_string(id));
    if (id >= vocab_size()) return "";
    const TokenInfo& token = Token(id);
    switch (token.kind) {
      case Kind::kSpecial:
        return special ? token.text : "";
      case Kind::kByte:
        return std::string(1, static_cast<char>(token.byte));
      case Kind::kAdded:
        return token.text;
      case Kind::kPiece:
        break;
    }
    std::string text;
    std::string_view piece = token.text;
    if (first && adds_space_ && piece.starts_with(kSpaceMark)) {
      piece.remove_prefix(kSpaceMark.size());
    }
    for (size_t at; (at = piece.find(kSpaceMark)) != piece.npos;) {
      text.append(piece, 0, at).append(1, ' ');
      piece.remove_prefix(at + kSpaceMark.size());
    }
    return text.append(piece);
  }

  bool IsSpecial(int32_t id) const override {
    return id >= 0 && id < vocab_size() && Token(id).kind == Kind::kSpecial;
  }

  std::optional<int32_t> TokenId(std::string_view text) const override {
    const auto at = ids_.find(std::string(text));
    if (at == ids_.end()) return std::nullopt;
    return at->second;
  }

  std::optional<int32_t> bos_id() const override { return bos_id_; }
  std::optional<int32_t> eos_id() const override { return eos_id_; }

 private:
  enum class Kind {
    kPiece,    // text, with U+2581 for spaces
    kByte,     // one byte
    kSpecial,  // control and unknown tokens: no text of their own
    kAdded,    // plain text beside the SentencePiece vocabulary
  };
  struct TokenInfo {
    std::string text;
    Kind kind = Kind::kSpecial;
    uint8_t byte = 0;  // kByte only
  };

  const TokenInfo& Token(int32_t id) const { return tokens_[static_cast<size_t>(id)]; }

  void ReadPieces() {
    const int count = model_.GetPieceSize();
    for (int id = 0; id < count; ++id) {
      TokenInfo token{model_.IdToPiece(id), Kind::kPiece};
      if (model_.IsControl(id) || model_.IsUnknown(id)) token.kind = Kind::kSpecial;
      if (model_.IsByte(id)) {  // "<0x0A>": checked by the library
        token.kind = Kind::kByte;
        std::from_chars(token.text.data() + 3, token.text.data() + 5, token.byte, 16);
        byte_ids_[token.byte] = id;
      }
      if (model_.IsControl(id)) controls_.push_back(id);
      ids_.emplace(token.text, id);
      tokens_.push_back(std::move(token));
    }
  }

  void AddTokens(const std::vector<TokenizerConfig::AddedToken>& added_tokens) {
    for (const TokenizerConfig::AddedToken& added : added_tokens) {
      const auto index = static_cast<size_t>(added.id);
      if (index >= tokens_.size()) tokens_.resize(index + 1);
      tokens_[index] = {added.content, added.special ? Kind::kSpecial : Kind::kAdded};
      ids_[added.content] = added.id;
      controls_.push_back(added.id);
    }
    std::sort(controls_.begin(), controls_.end());
    controls_.erase(std::unique(controls_.begin(), controls_.end()), controls_.end());
    std::stable_sort(controls_.begin(), controls_.end(), [this](int32_t a, int32_t b) {
      return Token(a).text.size() > Token(b).text.size();
    });
    for (const int32_t id : controls_) {
      begins_control_[static_cast<uint8_t>(Token(id).text.front())] = true;
    }
  }

  // Beginning- and end-of-sequence ids: tokenizer_config.json's, else the model's own.
  Result<void> SetEnds(const TokenizerConfig& config, const std::filesystem::path& path) {
    if (model_.bos_id() >= 0) bos_id_ = model_.bos_id();
    if (model_.eos_id() >= 0) eos_id_ = model_.eos_id();
    if (config.bos_token) bos_id_ = TokenId(*config.bos_token);
    if (config.eos_token) eos_id_ = TokenId(*config.eos_token);
    if (config.bos_token && !bos_id_) {
      return Damaged(path, "bos_token: \"" + *config.bos_token + "\" is not in the vocabulary");
    }
    if (config.eos_token && !eos_id_) {
      return Damaged(path, "eos_token: \"" + *config.eos_token + "\" is not in the vocabulary");
    }
    return {};
  }

  // The first control token that `text` spells, the longest if several begin there: its place and
  // id, or id -1.
  std::pair<size_t, int32_t> FindControl(std::string_view text) const {
    for (size_t at = 0; at < text.size(); ++at) {
      if (!begins_control_[static_cast<uint8_t>(text[at])]) continue;
      for (const int32_t id : controls_) {  // longest first
        if (text.substr(at).starts_with(Token(id).text)) return {at, id};
      }
    }
    return {text.size(), -1};
  }

  // Appends the ids of text without special tokens.
  void EncodeRun(std::string_view text, bool add_space, std::vector<int32_t>& ids) const {
    if (text.empty()) return;
    std::string valid = add_space ? std::string(kSpaceMark) : std::string();
    const auto end_valid = [&] {
      std::vector<int> part;
      const auto status = model_.Encode(valid, &part);
      CHECK(status.ok(), status.ToString());
      ids.insert(ids.end(), part.begin(), part.end());
      valid.clear();
    };
    while (!text.empty()) {
      const size_t length = Utf8CharLength(text);
      const std::string_view character = text.substr(0, std::max<size_t>(length, 1));
      if (length == 0 || character == kSpaceMark) {
        end_valid();
        for (const char byte : character) ids.push_back(ByteId(static_cast<uint8_t>(byte)));
      } else {
        valid += character;
      }
      text.remove_prefix(character.size());
    }
    end_valid();
  }

  int32_t ByteId(uint8_t byte) const {
    return byte_ids_[byte] >= 0 ? byte_ids_[byte] : model_.unk_id();
  }

  SentencePieceProcessor model_;
  std::vector<TokenInfo> tokens_;                 // by id
  std::unordered_map<std::string, int32_t> ids_;  // by text
  std::vector<int32_t> controls_;  // tokens that trusted text may spell, longest text first
  std::array<bool, 256> begins_control_{};  // by the first byte of their texts
  std::vector<int32_t> byte_ids_ = std::vector<int32_t>(256, -1);
  bool adds_space_ = false;        // before a text, removed again in decoding
  bool prefix_every_run_ = false;  // also after each special token
  bool add_bos_ = true;
  std::optional<int32_t> bos_id_;
  std::optional<int32_t> eos_id_;
};

}  // namespace

Result<std::shared_ptr<const Tokenizer>> LoadSentencePieceTokenizer(
    const std::filesystem::path& directory) {
  auto tokenizer = std::make_shared<SentencePieceTokenizer>();
  RETURN_IF_ERROR(tokenizer->Load(directory));
  return std::shared_ptr<const Tokenizer>(std::move(tokenizer));
}

}  // namespace innerq
