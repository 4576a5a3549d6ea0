// Needles: long texts that state codes of things, and questions for one of them.
#pragma once

#include <cstdint>
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
  int64_t length = 0;          // tokens of text and question together, at most
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
};

// Makes one, as long as `spec.length` allows for the question as it stands after the text.
Needle MakeNeedle(const NeedleSpec& spec, const Tokenizer& tokenizer);

}  // namespace innerq
