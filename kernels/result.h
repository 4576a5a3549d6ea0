// Result<T>, Error and the CHECK macros: how every layer reports what went wrong.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <variant>

namespace innerq {

// What the caller should do about a failure. To HTTP clients the first is a 400, resource exhausted
// and unavailable are a 503, the others a 500.
enum class ErrorCode {
  kInvalidArgument,    // the input is wrong and will stay wrong
  kNotFound,           // what was named does not exist
  kResourceExhausted,  // a limit was reached; later may work
  kCancelled,          // the asker went away
  kUnavailable,        // not now (loading, draining, device lost)
  kDataLoss,           // stored data is damaged
  kInternal,           // a defect of ours
};

// A failure: its code, a message that says what was expected and what was found, and, where one
// input is to blame, its name (a JSON key path, a request parameter).
struct Error {
  ErrorCode code = ErrorCode::kInternal;
  std::string message;
  std::string param = {};
};

inline Error InvalidArgument(std::string message, std::string param = {}) {
  return {ErrorCode::kInvalidArgument, std::move(message), std::move(param)};
}

namespace internal {
[[noreturn]] inline void CheckFailed(const char* file, int line, const char* condition,
                                     const std::string& message) {
  std::fprintf(stderr, "%s:%d: CHECK failed: %s: %s\n", file, line, condition, message.c_str());
  std::abort();
}
}  // namespace internal

// Stops the program on a broken invariant that only our own code can cause. Always on.
#define CHECK(condition, message)                                                 \
  do {                                                                            \
    if (!(condition)) [[unlikely]] {                                              \
      ::innerq::internal::CheckFailed(__FILE__, __LINE__, #condition, (message)); \
    }                                                                             \
  } while (false)

// A value or an Error, never both. Reading the absent one is a CHECK.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}      // NOLINT: implicit by design
  Result(Error error) : state_(std::move(error)) {}  // NOLINT: implicit by design

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }

  T& value() & {
    CHECK(ok(), error_message());
    return std::get<0>(state_);
  }
  const T& value() const& {
    CHECK(ok(), error_message());
    return std::get<0>(state_);
  }
  T&& value() && {
    CHECK(ok(), error_message());
    return std::get<0>(std::move(state_));
  }
  T& operator*() & { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

  const Error& error() const {
    CHECK(!ok(), "error() of a Result that holds a value");
    return std::get<1>(state_);
  }

 private:
  std::string error_message() const { return ok() ? std::string() : std::get<1>(state_).message; }
  std::variant<T, Error> state_;
};

// Success without a value, or an Error.
template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : failed_(true), error_(std::move(error)) {}  // NOLINT: implicit by design

  bool ok() const { return !failed_; }
  explicit operator bool() const { return ok(); }
  const Error& error() const {
    CHECK(failed_, "error() of a Result that succeeded");
    return error_;
  }

 private:
  bool failed_ = false;
  Error error_;
};

#define INNERQ_CONCAT_INNER(a, b) a##b
#define INNERQ_CONCAT(a, b) INNERQ_CONCAT_INNER(a, b)

// Returns the Error of a Result<void> expression from the enclosing function.
#define RETURN_IF_ERROR(expression)                                \
  do {                                                             \
    if (auto result_ = (expression); !result_.ok()) [[unlikely]] { \
      return result_.error();                                      \
    }                                                              \
  } while (false)

// Declares `declaration` from the value of a Result<T> expression, or returns its Error.
#define ASSIGN_OR_RETURN(declaration, expression) \
  ASSIGN_OR_RETURN_IMPL(INNERQ_CONCAT(result_, __LINE__), declaration, expression)
#define ASSIGN_OR_RETURN_IMPL(result, declaration, expression) \
  auto result = (expression);                                  \
  if (!result.ok()) [[unlikely]]                               \
    return result.error();                                     \
  declaration = std::move(result).value()

}  // namespace innerq
