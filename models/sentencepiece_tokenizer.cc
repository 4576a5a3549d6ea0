#include "models/sentencepiece_tokenizer.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <unordered_map>

#include "models/added_tokens.h"
#include "models/files.h"
#include "models/tokenizer_config.h"
#include "models/utf8.h"

namespace innerq {
namespace {

using sentencepiece::SentencePieceProcessor;

constexpr std::string_view kSpaceMark = "\xe2\x96\x81";  // U+2581, a space within a piece

Error Damaged(const std::filesystem::path& path, const std::string& what) {
  return {ErrorCode::kDataLoss, path.string() + ": " + what};
}

// The text of a piece: marks become spaces.
std::string PieceText(std::string_view piece) {
  std::string text;
  for (size_t at; (at = piece.find(kSpaceMark)) != piece.npos;) {
    text.append(piece, 0, at).append(1, ' ');
    piece.remove_prefix(at + kSpaceMark.size());
  }
  return text.append(piece);
}

// True if the model puts a space before each text: seen in how it encodes a letter.
bool AddsDummyPrefix(const SentencePieceProcessor& model) {
  std::vector<std::string> pieces;
  return model.Encode("a", &pieces).ok() && !pieces.empty() && pieces[0].starts_with(kSpaceMark);
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  Result<void> Load(const std::filesystem::path& directory) {
    ASSIGN_OR_RETURN(const TokenizerConfig config, ReadTokenizerConfig(directory));
    const std::filesystem::path config_path = directory / "tokenizer_config.json";
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
    const bool lossless = IsLossless();
    RETURN_IF_ERROR(AddTokens(config.added_tokens, config_path));
    for (const TokenInfo& token : tokens_) {
      const bool is_piece = token.kind == Kind::kPiece;
      const size_t bytes = is_piece ? PieceText(token.text).size() : token.text.size();
      if (lossless) longest_ = std::max(longest_, bytes);
    }
    add_bos_ = config.add_bos.value_or(true);  // as SentencePiece models are trained
    return SetEnds(config, config_path);
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
    std::string text;
    for (const TextSegment& segment : segments) text += segment.text;
    size_t run = 0;  // where the text since the last added token begins
    const auto encode_run = [&](std::string_view part) {
      EncodeRun(part, adds_space_ && (run == 0 || prefix_every_run_), ids);
    };
    size_t at = 0;
    size_t segment_end = 0;
    for (const TextSegment& segment : segments) {
      segment_end += segment.text.size();
      while (segment.trusted && at < segment_end) {
        const AddedToken* token = added_.Find(std::string_view(text).substr(at, segment_end - at));
        if (token == nullptr) {
          ++at;
          continue;
        }
        const size_t end = at + token->content.size();
        std::string_view before = std::string_view(text).substr(run, at - run);
        if (token->lstrip) before.remove_suffix(SpaceAtEnd(before));
        encode_run(before);
        ids.push_back(token->id);
        at = end + (token->rstrip ? SpaceAtStart(std::string_view(text).substr(end)) : 0);
        run = at;
      }
      at = std::max(at, segment_end);
    }
    encode_run(std::string_view(text).substr(run));
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
    std::string_view piece = token.text;
    if (first && adds_space_ && piece.starts_with(kSpaceMark)) {
      piece.remove_prefix(kSpaceMark.size());
    }
    return PieceText(piece);
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
      ids_.emplace(token.text, id);
      tokens_.push_back(std::move(token));
    }
  }

  // True if every byte of a text is in its pieces: all bytes have one, and nothing is normalized,
  // seen in how white space, wide forms, ligatures and controls come back.
  bool IsLossless() const {
    const std::string probe =
        "  a  \t\xc2\xa0\xe3\x80\x80\xef\xbc\xa1\xef\xac\x81\xe2\x80\x8b\x01"
        "e\xcc\x81\xe1\x84\x80\xe1\x85\xa1 ";
    std::vector<int32_t> ids;
    EncodeRun(probe, /*add_space=*/false, ids);
    std::string text;
    for (const int32_t id : ids) text += TokenBytes(id, /*first=*/false, /*special=*/false);
    return text == probe && std::find(byte_ids_.begin(), byte_ids_.end(), -1) == byte_ids_.end();
  }

  Result<void> AddTokens(const std::vector<AddedToken>& added_tokens,
                         const std::filesystem::path& path) {
    std::map<int32_t, AddedToken> found;  // those that trusted text may spell, by id
    for (int id = 0; id < model_.GetPieceSize(); ++id) {
      const std::string& text = Token(id).text;
      if (model_.IsControl(id) && !text.empty()) found[id] = {.id = id, .content = text};
    }
    for (const AddedToken& added : added_tokens) {
      const bool is_byte = added.id < model_.GetPieceSize() && model_.IsByte(added.id);
      if (added.special && is_byte) {  // plain text may have to be spelled with it
        return Damaged(path, "added_tokens_decoder: token " + std::to_string(added.id) +
                                 " is a byte and cannot be special");
      }
      const auto index = static_cast<size_t>(added.id);
      if (index >= tokens_.size()) tokens_.resize(index + 1);
      // Lists of added tokens may name the model's own controls without a word about them.
      const bool is_control =
          tokens_[index].kind == Kind::kSpecial && tokens_[index].text == added.content;
      tokens_[index] = {added.content, added.special || is_control ? Kind::kSpecial : Kind::kAdded};
      ids_[added.content] = added.id;
      found[added.id] = added;
    }
    for (const auto& [id, token] : found) {
      takes_space_ |= token.lstrip || token.rstrip;
      added_.Add(token);
    }
    added_.Sort();
    return {};
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

  // Appends the ids of text without special tokens.
  void EncodeRun(std::string_view text, bool add_space, std::vector<int32_t>& ids) const {
    if (text.empty()) return;
    std::string valid = add_space ? std::string(kSpaceMark) : std::string();
    const auto end_valid = [&] {
      std::vector<int> part;
      const auto status = model_.Encode(valid, &part);
      CHECK(status.ok(), status.ToString());
      for (const int id : part) AppendPlain(id, ids);
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

  // Appends a piece that SentencePiece found in plain text: as bytes if the configuration makes it
  // special, for SentencePiece itself finds user-defined symbols in any text.
  void AppendPlain(int32_t id, std::vector<int32_t>& ids) const {
    if (!IsSpecial(id) || id == model_.unk_id()) {
      ids.push_back(id);
      return;
    }
    for (const char byte : PieceText(model_.IdToPiece(id))) {
      ids.push_back(ByteId(static_cast<uint8_t>(byte)));
    }
  }

  int32_t ByteId(uint8_t byte) const {
    return byte_ids_[byte] >= 0 ? byte_ids_[byte] : model_.unk_id();
  }

  SentencePieceProcessor model_;
  std::vector<TokenInfo> tokens_;                 // by id
  std::unordered_map<std::string, int32_t> ids_;  // by text
  AddedTokens added_;         // the model's controls and those of the configuration
  bool takes_space_ = false;  // some of them takes the white space beside it
  std::vector<int32_t> byte_ids_ = std::vector<int32_t>(256, -1);
  size_t longest_ = 0;             // bytes that a token stands for; 0: no bound
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
