#include "server/eval_data.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "models/files.h"
#include "server/json_check.h"

namespace innerq {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr std::string_view kMark = "####";

// Texts are bounded by memory alone.
Result<std::string> ReadText(const std::filesystem::path& path) {
  Result<std::string> text = ReadTextFile(path, std::numeric_limits<int64_t>::max());
  if (!text) return Error{text.error().code, "cannot read " + text.error().message};
  return text;
}

bool Blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n\v\f") == std::string_view::npos;
}

// A line of a JSONL file that is not blank.
struct Line {
  std::string where;  // "file:12"
  OrderedJson json;   // an object
};

Result<std::vector<Line>> ReadLines(const std::filesystem::path& path, int64_t limit) {
  ASSIGN_OR_RETURN(const std::string text, ReadText(path));
  std::vector<Line> lines;
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    const std::string where = path.string() + ":" + std::to_string(++number);
    if (Blank(line)) continue;
    if (const auto valid = CheckJson(line, IndexStyle::kDots); !valid) {
      return InvalidArgument(where + ": " + valid.error().message);
    }
    OrderedJson json = OrderedJson::parse(line);
    if (!json.is_object()) return InvalidArgument(where + ": expected a JSON object");
    lines.push_back({where, std::move(json)});
    if (static_cast<int64_t>(lines.size()) == limit) break;
  }
  if (lines.empty()) return InvalidArgument(path.string() + ": there is no line in it");
  return lines;
}

// The text of a key, or nullopt.
std::optional<std::string> TextOf(const OrderedJson& json, const char* key) {
  const auto found = json.find(key);
  if (found == json.end() || !found->is_string()) return std::nullopt;
  return found->get<std::string>();
}

Result<std::string> DocumentOf(const Line& line) {
  if (const auto text = TextOf(line.json, "text")) {
    if (Blank(*text)) return InvalidArgument(line.where + ": text is empty");
    return *text;
  }
  const auto answer = TextOf(line.json, "answer");
  if (const auto prompt = TextOf(line.json, "prompt"); prompt && answer) {
    return *prompt + " " + *answer;
  }
  if (const auto question = TextOf(line.json, "question"); question && answer) {
    return WorkedExample({*question, *answer});
  }
  return InvalidArgument(line.where +
                         ": expected \"text\", \"prompt\" and \"answer\", or \"question\" and "
                         "\"answer\", each a string");
}

// "18" of "18", "018.0" and "18."; "-0.5" of "-.50"; "0" of "-0".
std::string Canonical(bool negative, std::string whole, std::string fraction) {
  whole.erase(0, std::min(whole.find_first_not_of('0'), whole.size()));
  fraction.erase(fraction.find_last_not_of('0') + 1);
  if (whole.empty()) whole = "0";
  if (!fraction.empty()) whole += "." + fraction;
  return negative && whole != "0" ? "-" + whole : whole;
}

// A final number and where it ends in its text.
struct Final {
  std::string number;
  size_t end = 0;
};

// The number at the beginning of `text` from `begin` on; none: an empty one.
Final ReadNumber(std::string_view text, size_t begin) {
  bool negative = false;
  size_t at = begin;
  for (; at < text.size() && std::string_view(" \t$+*-").find(text[at]) != text.npos; ++at) {
    negative = negative || text[at] == '-';
  }
  std::string parts[2];  // before and after the point
  size_t part = 0;
  size_t end = at;
  for (; at < text.size(); ++at) {
    const char c = text[at];
    if (c >= '0' && c <= '9') {
      parts[part] += c;
      end = at + 1;
    } else if (c == '.' && part == 0) {
      part = 1;
    } else if (c != ',' || part == 1) {
      break;
    }
  }
  if (parts[0].empty() && parts[1].empty()) return {};
  return {Canonical(negative, std::move(parts[0]), std::move(parts[1])), end};
}

Final FindFinal(std::string_view answer) {
  for (size_t mark = answer.find(kMark); mark != answer.npos; mark = answer.find(kMark, mark + 1)) {
    Final final = ReadNumber(answer, mark + kMark.size());
    if (!final.number.empty()) return final;
  }
  return {};
}

}  // namespace

Result<std::vector<std::string>> ReadTexts(const std::vector<std::filesystem::path>& files,
                                           int64_t limit) {
  std::vector<std::string> texts;
  for (const std::filesystem::path& file : files) {
    if (file.extension() != ".jsonl") {
      ASSIGN_OR_RETURN(std::string text, ReadText(file));
      if (Blank(text)) return InvalidArgument(file.string() + ": the text is empty");
      texts.push_back(std::move(text));
      continue;
    }
    ASSIGN_OR_RETURN(const std::vector<Line> lines, ReadLines(file, limit));
    for (const Line& line : lines) {
      ASSIGN_OR_RETURN(std::string text, DocumentOf(line));
      texts.push_back(std::move(text));
    }
  }
  return texts;
}

Result<std::vector<Problem>> ReadProblems(const std::filesystem::path& file, int64_t limit) {
  ASSIGN_OR_RETURN(const std::vector<Line> lines, ReadLines(file, limit));
  std::vector<Problem> problems;
  for (const Line& line : lines) {
    const auto question = TextOf(line.json, "question");
    const auto answer = TextOf(line.json, "answer");
    if (!question || !answer) {
      return InvalidArgument(line.where + ": expected \"question\" and \"answer\", both strings");
    }
    if (FinalNumber(*answer).empty()) {
      return InvalidArgument(line.where + ": the answer has no number after ####");
    }
    problems.push_back({*question, *answer});
  }
  return problems;
}

std::string ProblemPrompt(const std::string& question) {
  return "Question: " + question + "\nAnswer:";
}

std::string WorkedExample(const Problem& problem) {
  return ProblemPrompt(problem.question) + " " + problem.answer;
}

std::string FinalNumber(const std::string& answer) { return FindFinal(answer).number; }

bool HasFinalLine(const std::string& answer) {
  const Final final = FindFinal(answer);
  return !final.number.empty() && answer.find('\n', final.end) != std::string::npos;
}

std::vector<EvalText> CutIntoWindows(const Tokenizer& tokenizer,
                                     const std::vector<std::string>& texts, int64_t context,
                                     int64_t limit) {
  std::vector<EvalText> windows;
  for (const std::string& text : texts) {
    const std::vector<int32_t> ids = tokenizer.Encode(text, {});
    const bool bos = !ids.empty() && tokenizer.bos_id() == ids.front();
    const size_t room = static_cast<size_t>(context) - (bos ? 1 : 0);
    const size_t first = bos ? 1 : 0;
    const size_t last =
        limit > 0 ? std::min(first + static_cast<size_t>(limit) * room, ids.size()) : ids.size();
    for (size_t begin = first; begin < last; begin += room) {
      const size_t end = std::min(begin + room, ids.size());
      EvalText window;
      if (bos) window.tokens.push_back(ids.front());
      window.tokens.insert(window.tokens.end(), ids.begin() + static_cast<std::ptrdiff_t>(begin),
                           ids.begin() + static_cast<std::ptrdiff_t>(end));
      if (window.tokens.size() >= 2) windows.push_back(std::move(window));
    }
  }
  return windows;
}

}  // namespace innerq
