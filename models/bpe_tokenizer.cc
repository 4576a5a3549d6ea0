#include "models/bpe_tokenizer.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <unordered_map>

#include "models/added_tokens.h"
#include "models/bpe_model.h"
#include "models/pretokenizer.h"
#include "models/tokenizer_config.h"
#include "models/tokenizer_json.h"
#include "models/utf8.h"

namespace innerq {
namespace {

// The byte that a token like "<0x0A>" stands for, or -1.
int ByteOfToken(std::string_view text) {
  uint8_t byte = 0;
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return -1;
  const auto parsed = std::from_chars(text.data() + 3, text.data() + 5, byte, 16);
  return parsed.ec == std::errc() && parsed.ptr == text.data() + 5 ? byte : -1;
}

// Runs the decoder's steps on a token.
class TokenDecoder {
 public:
  explicit TokenDecoder(const std::vector<DecodeStep>& steps) : steps_(steps) {
    const std::array<std::string, 256> alphabet = ByteAlphabet();
    for (size_t byte = 0; byte < 256; ++byte) bytes_[alphabet[byte]] = static_cast<char>(byte);
  }

  std::string Decode(std::string text) const {
    for (const DecodeStep& step : steps_) {
      text = std::visit([&](const auto& kind) { return Run(kind, std::move(text)); }, step);
    }
    return text;
  }

 private:
  static std::string Run(const DecodeReplace& step, std::string text) {
    std::string out;
    size_t end = 0;
    for (size_t at; (at = text.find(step.from, end)) != text.npos; end = at + step.from.size()) {
      out.append(text, end, at - end).append(step.to);
    }
    return out.append(text, end);
  }
  static std::string Run(const DecodeByteFallback&, std::string text) {
    const int byte = ByteOfToken(text);
    return byte < 0 ? text : std::string(1, static_cast<char>(byte));
  }
  static std::string Run(const DecodeStrip& step, std::string text) {
    std::string_view rest = text;
    for (int64_t i = 0; i < step.start && rest.starts_with(step.content); ++i) {
      rest.remove_prefix(step.content.size());
    }
    for (int64_t i = 0; i < step.stop && rest.ends_with(step.content); ++i) {
      rest.remove_suffix(step.content.size());
    }
    return std::string(rest);
  }
  // A token with a character outside the alphabet stands for itself.
  std::string Run(const DecodeByteAlphabet&, std::string text) const {
    std::string out;
    for (std::string_view rest = text; !rest.empty();) {
      const std::string character(rest.substr(0, std::max<size_t>(1, Utf8CharLength(rest))));
      const auto at = bytes_.find(character);
      if (at == bytes_.end()) return text;
      out += at->second;
      rest.remove_prefix(character.size());
    }
    return out;
  }

  const std::vector<DecodeStep>& steps_;
  std::unordered_map<std::string, char> bytes_;
};

template <typename Step, typename Steps>
bool Has(const Steps& steps) {
  return std::any_of(steps.begin(), steps.end(),
                     [](const auto& step) { return std::holds_alternative<Step>(step); });
}

class BpeTokenizer : public Tokenizer {
 public:
  Result<void> Load(TokenizerJson json, const TokenizerConfig& config) {
    if (json.appends && !config.add_bos) {
      return *json.appends;  // else the post-processor is not asked
    }
    ReadVocabulary(json);
    RETURN_IF_ERROR(ReadAddedTokens(json, config));
    RETURN_IF_ERROR(ReadBytes(json));
    FindLongest(json);
    std::vector<bool> barred;
    for (const TokenInfo& token : tokens_) barred.push_back(token.special || token.is_byte);
    const bool spells_bytes =
        json.byte_fallback && std::find(byte_ids_.begin(), byte_ids_.end(), -1) == byte_ids_.end();
    for (const DecodeStep& step : json.decode_steps) {
      const auto* replace = std::get_if<DecodeReplace>(&step);
      if (spells_bytes && replace != nullptr && mark_.empty()) mark_ = replace->from;
    }
    const std::vector<int32_t> no_bytes(256, -1);
    ASSIGN_OR_RETURN(
        model_,
        BpeModel::Create(
            json.vocabulary, json.merges, barred, json.byte_fallback ? byte_ids_ : no_bytes,
            {.unk_id = unk_id_, .fuse_unk = json.fuse_unk, .ignore_merges = json.ignore_merges}));
    ASSIGN_OR_RETURN(pretokenizer_, Pretokenizer::Create(std::move(json.text_steps)));
    for (const int32_t id : json.prefix) {
      if (id < vocab_size() && Token(id).known) continue;
      return Error{ErrorCode::kDataLoss,
                   "post_processor: expected ids of tokens, found " + std::to_string(id)};
    }
    if (!json.prefix.empty()) bos_id_ = json.prefix.front();
    prefix_ = std::move(json.prefix);
    return {};
  }

  // Beginning- and end-of-sequence ids that tokenizer_config.json names, and whether a text begins
  // with the first; where it is silent, the post-processor of tokenizer.json says what does.
  Result<void> SetEnds(const TokenizerConfig& config) {
    if (config.bos_token) bos_id_ = TokenId(*config.bos_token);
    if (config.eos_token) eos_id_ = TokenId(*config.eos_token);
    if (config.bos_token && !bos_id_) {
      return Error{ErrorCode::kDataLoss,
                   "bos_token: \"" + *config.bos_token + "\" is not in the vocabulary"};
    }
    if (config.eos_token && !eos_id_) {
      return Error{ErrorCode::kDataLoss,
                   "eos_token: \"" + *config.eos_token + "\" is not in the vocabulary"};
    }
    if (config.add_bos == false) prefix_.clear();
    if (config.add_bos == true && prefix_.empty()) {
      if (!bos_id_) {
        return InvalidArgument("bos_token: expected a token to begin texts with, found none");
      }
      prefix_ = {*bos_id_};
    }
    return {};
  }

  int64_t vocab_size() const override { return static_cast<int64_t>(tokens_.size()); }

  std::vector<int32_t> Encode(std::string_view text, const EncodeOptions& options) const override {
    const TextSegment segment{std::string(text), options.parse_special};
    return EncodeSegments({&segment, 1}, options.add_bos);
  }

  std::vector<int32_t> EncodeSegments(std::span<const TextSegment> segments,
                                      bool add_bos) const override {
    std::vector<int32_t> ids;
    if (add_bos) ids = prefix_;
    std::string text;
    for (const TextSegment& segment : segments) text += segment.text;
    size_t run = 0;  // where the text since the last added token begins
    size_t at = 0;
    size_t segment_end = 0;
    for (const TextSegment& segment : segments) {
      segment_end += segment.text.size();
      while (at < segment_end) {
        const std::string_view rest = std::string_view(text).substr(at, segment_end - at);
        const AddedToken* token = (segment.trusted ? added_ : spaces_).Find(rest);
        if (token == nullptr) {
          ++at;
          continue;
        }
        const size_t end = at + token->content.size();
        const std::string_view before = std::string_view(text).substr(run, at - run);
        EncodeRun(before.substr(0, before.size() - (token->lstrip ? SpaceAtEnd(before) : 0)),
                  run == 0, ids);
        ids.push_back(token->id);
        at = end + (token->rstrip ? SpaceAtStart(std::string_view(text).substr(end)) : 0);
        run = at;
      }
    }
    EncodeRun(std::string_view(text).substr(run), run == 0, ids);
    return ids;
  }

  int64_t MinTokens(std::span<const TextSegment> segments) const override {
    if (longest_ == 0) return 0;
    size_t bytes = 0;
    for (const TextSegment& segment : segments) {
      bytes += takes_space_ ? BytesBesideSpace(segment.text) : segment.text.size();
    }
    return static_cast<int64_t>((bytes + longest_ - 1) / longest_);
  }

  std::string TokenBytes(int32_t id, bool first, bool special) const override {
    CHECK(id >= 0, "token id " + std::to_string(id));
    if (id >= vocab_size() || (!special && IsSpecial(id))) return "";
    const TokenInfo& token = Token(id);
    return first && token.stripped_at_start ? token.bytes.substr(text_start_.size()) : token.bytes;
  }

  bool IsSpecial(int32_t id) const override {
    return id >= 0 && id < vocab_size() && Token(id).special;
  }

  std::optional<int32_t> TokenId(std::string_view text) const override {
    const auto at = ids_.find(std::string(text));
    if (at == ids_.end()) return std::nullopt;
    return at->second;
  }

  std::optional<int32_t> bos_id() const override { return bos_id_; }
  std::optional<int32_t> eos_id() const override { return eos_id_; }

 private:
  struct TokenInfo {
    std::string bytes;   // what it adds to a text
    bool known = false;  // false: no token has this id
    bool special = false;
    bool is_byte = false;            // "<0x0A>" of a byte-fallback model
    bool stripped_at_start = false;  // at the start of a text, text_start_ is taken off `bytes`
  };

  const TokenInfo& Token(int32_t id) const { return tokens_[static_cast<size_t>(id)]; }

  TokenInfo& Grow(int32_t id) {
    const auto index = static_cast<size_t>(id);
    if (index >= tokens_.size()) tokens_.resize(index + 1);
    return tokens_[index];
  }

  void ReadVocabulary(const TokenizerJson& json) {
    const TokenDecoder decoder(json.decode_steps);
    text_start_ = json.text_start;
    for (const auto& [text, id] : json.vocabulary) {
      TokenInfo token{.bytes = decoder.Decode(text), .known = true};
      token.is_byte = json.byte_fallback && ByteOfToken(text) >= 0;
      token.stripped_at_start =
          !token.is_byte && !text_start_.empty() && token.bytes.starts_with(text_start_);
      Grow(id) = std::move(token);
      ids_.emplace(text, id);
    }
  }

  // Those of tokenizer.json, then what tokenizer_config.json has besides.
  Result<void> ReadAddedTokens(const TokenizerJson& json, const TokenizerConfig& config) {
    std::vector<AddedToken> tokens = json.added_tokens;
    for (const AddedToken& token : config.added_tokens) {
      const auto same = std::find_if(tokens.begin(), tokens.end(), [&](const AddedToken& other) {
        return other.id == token.id && other.content == token.content;
      });
      if (same == tokens.end()) {
        tokens.push_back(token);
      } else {
        same->special |= token.special;
      }
    }
    for (const AddedToken& token : tokens) {
      TokenInfo& info = Grow(token.id);
      const auto [at, is_new] = ids_.emplace(token.content, token.id);
      if (at->second != token.id || (is_new && info.known)) {
        return Error{ErrorCode::kDataLoss, "added token \"" + token.content + "\": expected id " +
                                               std::to_string(token.id) +
                                               " and text to be the same token everywhere, found "
                                               "another with its " +
                                               (is_new ? "id" : "text")};
      }
      if (token.special && info.is_byte) {  // plain text may have to be spelled with it
        return Error{ErrorCode::kDataLoss, "added token \"" + token.content +
                                               "\": expected a byte token not to be special"};
      }
      info = {
          .bytes = token.content, .known = true, .special = token.special, .is_byte = info.is_byte};
      longest_added_ = std::max(longest_added_, token.content.size());
      takes_space_ |= token.lstrip || token.rstrip;
      const bool is_space = !token.special && SpaceAtStart(token.content) == token.content.size();
      const bool is_late = is_space && token.normalized && !token.lstrip && !token.rstrip;
      (is_late ? late_spaces_ : added_).Add(token);
      if (is_space && !is_late) spaces_.Add(token);
    }
    added_.Sort();
    spaces_.Sort();
    late_spaces_.Sort();
    return {};
  }

  // Finds the most bytes of a text that a token stands for, in the form that BPE meets: no step
  // makes a text shorter, or there is no bound.
  void FindLongest(const TokenizerJson& json) {
    const bool byte_level = Has<ByteAlphabetStep>(json.text_steps);
    for (const TextStep& step : json.text_steps) {
      const auto* replace = std::get_if<ReplaceStep>(&step);
      const auto* split = std::get_if<SplitStep>(&step);
      if (split != nullptr && split->behavior == SplitBehavior::kRemoved) return;
      if (replace == nullptr) continue;
      const TextPattern& pattern = replace->pattern;
      if (pattern.is_regex || replace->content.size() < pattern.text.size()) return;
    }
    const bool has_bytes = std::find(byte_ids_.begin(), byte_ids_.end(), -1) == byte_ids_.end();
    if (!has_bytes && json.fuse_unk) return;
    longest_ = std::max<size_t>(longest_added_, 4);  // 4: a character that has no token
    for (const auto& [text, id] : json.vocabulary) {
      // A character of the byte alphabet is a byte.
      const auto bytes = byte_level ? std::count_if(text.begin(), text.end(), StartsCharacter)
                                    : static_cast<std::ptrdiff_t>(text.size());
      longest_ = std::max(longest_, static_cast<size_t>(bytes));
    }
  }
  static bool StartsCharacter(char byte) { return (static_cast<uint8_t>(byte) & 0xc0) != 0x80; }

  // Finds the tokens of single bytes. Every byte must have one, or there must be an unknown token.
  Result<void> ReadBytes(const TokenizerJson& json) {
    const bool byte_level = Has<ByteAlphabetStep>(json.text_steps);
    if (byte_level != Has<DecodeByteAlphabet>(json.decode_steps)) {
      return InvalidArgument(
          "decoder: expected ByteLevel if and only if there is such a "
          "pre_tokenizer");
    }
    if (json.byte_fallback && !Has<DecodeByteFallback>(json.decode_steps)) {
      return InvalidArgument("decoder: expected a ByteFallback, for model.byte_fallback is true");
    }
    if (json.byte_fallback && byte_level) {
      return InvalidArgument("model.byte_fallback: expected false with a ByteLevel pre_tokenizer");
    }
    if (json.unk_token) {
      unk_id_ = TokenId(*json.unk_token);
      if (!unk_id_) {
        return Error{ErrorCode::kDataLoss,
                     "model.unk_token: expected a token of the vocabulary, "
                     "found \"" +
                         *json.unk_token + '"'};
      }
    }
    const std::array<std::string, 256> alphabet = ByteAlphabet();
    for (size_t byte = 0; byte < 256; ++byte) {
      constexpr std::string_view kDigits = "0123456789ABCDEF";
      const std::string text =
          byte_level ? alphabet[byte]
                     : std::string("<0x") + kDigits[byte / 16] + kDigits[byte % 16] + ">";
      const auto id = byte_level || json.byte_fallback ? TokenId(text) : std::nullopt;
      if (id && !IsSpecial(*id)) byte_ids_[byte] = *id;
      if (byte_ids_[byte] >= 0 || unk_id_) continue;
      return InvalidArgument("model.vocab: expected a token \"" + text + "\" for byte " +
                             std::to_string(byte) + ", for model.unk_token is null; found none");
    }
    return {};
  }

  // Appends the ids of text without added tokens but those of white space that are searched last.
  void EncodeRun(std::string_view text, bool begins_text, std::vector<int32_t>& ids) const {
    size_t run = 0;  // where the text since the last token begins
    for (size_t at = 0; at < text.size();) {
      const AddedToken* token = late_spaces_.Find(text.substr(at));
      if (token == nullptr) {
        ++at;
        continue;
      }
      EncodeText(text.substr(run, at - run), begins_text && run == 0, ids);
      ids.push_back(token->id);
      at += token->content.size();
      run = at;
    }
    EncodeText(text.substr(run), begins_text && run == 0, ids);
  }

  // Appends the ids of text without added tokens.
  void EncodeText(std::string_view text, bool begins_text, std::vector<int32_t>& ids) const {
    for (const TextPiece& piece : pretokenizer_.Split(text, begins_text, mark_)) {
      if (!piece.raw) {
        model_.Encode(piece.text, ids);
        continue;
      }
      for (const char byte : piece.text) {
        const int32_t id = byte_ids_[static_cast<uint8_t>(byte)];
        ids.push_back(id >= 0 ? id : *unk_id_);
      }
    }
  }

  std::vector<TokenInfo> tokens_;                 // by id
  std::unordered_map<std::string, int32_t> ids_;  // by text
  AddedTokens added_;
  AddedTokens spaces_;        // those of them that are found in untrusted text, too
  AddedTokens late_spaces_;   // found in what the others left
  size_t longest_added_ = 0;  // bytes
  bool takes_space_ = false;  // some added token takes the white space beside it
  size_t longest_ = 0;        // bytes that a token stands for beside such space; 0: no bound
  BpeModel model_;
  Pretokenizer pretokenizer_;
  std::vector<int32_t> byte_ids_ = std::vector<int32_t>(256, -1);
  std::string mark_;        // text that becomes byte tokens, for decoding would change it
  std::string text_start_;  // put before each text, removed again in decoding
  std::vector<int32_t> prefix_;
  std::optional<int32_t> unk_id_;
  std::optional<int32_t> bos_id_;
  std::optional<int32_t> eos_id_;
};

}  // namespace

Result<std::shared_ptr<const Tokenizer>> LoadBpeTokenizer(const std::filesystem::path& directory) {
  ASSIGN_OR_RETURN(const TokenizerConfig config, ReadTokenizerConfig(directory));
  const std::filesystem::path path = directory / "tokenizer.json";
  ASSIGN_OR_RETURN(TokenizerJson json, ReadTokenizerJson(path));
  auto tokenizer = std::make_shared<BpeTokenizer>();
  const auto in_file = [](const std::filesystem::path& file, const Error& error) {
    return Error{error.code, file.string() + ": " + error.message};
  };
  if (const auto loaded = tokenizer->Load(std::move(json), config); !loaded.ok()) {
    return in_file(path, loaded.error());
  }
  if (const auto set = tokenizer->SetEnds(config); !set.ok()) {
    return in_file(directory / "tokenizer_config.json", set.error());
  }
  return std::shared_ptr<const Tokenizer>(std::move(tokenizer));
}

}  // namespace innerq
