#include "models/tokenizer_json.h"

#include <algorithm>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string_view>
#include <unordered_set>

#include "models/files.h"

namespace innerq {
namespace {

using nlohmann::json;

constexpr size_t kMaxAddedTokenBytes = 1000;
// Bounds of a file: what real ones have, several times over. A value takes up to 100 bytes here.
constexpr int64_t kMaxDepth = 32;
constexpr int64_t kMaxValues = 4'000'000;
// Pre-tokenizer "ByteLevel" with use_regex (GPT-2, encoder.py).
constexpr std::string_view kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Pre-tokenizer "Punctuation" (tokenizers, pre_tokenizers/punctuation.rs, is_punc): ASCII's,
// symbols among it, and the general category.
constexpr std::string_view kPunctuationPattern = R"([!-/:-@\[-`{-~\p{P}])";

// The value as an error message shows it.
std::string Show(const json& value) {
  switch (value.type()) {
    case json::value_t::string: {
      const auto& text = value.get_ref<const std::string&>();
      return text.size() > 60 ? "a string of " + std::to_string(text.size()) + " bytes"
                              : '"' + text + '"';
    }
    case json::value_t::object:
    case json::value_t::array:
      return std::string("an ") + value.type_name();
    default:
      return value.dump();
  }
}

// A value of the file and its place there. Borrows the value.
class Node {
 public:
  Node(const json& value, std::string path) : value_(&value), path_(std::move(path)) {}

  const json& value() const { return *value_; }
  const std::string& path() const { return path_; }
  bool is_null() const { return value_->is_null(); }

  Error Damaged(const std::string& expected) const {
    return {ErrorCode::kDataLoss, path_ + ": expected " + expected + ", found " + Show(*value_)};
  }
  Error Unsupported(const std::string& expected) const {
    return InvalidArgument(path_ + ": expected " + expected + ", found " + Show(*value_));
  }

  // A member of an object; null if there is none.
  Node Member(const std::string& key) const {
    static const json kNull;
    const auto at = value_->is_object() ? value_->find(key) : value_->end();
    const bool absent = !value_->is_object() || at == value_->end();
    return {absent ? kNull : *at, path_.empty() ? key : path_ + "." + key};
  }
  Node Element(size_t index) const {
    return {(*value_)[index], path_ + "[" + std::to_string(index) + "]"};
  }

  // Succeeds for an object without other keys than these.
  Result<void> ExpectKeys(std::initializer_list<std::string_view> keys) const {
    if (!value_->is_object()) return Damaged("an object");
    for (const auto& item : value_->items()) {
      if (std::find(keys.begin(), keys.end(), item.key()) != keys.end()) continue;
      std::string known;
      for (const std::string_view key : keys)
        known += (known.empty() ? "" : ", ") + std::string(key);
      return InvalidArgument(Member(item.key()).path() +
                             ": this key is not supported; expected only " + known);
    }
    return {};
  }

  Result<const json*> Array() const {
    if (!value_->is_array()) return Damaged("an array");
    return value_;
  }
  Result<std::string> Text() const {
    if (!value_->is_string()) return Damaged("a string");
    return value_->get<std::string>();
  }
  Result<std::string> NonEmptyText() const {
    if (!value_->is_string() || value_->get_ref<const std::string&>().empty()) {
      return Damaged("a string that is not empty");
    }
    return value_->get<std::string>();
  }
  Result<bool> Flag(const std::string& key, bool fallback) const {
    const Node member = Member(key);
    if (member.is_null()) return fallback;
    if (!member.value().is_boolean()) return member.Damaged("true or false");
    return member.value().get<bool>();
  }
  Result<int64_t> Integer(int64_t last) const {
    if (!value_->is_number_integer() || value_->get<int64_t>() < 0 ||
        value_->get<int64_t>() > last) {
      return Damaged("an integer in [0, " + std::to_string(last) + "]");
    }
    return value_->get<int64_t>();
  }
  Result<int32_t> TokenId() const {
    ASSIGN_OR_RETURN(const int64_t id, Integer(kMaxTokenId));
    return static_cast<int32_t>(id);
  }

 private:
  const json* value_;
  std::string path_;
};

// Bounds what the parser will build, before it does.
Result<void> CheckSize(std::string_view text) {
  int64_t depth = 0;
  int64_t values = 1;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
      continue;
    }
    if (c == '"') in_string = true;
    if (c == ',' || c == '[' || c == '{') ++values;
    if (c == '[' || c == '{') ++depth;
    if (c == ']' || c == '}') --depth;
    if (depth > kMaxDepth || values > kMaxValues) {
      return Error{ErrorCode::kDataLoss, "expected at most " + std::to_string(kMaxDepth) +
                                             " levels and " + std::to_string(kMaxValues) +
                                             " values, found more at byte " + std::to_string(i)};
    }
  }
  return {};
}

// {"String": text} or {"Regex": text}.
Result<TextPattern> ReadPattern(const Node& node) {
  RETURN_IF_ERROR(node.ExpectKeys({"String", "Regex"}));
  if (node.value().size() != 1) return node.Damaged("one of String and Regex");
  TextPattern pattern;
  pattern.is_regex = node.value().contains("Regex");
  const Node text = node.Member(pattern.is_regex ? "Regex" : "String");
  ASSIGN_OR_RETURN(pattern.text, text.NonEmptyText());
  pattern.path = text.path();
  return pattern;
}

// Calls `read` with every element of a Sequence component.
template <typename Read>
Result<void> ReadSequence(const Node& node, const std::string& key, Read read) {
  RETURN_IF_ERROR(node.ExpectKeys({"type", key}));
  const Node list = node.Member(key);
  ASSIGN_OR_RETURN(const json* const elements, list.Array());
  for (size_t i = 0; i < elements->size(); ++i) RETURN_IF_ERROR(read(list.Element(i)));
  return {};
}

Result<std::string> ReadType(const Node& node) {
  if (!node.value().is_object()) return node.Damaged("an object");
  return node.Member("type").Text();
}

Result<void> ReadNormalizer(const Node& node, TokenizerJson& out) {
  ASSIGN_OR_RETURN(const std::string type, ReadType(node));
  if (type == "Sequence") {
    return ReadSequence(node, "normalizers",
                        [&out](const Node& element) { return ReadNormalizer(element, out); });
  }
  if (type == "Prepend") {
    RETURN_IF_ERROR(node.ExpectKeys({"type", "prepend"}));
    PrependStep step;
    ASSIGN_OR_RETURN(step.text, node.Member("prepend").NonEmptyText());
    out.text_steps.push_back(std::move(step));
    return {};
  }
  if (type == "Replace") {
    RETURN_IF_ERROR(node.ExpectKeys({"type", "pattern", "content"}));
    ReplaceStep step;
    ASSIGN_OR_RETURN(step.pattern, ReadPattern(node.Member("pattern")));
    ASSIGN_OR_RETURN(step.content, node.Member("content").Text());
    out.text_steps.push_back(std::move(step));
    return {};
  }
  return node.Member("type").Unsupported("Prepend, Replace or Sequence");
}

Result<SplitBehavior> ReadBehavior(const Node& node) {
  if (node.value() == "Removed") return SplitBehavior::kRemoved;
  if (node.value() == "Isolated") return SplitBehavior::kIsolated;
  if (node.value() == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (node.value() == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (node.value() == "Contiguous") return SplitBehavior::kContiguous;
  return node.Unsupported("Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
}

// What pre-tokenizer and decoder "Metaspace" have in common.
struct Metaspace {
  std::string mark;
  PrependStep prepend;
  bool prepends = true;
  bool split = true;
};

Result<Metaspace> ReadMetaspace(const Node& node) {
  RETURN_IF_ERROR(node.ExpectKeys(
      {"type", "replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"}));
  Metaspace out;
  ASSIGN_OR_RETURN(out.mark, node.Member("replacement").NonEmptyText());
  const Node rep = node.Member("str_rep");  // the same again, in old files
  if (!rep.is_null() && rep.value() != out.mark) return rep.Damaged('"' + out.mark + '"');
  ASSIGN_OR_RETURN(out.prepends, node.Flag("add_prefix_space", true));
  ASSIGN_OR_RETURN(out.split, node.Flag("split", true));
  out.prepend = {.text = out.mark, .unless_present = true};
  const Node scheme = node.Member("prepend_scheme");
  if (scheme.is_null()) return out;
  const bool known = scheme.value() == "always" || scheme.value() == "first";
  if (!known && scheme.value() != "never") return scheme.Unsupported("always, first or never");
  if (known && !out.prepends) return scheme.Damaged("never, for add_prefix_space is false");
  out.prepends = known;
  out.prepend.only_at_start = scheme.value() == "first";
  return out;
}

Result<void> ReadByteLevelKeys(const Node& node) {
  RETURN_IF_ERROR(node.ExpectKeys({"type", "add_prefix_space", "trim_offsets", "use_regex"}));
  for (const char* key : {"add_prefix_space", "trim_offsets", "use_regex"}) {
    if (const auto flag = node.Flag(key, true); !flag.ok()) return flag.error();
  }
  return {};
}

Result<void> ReadPretokenizer(const Node& node, TokenizerJson& out) {
  ASSIGN_OR_RETURN(const std::string type, ReadType(node));
  if (type == "Sequence") {
    return ReadSequence(node, "pretokenizers",
                        [&out](const Node& element) { return ReadPretokenizer(element, out); });
  }
  if (type == "ByteLevel") {
    RETURN_IF_ERROR(ReadByteLevelKeys(node));
    ASSIGN_OR_RETURN(const bool add_space, node.Flag("add_prefix_space", true));
    ASSIGN_OR_RETURN(const bool use_regex, node.Flag("use_regex", true));
    if (add_space) out.text_steps.push_back(PrependStep{.text = " ", .unless_present = true});
    if (use_regex) {
      out.text_steps.push_back(
          SplitStep{.pattern = {std::string(kByteLevelPattern), true, node.path()}});
    }
    out.text_steps.push_back(ByteAlphabetStep{});
    return {};
  }
  if (type == "Split") {
    RETURN_IF_ERROR(node.ExpectKeys({"type", "pattern", "behavior", "invert"}));
    SplitStep step;
    ASSIGN_OR_RETURN(step.pattern, ReadPattern(node.Member("pattern")));
    ASSIGN_OR_RETURN(step.behavior, ReadBehavior(node.Member("behavior")));
    ASSIGN_OR_RETURN(step.invert, node.Flag("invert", false));
    out.text_steps.push_back(std::move(step));
    return {};
  }
  if (type == "Digits") {
    RETURN_IF_ERROR(node.ExpectKeys({"type", "individual_digits"}));
    ASSIGN_OR_RETURN(const bool individual, node.Flag("individual_digits", false));
    out.text_steps.push_back(
        SplitStep{.pattern = {"\\p{N}", true, node.path()},
                  .behavior = individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous});
    return {};
  }
  if (type == "Punctuation") {
    RETURN_IF_ERROR(node.ExpectKeys({"type", "behavior"}));
    SplitStep step{.pattern = {std::string(kPunctuationPattern), true, node.path()}};
    if (const Node behavior = node.Member("behavior"); !behavior.is_null()) {
      ASSIGN_OR_RETURN(step.behavior, ReadBehavior(behavior));
    }
    out.text_steps.push_back(std::move(step));
    return {};
  }
  if (type == "Metaspace") {
    ASSIGN_OR_RETURN(Metaspace meta, ReadMetaspace(node));
    out.text_steps.push_back(ReplaceStep{{" "}, meta.mark});
    if (meta.prepends) out.text_steps.push_back(std::move(meta.prepend));
    if (meta.split) {
      out.text_steps.push_back(SplitStep{{meta.mark}, SplitBehavior::kMergedWithNext});
    }
    return {};
  }
  return node.Member("type").Unsupported(
      "ByteLevel, Digits, Metaspace, Punctuation, Sequence or Split");
}

// Reads decoders into steps of single tokens. After a Fuse, `fused`, the text is one: all that can
// be done then without the whole text is to strip its start.
Result<void> ReadDecoder(const Node& node, bool& fused, TokenizerJson& out) {
  ASSIGN_OR_RETURN(const std::string type, ReadType(node));
  if (type == "Sequence") {
    return ReadSequence(node, "decoders",
                        [&](const Node& element) { return ReadDecoder(element, fused, out); });
  }
  if (type == "Fuse") {
    fused = true;
    return node.ExpectKeys({"type"});
  }
  if (type == "Strip") {
    RETURN_IF_ERROR(node.ExpectKeys({"type", "content", "start", "stop"}));
    DecodeStrip strip;
    ASSIGN_OR_RETURN(strip.content, node.Member("content").NonEmptyText());
    ASSIGN_OR_RETURN(strip.start, node.Member("start").Integer(kMaxTokenId));
    ASSIGN_OR_RETURN(strip.stop, node.Member("stop").Integer(kMaxTokenId));
    if (!fused) {
      out.decode_steps.push_back(std::move(strip));
      return {};
    }
    if (strip.start > 1 || !out.text_start.empty()) {
      return node.Member("start").Unsupported("0 or 1 in all, after a Fuse");
    }
    if (strip.stop > 0) return node.Member("stop").Unsupported("0, after a Fuse");
    if (strip.start == 1) out.text_start = strip.content;
    return {};
  }
  if (fused) return node.Member("type").Unsupported("only Strip after a Fuse");
  if (type == "ByteLevel") {
    RETURN_IF_ERROR(ReadByteLevelKeys(node));
    out.decode_steps.push_back(DecodeByteAlphabet{});
    return {};
  }
  if (type == "ByteFallback") {
    out.decode_steps.push_back(DecodeByteFallback{});
    return node.ExpectKeys({"type"});
  }
  if (type == "Replace") {
    RETURN_IF_ERROR(node.ExpectKeys({"type", "pattern", "content"}));
    ASSIGN_OR_RETURN(const TextPattern pattern, ReadPattern(node.Member("pattern")));
    if (pattern.is_regex) return node.Member("pattern").Member("Regex").Unsupported("a String");
    ASSIGN_OR_RETURN(const std::string content, node.Member("content").Text());
    out.decode_steps.push_back(DecodeReplace{pattern.text, content});
    return {};
  }
  if (type == "Metaspace") {
    ASSIGN_OR_RETURN(const Metaspace meta, ReadMetaspace(node));
    out.decode_steps.push_back(DecodeReplace{meta.mark, " "});
    if (meta.prepends) out.text_start = " ";
    return {};
  }
  return node.Member("type").Unsupported(
      "ByteFallback, ByteLevel, Fuse, Metaspace, Replace, Sequence or Strip");
}

// "single" of a TemplateProcessing: special tokens, sequence A, perhaps special tokens again.
Result<void> ReadTemplate(const Node& node, TokenizerJson& out) {
  RETURN_IF_ERROR(node.ExpectKeys({"type", "single", "pair", "special_tokens"}));
  const Node single = node.Member("single");
  ASSIGN_OR_RETURN(const json* const parts, single.Array());
  bool found_text = false;
  for (size_t i = 0; i < parts->size(); ++i) {
    const Node part = single.Element(i);
    RETURN_IF_ERROR(part.ExpectKeys({"SpecialToken", "Sequence"}));
    const Node text = part.Member("Sequence");
    if (found_text && !out.appends) out.appends = part.Unsupported("nothing after the Sequence");
    if (found_text && text.is_null()) continue;
    if (found_text) return *out.appends;
    if (!text.is_null()) {
      if (text.Member("id").value() != "A") return text.Member("id").Unsupported("\"A\"");
      found_text = true;
      continue;
    }
    ASSIGN_OR_RETURN(const std::string name, part.Member("SpecialToken").Member("id").Text());
    const Node ids = node.Member("special_tokens").Member(name).Member("ids");
    ASSIGN_OR_RETURN(const json* const list, ids.Array());
    for (size_t k = 0; k < list->size(); ++k) {
      ASSIGN_OR_RETURN(const int32_t id, ids.Element(k).TokenId());
      out.prefix.push_back(id);
    }
  }
  if (!found_text) return single.Damaged("a Sequence");
  return {};
}

Result<void> ReadPostProcessor(const Node& node, TokenizerJson& out) {
  ASSIGN_OR_RETURN(const std::string type, ReadType(node));
  if (type == "Sequence") {
    return ReadSequence(node, "processors",
                        [&out](const Node& element) { return ReadPostProcessor(element, out); });
  }
  if (type == "ByteLevel") return ReadByteLevelKeys(node);  // changes offsets only
  if (type == "TemplateProcessing") {
    if (!out.prefix.empty()) return node.Unsupported("only one TemplateProcessing");
    return ReadTemplate(node, out);
  }
  return node.Member("type").Unsupported("ByteLevel, Sequence or TemplateProcessing");
}

// A merge is "left right" or ["left", "right"].
Result<std::pair<std::string, std::string>> ReadMerge(const Node& list, size_t index) {
  const json& value = list.value()[index];
  if (value.is_array() && value.size() == 2 && value[0].is_string() && value[1].is_string()) {
    return std::pair{value[0].get<std::string>(), value[1].get<std::string>()};
  }
  if (value.is_string()) {
    const auto& text = value.get_ref<const std::string&>();
    const size_t space = text.find(' ');
    if (space != text.npos && text.find(' ', space + 1) == text.npos) {
      return std::pair{text.substr(0, space), text.substr(space + 1)};
    }
  }
  return list.Element(index).Damaged("two tokens, as \"left right\" or [left, right]");
}

Result<void> ReadVocabulary(const Node& node, TokenizerJson& out) {
  if (!node.value().is_object()) return node.Damaged("an object");
  std::vector<bool> seen;
  for (const auto& item : node.value().items()) {
    const Node entry(item.value(), node.path() + "[\"" + item.key().substr(0, 60) + "\"]");
    ASSIGN_OR_RETURN(const int32_t id, entry.TokenId());
    const auto index = static_cast<size_t>(id);
    if (seen.size() <= index) seen.resize(index + 1);
    if (seen[index]) return entry.Damaged("an id of its own");
    seen[index] = true;
    out.vocabulary.emplace_back(item.key(), id);
  }
  return {};
}

Result<void> ReadModel(const Node& node, TokenizerJson& out) {
  if (node.Member("type").value() != "BPE") {
    return InvalidArgument(
        "this kind of tokenizer is not supported; expected model.type \"BPE\", "
        "found " +
        Show(node.Member("type").value()));
  }
  RETURN_IF_ERROR(node.ExpectKeys({"type", "dropout", "unk_token", "continuing_subword_prefix",
                                   "end_of_word_suffix", "fuse_unk", "byte_fallback",
                                   "ignore_merges", "vocab", "merges"}));
  const Node dropout = node.Member("dropout");
  if (!dropout.is_null() && dropout.value() != 0) return dropout.Unsupported("null");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Node affix = node.Member(key);
    if (!affix.is_null() && affix.value() != "") return affix.Unsupported("null");
  }
  ASSIGN_OR_RETURN(out.fuse_unk, node.Flag("fuse_unk", false));
  ASSIGN_OR_RETURN(out.byte_fallback, node.Flag("byte_fallback", false));
  ASSIGN_OR_RETURN(out.ignore_merges, node.Flag("ignore_merges", false));
  if (const Node unk = node.Member("unk_token"); !unk.is_null()) {
    ASSIGN_OR_RETURN(out.unk_token, unk.Text());
  }
  RETURN_IF_ERROR(ReadVocabulary(node.Member("vocab"), out));
  const Node merges = node.Member("merges");
  ASSIGN_OR_RETURN(const json* const list, merges.Array());
  out.merges.reserve(list->size());
  for (size_t i = 0; i < list->size(); ++i) {
    ASSIGN_OR_RETURN(auto merge, ReadMerge(merges, i));
    out.merges.push_back(std::move(merge));
  }
  return {};
}

Result<void> ReadAddedTokens(const Node& node, TokenizerJson& out) {
  if (node.is_null()) return {};
  ASSIGN_OR_RETURN(const json* const list, node.Array());
  std::unordered_set<int32_t> ids;
  std::unordered_set<std::string> contents;
  for (size_t i = 0; i < list->size(); ++i) {
    const Node entry = node.Element(i);
    RETURN_IF_ERROR(entry.ExpectKeys(
        {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}));
    AddedToken token;
    ASSIGN_OR_RETURN(token.id, entry.Member("id").TokenId());
    const Node content = entry.Member("content");
    ASSIGN_OR_RETURN(token.content, content.NonEmptyText());
    if (token.content.size() > kMaxAddedTokenBytes) return content.Damaged("at most 1000 bytes");
    if (const Node word = entry.Member("single_word"); !word.is_null() && word.value() != false) {
      return word.Unsupported("false");
    }
    ASSIGN_OR_RETURN(token.lstrip, entry.Flag("lstrip", false));
    ASSIGN_OR_RETURN(token.rstrip, entry.Flag("rstrip", false));
    ASSIGN_OR_RETURN(token.special, entry.Flag("special", false));
    ASSIGN_OR_RETURN(token.normalized, entry.Flag("normalized", !token.special));
    if (!ids.insert(token.id).second) return entry.Member("id").Damaged("an id of its own");
    if (!contents.insert(token.content).second) return content.Damaged("a text of its own");
    out.added_tokens.push_back(std::move(token));
  }
  return {};
}

Result<TokenizerJson> ReadFile(const Node& file) {
  if (!file.value().is_object()) return Error{ErrorCode::kDataLoss, "not a JSON object"};
  TokenizerJson out;
  RETURN_IF_ERROR(ReadModel(file.Member("model"), out));
  RETURN_IF_ERROR(file.ExpectKeys({"version", "truncation", "padding", "added_tokens", "normalizer",
                                   "pre_tokenizer", "post_processor", "decoder", "model"}));
  if (const Node version = file.Member("version"); !version.is_null() && version.value() != "1.0") {
    return version.Unsupported("\"1.0\"");
  }
  for (const char* key : {"truncation", "padding"}) {
    const Node node = file.Member(key);
    if (!node.is_null() && !node.value().is_object()) return node.Damaged("null or an object");
  }
  RETURN_IF_ERROR(ReadAddedTokens(file.Member("added_tokens"), out));
  if (const Node node = file.Member("normalizer"); !node.is_null()) {
    RETURN_IF_ERROR(ReadNormalizer(node, out));
  }
  if (const Node node = file.Member("pre_tokenizer"); !node.is_null()) {
    RETURN_IF_ERROR(ReadPretokenizer(node, out));
  }
  if (const Node node = file.Member("post_processor"); !node.is_null()) {
    RETURN_IF_ERROR(ReadPostProcessor(node, out));
  }
  bool fused = false;
  RETURN_IF_ERROR(ReadDecoder(file.Member("decoder"), fused, out));
  return out;
}

}  // namespace

Result<TokenizerJson> ReadTokenizerJson(const std::filesystem::path& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxTextFileBytes));
  const auto in_file = [&path](const Error& error) {
    return Error{error.code, path.string() + ": " + error.message};
  };
  if (const auto size = CheckSize(text); !size.ok()) return in_file(size.error());
  const json file = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (file.is_discarded()) return Error{ErrorCode::kDataLoss, path.string() + ": not JSON"};
  Result<TokenizerJson> out = ReadFile(Node(file, ""));
  if (!out.ok()) return in_file(out.error());
  return out;
}

}  // namespace innerq
