// RequestParser: what parsers of requests have in common. A template over the JSON tree, so that no
// header of ours names a library's.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/chat_template.h"
#include "server/api_error.h"
#include "server/json_check.h"

namespace innerq {

// A base for classes that read one request, a method per parameter. The first error stays; after it
// every method returns false.
template <typename Json>
class RequestParser {
 protected:
  // A parameter, the endpoints that have it (bits), and what reads it into a `Parser`.
  template <typename Parser>
  struct Entry {
    std::string_view name;
    unsigned endpoints;
    bool (Parser::*method)(const std::string&, const Json&);
  };

  // The entry of a name that one of `endpoints` has, or null.
  template <typename Parser>
  static const Entry<Parser>* Find(std::span<const Entry<Parser>> entries, std::string_view name,
                                   unsigned endpoints) {
    const auto at = std::find_if(entries.begin(), entries.end(), [&](const auto& entry) {
      return entry.name == name && (entry.endpoints & endpoints) != 0;
    });
    return at == entries.end() ? nullptr : &*at;
  }
  // The names that one of `endpoints` has.
  template <typename Parser>
  static std::vector<std::string_view> NamesOf(std::span<const Entry<Parser>> entries,
                                               unsigned endpoints) {
    std::vector<std::string_view> names;
    for (const auto& entry : entries) {
      if ((entry.endpoints & endpoints) != 0) names.push_back(entry.name);
    }
    return names;
  }

  bool Fail(ApiError error) {
    error_ = std::move(error);
    return false;
  }
  bool WrongType(const std::string& name, const char* expected) {
    return Fail(WrongTypeError(name, expected));
  }
  bool WrongValue(const std::string& name, const std::string& reason) {
    return Fail(WrongValueError(name, reason));
  }
  bool Unsupported(const std::string& name, const std::string& detail = "") {
    return Fail(UnsupportedError(name, detail));
  }
  bool Missing(const std::string& name) { return Fail(MissingError(name)); }

  // Reads a body, which must be an object. Beyond JSON's own rules: CheckJson's.
  bool Object(std::string_view body, Json* result) {
    if (const auto valid = CheckJson(body, IndexStyle::kBrackets); !valid) {
      return Fail(InvalidJsonError(valid.error()));
    }
    *result = Json::parse(body);
    return result->is_object() || Fail(InvalidJsonError(InvalidArgument("expected a JSON object")));
  }

  bool Integer(const std::string& name, const Json& value, int64_t low, int64_t high,
               int64_t* result) {
    if (value.is_number_float()) {
      const auto whole = WholeNumber(value.template get<double>());
      return whole ? Integer(name, *whole, low, high, result) : WrongType(name, "an integer");
    }
    if (!value.is_number_integer()) return WrongType(name, "an integer");
    const bool huge =
        value.is_number_unsigned() &&
        value.template get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()};
    const int64_t number = huge ? 0 : value.template get<int64_t>();
    if (huge || number < low || number > high) {
      return WrongValue(
          name, "expected an integer from " + std::to_string(low) + " to " + std::to_string(high));
    }
    *result = number;
    return true;
  }
  bool Bool(const std::string& name, const Json& value, bool* result) {
    if (!value.is_boolean()) return WrongType(name, "a boolean");
    *result = value.template get<bool>();
    return true;
  }
  bool String(const std::string& name, const Json& value, std::string* result) {
    if (!value.is_string()) return WrongType(name, "a string");
    *result = value.template get<std::string>();
    return true;
  }
  bool TokenIds(const std::string& name, const Json& value, std::vector<int32_t>* result) {
    if (!value.is_array()) return WrongType(name, "an array of token ids");
    for (const Json& item : value) {
      int64_t id = 0;
      if (!Integer(name, item, 0, std::numeric_limits<int32_t>::max(), &id)) return false;
      result->push_back(static_cast<int32_t>(id));
    }
    return true;
  }

  // A conversation of at least one message.
  bool Messages(const std::string& name, const Json& value, std::vector<ChatMessage>* result) {
    if (!value.is_array()) return WrongType(name, "an array of messages");
    if (value.empty()) return WrongValue(name, "no messages");
    if (value.size() > kMaxMessages) {
      return WrongValue(name, "more than " + std::to_string(kMaxMessages) + " messages");
    }
    for (size_t i = 0; i < value.size(); ++i) {
      const std::string path = name + "[" + std::to_string(i) + "]";
      if (!value[i].is_object()) return WrongType(path, "an object");
      if (!Message(path, value[i], &result->emplace_back())) return false;
    }
    return true;
  }

  static bool Has(const Json& object, const char* key) {
    const auto member = object.find(key);
    return member != object.end() && !member->is_null();
  }

  std::optional<ApiError> error_;

 private:
  // What messages of OpenAI's and vLLM's have, in requests or answers, with a value that says that
  // there is none.
  static bool IsAbsent(std::string_view key, const Json& value) {
    constexpr std::array<std::string_view, 7> kMembers = {
        "audio", "content", "function_call", "name", "refusal", "role", "tool_call_id"};
    constexpr std::array<std::string_view, 2> kLists = {"annotations", "tool_calls"};
    constexpr std::array<std::string_view, 2> kTexts = {"reasoning", "reasoning_content"};
    const auto is_one_of = [key](const auto& names) {
      return std::find(names.begin(), names.end(), key) != names.end();
    };
    if (is_one_of(kLists)) return value.is_null() || value == Json::array();
    if (is_one_of(kTexts)) return value.is_null() || value == "";
    return value.is_null() && is_one_of(kMembers);
  }

  bool Message(const std::string& path, const Json& value, ChatMessage* message) {
    for (const auto& [key, member] : value.items()) {
      const std::string at = path + "." + key;
      if (IsAbsent(key, member)) continue;
      if (key == "role") {
        if (!String(at, member, &message->role)) return false;
      } else if (key == "content") {
        if (!Content(at, member, &message->content)) return false;
      } else {
        return Unsupported(at);
      }
    }
    if (message->role.empty()) return Missing(path + ".role");
    if (!Has(value, "content")) return Missing(path + ".content");
    if (message->role == "developer") message->role = "system";  // OpenAI's later name for it
    return true;
  }

  // Parts of a text are lines of it, as in vLLM.
  bool Content(const std::string& name, const Json& value, std::string* text) {
    if (value.is_string()) return String(name, value, text);
    if (!value.is_array()) return WrongType(name, "a string or an array of parts");
    for (size_t i = 0; i < value.size(); ++i) {
      const std::string path = name + "[" + std::to_string(i) + "]";
      const Json& part = value[i];
      if (!part.is_object()) return WrongType(path, "an object");
      if (!Has(part, "type")) return Missing(path + ".type");
      if (part["type"] != "text") {
        return Unsupported(path + ".type", ": only text parts are understood");
      }
      for (const auto& [key, member] : part.items()) {
        if (key != "type" && key != "text") return Unsupported(path + "." + key);
      }
      std::string piece;
      if (!Has(part, "text")) return Missing(path + ".text");
      if (!String(path + ".text", part["text"], &piece)) return false;
      if (i > 0) *text += '\n';
      *text += piece;
    }
    return true;
  }
};

}  // namespace innerq
