#include "server/text_stream.h"

#include <algorithm>

namespace innerq {

TextStream::TextStream(const Tokenizer* tokenizer, std::vector<std::string> stops)
    : tokenizer_(tokenizer), stops_(std::move(stops)) {
  for (const std::string& stop : stops_) CHECK(!stop.empty(), "empty stop string");
}

std::string TextStream::Push(int32_t token_id) {
  CHECK(!stopped_, "token after a stop string");
  held_ += decoder_.Push(tokenizer_->TokenBytes(token_id, /*first=*/false, /*special=*/false));
  return Release();
}

std::string TextStream::Flush() {
  if (stopped_) return "";
  held_ += decoder_.Flush();
  std::string text = Release();
  text += held_;
  released_ += CountCharacters(held_);
  held_.clear();
  return text;
}

std::string TextStream::Release() {
  // The stop string that ends the text is the one that starts first.
  size_t end = std::string::npos;
  for (const std::string& stop : stops_) end = std::min(end, held_.find(stop));
  size_t keep = 0;  // bytes at the end of held_ that a stop string may begin with
  if (end != std::string::npos) {
    stopped_ = true;
  } else {
    for (const std::string& stop : stops_) {
      for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n) {
        if (held_.ends_with(std::string_view(stop).substr(0, n))) keep = n;
      }
    }
    end = held_.size() - keep;
  }
  std::string text = held_.substr(0, end);
  held_.erase(0, stopped_ ? std::string::npos : end);
  released_ += CountCharacters(text);
  return text;
}

}  // namespace innerq
