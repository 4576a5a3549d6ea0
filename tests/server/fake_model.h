// A tokenizer of bytes and a scripted model, so that the server's tests know every answer.
#pragma once

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "models/chat_template.h"
#include "models/tokenizer.h"

namespace innerq {

constexpr int32_t kFakeBos = 256;
constexpr int32_t kFakeEos = 257;
constexpr int64_t kFakeVocab = 258;

// Token ids are byte values; 256 (<s>) begins a prompt, 257 (</s>) ends an answer. Throws for
// prompts that begin with "throw", and at the byte '~' of an answer.
class ByteTokenizer : public Tokenizer {
 public:
  int64_t vocab_size() const override { return kFakeVocab; }
  std::vector<int32_t> Encode(std::string_view text, const EncodeOptions& options) const override {
    if (text.starts_with("throw")) throw std::runtime_error("secret of the tokenizer");
    std::vector<int32_t> ids;
    if (options.add_bos) ids.push_back(kFakeBos);
    while (!text.empty()) {
      const bool bos = options.parse_special && text.starts_with("<s>");
      const bool eos = options.parse_special && text.starts_with("</s>");
      ids.push_back(bos ? kFakeBos : eos ? kFakeEos : static_cast<uint8_t>(text[0]));
      text.remove_prefix(bos ? 3 : eos ? 4 : 1);
    }
    return ids;
  }
  int64_t MinTokens(std::span<const TextSegment> segments) const override {
    size_t bytes = 0;
    for (const TextSegment& segment : segments) bytes += segment.text.size();
    return static_cast<int64_t>(bytes);
  }
  std::string TokenBytes(int32_t id, bool, bool special) const override {
    if (id == '~') throw std::runtime_error("secret of the detokenizer");
    if (id < kFakeBos) return std::string(1, static_cast<char>(id));
    return special ? (id == kFakeBos ? "<s>" : "</s>") : "";
  }
  bool IsSpecial(int32_t id) const override { return id >= kFakeBos; }
  std::optional<int32_t> TokenId(std::string_view) const override { return std::nullopt; }
  std::optional<int32_t> bos_id() const override { return kFakeBos; }
  std::optional<int32_t> eos_id() const override { return kFakeEos; }
};

// "role:content|" per message, then "assistant:". Refuses roles but system, user and assistant.
class PlainTemplate : public ChatTemplate {
 public:
  std::string_view name() const override { return "plain"; }
  std::string_view source() const override { return "{{ messages }}"; }
  std::optional<int32_t> end_of_turn() const override { return std::nullopt; }
  Result<std::vector<TextSegment>> Render(const std::vector<ChatMessage>& messages,
                                          const ChatOptions& options) const override {
    std::string text;
    for (size_t i = 0; i < messages.size(); ++i) {
      const std::string& role = messages[i].role;
      if (role != "system" && role != "user" && role != "assistant") {
        return InvalidArgument("unknown role " + role, "messages[" + std::to_string(i) + "].role");
      }
      text += role + ":" + messages[i].content + "|";
    }
    if (options.add_generation_prompt) text += "assistant:";
    return std::vector<TextSegment>{{.text = text, .trusted = true}};
  }
};

// The next token depends on the last alone: '!' ends the answer, '#' makes the step fail, '$'
// loses the device, ':' is followed by 'a', other bytes by the next one ("a" by "bcdef..."), 'z' by
// 'a'. Each step takes `step_time`.
class ScriptedModel : public StepModel {
 public:
  explicit ScriptedModel(std::chrono::microseconds step_time = std::chrono::microseconds(0))
      : step_time_(step_time),
        layout_(
            KvLayout::Create({.kv_heads = 1, .head_dim = 32, .layers = {{}}}, CodeOrder::kRowMajor)
                .value()) {}
  int64_t vocab_size() const override { return kFakeVocab; }
  const KvLayout& layout() const override { return layout_; }
  int64_t num_open_pages() const override { return 4096; }
  int64_t num_sealed_pages() const override { return 4096; }
  int64_t num_norm_slots() const override { return 128; }
  int64_t max_logit_rows() const override { return 512; }

  Result<std::span<const float>> Step(const ForwardBatch& batch) override {
    std::this_thread::sleep_for(step_time_);
    logits_.assign(batch.logit_rows.size() * kFakeVocab, 0.0f);
    for (size_t row = 0; row < batch.logit_rows.size(); ++row) {
      const int32_t last = batch.token_ids[static_cast<size_t>(batch.logit_rows[row])];
      if (last == '$') return Error{ErrorCode::kUnavailable, "scripted loss of the device"};
      if (last == '#') return Error{ErrorCode::kInternal, "scripted failure in secret_function()"};
      logits_[row * kFakeVocab + static_cast<size_t>(After(last))] = 20.0f;
    }
    return std::span<const float>(logits_);
  }

 private:
  static int32_t After(int32_t last) {
    if (last == '!') return kFakeEos;
    if (last == ':' || last == 'z') return 'a';
    return last >= kFakeBos ? 'a' : (last + 1) % 256;
  }

  const std::chrono::microseconds step_time_;
  const KvLayout layout_;
  std::vector<float> logits_;
};

inline std::unique_ptr<Engine> ScriptedEngine(
    std::chrono::microseconds step_time = std::chrono::microseconds(0),
    EngineOptions options = {.max_context = 1024}) {
  auto engine = Engine::Create(options, std::make_unique<ScriptedModel>(step_time));
  CHECK(engine.ok(), engine.ok() ? "" : engine.error().message);
  return std::move(engine).value();
}

}  // namespace innerq
