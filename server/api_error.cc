#include "server/api_error.h"

namespace innerq {

ApiError WrongTypeError(const std::string& name, const std::string& expected) {
  return {.message = "Invalid type for '" + name + "': expected " + expected + ".",
          .param = name,
          .code = "invalid_type"};
}

ApiError WrongValueError(const std::string& name, const std::string& reason) {
  return {.message = "Invalid value for '" + name + "': " + reason + ".",
          .param = name,
          .code = "invalid_value"};
}

ApiError UnsupportedError(const std::string& name, const std::string& detail) {
  return {.message = "Unsupported parameter: '" + name + "'" + detail + ".",
          .param = name,
          .code = "unsupported_parameter"};
}

ApiError MissingError(const std::string& name) {
  return {.message = "Missing required parameter: '" + name + "'.",
          .param = name,
          .code = "missing_required_parameter"};
}

ApiError InvalidArgumentError(const Error& error) {
  return {.message = error.message, .param = error.param, .code = "invalid_value"};
}

ApiError InvalidJsonError(const Error& error) {
  const std::string place = error.param.empty() ? "" : "'" + error.param + "': ";
  return {.message = "Invalid request body: " + place + error.message + ".",
          .param = error.param,
          .code = error.param.empty() ? "invalid_json" : "duplicate_parameter"};
}

}  // namespace innerq
