// Needles: long texts that state codes of things, and questions for one of them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "models/tokenizer.h"

namespace innerq {

// Random numbers of a seed, the same on every machine (SplitMix64: Steele, Lea, Flood, "Fast
// splittable pseudorandom number generators", 2014).
class TextRandom {
 public:
  explicit TextRandom(uint64_t seed) : state_(seed) {}
  uint64_t Next();
  // In [0, bound); bound is positive and far below 2^64, so that the bias does not matter.
  int64_t Below(int64_t bound) {
    return static_cast<int64_t>(Next() % static_cast<uint64_t>(bound));
  }
  // With probability `percent` / 100.
  bool Chance(int64_t percent) { return Below(100) < percent; }

 private:
  uint64_t state_;
};

// What a haystack is to be.
struct NeedleSpec {
  int64_t length = 0;          // tokens of a prompt, at most
  int64_t depth_percent = 0;   // where the needle stands: 0 first, 100 last sentence
  int64_t record_percent = 0;  // share of other sentences that state codes too
  uint64_t seed = 0;
};

// "The code of the red lantern is 4821." among sentences of the same kind and of no importance: the
// text that the demo model was trained on (models/training/data.py), in plain English for others.
struct Needle {
  std::string text;
  std::string question;  // "What is the code of the red lantern?"
  std::string code;      // four digits
  std::vector<int32_t> prompt;
  int64_t begin = 0, end = 0;  // the tokens of `prompt` that state the code
  int64_t least_length = 0;    // tokens of the prompt without other sentences
};

// The prompt of a text and a question, all that a template writes around them included.
using EncodeNeedle = std::function<Result<std::vector<int32_t>>(const std::string& text,
                                                                const std::string& question)>;

// Makes one whose prompt is as long as `spec.length` allows; where that is below the least length,
// its prompt has no other sentences. Errors: those of `encode`.
Result<Needle> MakeNeedle(const NeedleSpec& spec, const Tokenizer& tokenizer,
                          const EncodeNeedle& encode);

}  // namespace innerq
