#include "server/recall_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <utility>

namespace innerq {
namespace {

using Words = std::span<const std::string_view>;

constexpr std::string_view kNames[] = {"Anna",  "Ben",   "Carla", "David", "Emma",   "Felix",
                                       "Grace", "Henry", "Iris",  "Jack",  "Kate",   "Leo",
                                       "Maria", "Noah",  "Paul",  "Rosa",  "Victor", "Wendy"};
constexpr std::string_view kAdjectives[] = {
    "red",    "blue",  "green",  "yellow", "white",   "black",  "silver", "golden", "small",
    "large",  "old",   "new",    "round",  "wooden",  "iron",   "glass",  "quiet",  "bright",
    "dark",   "heavy", "light",  "broken", "painted", "hidden", "empty",  "narrow", "soft",
    "frozen", "dusty", "purple", "orange", "copper",  "plain",  "tall",   "rusty",  "smooth"};
constexpr std::string_view kNouns[] = {
    "lantern", "door",   "box",    "key",    "chair",  "table",  "clock",  "bottle", "bridge",
    "tower",   "garden", "wagon",  "mirror", "basket", "drum",   "boat",   "bell",   "candle",
    "hammer",  "ladder", "window", "carpet", "statue", "engine", "barrel", "coat",   "fence",
    "gate",    "kettle", "pillow", "anchor", "cabin",  "flute",  "saddle", "wheel",  "desk"};
constexpr std::string_view kPeople[] = {"baker",  "farmer",   "teacher", "sailor",
                                        "doctor", "painter",  "singer",  "gardener",
                                        "miller", "neighbor", "driver",  "traveler"};
constexpr std::string_view kVerbs[] = {"walked", "slept",  "waited", "worked", "rested", "sang",
                                       "danced", "looked", "stood",  "smiled", "talked", "played"};
constexpr std::string_view kPlaces[] = {"river",   "market",  "forest", "harbor", "hill",
                                        "station", "village", "lake",   "school", "mill",
                                        "field",   "beach",   "valley", "church"};
constexpr std::string_view kTimes[] = {"in the morning", "in the evening", "at noon",
                                       "at night",       "after lunch",    "before dawn",
                                       "all day",        "in the rain",    "every week"};
constexpr std::string_view kWeather[] = {"cold", "warm", "windy", "rainy", "cloudy", "sunny"};

std::string_view Pick(TextRandom& random, Words words) {
  return words[static_cast<size_t>(random.Below(static_cast<int64_t>(words.size())))];
}

std::string FillerSentence(TextRandom& random) {
  const std::string_view adjective = Pick(random, kAdjectives), noun = Pick(random, kNouns);
  const std::string_view person = Pick(random, kPeople), verb = Pick(random, kVerbs);
  const std::string_view place = Pick(random, kPlaces), time = Pick(random, kTimes);
  switch (random.Below(6)) {
    case 0:
      return fmt::format("The {} {} near the {} {}.", person, verb, place, time);
    case 1:
      return fmt::format("It was a {} day and the {} {} by the {}.", Pick(random, kWeather), person,
                         verb, place);
    case 2:
      return fmt::format("{} saw the {} at the {} {}.", Pick(random, kNames), person, place, time);
    case 3:
      return fmt::format("The {} {} stood near the {} {}.", adjective, noun, place, time);
    case 4:
      return fmt::format("Nobody at the {} knew where the {} {} was.", place, adjective, noun);
    default:
      return fmt::format("{} and the {} {} at the {} {}.", Pick(random, kNames), person, verb,
                         place, time);
  }
}

// Codes of things, no thing twice.
class Records {
 public:
  // A new one; absent once half of all things have one, for it would take ever longer to find.
  std::optional<std::pair<std::string, std::string>> Make(TextRandom& random) {
    if (used_.size() * 2 >= std::size(kAdjectives) * std::size(kNouns)) return std::nullopt;
    for (;;) {
      std::string key = fmt::format("{} {}", Pick(random, kAdjectives), Pick(random, kNouns));
      if (!used_.insert(key).second) continue;
      return std::pair(std::move(key), fmt::format("{:04}", random.Below(10000)));
    }
  }

 private:
  std::set<std::string> used_;
};

std::string RecordSentence(const std::pair<std::string, std::string>& record) {
  return fmt::format("The code of the {} is {}.", record.first, record.second);
}

std::string Join(const std::vector<std::string>& sentences, const std::string& needle,
                 int64_t depth_percent) {
  const auto count = static_cast<int64_t>(sentences.size());
  const int64_t at = (count * depth_percent + 50) / 100;
  std::string text;
  for (int64_t i = 0; i <= count; ++i) {
    if (i == at) text += needle + " ";
    if (i < count) text += sentences[static_cast<size_t>(i)] + " ";
  }
  text.pop_back();
  return text;
}

// Finds the tokens that state the code by what they follow: a prompt that ends before the needle
// has the same tokens up to it.
Result<void> Locate(const std::string& sentence, const EncodeNeedle& encode, Needle* needle) {
  const size_t at = needle->text.find(sentence);
  const std::string before = needle->text.substr(0, at > 0 ? at - 1 : 0);
  const std::string through = needle->text.substr(0, at + sentence.size());
  ASSIGN_OR_RETURN(const std::vector<int32_t> shorter, encode(before, needle->question));
  ASSIGN_OR_RETURN(const std::vector<int32_t> longer, encode(through, needle->question));
  const auto same =
      std::mismatch(needle->prompt.begin(), needle->prompt.end(), shorter.begin(), shorter.end());
  needle->begin = same.first - needle->prompt.begin();
  needle->end = std::min(needle->begin + std::ssize(longer) - std::ssize(shorter),
                         std::ssize(needle->prompt));
  return {};
}

}  // namespace

uint64_t TextRandom::Next() {
  uint64_t mixed = state_ += 0x9e3779b97f4a7c15;
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
  return mixed ^ (mixed >> 31);
}

Result<Needle> MakeNeedle(const NeedleSpec& spec, const Tokenizer& tokenizer,
                          const EncodeNeedle& encode) {
  TextRandom random(spec.seed);
  Records records;
  const auto record = *records.Make(random);
  Needle needle;
  needle.question = fmt::format("What is the code of the {}?", record.first);
  needle.code = record.second;
  needle.text = RecordSentence(record);
  const std::string sentence = needle.text;
  ASSIGN_OR_RETURN(needle.prompt, encode(needle.text, needle.question));
  needle.least_length = static_cast<int64_t>(needle.prompt.size());

  // Sentences in a row may have other tokens than alone: estimates, then looks.
  std::vector<std::string> sentences;
  for (int64_t length = needle.least_length; length < spec.length;) {
    while (length < spec.length) {
      std::optional<std::pair<std::string, std::string>> other;
      if (random.Chance(spec.record_percent)) other = records.Make(random);
      sentences.push_back(other ? RecordSentence(*other) : FillerSentence(random));
      length += std::ssize(tokenizer.Encode(" " + sentences.back(), {.add_bos = false}));
    }
    needle.text = Join(sentences, sentence, spec.depth_percent);
    ASSIGN_OR_RETURN(needle.prompt, encode(needle.text, needle.question));
    length = std::ssize(needle.prompt);
  }
  while (!sentences.empty() && std::ssize(needle.prompt) > spec.length) {
    sentences.pop_back();
    needle.text = Join(sentences, sentence, spec.depth_percent);
    ASSIGN_OR_RETURN(needle.prompt, encode(needle.text, needle.question));
  }
  RETURN_IF_ERROR(Locate(sentence, encode, &needle));
  return needle;
}

}  // namespace innerq
