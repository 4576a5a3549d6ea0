#include "server/http_head.h"

#include <algorithm>
#include <charconv>
#include <limits>

namespace innerq {
namespace {

constexpr size_t kMaxTargetBytes = 1024;
constexpr size_t kMaxFields = 128;

HttpFault Bad(std::string message) { return {400, std::move(message)}; }

bool IsAlphanumeric(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

// RFC 9110, 5.6.2.
bool IsToken(std::string_view text) {
  constexpr std::string_view kPunctuation = "!#$%&'*+-.^_`|~";
  return !text.empty() && std::all_of(text.begin(), text.end(), [&](char c) {
    return IsAlphanumeric(c) || kPunctuation.find(c) != std::string_view::npos;
  });
}

bool IsVisible(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

// RFC 9110, 5.5: no control characters but the tab.
bool IsFieldValue(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte == '\t' || (byte >= ' ' && byte != 0x7f);
  });
}

std::string_view TrimEnd(std::string_view text) {
  return text.substr(0, text.find_last_not_of(" \t") + 1);
}

std::string_view Trim(std::string_view text) {
  return TrimEnd(text.substr(std::min(text.find_first_not_of(" \t"), text.size())));
}

// A whole number without sign; -1 for anything else, and for what no int64_t holds.
int64_t ParseNumber(std::string_view text, int base) {
  uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [parsed, error] = std::from_chars(text.data(), end, number, base);
  if (text.empty() || error != std::errc() || parsed != end) return -1;
  if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return -1;
  return static_cast<int64_t>(number);
}

// Decodes %XX. False for a bad escape or one of a control character.
bool Decode(std::string_view text, std::string* path) {
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      *path += text[i];
      continue;
    }
    const int64_t byte = i + 2 < text.size() ? ParseNumber(text.substr(i + 1, 2), 16) : -1;
    if (byte < ' ' || byte == 0x7f) return false;
    *path += static_cast<char>(byte);
    i += 2;
  }
  return true;
}

// The "/path?query" of a target that may be "http://host/path?query"; empty if it is neither.
std::string_view OriginForm(std::string_view target) {
  for (const std::string_view scheme : {"http://", "https://"}) {
    if (!EqualsIgnoringCase(target.substr(0, scheme.size()), scheme)) continue;
    target.remove_prefix(std::min(target.find('/', scheme.size()), target.size()));
  }
  return target.starts_with('/') ? target : std::string_view();
}

std::variant<HttpHead, HttpFault> ParseRequestLine(std::string_view line) {
  HttpHead head;
  const size_t first = line.find(' ');
  const size_t last = line.rfind(' ');
  if (first == std::string_view::npos || first == last) {
    return Bad("the request line is not \"METHOD target HTTP/1.1\"");
  }
  const std::string_view target = line.substr(first + 1, last - first - 1);
  const std::string_view version = line.substr(last + 1);
  head.method = line.substr(0, first);
  head.http_1_0 = version == "HTTP/1.0";
  if (version != "HTTP/1.1" && !head.http_1_0) return Bad("the version is not HTTP/1.1 or 1.0");
  if (!IsToken(head.method)) return Bad("the method is not a token");
  if (target.size() > kMaxTargetBytes) return HttpFault{414, "the request's target is too long"};
  const std::string_view local = OriginForm(target);
  const size_t mark = std::min(local.find('?'), local.size());
  if (!IsVisible(target) || local.empty() || !Decode(local.substr(0, mark), &head.path)) {
    return Bad("the request's target is not a valid path");
  }
  head.query = local.substr(std::min(mark + 1, local.size()));
  return head;
}

// Reads how long the body is. Anything that two readers might understand in two ways is a fault.
HttpFault ReadFraming(HttpHead* head) {
  const auto count = [head](std::string_view name) {
    return std::count_if(
        head->fields.begin(), head->fields.end(),
        [name](const HttpHead::Field& field) { return EqualsIgnoringCase(field.name, name); });
  };
  const auto encodings = count("Transfer-Encoding");
  const auto lengths = count("Content-Length");
  const auto hosts = count("Host");
  if (hosts > 1 || (hosts == 0 && !head->http_1_0)) return Bad("there must be one Host header");
  if (encodings + lengths > 1) return Bad("the length of the body is given more than once");
  if (encodings == 1) {
    if (head->http_1_0) return Bad("HTTP/1.0 has no transfer encodings");
    if (!EqualsIgnoringCase(head->Get("Transfer-Encoding"), "chunked")) {
      return {501, "only the transfer encoding \"chunked\" is supported"};
    }
    head->chunked = true;
  }
  if (lengths == 1) {
    head->content_length = ParseNumber(head->Get("Content-Length"), 10);
    if (head->content_length < 0) return Bad("Content-Length is not a number");
  }
  return {0, ""};
}

}  // namespace

bool EqualsIgnoringCase(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [lower](char x, char y) { return lower(x) == lower(y); });
}

std::string_view HttpHead::Get(std::string_view name) const {
  for (const Field& field : fields) {
    if (EqualsIgnoringCase(field.name, name)) return field.value;
  }
  return {};
}

bool HttpHead::keep_alive() const {
  if (http_1_0) return false;
  for (const Field& field : fields) {
    if (!EqualsIgnoringCase(field.name, "Connection")) continue;
    std::string_view options = field.value;
    while (!options.empty()) {
      const size_t comma = std::min(options.find(','), options.size());
      if (EqualsIgnoringCase(Trim(options.substr(0, comma)), "close")) return false;
      options.remove_prefix(std::min(comma + 1, options.size()));
    }
  }
  return true;
}

std::string HttpHead::FirstParameter() const {
  const std::string_view name = std::string_view(query).substr(0, query.find_first_of("=&"));
  std::string decoded;
  return Decode(name, &decoded) ? decoded : std::string(name);
}

std::variant<HttpHead::Field, HttpFault> ParseHttpField(std::string_view line) {
  const size_t colon = line.find(':');
  if (colon == std::string_view::npos || !IsToken(line.substr(0, colon))) {
    return Bad("a header is not \"Name: value\"");
  }
  const std::string_view value = Trim(line.substr(colon + 1));
  if (!IsFieldValue(value)) return Bad("a header holds a control character");
  return HttpHead::Field{std::string(line.substr(0, colon)), std::string(value)};
}

std::variant<HttpHead, HttpFault> ParseHttpHead(std::string_view text) {
  HttpHead head;
  for (bool first = true;; first = false) {
    const size_t end = text.find('\n');
    if (end == std::string_view::npos || end == 0 || text[end - 1] != '\r') {
      return Bad("a line does not end with CR LF");
    }
    const std::string_view line = text.substr(0, end - 1);
    text.remove_prefix(end + 1);
    if (first) {
      auto parsed = ParseRequestLine(line);
      if (auto* fault = std::get_if<HttpFault>(&parsed)) return std::move(*fault);
      head = std::get<HttpHead>(std::move(parsed));
      continue;
    }
    if (line.empty()) break;
    if (head.fields.size() == kMaxFields) return HttpFault{431, "there are too many headers"};
    auto parsed = ParseHttpField(line);
    if (auto* fault = std::get_if<HttpFault>(&parsed)) return std::move(*fault);
    head.fields.push_back(std::get<HttpHead::Field>(std::move(parsed)));
  }
  if (!text.empty()) return Bad("there is something behind the headers");
  if (HttpFault fault = ReadFraming(&head); fault.status != 0) return fault;
  return head;
}

int64_t ParseChunkSize(std::string_view line) {
  if (!IsFieldValue(line)) return -1;
  return ParseNumber(TrimEnd(line.substr(0, line.find(';'))), 16);
}

}  // namespace innerq
