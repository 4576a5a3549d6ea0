#include "server/eval_data.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

#include "server/json_check.h"

namespace innerq {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kMark = "####";

Result<std::string> ReadFile(const std::filesystem::path& path) {
  std::error_code ignored;
  std::ifstream stream(path, std::ios::binary);
  if (!stream.is_open() || std::filesystem::is_directory(path, ignored)) {
    return Error{ErrorCode::kNotFound, "cannot read " + path.string()};
  }
  std::string text{std::istreambuf_iterator<char>(stream), {}};
  if (stream.bad()) return Error{ErrorCode::kDataLoss, "cannot read " + path.string()};
  return text;
}

bool Blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n\v\f") == std::string_view::npos;
}

// A line of a JSONL file that is not blank.
struct Line {
  std::string where;  // "file:12"
  Json json;          // an object
};

Result<std::vector<Line>> ReadLines(const std::filesystem::path& path, int64_t limit) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
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
    Json json = Json::parse(line);
    if (!json.is_object()) return InvalidArgument(where + ": expected a JSON object");
    lines.push_back({where, std::move(json)});
    if (static_cast<int64_t>(lines.size()) == limit) break;
  }
  if (lines.empty()) return InvalidArgument(path.string() + ": there is no line in it");
  return lines;
}

// The text of a key, or nullopt.
std::optional<std::string> TextOf(const Json& json, const char* key) {
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

}  // namespace

Result<std::vector<std::string>> ReadTexts(const std::vector<std::filesystem::path>& files,
                                           int64_t limit) {
  std::vector<std::string> texts;
  for (const std::filesystem::path& file : files) {
    if (file.extension() != ".jsonl") {
      ASSIGN_OR_RETURN(std::string text, ReadFile(file));
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

std::string FinalNumber(const std::string& answer) {
  const size_t mark = answer.find(kMark);
  if (mark == std::string::npos) return "";
  size_t at = mark + kMark.size();
  while (at < answer.size() && (answer[at] == ' ' || answer[at] == '$')) ++at;
  std::string number;
  for (; at < answer.size(); ++at) {
    const char c = answer[at];
    if (c == ',') continue;
    const bool sign = c == '-' && number.empty();
    if (!sign && c != '.' && (c < '0' || c > '9')) break;
    number += c;
  }
  while (number.ends_with('.')) number.pop_back();  // the end of a sentence
  return number;
}

std::vector<EvalText> CutIntoWindows(const Tokenizer& tokenizer,
                                     const std::vector<std::string>& texts, int64_t context) {
  std::vector<EvalText> windows;
  for (const std::string& text : texts) {
    const std::vector<int32_t> ids = tokenizer.Encode(text, {});
    const bool bos = !ids.empty() && tokenizer.bos_id() == ids.front();
    const size_t room = static_cast<size_t>(context) - (bos ? 1 : 0);
    for (size_t begin = bos ? 1 : 0; begin < ids.size(); begin += room) {
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
