#include "models/tokenizer.h"

#include "models/bpe_tokenizer.h"
#include "models/sentencepiece_tokenizer.h"

namespace innerq {

Result<std::shared_ptr<const Tokenizer>> Tokenizer::Load(const std::filesystem::path& directory) {
  std::error_code ignored;  // what cannot be looked at counts as absent
  if (std::filesystem::exists(directory / "tokenizer.json", ignored)) {
    return LoadBpeTokenizer(directory);
  }
  if (std::filesystem::exists(directory / "tokenizer.model", ignored)) {
    return LoadSentencePieceTokenizer(directory);
  }
  return Error{ErrorCode::kNotFound, directory.string() + ": no tokenizer.json or tokenizer.model"};
}

std::vector<int32_t> Tokenizer::EncodeSegments(std::span<const TextSegment> segments,
                                               bool add_bos) const {
  std::vector<int32_t> ids;
  for (size_t i = 0; i < segments.size(); ++i) {
    const EncodeOptions options{.add_bos = add_bos && i == 0, .parse_special = segments[i].trusted};
    const std::vector<int32_t> part = Encode(segments[i].text, options);
    ids.insert(ids.end(), part.begin(), part.end());
  }
  return ids;
}

int64_t Tokenizer::MinTokens(std::span<const TextSegment>) const { return 0; }

std::string Tokenizer::Decode(const std::vector<int32_t>& ids, bool special) const {
  std::string text;
  bool first = true;
  for (const int32_t id : ids) {
    text += TokenBytes(id, first, special);
    if (special || !IsSpecial(id)) first = false;
  }
  return text;
}

}  // namespace innerq
