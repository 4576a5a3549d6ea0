#include "server/api_error.h"

#include "server/utf8.h"

namespace innerq {
namespace {

constexpr size_t kMaxQuotedBytes = 200;
// Of explanations, which may quote as well.
constexpr size_t kMaxMessageBytes = 1000;

ApiError RefusalOf(const std::string& name, const char* code, const std::string& before,
                   const std::string& after) {
  const std::string shown = Quotable(name);
  return {.message = before + "'" + shown + "'" + ShortenUtf8(after, kMaxMessageBytes) + ".",
          .param = shown,
          .code = code};
}

}  // namespace

std::string Quotable(std::string_view text) { return ShortenUtf8(text, kMaxQuotedBytes); }

ApiError WrongTypeError(const std::string& name, const std::string& expected) {
  return RefusalOf(name, "invalid_type", "Invalid type for ", ": expected " + expected);
}

ApiError WrongValueError(const std::string& name, const std::string& reason) {
  return RefusalOf(name, "invalid_value", "Invalid value for ", ": " + reason);
}

ApiError UnsupportedError(const std::string& name, const std::string& detail) {
  return RefusalOf(name, "unsupported_parameter", "Unsupported parameter: ", detail);
}

ApiError MissingError(const std::string& name) {
  return RefusalOf(name, "missing_required_parameter", "Missing required parameter: ", "");
}

ApiError InvalidArgumentError(const Error& error) {
  return {.message = ShortenUtf8(error.message, kMaxMessageBytes),
          .param = Quotable(error.param),
          .code = "invalid_value"};
}

ApiError InvalidJsonError(const Error& error) {
  const std::string shown = Quotable(error.param);
  const std::string place = shown.empty() ? "" : "'" + shown + "': ";
  return {.message = "Invalid request body: " + place + error.message + ".",
          .param = shown,
          .code = shown.empty() ? "invalid_json" : "duplicate_parameter"};
}

}  // namespace innerq
