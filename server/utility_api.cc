#include "server/utility_api.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "server/utf8.h"

namespace innerq {
namespace {

using OrderedJson = nlohmann::ordered_json;

HttpResponse JsonAnswer(const OrderedJson& json) {
  return {.body = json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace)};
}

OrderedJson TemplateSource(const ApiModel& model) {
  return model.chat_template ? OrderedJson(model.chat_template->source()) : OrderedJson();
}

// The text of a special token, null if there is none.
OrderedJson SpecialToken(const Tokenizer& tokenizer, const std::optional<int32_t>& id) {
  if (!id) return nullptr;
  return tokenizer.TokenBytes(*id, /*first=*/false, /*special=*/true);
}

// Appends a JSON array of an item per token, which `append` appends: a tree of a long one would
// take far more memory than its text.
template <typename Append>
void AppendList(const std::vector<int32_t>& ids, Append append, std::string* json) {
  *json += "[";
  const char* separator = "";
  for (const int32_t id : ids) {
    *json += separator;
    append(id, json);
    separator = ", ";
  }
  *json += "]";
}

// Appends llama.cpp's form of a token with its text, which is a list of bytes if it is part of a
// character.
void AppendPiece(int32_t id, const std::string& bytes, std::string* json) {
  *json += "{\"id\": " + std::to_string(id) + ", \"piece\": ";
  if (ReplaceInvalidUtf8(bytes) == bytes) {
    *json += QuoteJson(bytes);
  } else {
    const char* separator = "[";
    for (const char c : bytes) {
      *json += separator + std::to_string(static_cast<uint8_t>(c));
      separator = ", ";
    }
    *json += "]";
  }
  *json += "}";
}

}  // namespace

UtilityApi::UtilityApi(ApiModel model, ServerProps props, const CacheInfo& cache,
                       const Engine* engine)
    : model_(std::move(model)), props_(std::move(props)), cache_(cache), engine_(engine) {}

std::variant<UtilityRequest, ApiError> UtilityApi::Read(const HttpRequest& http,
                                                        UtilityEndpoint endpoint) const {
  auto parsed = ParseUtilityRequest(http.body, endpoint);
  if (const auto* request = std::get_if<UtilityRequest>(&parsed)) {
    if (request->model && *request->model != model_.id) {
      return UnknownModelError(*request->model, model_);
    }
  }
  return parsed;
}

std::variant<std::vector<TextSegment>, ApiError> UtilityApi::Render(
    const UtilityRequest& request) const {
  if (!model_.chat_template) return NoChatTemplateError(model_);
  auto segments = model_.chat_template->Render(
      request.messages,
      {.add_generation_prompt = request.add_generation_prompt, .now = LocalTime()});
  if (segments) return std::move(segments).value();
  return InvalidArgumentError(segments.error());
}

HttpResponse UtilityApi::Tokenize(const HttpRequest& http) const {
  const WorkSlots::Slot slot(*model_.utility_slots, http.body.size());
  const auto parsed = Read(http, UtilityEndpoint::kTokenize);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return ErrorResponse(*error);
  const auto& request = std::get<UtilityRequest>(parsed);
  const Tokenizer& tokenizer = *model_.tokenizer;
  std::vector<int32_t> ids;
  if (request.messages.empty()) {
    ids = EncodePrompt({{.text = request.text, .trusted = request.parse_special}}, tokenizer,
                       request.add_bos);
  } else {
    const auto rendered = Render(request);
    if (const auto* error = std::get_if<ApiError>(&rendered)) return ErrorResponse(*error);
    ids = EncodePrompt(std::get<std::vector<TextSegment>>(rendered), tokenizer);
  }
  const auto bytes = [&](int32_t id) { return tokenizer.TokenBytes(id, false, true); };
  std::string body = "{\"count\": " + std::to_string(ids.size()) +
                     ", \"max_model_len\": " + std::to_string(engine_->options().max_context) +
                     ", \"tokens\": ";
  const auto append_token = [&](int32_t id, std::string* json) {
    if (request.with_pieces) return AppendPiece(id, bytes(id), json);
    *json += std::to_string(id);
  };
  AppendList(ids, append_token, &body);
  if (request.return_token_strs) {
    body += ", \"token_strs\": ";
    AppendList(
        ids, [&](int32_t id, std::string* json) { *json += QuoteJson(bytes(id)); }, &body);
  }
  body += "}";
  return {.body = std::move(body)};
}

HttpResponse UtilityApi::Detokenize(const HttpRequest& http) const {
  const WorkSlots::Slot slot(*model_.utility_slots, http.body.size());
  const auto parsed = Read(http, UtilityEndpoint::kDetokenize);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return ErrorResponse(*error);
  const auto& request = std::get<UtilityRequest>(parsed);
  const int64_t vocab_size = model_.tokenizer->vocab_size();
  for (const int32_t id : request.tokens) {
    if (id < vocab_size) continue;
    return ErrorResponse(WrongValueError(
        "tokens",
        std::to_string(id) + " is outside the vocabulary [0, " + std::to_string(vocab_size) + ")"));
  }
  const std::string text = QuoteJson(model_.tokenizer->Decode(request.tokens, /*special=*/true));
  return {.body = "{\"prompt\": " + text + ", \"content\": " + text + "}"};
}

HttpResponse UtilityApi::ApplyTemplate(const HttpRequest& http) const {
  const WorkSlots::Slot slot(*model_.utility_slots, http.body.size());
  const auto parsed = Read(http, UtilityEndpoint::kApplyTemplate);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return ErrorResponse(*error);
  const auto rendered = Render(std::get<UtilityRequest>(parsed));
  if (const auto* error = std::get_if<ApiError>(&rendered)) return ErrorResponse(*error);
  const auto& segments = std::get<std::vector<TextSegment>>(rendered);
  std::string text;
  for (const TextSegment& segment : segments) text += segment.text;
  // A template may write BOS itself. It is left out: whoever tokenizes the text adds it.
  const Tokenizer& tokenizer = *model_.tokenizer;
  if (tokenizer.bos_id() && !tokenizer.Encode("", {}).empty()) {
    const std::string bos = tokenizer.TokenBytes(*tokenizer.bos_id(), false, true);
    const bool written = !segments.empty() && segments.front().trusted;
    if (written && text.starts_with(bos)) text.erase(0, bos.size());
  }
  return JsonAnswer({{"prompt", text}});
}

HttpResponse UtilityApi::TokenizerInfo() const {
  const Tokenizer& tokenizer = *model_.tokenizer;
  const auto id = [](const std::optional<int32_t>& token) {
    return token ? OrderedJson(*token) : OrderedJson();
  };
  return JsonAnswer({{"vocab_size", tokenizer.vocab_size()},
                     {"model_max_length", engine_->options().max_context},
                     {"add_bos_token", !tokenizer.Encode("", {}).empty()},
                     {"bos_token", SpecialToken(tokenizer, tokenizer.bos_id())},
                     {"bos_token_id", id(tokenizer.bos_id())},
                     {"eos_token", SpecialToken(tokenizer, tokenizer.eos_id())},
                     {"eos_token_id", id(tokenizer.eos_id())},
                     {"stop_token_ids", model_.stop_token_ids},
                     {"chat_template", TemplateSource(model_)}});
}

HttpResponse UtilityApi::Props() const {
  const EngineOptions& options = engine_->options();
  const SamplingParams sampling;
  const OrderedJson params = {{"temperature", sampling.temperature},
                              {"top_k", sampling.top_k},
                              {"top_p", sampling.top_p},
                              {"min_p", sampling.min_p},
                              {"repeat_penalty", sampling.repetition_penalty},
                              {"presence_penalty", sampling.presence_penalty},
                              {"frequency_penalty", sampling.frequency_penalty},
                              {"ignore_eos", false},
                              {"stream", false}};
  const Tokenizer& tokenizer = *model_.tokenizer;
  return JsonAnswer(
      {{"default_generation_settings", {{"n_ctx", options.max_context}, {"params", params}}},
       {"total_slots", options.max_sequences},
       {"model_alias", model_.id},
       {"model_path", props_.model_path},
       {"modalities", {{"vision", false}, {"audio", false}}},
       {"endpoint_slots", true},
       {"endpoint_props", false},  // nothing can be changed by POST
       {"endpoint_metrics", true},
       {"bos_token", SpecialToken(tokenizer, tokenizer.bos_id())},
       {"eos_token", SpecialToken(tokenizer, tokenizer.eos_id())},
       {"chat_template", TemplateSource(model_)},
       {"build_info", "innerq " + props_.version},
       {"backend", props_.backend},
       {"scheduler",
        {{"max_sequences", options.max_sequences},
         {"max_batch_tokens", options.max_batch_tokens},
         {"max_queue", options.max_queue},
         {"max_context", options.max_context}}},
       {"kv_cache",
        {{"configuration", OrderedJson::parse(props_.kv_cache)},
         {"capacity_tokens", cache_.capacity_tokens},
         {"bits_per_element", cache_.sealed_bits},
         {"bits_per_element_with_windows", cache_.effective_bits},
         {"open_page_bytes", cache_.open_page_bytes},
         {"sealed_page_bytes", cache_.sealed_page_bytes}}}});
}

HttpResponse UtilityApi::Slots() const {
  const EngineOptions& options = engine_->options();
  OrderedJson slots = OrderedJson::array();
  for (const RunningRequest& running : engine_->Running()) {
    slots.push_back(
        {{"id", slots.size()},
         {"id_task", running.number},
         {"n_ctx", options.max_context},
         {"speculative", false},
         {"is_processing", true},
         {"n_prompt_tokens", running.prompt_tokens},
         {"n_prompt_tokens_processed", std::min(running.computed_tokens, running.prompt_tokens)},
         {"n_cached_tokens", running.computed_tokens},
         {"n_cache_pages", running.pages},
         {"next_token",
          {{"has_next_token", running.generated_tokens < running.max_tokens},
           {"n_remain", running.max_tokens - running.generated_tokens},
           {"n_decoded", running.generated_tokens}}}});
  }
  while (static_cast<int64_t>(slots.size()) < options.max_sequences) {
    slots.push_back({{"id", slots.size()},
                     {"n_ctx", options.max_context},
                     {"speculative", false},
                     {"is_processing", false}});
  }
  return JsonAnswer(slots);
}

}  // namespace innerq
