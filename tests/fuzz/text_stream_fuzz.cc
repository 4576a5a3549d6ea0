// The text of an answer from tokens of arbitrary bytes, with stop strings, as it leaves in events.
//
// Input: stop strings, then the tokens' bytes, as FuzzedDataProvider cuts them.
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "server/openai_response.h"
#include "server/text_stream.h"

namespace innerq {
namespace {

// Token i has the i-th text.
class ListTokenizer : public Tokenizer {
 public:
  explicit ListTokenizer(std::vector<std::string> tokens) : tokens_(std::move(tokens)) {}
  int64_t vocab_size() const override { return static_cast<int64_t>(tokens_.size()); }
  std::vector<int32_t> Encode(std::string_view, const EncodeOptions&) const override { return {}; }
  std::string TokenBytes(int32_t id, bool, bool) const override {
    return tokens_[static_cast<size_t>(id)];
  }
  bool IsSpecial(int32_t) const override { return false; }
  std::optional<int32_t> TokenId(std::string_view) const override { return std::nullopt; }
  std::optional<int32_t> bos_id() const override { return std::nullopt; }
  std::optional<int32_t> eos_id() const override { return std::nullopt; }

 private:
  const std::vector<std::string> tokens_;
};

// An answer's text and whether a stop string ended it.
struct Answer {
  std::string text;
  bool stopped = false;
  bool operator==(const Answer&) const = default;
};

// What the answer must be: the bytes that came up to some token, decoded as one text, are searched
// as a whole; the first token that completes a stop string ends the answer where the first such
// string begins.
Answer Expected(const std::vector<std::string>& tokens, const std::vector<std::string>& stops) {
  std::string bytes;
  const auto cut = [&stops](const std::string& text) {
    size_t end = text.npos;
    for (const std::string& stop : stops) end = std::min(end, text.find(stop));
    return end;
  };
  for (const std::string& token : tokens) {
    bytes += token;
    const std::string text = Utf8Decoder().Push(bytes);
    if (const size_t end = cut(text); end != text.npos) return {text.substr(0, end), true};
  }
  const std::string text = ReplaceInvalidUtf8(bytes);
  const size_t end = cut(text);
  return {text.substr(0, end), end != text.npos};
}

// The text in a chunk of a streamed answer.
std::string ChunkText(const AnswerHead& head, const std::string& text) {
  const auto chunk = nlohmann::json::parse(TextChunkJson(head, text, {}));
  const auto& choice = chunk.at("choices").at(0);
  return head.chat ? choice.at("delta").at("content") : choice.at("text");
}

Answer Stream(const std::vector<std::string>& tokens, const std::vector<std::string>& stops,
              bool chat) {
  const ListTokenizer tokenizer(tokens);
  const AnswerHead head{.chat = chat, .id = "id", .model = "model"};
  TextStream stream(&tokenizer, stops);
  Answer answer;
  int64_t characters = 0;
  const auto leave = [&](const std::string& text) {
    CHECK(ReplaceInvalidUtf8(text) == text, "an incomplete character left");
    CHECK(ChunkText(head, text) == text, "a chunk changes the text");
    answer.text += text;
    characters += CountCharacters(text);
    CHECK(stream.released_characters() == characters, "released_characters");
    CHECK(stream.next_offset() >= characters, "next_offset");
  };
  for (int32_t id = 0; id < tokenizer.vocab_size() && !stream.stopped(); ++id) {
    leave(stream.Push(id));
  }
  leave(stream.Flush());
  answer.stopped = stream.stopped();
  return answer;
}

}  // namespace
}  // namespace innerq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace innerq;
  FuzzedDataProvider input(data, size);
  const bool chat = input.ConsumeBool();
  std::vector<std::string> stops(input.ConsumeIntegralInRange<size_t>(0, 4));
  for (std::string& stop : stops) {
    stop = ReplaceInvalidUtf8(input.ConsumeRandomLengthString(12));  // as JSON gives them
    if (stop.empty()) stop = "\n";
  }
  std::vector<std::string> tokens;
  while (input.remaining_bytes() > 0 && tokens.size() < 200) {
    tokens.push_back(input.ConsumeRandomLengthString(12));
  }
  const Answer expected = Expected(tokens, stops);
  const Answer answer = Stream(tokens, stops, chat);
  CHECK(answer.text == expected.text, "'" + answer.text + "' instead of '" + expected.text + "'");
  CHECK(answer.stopped == expected.stopped, "stopped");
  return 0;
}
