// A tokenizer.json and the files beside it from an input: loading succeeds or names an error, and
// a tokenizer that loads keeps its promises on the part "text".
#include <algorithm>

#include "models/tokenizer.h"
#include "tests/fuzz/fuzz_parts.h"

namespace innerq {
namespace {

constexpr int64_t kMaxTokensRead = 4096;

void CheckIds(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  for (const int32_t id : ids) {
    CHECK(id >= 0 && id < tokenizer.vocab_size(), "token id " + std::to_string(id));
  }
}

void Use(const Tokenizer& tokenizer, const std::string& text) {
  for (int32_t id = 0; id < std::min(tokenizer.vocab_size() + 1, kMaxTokensRead); ++id) {
    const std::string plain = tokenizer.TokenBytes(id, false, false);
    CHECK(!tokenizer.IsSpecial(id) || plain.empty(), "a special token has text");
    CHECK(
        tokenizer.TokenBytes(id, true, true).size() <= tokenizer.TokenBytes(id, false, true).size(),
        "the start of a text adds to a token");
  }
  for (const auto& end : {tokenizer.bos_id(), tokenizer.eos_id()}) {
    if (end) CheckIds(tokenizer, {*end});
  }
  for (const bool trusted : {false, true}) {
    const EncodeOptions options{.add_bos = true, .parse_special = trusted};
    const std::vector<int32_t> ids = tokenizer.Encode(text, options);
    CheckIds(tokenizer, ids);
    tokenizer.Decode(ids, trusted);
    const TextSegment segment{text, trusted};
    CHECK(tokenizer.EncodeSegments({&segment, 1}, true) == ids,
          "one segment differs from its text");
  }
  // Where untrusted text is cut changes nothing.
  const size_t middle = text.size() / 2;
  const TextSegment halves[] = {{text.substr(0, middle), false}, {text.substr(middle), false}};
  CHECK(tokenizer.EncodeSegments(halves, true) == tokenizer.Encode(text, EncodeOptions()),
        "segments differ from their text");
}

}  // namespace
}  // namespace innerq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace innerq;
  static const FuzzDirectory directory(
      {"tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"});
  const FuzzParts parts = SplitParts(data, size);
  directory.Fill(parts);
  const auto tokenizer = Tokenizer::Load(directory.path());
  if (tokenizer.ok()) {
    const auto text = parts.find("text");
    Use(**tokenizer, text == parts.end() ? "a b  \xc3\xa9\xff<s>" : text->second);
  } else {
    CHECK(!tokenizer.error().message.empty(), "an error without a message");
  }
  return 0;
}
