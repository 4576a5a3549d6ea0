// ReadModelConfig: config.json and generation_config.json to a checked ModelConfig.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <nlohmann/json.hpp>

#include "models/checkpoint.h"
#include "models/files.h"

namespace innerq {
namespace {

using nlohmann::json;

constexpr int64_t kMaxHidden = int64_t{1} << 20;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxLayers = 1000;
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxPositions = int64_t{1} << 30;

constexpr char kMistral[] = "MistralForCausalLM";
// What transformers' MistralConfig takes for an absent "sliding_window"; LlamaConfig has no such
// key.
constexpr int64_t kMistralWindow = 4096;
// And for absent "num_key_value_heads"; null, and LlamaConfig, mean as many as attention heads.
constexpr int64_t kMistralKvHeads = 8;

// Reads the keys of one JSON object and checks their types and ranges. The first error sticks; what
// is read after it is meaningless.
class KeyReader {
 public:
  // `where` begins every message, e.g. "dir/config.json: rope_scaling.".
  KeyReader(const json& object, std::string where) : object_(object), where_(std::move(where)) {}

  const Result<void>& status() const { return status_; }

  // Null if the key is absent or its value is null.
  const json* Find(const char* key) const {
    const auto at = object_.find(key);
    return at == object_.end() || at->is_null() ? nullptr : &*at;
  }

  int64_t Integer(const char* key, int64_t low, int64_t high,
                  std::optional<int64_t> fallback = std::nullopt) {
    const json* value = Find(key);
    if (value == nullptr) return Absent(key, fallback);
    const bool fits = value->is_number_integer() &&
                      !(value->is_number_unsigned() && value->get<uint64_t>() > INT64_MAX);
    const int64_t number = fits ? value->get<int64_t>() : 0;
    if (!fits || number < low || number > high) {
      Fail(key, value, "an integer in [" + std::to_string(low) + ", " + std::to_string(high) + "]");
    }
    return number;
  }

  // A number in (low, high].
  double Number(const char* key, double low, double high,
                std::optional<double> fallback = std::nullopt) {
    const json* value = Find(key);
    if (value == nullptr) return Absent(key, fallback);
    const double number = value->is_number() ? value->get<double>() : NAN;
    if (!(number > low && number <= high)) {
      Fail(key, value, "a number in (" + json(low).dump() + ", " + json(high).dump() + "]");
    }
    return number;
  }

  bool Bool(const char* key, bool fallback) {
    const json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) Fail(key, value, "true or false");
    return value->is_boolean() && value->get<bool>();
  }

  std::string String(const char* key, std::optional<std::string> fallback = std::nullopt) {
    const json* value = Find(key);
    if (value == nullptr) return Absent(key, fallback);
    if (!value->is_string()) Fail(key, value, "a string");
    return value->is_string() ? value->get<std::string>() : std::string();
  }

  // An id, a list of ids, or nothing.
  std::vector<int32_t> TokenIds(const char* key, int64_t vocab_size) {
    std::vector<int32_t> ids;
    const json* value = Find(key);
    if (value == nullptr) return ids;
    const size_t count = value->is_array() ? value->size() : 1;
    for (size_t i = 0; i < count; ++i) {
      const json& id = value->is_array() ? (*value)[i] : *value;
      if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(vocab_size)) {
        Fail(key, &id, "token ids below vocab_size " + std::to_string(vocab_size));
        return ids;
      }
      ids.push_back(id.get<int32_t>());
    }
    return ids;
  }

  // Refuses keys other than those of `known`.
  void RequireOnly(std::initializer_list<std::string_view> known) {
    for (const auto& [key, value] : object_.items()) {
      if (std::find(known.begin(), known.end(), key) == known.end()) {
        Fail(key.c_str(), &value, "no such key");
      }
    }
  }

  // Whether the key is there, be its value null.
  bool Has(const char* key) const { return object_.contains(key); }

  // Refuses what this server cannot compute.
  void Require(bool holds, const char* key, const std::string& expected) {
    const auto at = object_.find(key);
    if (!holds) Fail(key, at == object_.end() ? nullptr : &*at, expected);
  }

 private:
  template <typename T>
  T Absent(const char* key, const std::optional<T>& fallback) {
    if (!fallback && status_.ok()) {
      status_ = Error{ErrorCode::kInvalidArgument, where_ + key + ": missing"};
    }
    return fallback.value_or(T());
  }

  // `found` is null if the key is absent.
  void Fail(const char* key, const json* found, const std::string& expected) {
    if (!status_.ok()) return;
    std::string text = "nothing";
    // Structures may nest deeper than dump() can recurse, so only their kind is told.
    if (found != nullptr) text = found->is_structured() ? found->type_name() : found->dump();
    if (text.size() > 100) text = text.substr(0, 97) + "...";
    status_ = InvalidArgument(where_ + key + ": expected " + expected + ", found " + text);
  }

  const json& object_;
  std::string where_;
  Result<void> status_;
};

Result<json> ReadJsonObject(const std::filesystem::path& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxTextFileBytes));
  json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!value.is_object()) {
    return Error{ErrorCode::kDataLoss, path.string() + ": not a JSON object"};
  }
  return value;
}

Result<std::string> ReadArchitecture(const json& file, const std::string& where) {
  const auto names = file.find("architectures");
  const bool one_name =
      names != file.end() && names->is_array() && names->size() == 1 && names->front().is_string();
  const std::string name = one_name ? names->front().get<std::string>() : "";
  if (name != "LlamaForCausalLM" && name != kMistral) {
    return InvalidArgument(where + "architectures: expected LlamaForCausalLM or " +
                           "MistralForCausalLM, found " +
                           (one_name ? name : std::string("no single name")));
  }
  return name;
}

// "rope_scaling" (or the newer "rope_parameters") into config.rope_scaling and config.rope_theta.
Result<void> ReadRope(KeyReader& top, const std::string& file, ModelConfig& config) {
  config.rope_theta = top.Number("rope_theta", 1.0, 1e12, 10000.0);
  const char* key = top.Find("rope_scaling") != nullptr ? "rope_scaling" : "rope_parameters";
  const json* object = top.Find(key);
  if (object == nullptr) return top.status();
  top.Require(object->is_object(), key, "an object");
  RETURN_IF_ERROR(top.status());

  KeyReader rope(*object, file + ": " + key + ".");
  config.rope_theta = rope.Number("rope_theta", 1.0, 1e12, config.rope_theta);
  const char* type_key = rope.Find("rope_type") != nullptr ? "rope_type" : "type";
  const std::string type = rope.String(type_key, "default");
  rope.Require(rope.Number("partial_rotary_factor", 0.0, 1.0, 1.0) == 1.0, "partial_rotary_factor",
               "1");
  RopeScaling& scaling = config.rope_scaling;
  if (type == "linear") {
    scaling.type = RopeScaling::Type::kLinear;
    scaling.factor = rope.Number("factor", 0.0, 1e6);
  } else if (type == "llama3") {
    scaling.type = RopeScaling::Type::kLlama3;
    scaling.factor = rope.Number("factor", 0.0, 1e6);
    scaling.low_freq_factor = rope.Number("low_freq_factor", 0.0, 1e6);
    scaling.high_freq_factor = rope.Number("high_freq_factor", 0.0, 1e6);
    scaling.original_max_positions =
        rope.Integer("original_max_position_embeddings", 1, kMaxPositions);
    rope.Require(scaling.high_freq_factor > scaling.low_freq_factor, "high_freq_factor",
                 "more than low_freq_factor");
  } else {
    rope.Require(type == "default", type_key, "default, linear or llama3");
  }
  return rope.status();
}

Result<void> ReadShape(KeyReader& keys, ModelConfig& config) {
  config.hidden_size = keys.Integer("hidden_size", 1, kMaxHidden);
  config.intermediate_size = keys.Integer("intermediate_size", 1, kMaxHidden);
  config.num_layers = keys.Integer("num_hidden_layers", 1, kMaxLayers);
  config.num_heads = keys.Integer("num_attention_heads", 1, kMaxHeads);
  const bool default_kv_heads = config.architecture == kMistral && !keys.Has("num_key_value_heads");
  config.num_kv_heads = keys.Integer("num_key_value_heads", 1, kMaxHeads,
                                     default_kv_heads ? kMistralKvHeads : config.num_heads);
  config.vocab_size = keys.Integer("vocab_size", 1, kMaxVocab);
  config.max_positions = keys.Integer("max_position_embeddings", 1, kMaxPositions);
  RETURN_IF_ERROR(keys.status());

  keys.Require(config.num_heads % config.num_kv_heads == 0, "num_key_value_heads",
               "a divisor of num_attention_heads " + std::to_string(config.num_heads));
  if (keys.Find("head_dim") == nullptr) {
    keys.Require(config.hidden_size % config.num_heads == 0, "hidden_size",
                 "a multiple of num_attention_heads " + std::to_string(config.num_heads));
    config.head_dim = config.hidden_size / config.num_heads;
    keys.Require(config.head_dim <= kMaxHeadDim, "hidden_size",
                 "at most " + std::to_string(kMaxHeadDim) + " channels for each of " +
                     std::to_string(config.num_heads) + " heads");
  } else {
    config.head_dim = keys.Integer("head_dim", 2, kMaxHeadDim);
  }
  keys.Require(config.head_dim % 2 == 0, "head_dim", "an even number of channels in a head");
  return keys.status();
}

// The window of Mistral's attention; Llama's looks at no such key. transformers knows none that is
// 0 (such a window holds nothing) and turns it off by null.
Result<void> RefuseWindow(KeyReader& keys, const ModelConfig& config) {
  if (config.architecture != kMistral || !keys.Bool("use_sliding_window", true)) {
    return keys.status();
  }
  const int64_t window =
      keys.Integer("sliding_window", 0, INT64_MAX,
                   keys.Has("sliding_window") ? config.max_positions : kMistralWindow);
  keys.Require(window >= config.max_positions, "sliding_window",
               "null, or at least max_position_embeddings " + std::to_string(config.max_positions) +
                   " (Mistral's default is " + std::to_string(kMistralWindow) + ")");
  return keys.status();
}

// Keys that change what the model computes in ways this server does not implement.
Result<void> RefuseUnsupported(KeyReader& keys, const ModelConfig& config) {
  keys.Require(keys.String("hidden_act", "silu") == "silu", "hidden_act", "silu");
  RETURN_IF_ERROR(RefuseWindow(keys, config));
  keys.Require(!keys.Bool("rope_interleaved", false), "rope_interleaved", "false");
  keys.Require(keys.Number("partial_rotary_factor", 0.0, 1.0, 1.0) == 1.0, "partial_rotary_factor",
               "1");
  return keys.status();
}

// The keys that say how matrices are coded.
Result<LowBitSpec> ReadLowBitSpec(KeyReader& keys) {
  const std::optional<LowBitScheme> scheme = FindLowBitScheme(keys.String("scheme"));
  keys.Require(scheme.has_value(), "scheme", "pow2, apot or uniform");
  const int64_t bits = keys.Integer("bits", 2, 8);
  const int64_t group_size = keys.Integer("group_size", 0, 128);
  const int64_t activation_bits = keys.Integer("activation_bits", 3, 16);
  RETURN_IF_ERROR(keys.status());

  LowBitSpec spec;  // valid with 4 bits; what a change makes invalid is the change's fault
  spec.scheme = *scheme;
  spec.bits = static_cast<int>(bits);
  keys.Require(spec.valid(), "bits",
               std::string(LowBitSchemeBits(*scheme)) + " for scheme " + LowBitSchemeName(*scheme));
  spec.group_size = group_size;
  keys.Require(spec.valid(), "group_size", "0, 32, 64 or 128");
  spec.activation_bits = static_cast<int>(activation_bits);
  keys.Require(spec.valid(), "activation_bits", "3, 4, 8 or 16");
  RETURN_IF_ERROR(keys.status());
  return spec;
}

// What follows a key of the model's to say that `spec` must divide it.
std::string MultipleOf(const LowBitSpec& spec, const std::string& key) {
  return "a multiple of " + std::to_string(std::max(kLowBitUnit, spec.group_size)) + " for " + key;
}

// "head" of "quantization_config" into config.low_bit_head.
Result<void> ReadLowBitHead(KeyReader& quantization, const std::string& where, KeyReader& model,
                            ModelConfig& config) {
  const json* object = quantization.Find("head");
  if (object == nullptr) return quantization.status();
  quantization.Require(object->is_object(), "head", "an object");
  RETURN_IF_ERROR(quantization.status());
  KeyReader keys(*object, where + "head.");
  keys.RequireOnly({"scheme", "bits", "group_size", "activation_bits"});
  ASSIGN_OR_RETURN(config.low_bit_head, ReadLowBitSpec(keys));
  model.Require(config.low_bit_head->Divides(config.hidden_size), "hidden_size",
                MultipleOf(*config.low_bit_head, "quantization_config.head"));
  return model.status();
}

// "quantization_config" into config.low_bit and its like; the other extents are known.
Result<void> ReadLowBit(KeyReader& keys, const std::string& file, ModelConfig& config) {
  constexpr char kKey[] = "quantization_config";
  const json* object = keys.Find(kKey);
  if (object == nullptr) return keys.status();
  keys.Require(object->is_object(), kKey, "an object");
  RETURN_IF_ERROR(keys.status());
  const std::string where = file + ": " + kKey + ".";
  KeyReader quantization(*object, where);
  quantization.Require(quantization.String("quant_method") == "sigma", "quant_method",
                       "sigma, which `innerq quantize` makes and which alone is supported");
  RETURN_IF_ERROR(quantization.status());
  quantization.RequireOnly(
      {"quant_method", "scheme", "bits", "group_size", "activation_bits", "scale", "head"});
  ASSIGN_OR_RETURN(const LowBitSpec spec, ReadLowBitSpec(quantization));
  const auto scale =
      FindLowBitScale(quantization.String("scale", LowBitScaleName(LowBitScale::kFree)));
  quantization.Require(scale.has_value(), "scale", "free or pow2");
  RETURN_IF_ERROR(quantization.status());
  const std::string multiple = MultipleOf(spec, kKey);
  keys.Require(spec.Divides(config.hidden_size), "hidden_size", multiple);
  // Without the key, heads divide hidden_size into the same number of inputs.
  keys.Require(
      spec.Divides(config.num_heads * config.head_dim), "head_dim",
      "that, times num_attention_heads " + std::to_string(config.num_heads) + ", " + multiple);
  keys.Require(spec.Divides(config.intermediate_size), "intermediate_size", multiple);
  config.low_bit = spec;
  config.low_bit_scale = *scale;
  RETURN_IF_ERROR(keys.status());
  return ReadLowBitHead(quantization, where, keys, config);
}

// Ids of config.json that end a text, replaced by those that generation_config.json gives.
Result<void> ReadEndTokens(KeyReader& keys, const std::filesystem::path& directory,
                           ModelConfig& config) {
  config.eos_token_ids = keys.TokenIds("eos_token_id", config.vocab_size);
  RETURN_IF_ERROR(keys.status());

  const std::filesystem::path path = directory / "generation_config.json";
  const Result<json> file = ReadJsonObject(path);
  if (!file.ok()) {
    return file.error().code == ErrorCode::kNotFound ? Result<void>() : file.error();
  }
  KeyReader generation(*file, path.string() + ": ");
  const std::vector<int32_t> eos = generation.TokenIds("eos_token_id", config.vocab_size);
  if (!eos.empty()) config.eos_token_ids = eos;
  return generation.status();
}

}  // namespace

Result<ModelConfig> ReadModelConfig(const std::filesystem::path& directory) {
  const std::string path = (directory / "config.json").string();
  ASSIGN_OR_RETURN(const json file, ReadJsonObject(path));
  ModelConfig config;
  ASSIGN_OR_RETURN(config.architecture, ReadArchitecture(file, path + ": "));
  KeyReader keys(file, path + ": ");
  RETURN_IF_ERROR(ReadShape(keys, config));
  RETURN_IF_ERROR(ReadRope(keys, path, config));
  RETURN_IF_ERROR(RefuseUnsupported(keys, config));
  RETURN_IF_ERROR(ReadLowBit(keys, path, config));
  // Absent keys mean what transformers' LlamaConfig and MistralConfig say.
  config.rms_norm_eps = keys.Number("rms_norm_eps", 0.0, 0.1, 1e-6);
  config.tie_word_embeddings = keys.Bool("tie_word_embeddings", false);
  config.attention_bias = keys.Bool("attention_bias", false);
  config.mlp_bias = keys.Bool("mlp_bias", false);
  RETURN_IF_ERROR(ReadEndTokens(keys, directory, config));
  return config;
}

int64_t ModelConfig::num_parameters() const {
  const int64_t queries = num_heads * head_dim;
  const int64_t keys_values = 2 * num_kv_heads * head_dim;
  int64_t vectors = 2 * hidden_size;  // of a layer
  if (attention_bias) vectors += queries + keys_values + hidden_size;
  if (mlp_bias) vectors += 2 * intermediate_size + hidden_size;
  const int64_t vocabulary = vocab_size * hidden_size * (tie_word_embeddings ? 1 : 2);
  return vocabulary + num_layer_weights() + num_layers * vectors + hidden_size;
}

int64_t ModelConfig::num_layer_weights() const {
  const int64_t queries = num_heads * head_dim;
  const int64_t keys_values = 2 * num_kv_heads * head_dim;
  return num_layers * (hidden_size * (queries + keys_values) + queries * hidden_size +
                       3 * hidden_size * intermediate_size);
}

int64_t ModelConfig::low_bit_bytes() const {
  CHECK(low_bit.has_value(), "a model without codes");
  const int64_t queries = num_heads * head_dim;
  const int64_t keys_values = 2 * num_kv_heads * head_dim;
  const auto bytes = [this](int64_t rows, int64_t cols) { return low_bit->Bytes(rows, cols); };
  return num_layers *
         (bytes(queries + keys_values, hidden_size) + bytes(hidden_size, queries) +
          bytes(2 * intermediate_size, hidden_size) + bytes(hidden_size, intermediate_size));
}

int64_t ModelConfig::low_bit_head_bytes() const {
  CHECK(low_bit_head.has_value(), "a head without codes");
  return low_bit_head->Bytes(vocab_size, hidden_size);
}

std::vector<float> ModelConfig::InverseFrequencies() const {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < head_dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(head_dim);
    float frequency = 1.0f / std::pow(static_cast<float>(rope_theta), exponent);
    const auto factor = static_cast<float>(rope_scaling.factor);
    switch (rope_scaling.type) {
      case RopeScaling::Type::kNone:
        break;
      case RopeScaling::Type::kLinear:
        frequency /= factor;
        break;
      case RopeScaling::Type::kLlama3: {
        // Long wavelengths are slowed down by `factor`, short ones kept, those between interpolated
        // (transformers, _compute_llama3_parameters).
        const auto context = static_cast<double>(rope_scaling.original_max_positions);
        const double low = rope_scaling.low_freq_factor;
        const double high = rope_scaling.high_freq_factor;
        const float wavelength = static_cast<float>(2.0 * M_PI) / frequency;
        if (wavelength > static_cast<float>(context / low)) {
          frequency /= factor;
        } else if (!(wavelength < static_cast<float>(context / high))) {
          const float smooth =
              (static_cast<float>(context) / wavelength - static_cast<float>(low)) /
              static_cast<float>(high - low);
          frequency = (1.0f - smooth) * frequency / factor + smooth * frequency;
        }
        break;
      }
    }
    frequencies.push_back(frequency);
  }
  return frequencies;
}

}  // namespace innerq
