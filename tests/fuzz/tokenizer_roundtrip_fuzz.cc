// Any bytes, encoded and decoded, come back: by a byte-level and a byte-fallback tokenizer.json and
// by the demo model's SentencePiece tokenizer. The first byte says where to cut into segments.
#include <array>

#include "models/tokenizer.h"
#include "tests/fuzz/fuzz_parts.h"

namespace innerq {
namespace {

std::shared_ptr<const Tokenizer> Load(const std::string& directory) {
  auto tokenizer = Tokenizer::Load(std::filesystem::path(INNERQ_SOURCE_DIR) / directory);
  CHECK(tokenizer.ok(), tokenizer.ok() ? "" : tokenizer.error().message);
  return *tokenizer;
}

void CheckRoundTrip(const Tokenizer& tokenizer, const std::string& text, size_t cut) {
  const std::vector<int32_t> ids =
      tokenizer.Encode(text, {.add_bos = false, .parse_special = false});
  for (const int32_t id : ids) {
    CHECK(!tokenizer.IsSpecial(id), "untrusted text makes special token " + std::to_string(id));
  }
  CHECK(tokenizer.Decode(ids, /*special=*/false) == text, "the text does not come back");
  const TextSegment segments[] = {{text.substr(0, cut), false}, {text.substr(cut), false}};
  CHECK(tokenizer.EncodeSegments(segments, false) == ids, "segments differ from their text");
}

}  // namespace
}  // namespace innerq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace innerq;
  static const std::array tokenizers = {Load("tests/fuzz/tokenizers/byte_level"),
                                        Load("tests/fuzz/tokenizers/byte_fallback"),
                                        Load("models/demo")};
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  for (const auto& tokenizer : tokenizers) CheckRoundTrip(*tokenizer, text, data[0] % size);
  return 0;
}
