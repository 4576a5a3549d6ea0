// What evaluations read: texts and problems from files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "engine/evaluate.h"
#include "kernels/result.h"
#include "models/tokenizer.h"

namespace innerq {

// The documents of files, at most `limit` of each (0: all). A name that ends in .jsonl is a JSON
// object per line: "text"; or "prompt" and "answer", a space between them; or "question" and
// "answer", as a worked example of GSM8K's prompts. Any other file is one document of plain text.
// Errors: not found; invalid argument, with the line, for one that is no such object, or empty.
Result<std::vector<std::string>> ReadTexts(const std::vector<std::filesystem::path>& files,
                                           int64_t limit);

// A problem of GSM8K's public format.
struct Problem {
  std::string question;
  std::string answer;  // reasoning, then "#### 42"
};
// The first `limit` problems of a JSONL file (0: all). Errors: as above, and invalid argument for
// an answer without "####".
Result<std::vector<Problem>> ReadProblems(const std::filesystem::path& file, int64_t limit);

// "Question: ...\nAnswer:", and with the answer as one of several worked examples.
std::string ProblemPrompt(const std::string& question);
std::string WorkedExample(const Problem& problem);

// The number after the first "####" that one follows, in one form for equal numbers: without "$",
// "+", "*", thousands separators and zeros that say nothing. Empty if there is none.
std::string FinalNumber(const std::string& answer);
// Whether that number's line has ended.
bool HasFinalLine(const std::string& answer);

// Cuts texts into windows of at most `context` tokens, each of which begins with the tokenizer's
// BOS where it puts one before texts; at most `limit` of each text (0: all). Every token of a text
// but the first of a window is scored. A rest that leaves nothing to score is dropped.
std::vector<EvalText> CutIntoWindows(const Tokenizer& tokenizer,
                                     const std::vector<std::string>& texts, int64_t context,
                                     int64_t limit);

}  // namespace innerq
