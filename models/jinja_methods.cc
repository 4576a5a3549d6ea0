// The methods of texts and dicts, and the functions of templates.
#include <algorithm>
#include <array>
#include <ctime>
#include <span>

#include "models/jinja_program.h"

namespace innerq::jinja {
namespace {

using Flavor = Sequence::Flavor;

Error NoMethod(const Call& call, std::string_view method) {
  if (call.input().is_undefined()) return InvalidArgument(call.input().why_undefined());
  return InvalidArgument(TypeName(call.input()) + " has no method " + std::string(method));
}

// The text that a method is called on.
Result<const Text*> Self(const Call& call, std::string_view method) {
  if (!call.input().is_string()) return NoMethod(call, method);
  return &call.input().text();
}

Result<const Text*> TextArg(const Call& call, size_t i, std::string_view method) {
  if (call.arg(i).is_string()) return &call.arg(i).text();
  return InvalidArgument(std::string(method) + " expects a text, found " + TypeName(call.arg(i)));
}

template <std::string (*kMap)(std::string_view)>
Result<Value> MapMethod(Call& call) {
  ASSIGN_OR_RETURN(const Text* text, Self(call, "of texts"));
  RETURN_IF_ERROR(call.budget.SpendBytes(static_cast<int64_t>(text->bytes.size())));
  return Value::String(Text::From(kMap(text->bytes), text->any_untrusted()));
}

template <bool kLeft, bool kRight>
Result<Value> StripMethod(Call& call) {
  ASSIGN_OR_RETURN(const Text* text, Self(call, "strip"));
  constexpr Sides kSides{kLeft, kRight};
  if (!call.has(1) || call.arg(1).is_none()) return Value::String(Strip(*text, nullptr, kSides));
  ASSIGN_OR_RETURN(const Text* chars, TextArg(call, 1, "strip"));
  RETURN_IF_ERROR(
      call.budget.Spend(static_cast<int64_t>(text->bytes.size() / 16 + chars->bytes.size())));
  return Value::String(Strip(*text, &chars->bytes, kSides));
}

// Bytes [begin, end) of each piece.
using Places = std::vector<std::pair<size_t, size_t>>;
constexpr int64_t kPieceSteps = 4;  // a piece becomes a value

struct Cuts {
  int64_t most;  // below 0: all
  bool reverse;  // from the right
};

// What is looked for from the right is looked for from the left in this.
std::string Reversed(std::string_view text) { return {text.rbegin(), text.rend()}; }

// The pieces between separators.
Result<Places> CutAt(std::string_view text, std::string_view separator, Cuts cuts, Budget& budget) {
  if (cuts.reverse) {
    ASSIGN_OR_RETURN(Places out, CutAt(Reversed(text), Reversed(separator),
                                       {.most = cuts.most, .reverse = false}, budget));
    std::reverse(out.begin(), out.end());
    for (auto& place : out) place = {text.size() - place.second, text.size() - place.first};
    return out;
  }
  Places out;
  size_t begin = 0;
  RETURN_IF_ERROR(budget.Spend(static_cast<int64_t>(text.size() / 16)));
  for (int64_t done = 0; cuts.most < 0 || done < cuts.most; ++done) {
    RETURN_IF_ERROR(budget.Spend(kPieceSteps));
    const size_t found = FindPart(text, separator, begin);
    if (found == std::string_view::npos) break;
    out.emplace_back(begin, found);
    begin = found + separator.size();
  }
  out.emplace_back(begin, text.size());
  return out;
}

// The same between runs of whitespace; what is left after `most` cuts keeps its far end.
Result<Places> CutAtSpace(std::string_view text, Cuts cuts, Budget& budget) {
  RETURN_IF_ERROR(budget.Spend(static_cast<int64_t>(text.size() / 4)));
  const auto [most, reverse] = cuts;
  Places out;
  const std::vector<size_t> at = CharOffsets(text);
  const auto is_space = [&](size_t i) { return SpaceLength(text.substr(at[i])) > 0; };
  size_t begin = 0;
  size_t end = at.size() - 1;
  const auto skip = [&, reverse = reverse](bool spaces) {
    while (begin < end && is_space(reverse ? end - 1 : begin) == spaces) {
      reverse ? --end : ++begin;
    }
  };
  for (skip(true); begin < end; skip(true)) {
    RETURN_IF_ERROR(budget.Spend(kPieceSteps));
    if (most >= 0 && static_cast<int64_t>(out.size()) == most) {
      out.emplace_back(at[begin], at[end]);
      break;
    }
    const size_t from = reverse ? end : begin;
    skip(false);
    const size_t to = reverse ? end : begin;
    out.emplace_back(at[std::min(from, to)], at[std::max(from, to)]);
  }
  if (reverse) std::reverse(out.begin(), out.end());
  return out;
}

Value Pieces(const Text& text, const Places& places) {
  std::vector<Value> out;
  for (const auto& [begin, end] : places) out.push_back(Value::String(text.Sub(begin, end)));
  return Value::List(std::move(out));
}

template <bool kReverse>
Result<Value> SplitMethod(Call& call) {
  ASSIGN_OR_RETURN(const Text* text, Self(call, "split"));
  ASSIGN_OR_RETURN(const int64_t most, call.Int(2, -1));
  if (!call.has(1) || call.arg(1).is_none()) {
    ASSIGN_OR_RETURN(const Places places, CutAtSpace(text->bytes, {most, kReverse}, call.budget));
    return Pieces(*text, places);
  }
  ASSIGN_OR_RETURN(const Text* separator, TextArg(call, 1, "split"));
  if (separator->bytes.empty()) return InvalidArgument("split expects a separator, found \"\"");
  ASSIGN_OR_RETURN(const Places places,
                   CutAt(text->bytes, separator->bytes, {most, kReverse}, call.budget));
  return Pieces(*text, places);
}

Result<Value> SplitLinesMethod(Call& call) {
  ASSIGN_OR_RETURN(const Text* text, Self(call, "splitlines"));
  RETURN_IF_ERROR(call.budget.Spend(static_cast<int64_t>(text->bytes.size() / 16)));
  Places places;
  for (size_t begin = 0; begin < text->bytes.size();) {
    const size_t end =
        std::min(text->bytes.find_first_of("\r\n\v\f\x1c\x1d\x1e", begin), text->bytes.size());
    const bool pair = text->bytes.compare(end, 2, "\r\n") == 0;
    const size_t next = std::min(end + (pair ? 2 : 1), text->bytes.size());
    RETURN_IF_ERROR(call.budget.Spend(kPieceSteps));
    places.emplace_back(begin, call.Flag(1) ? next : end);
    begin = next;
  }
  return Pieces(*text, places);
}

// Whether the text begins (ends, if kEnd) with the argument or one of a tuple of them.
template <bool kEnd>
Result<Value> WithMethod(Call& call) {
  const std::string name = kEnd ? "endswith" : "startswith";
  ASSIGN_OR_RETURN(const Text* text, Self(call, name));
  std::span<const Value> wanted(&call.arg(1), 1);
  if (call.arg(1).is_list()) wanted = call.arg(1).sequence()->items;
  for (const Value& one : wanted) {
    if (!one.is_string()) return InvalidArgument(name + " expects texts, found " + TypeName(one));
    RETURN_IF_ERROR(call.budget.SpendOn(one));
    const std::string& mark = one.text().bytes;
    if (kEnd ? text->bytes.ends_with(mark) : text->bytes.starts_with(mark)) {
      return Value::Bool(true);
    }
  }
  return Value::Bool(false);
}

Result<Value> ReplaceMethod(Call& call) {
  ASSIGN_OR_RETURN(const Text* text, Self(call, "replace"));
  ASSIGN_OR_RETURN(const Text* old, TextArg(call, 1, "replace"));
  ASSIGN_OR_RETURN(const Text* with, TextArg(call, 2, "replace"));
  int64_t most = -1;
  if (call.has(3) && !call.arg(3).is_none()) {
    ASSIGN_OR_RETURN(most, call.Int(3, -1));
  }
  Places pieces;
  if (old->bytes.empty()) {
    RETURN_IF_ERROR(call.budget.Spend(static_cast<int64_t>(text->bytes.size())));
    const std::vector<size_t> at = CharOffsets(text->bytes);
    size_t begin = 0;
    for (size_t i = 0; i < at.size() && (most < 0 || static_cast<int64_t>(i) < most); ++i) {
      pieces.emplace_back(begin, at[i]);
      begin = at[i];
    }
    pieces.emplace_back(begin, text->bytes.size());
  } else {
    ASSIGN_OR_RETURN(pieces, CutAt(text->bytes, old->bytes, {most, false}, call.budget));
  }
  RETURN_IF_ERROR(call.budget.SpendBytes(
      static_cast<int64_t>(text->bytes.size() + pieces.size() * with->bytes.size())));
  Text out;
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (i > 0) out.Append(*with);
    out.Append(text->Sub(pieces[i].first, pieces[i].second));
  }
  return Value::String(std::move(out));
}

Result<Value> JoinMethod(Call& call) {
  ASSIGN_OR_RETURN(const Text* separator, Self(call, "join"));
  ASSIGN_OR_RETURN(const auto items, Iterate(call.arg(1), call.budget));
  Text out;
  for (size_t i = 0; i < items->size(); ++i) {
    const Value& item = (*items)[i];
    if (!item.is_string()) return InvalidArgument("join expects texts, found " + TypeName(item));
    const size_t more = separator->bytes.size() + item.text().bytes.size();
    RETURN_IF_ERROR(call.budget.Spend(1 + static_cast<int64_t>(more / 64)));
    if (static_cast<int64_t>(out.bytes.size() + more) > call.budget.limits().max_output_bytes) {
      RETURN_IF_ERROR(call.budget.SpendBytes(static_cast<int64_t>(out.bytes.size() + more)));
    }
    if (i > 0) out.Append(*separator);
    out.Append(item.text());
  }
  return Value::String(std::move(out));
}

template <bool kReverse, bool kMustFind>
Result<Value> FindInText(Call& call) {
  ASSIGN_OR_RETURN(const Text* text, Self(call, "find"));
  ASSIGN_OR_RETURN(const Text* wanted, TextArg(call, 1, "find"));
  const std::string_view all = text->bytes;
  size_t at =
      kReverse ? FindPart(Reversed(all), Reversed(wanted->bytes)) : FindPart(all, wanted->bytes);
  if (at != std::string_view::npos) {
    if (kReverse) at = all.size() - at - wanted->bytes.size();
    return Value::Int(CountChars(all.substr(0, at)));
  }
  if (kMustFind) return InvalidArgument("index expects a text that is there, found none");
  return Value::Int(-1);
}

Result<Value> CountMethod(Call& call) {
  ASSIGN_OR_RETURN(const Text* text, Self(call, "count"));
  ASSIGN_OR_RETURN(const Text* wanted, TextArg(call, 1, "count"));
  if (wanted->bytes.empty()) return Value::Int(CountChars(text->bytes) + 1);
  ASSIGN_OR_RETURN(const Places pieces,
                   CutAt(text->bytes, wanted->bytes, {-1, false}, call.budget));
  return Value::Int(static_cast<int64_t>(pieces.size()) - 1);
}

template <bool kSuffix>
Result<Value> RemoveMethod(Call& call) {
  ASSIGN_OR_RETURN(const Text* text, Self(call, "removeprefix"));
  ASSIGN_OR_RETURN(const Text* part, TextArg(call, 1, "removeprefix"));
  const size_t size = text->bytes.size();
  if (kSuffix && text->bytes.ends_with(part->bytes)) {
    return Value::String(text->Sub(0, size - part->bytes.size()));
  }
  if (!kSuffix && text->bytes.starts_with(part->bytes)) {
    return Value::String(text->Sub(part->bytes.size(), size));
  }
  return call.input();
}

template <Flavor kFlavor>
Result<Value> DictView(Call& call) {
  if (!call.input().is(Value::Kind::kDict)) return NoMethod(call, "items, keys or values");
  std::vector<Value> out;
  for (const auto& [key, value] : call.input().dict().items()) {
    RETURN_IF_ERROR(call.budget.Spend(1));
    out.push_back(kFlavor == Flavor::kItems  ? Value::Tuple({key, value})
                  : kFlavor == Flavor::kKeys ? key
                                             : value);
  }
  return Value::Of(kFlavor, std::move(out));
}

Result<Value> GetMethod(Call& call) {
  if (!call.input().is(Value::Kind::kDict)) return NoMethod(call, "get");
  if (const Value* found = call.input().dict().Find(call.arg(1))) return *found;
  return call.has(2) ? call.arg(2) : Value::None();
}

Result<Value> RangeFunction(Call& call) {
  int64_t bounds[3] = {0, 0, 1};
  const size_t count = call.args.size();
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(bounds[count == 1 ? 1 : i], call.Int(i, 0));
  }
  const auto [begin, end, step] = std::array<int64_t, 3>{bounds[0], bounds[1], bounds[2]};
  if (step == 0) return InvalidArgument("range expects a step other than 0");
  constexpr size_t kRangeMax = 100'000;  // as Jinja2's sandbox
  std::vector<Value> out;
  for (int64_t i = begin; step > 0 ? i < end : i > end;) {
    if (out.size() == kRangeMax) return InvalidArgument("range expects at most 100000 elements");
    out.push_back(Value::Int(i));
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  RETURN_IF_ERROR(call.budget.Spend(static_cast<int64_t>(out.size())));
  return Value::List(std::move(out));
}

Result<Value> RaiseFunction(Call& call) {
  RETURN_IF_ERROR(call.budget.SpendOn(call.arg(0)));
  ASSIGN_OR_RETURN(const Text message, Str(call.arg(0)));
  return InvalidArgument(message.bytes);
}

// Days since 1970-01-01 of a date of the proleptic Gregorian calendar.
int64_t DaysFromDate(int64_t year, int64_t month, int64_t day) {
  year -= month <= 2 ? 1 : 0;
  const int64_t era = (year >= 0 ? year : year - 399) / 400;
  const int64_t of_era = year - era * 400;
  const int64_t of_year = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1;
  return era * 146097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719468;
}

Result<Value> StrftimeFunction(Call& call) {
  if (!call.arg(0).is_string()) {
    return InvalidArgument("strftime_now expects a text, found " + TypeName(call.arg(0)));
  }
  const Text& source = call.arg(0).text();
  const std::string& format = source.bytes;
  const Time& now = *call.now;
  std::tm fields{};
  fields.tm_year = now.year - 1900;
  fields.tm_mon = now.month - 1;
  fields.tm_mday = now.day;
  fields.tm_hour = now.hour;
  fields.tm_min = now.minute;
  fields.tm_sec = now.second;
  const int64_t days = DaysFromDate(now.year, now.month, now.day);
  fields.tm_wday = static_cast<int>(((days + 4) % 7 + 7) % 7);  // 1970-01-01 was a Thursday
  fields.tm_yday = static_cast<int>(days - DaysFromDate(now.year, 1, 1));
  RETURN_IF_ERROR(call.budget.SpendBytes(static_cast<int64_t>(format.size()) * 16));
  std::string out;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      out += format[i];
      continue;
    }
    std::string directive = "%";
    if (i + 1 < format.size() && format[i + 1] == '-') directive += format[++i];
    const char c = i + 1 < format.size() ? format[++i] : '\0';
    if (c == '\0' || std::string_view("aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyY%").find(c) ==
                         std::string_view::npos) {
      return InvalidArgument("strftime_now does not support the directive " + directive + c);
    }
    directive += c;
    char buffer[128];
    out.append(buffer, std::strftime(buffer, sizeof buffer, directive.c_str(), &fields));
  }
  return Value::String(Text::From(out, source.any_untrusted()));
}

const Signature* FindIn(const std::vector<Signature>& table, std::string_view name) {
  const auto found = std::find_if(table.begin(), table.end(),
                                  [&](const Signature& one) { return one.name == name; });
  return found == table.end() ? nullptr : &*found;
}

}  // namespace

Result<int64_t> Call::Int(size_t i, int64_t absent) const {
  if (!has(i)) return absent;
  if (arg(i).is_integral()) return arg(i).integer();
  return InvalidArgument("expected an integer as argument, found " + TypeName(arg(i)));
}

Result<std::string> Call::String(size_t i, std::string_view absent) const {
  if (!has(i)) return std::string(absent);
  if (arg(i).is_string()) return arg(i).text().bytes;
  return InvalidArgument("expected a text as argument, found " + TypeName(arg(i)));
}

const Signature* FindMethod(std::string_view name) {
  static const std::vector<Signature> kMethods = {
      {"capitalize", {}, 0, MapMethod<Capitalize>},
      {"count", {"sub"}, 1, CountMethod},
      {"endswith", {"suffix"}, 1, WithMethod<true>},
      {"find", {"sub"}, 1, FindInText<false, false>},
      {"get", {"key", "default"}, 1, GetMethod},
      {"index", {"sub"}, 1, FindInText<false, true>},
      {"items", {}, 0, DictView<Flavor::kItems>},
      {"join", {"iterable"}, 1, JoinMethod},
      {"keys", {}, 0, DictView<Flavor::kKeys>},
      {"lower", {}, 0, MapMethod<Lower>},
      {"lstrip", {"chars"}, 0, StripMethod<true, false>},
      {"removeprefix", {"prefix"}, 1, RemoveMethod<false>},
      {"removesuffix", {"suffix"}, 1, RemoveMethod<true>},
      {"replace", {"old", "new", "count"}, 2, ReplaceMethod},
      {"rfind", {"sub"}, 1, FindInText<true, false>},
      {"rsplit", {"sep", "maxsplit"}, 0, SplitMethod<true>},
      {"rstrip", {"chars"}, 0, StripMethod<false, true>},
      {"split", {"sep", "maxsplit"}, 0, SplitMethod<false>},
      {"splitlines", {"keepends"}, 0, SplitLinesMethod},
      {"startswith", {"prefix"}, 1, WithMethod<false>},
      {"strip", {"chars"}, 0, StripMethod<true, true>},
      {"title", {}, 0, MapMethod<Title>},
      {"upper", {}, 0, MapMethod<Upper>},
      {"values", {}, 0, DictView<Flavor::kValues>},
  };
  return FindIn(kMethods, name);
}

const std::vector<Signature>& Functions() {
  static const std::vector<Signature> kFunctions = {
      {"raise_exception", {"message"}, 1, RaiseFunction},
      {"range", {"start", "stop", "step"}, 1, RangeFunction},
      {"strftime_now", {"format"}, 1, StrftimeFunction},
  };
  return kFunctions;
}

const Signature* FindFunction(std::string_view name) { return FindIn(Functions(), name); }

}  // namespace innerq::jinja
