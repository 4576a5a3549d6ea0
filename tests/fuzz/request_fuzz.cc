// Bodies of requests to all endpoints, and configurations: each is read, or refused by an error
// that is itself good JSON. The first byte chooses; a configuration's later parts are overrides.
#include <nlohmann/json.hpp>

#include "server/http_messages.h"
#include "server/openai_request.h"
#include "server/options.h"
#include "server/utility_request.h"
#include "tests/fuzz/fuzz_parts.h"

namespace innerq {
namespace {

void CheckError(const ApiError& error) {
  CHECK(error.status == 400, "status " + std::to_string(error.status));
  CHECK(!error.message.empty() && !error.code.empty(), "an error without message or code");
  const std::string body = ErrorJson(error.message, error.type, error.param, error.code);
  CHECK(nlohmann::json::accept(body), body);
}

void ParseRequest(std::string_view body, bool chat) {
  const auto parsed = ParseApiRequest(body, chat);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return CheckError(*error);
  const auto& request = std::get<ApiRequest>(parsed);
  CHECK(request.chat == chat && !request.model.empty(), "model");
  CHECK(!chat || !request.messages.empty(), "messages");
  for (const ChatMessage& message : request.messages) CHECK(!message.role.empty(), "role");
  for (const std::string& stop : request.stop) CHECK(!stop.empty(), "stop");
  CHECK(chat == request.prompts.empty(), "prompts");
  for (const ApiPrompt& prompt : request.prompts) {
    const auto* ids = std::get_if<std::vector<int32_t>>(&prompt);
    for (const int32_t id : ids == nullptr ? std::vector<int32_t>() : *ids) {
      CHECK(id >= 0, "prompt id");
    }
  }
  CHECK(request.n >= 1 && request.best_of >= request.n, "n and best_of");
  for (const int32_t id : request.stop_token_ids) CHECK(id >= 0, "stop token id");
  CHECK(!request.max_tokens || *request.max_tokens >= request.min_tokens, "min_tokens");
}

void ParseUtility(std::string_view body, UtilityEndpoint endpoint) {
  const auto parsed = ParseUtilityRequest(body, endpoint);
  if (const auto* error = std::get_if<ApiError>(&parsed)) return CheckError(*error);
  const auto& request = std::get<UtilityRequest>(parsed);
  for (const ChatMessage& message : request.messages) CHECK(!message.role.empty(), "role");
  for (const int32_t id : request.tokens) CHECK(id >= 0, "token id");
  switch (endpoint) {
    case UtilityEndpoint::kTokenize:
      CHECK(request.tokens.empty() && (request.text.empty() || request.messages.empty()), "input");
      break;
    case UtilityEndpoint::kDetokenize:
      CHECK(request.text.empty() && request.messages.empty(), "input");
      break;
    case UtilityEndpoint::kApplyTemplate:
      CHECK(!request.messages.empty() && request.text.empty() && request.tokens.empty(), "input");
      break;
  }
}

void ParseConfiguration(std::string_view text) {
  FuzzParts parts = SplitParts(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  const std::string configuration = parts[""];
  parts.erase("");
  std::vector<std::string> overrides;
  for (const auto& [name, content] : parts) overrides.push_back(name);
  const auto options = ParseOptions(configuration, overrides);
  if (!options.ok()) {
    CHECK(!options.error().message.empty(), "an error without a message");
    return;
  }
  CHECK(options.value().server.port >= 0 && options.value().server.port <= 65535, "port");
  CHECK(options.value().runner.kv_cache.memory_bytes.value_or(0) >= 0, "memory");
  CHECK(options.value().server.max_body_bytes >= 0, "max_body");
}

}  // namespace
}  // namespace innerq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace innerq;
  if (size == 0) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0]) {
    case 'o':
      ParseConfiguration(rest);
      return 0;
    case 't':
      ParseUtility(rest, UtilityEndpoint::kTokenize);
      return 0;
    case 'd':
      ParseUtility(rest, UtilityEndpoint::kDetokenize);
      return 0;
    case 'a':
      ParseUtility(rest, UtilityEndpoint::kApplyTemplate);
      return 0;
  }
  ParseRequest(rest, data[0] == 'c');
  return 0;
}
