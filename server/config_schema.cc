#include "server/config_schema.h"

#include <regex.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>

#include "server/json_check.h"
#include "server/utf8.h"

namespace innerq {
namespace {

using OrderedJson = nlohmann::ordered_json;

std::string Join(const std::string& path, const std::string& key) {
  return path.empty() ? key : path + "." + key;
}

Error At(const std::string& path, const std::string& message) {
  return InvalidArgument(path.empty() ? message : path + ": " + message, path);
}

// Edits (insert, delete, replace) that turn `a` into `b`.
size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

Error UnknownKey(const std::string& path, const std::string& key, const OrderedJson& properties) {
  std::string message = "unknown key";
  size_t best = 3;  // more edits are no typing error
  for (const auto& [name, unused] : properties.items()) {
    const size_t distance = EditDistance(key, name);
    if (distance < best && distance < name.size()) {
      best = distance;
      message = "unknown key; did you mean " + name + "?";
    }
  }
  return At(Join(path, key), message);
}

bool HasType(const OrderedJson& value, std::string_view type) {
  if (type == "object") return value.is_object();
  if (type == "array") return value.is_array();
  if (type == "string") return value.is_string();
  if (type == "boolean") return value.is_boolean();
  if (type == "integer") return value.is_number_integer();
  return type == "number" && value.is_number();
}

// A value as messages show it: not at all if it may be a secret.
std::string Shown(const OrderedJson& schema, const OrderedJson& value) {
  return schema.value("writeOnly", false)
             ? "what is given"
             : value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

Result<void> CheckNumber(const OrderedJson& schema, const OrderedJson& value,
                         const std::string& path) {
  const double number = value.get<double>();
  const bool low = schema.contains("minimum") && !(number >= schema["minimum"].get<double>());
  const bool high = schema.contains("maximum") && !(number <= schema["maximum"].get<double>());
  if (!low && !high) return {};
  const char* const bound = low ? "minimum" : "maximum";
  return At(path, value.dump() + (low ? " is below the minimum, " : " is above the maximum, ") +
                      schema[bound].dump());
}

// Whether a part of the text matches a POSIX extended regular expression; NUL never does.
bool Matches(const std::string& text, const std::string& pattern) {
  if (text.find('\0') != std::string::npos) return false;
  regex_t compiled;
  CHECK(regcomp(&compiled, pattern.c_str(), REG_EXTENDED | REG_NOSUB) == 0, pattern);
  const bool matches = regexec(&compiled, text.c_str(), 0, nullptr, 0) == 0;
  regfree(&compiled);
  return matches;
}

Result<void> CheckString(const OrderedJson& schema, const std::string& text,
                         const std::string& path) {
  if (text.size() < schema.value("minLength", size_t{0})) return At(path, "must not be empty");
  if (schema.contains("pattern") && !Matches(text, schema["pattern"].get<std::string>())) {
    return At(path,
              Shown(schema, text) + " does not match " + schema["pattern"].get<std::string>());
  }
  const std::string format = schema.value("format", "");
  if (format == "size" || (format == "size or auto" && text != "auto")) {
    if (const auto size = ParseSize(text); !size) {
      return At(path, size.error().message + (format == "size" ? "" : "; or auto"));
    }
  }
  return {};
}

Result<void> Check(const OrderedJson& schema, OrderedJson& value, const std::string& path);

Result<void> CheckObject(const OrderedJson& schema, OrderedJson& value, const std::string& path) {
  const OrderedJson& properties = schema.at("properties");
  for (const auto& [key, unused] : value.items()) {
    if (!properties.contains(key)) return UnknownKey(path, key, properties);
  }
  for (const OrderedJson& key : schema.value("required", OrderedJson::array())) {
    if (!value.contains(key)) return At(Join(path, key), "is required");
  }
  for (const auto& [key, property] : properties.items()) {
    if (!value.contains(key)) {
      if (property.contains("default")) {
        value[key] = property["default"];
      } else if (property.value("type", "") == "object") {
        value[key] = OrderedJson::object();
      } else {
        continue;
      }
    }
    RETURN_IF_ERROR(Check(property, value[key], Join(path, key)));
  }
  return {};
}

// Checks one value and fills in the defaults below it.
Result<void> Check(const OrderedJson& schema, OrderedJson& value, const std::string& path) {
  const std::string type = schema.value("type", "");
  if (!type.empty() && !HasType(value, type)) {
    return At(path, "expected " + type + ", not " + Shown(schema, value));
  }
  if (schema.contains("enum")) {
    const OrderedJson& choices = schema["enum"];
    if (std::find(choices.begin(), choices.end(), value) == choices.end()) {
      std::string list;
      for (const OrderedJson& choice : choices) list += (list.empty() ? "" : ", ") + choice.dump();
      return At(path, "expected one of " + list + ", not " + value.dump());
    }
  }
  if (value.is_number()) return CheckNumber(schema, value, path);
  if (value.is_string()) return CheckString(schema, value.get<std::string>(), path);
  if (value.is_object()) return CheckObject(schema, value, path);
  if (value.is_array()) {
    if (value.size() > schema.value("maxItems", std::numeric_limits<size_t>::max())) {
      return At(path, "has more than " + schema["maxItems"].dump() + " elements");
    }
    for (size_t i = 0; i < value.size(); ++i) {
      RETURN_IF_ERROR(Check(schema.at("items"), value[i], Join(path, std::to_string(i))));
    }
  }
  return {};
}

Result<OrderedJson> Parse(std::string_view text) {
  if (const auto valid = CheckJson(text, IndexStyle::kDots); !valid) {
    return At(valid.error().param, valid.error().message);
  }
  return OrderedJson::parse(text);
}

std::vector<std::string> SplitPath(std::string_view path) {
  std::vector<std::string> keys;
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find('.', begin), path.size());
    keys.emplace_back(path.substr(begin, end - begin));
    begin = end + 1;
  }
  return keys;
}

// Applies "a.b.c=value".
Result<void> Override(const OrderedJson& schema, OrderedJson& config, const std::string& text) {
  if (const std::string valid = ReplaceInvalidUtf8(text); valid != text) {
    return InvalidArgument("--set needs UTF-8, not \"" + valid + "\"");
  }
  const size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0) {
    return InvalidArgument("--set needs key=value, not \"" + text + "\"");
  }
  const std::string path = text.substr(0, equals);
  const std::string literal = text.substr(equals + 1);
  OrderedJson* target = &config;
  const OrderedJson* rule = &schema;
  std::string at;
  for (const std::string& key : SplitPath(path)) {
    const std::string parent = std::exchange(at, Join(at, key));
    if (rule->contains("items")) {
      if (target->is_null()) *target = OrderedJson::array();
      size_t index = 0;
      const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), index);
      if (error != std::errc() || end != key.data() + key.size() || !target->is_array() ||
          index > target->size()) {
        return At(at, "is not an element of an array, nor the next one");
      }
      if (index == target->size()) target->push_back(nullptr);
      target = &(*target)[index];
      rule = &(*rule)["items"];
    } else {
      if (!rule->contains("properties")) return At(at, parent + " has no keys");
      const OrderedJson& properties = (*rule)["properties"];
      if (!properties.contains(key)) return UnknownKey(parent, key, properties);
      if (target->is_null()) *target = OrderedJson::object();
      if (!target->is_object()) return At(parent, "expected object");
      target = &(*target)[key];
      rule = &properties[key];
    }
  }
  OrderedJson value = OrderedJson::parse(literal, nullptr, /*allow_exceptions=*/false);
  // A model called 7 or a range of 3 layers is text, whatever it looks like.
  if (value.is_discarded() || (rule->value("type", "") == "string" && !value.is_string())) {
    *target = literal;
    return {};
  }
  if (const auto valid = CheckJson(literal, IndexStyle::kDots); !valid) {
    const std::string& below = valid.error().param;
    return At(below.empty() ? at : Join(at, below), valid.error().message);
  }
  *target = std::move(value);
  return {};
}

}  // namespace

Result<std::string> ApplySchema(std::string_view schema_text, std::string_view config_text,
                                const std::vector<std::string>& overrides) {
  ASSIGN_OR_RETURN(const OrderedJson schema, Parse(schema_text));
  ASSIGN_OR_RETURN(OrderedJson config, Parse(config_text));
  if (!config.is_object()) return InvalidArgument("a configuration must be a JSON object");
  for (const std::string& text : overrides) RETURN_IF_ERROR(Override(schema, config, text));
  RETURN_IF_ERROR(Check(schema, config, ""));
  return config.dump(2, ' ', false, OrderedJson::error_handler_t::replace);
}

Result<int64_t> ParseSize(std::string_view text) {
  struct Unit {
    std::string_view name;
    int64_t bytes;
  };
  static constexpr std::array<Unit, 9> kUnits = {{{"B", 1},
                                                  {"KiB", int64_t{1} << 10},
                                                  {"MiB", int64_t{1} << 20},
                                                  {"GiB", int64_t{1} << 30},
                                                  {"TiB", int64_t{1} << 40},
                                                  {"KB", 1'000},
                                                  {"MB", 1'000'000},
                                                  {"GB", 1'000'000'000},
                                                  {"TB", 1'000'000'000'000}}};
  int64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [unit_begin, error] = std::from_chars(text.data(), end, number);
  const std::string_view name(unit_begin, static_cast<size_t>(end - unit_begin));
  const auto unit =
      std::find_if(kUnits.begin(), kUnits.end(), [&](const Unit& u) { return u.name == name; });
  if (error != std::errc() || number < 0 || unit == kUnits.end() ||
      number > std::numeric_limits<int64_t>::max() / unit->bytes) {
    return InvalidArgument("expected a size like 512MiB or 2GB, not \"" + std::string(text) + "\"");
  }
  return number * unit->bytes;
}

}  // namespace innerq
