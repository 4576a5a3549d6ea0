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

// What an answer is asked to be.
struct Asked {
  bool chat = false;
  TextStream::Options options;
  size_t min_tokens = 0;  // those before which no stop string counts
};

// What the answer must be: the bytes that came up to some token, decoded as one text, are searched
// as a whole; the first token that completes a stop string ends the answer where the first such
// string begins, the shortest of several there.
Answer Expected(const std::vector<std::string>& tokens, const Asked& asked) {
  std::string bytes;
  size_t searched_from = 0;
  const auto cut = [&](const std::string& text) {
    size_t begin = text.npos, length = 0;
    for (const std::string& stop : asked.options.stops) {
      const size_t found = text.find(stop, searched_from);
      if (found > begin || found == text.npos) continue;
      length = found == begin ? std::min(length, stop.size()) : stop.size();
      begin = found;
    }
    return begin == text.npos ? begin : begin + (asked.options.include_stop ? length : 0);
  };
  for (size_t i = 0; i < tokens.size(); ++i) {
    bytes += tokens[i];
    const std::string text = Utf8Decoder().Push(bytes);
    if (i + 1 < asked.min_tokens) {
      searched_from = text.size();
    } else if (const size_t end = cut(text); end != text.npos) {
      return {text.substr(0, end), true};
    }
  }
  const std::string text = ReplaceInvalidUtf8(bytes);
  const size_t end = cut(text);
  return {text.substr(0, end), end != text.npos};
}

// The text in a chunk of a streamed answer.
std::string ChunkText(const AnswerHead& head, const std::string& text) {
  const auto chunk =
      nlohmann::json::parse(TextChunkJson(head, 0, {.text = text, .tokens = {}}, {}));
  const auto& choice = chunk.at("choices").at(0);
  return head.chat ? choice.at("delta").at("content") : choice.at("text");
}

Answer Stream(const std::vector<std::string>& tokens, const Asked& asked) {
  const ListTokenizer tokenizer(tokens);
  const AnswerHead head{.chat = asked.chat, .id = "id", .model = "model"};
  TextStream stream(&tokenizer, asked.options);
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
  for (size_t i = 0; i < tokens.size() && !stream.stopped(); ++i) {
    leave(stream.Push(static_cast<int32_t>(i), i + 1 >= asked.min_tokens));
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
  Asked asked{.chat = input.ConsumeBool(), .options = {}, .min_tokens = 0};
  asked.options.stops.resize(input.ConsumeIntegralInRange<size_t>(0, 4));
  for (std::string& stop : asked.options.stops) {
    stop = ReplaceInvalidUtf8(input.ConsumeRandomLengthString(12));  // as JSON gives them
    if (stop.empty()) stop = "\n";
  }
  asked.options.include_stop = input.ConsumeBool();
  asked.min_tokens = input.ConsumeIntegralInRange<size_t>(0, 3);
  std::vector<std::string> tokens;
  while (input.remaining_bytes() > 0 && tokens.size() < 200) {
    tokens.push_back(input.ConsumeRandomLengthString(12));
  }
  const Answer expected = Expected(tokens, asked);
  const Answer answer = Stream(tokens, asked);
  CHECK(answer.text == expected.text, "'" + answer.text + "' instead of '" + expected.text + "'");
  CHECK(answer.stopped == expected.stopped, "stopped");
  return 0;
}
