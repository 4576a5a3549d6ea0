// ApiError: a refusal or a failure as the client sees it, and refusals worded alike everywhere.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "kernels/result.h"

namespace innerq {

struct ApiError {
  int status = 400;
  std::string message;
  std::string type = "invalid_request_error";
  std::string param = {};   // null in JSON if empty
  std::string code = {};    // null in JSON if empty
  std::string extra = {};   // further members of the error object: ", \"n_ctx\": 512"
  int64_t retry_after = 0;  // seconds; 0: no such header
};

// What a client sent, for quoting it in an error: cut to 200 bytes, for it may be as long as a
// body.
std::string Quotable(std::string_view text);

// Refusals of a parameter, of which they quote as much.
ApiError WrongTypeError(const std::string& name, const std::string& expected);
ApiError WrongValueError(const std::string& name, const std::string& reason);
ApiError UnsupportedError(const std::string& name, const std::string& detail = "");
ApiError MissingError(const std::string& name);
// What an invalid argument, as the layers below report it, is to a client.
ApiError InvalidArgumentError(const Error& error);
// What CheckJson found wrong with a body.
ApiError InvalidJsonError(const Error& error);

}  // namespace innerq
