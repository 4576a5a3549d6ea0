#include "server/text_stream.h"

#include <algorithm>

namespace innerq {

TextStream::TextStream(const Tokenizer* tokenizer, Options options)
    : tokenizer_(tokenizer), options_(std::move(options)) {
  for (const std::string& stop : options_.stops) CHECK(!stop.empty(), "empty stop string");
}

std::string TextStream::Push(int32_t token_id, bool may_stop) {
  CHECK(!stopped_, "token after a stop string");
  held_ += decoder_.Push(tokenizer_->TokenBytes(token_id, /*first=*/false, options_.special));
  return may_stop ? Release() : Take(held_.size());
}

std::string TextStream::Flush() {
  if (stopped_) return "";
  held_ += decoder_.Flush();
  std::string text = Release();
  return text + Take(held_.size());
}

std::string TextStream::Release() {
  // The stop string that ends the text is the one that starts first; of those that start together,
  // the shortest, which was there first.
  size_t begin = std::string::npos, length = 0;
  for (const std::string& stop : options_.stops) {
    const size_t found = held_.find(stop);
    if (found < begin || (found == begin && found != std::string::npos && stop.size() < length)) {
      begin = found;
      length = stop.size();
    }
  }
  if (begin != std::string::npos) {
    stopped_ = true;
    std::string text = Take(begin + (options_.include_stop ? length : 0));
    held_.clear();
    return text;
  }
  size_t keep = 0;  // bytes at the end of held_ that a stop string may begin with
  for (const std::string& stop : options_.stops) {
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n) {
      if (held_.ends_with(std::string_view(stop).substr(0, n))) keep = n;
    }
  }
  return Take(held_.size() - keep);
}

// Releases the first `size` bytes of what is held.
std::string TextStream::Take(size_t size) {
  std::string text = held_.substr(0, size);
  held_.erase(0, size);
  released_ += CountCharacters(text);
  return text;
}

PromptEcho EchoPrompt(const Tokenizer& tokenizer, std::span<const int32_t> ids,
                      const std::optional<std::string>& given, bool special) {
  PromptEcho echo;
  Utf8Decoder decoder;
  bool first = true;
  int64_t characters = 0;
  for (const int32_t id : ids) {
    echo.tokens.push_back({.id = id, .first = first, .offset = characters});
    // A BOS that the tokenizer added is not in what the client sent.
    const bool added = given && id == tokenizer.bos_id() && echo.tokens.size() == 1 &&
                       !given->starts_with(tokenizer.TokenBytes(id, first, true));
    const bool shown = special && !added;
    const std::string text = decoder.Push(tokenizer.TokenBytes(id, first, shown));
    if (shown || !tokenizer.IsSpecial(id)) first = false;
    characters += CountCharacters(text);
    echo.text += text;
  }
  echo.text += decoder.Flush();
  if (!given) return echo;
  echo.text = ReplaceInvalidUtf8(*given);
  const int64_t end = CountCharacters(echo.text);
  for (PromptEcho::Token& token : echo.tokens) token.offset = std::min(token.offset, end);
  return echo;
}

}  // namespace innerq
