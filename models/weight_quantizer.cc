#include "models/weight_quantizer.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <system_error>

#include "kernels/cpu/host_memory.h"
#include "kernels/cpu/low_bit_encoder.h"
#include "kernels/cpu/low_bit_hessian.h"
#include "models/files.h"
#include "models/fnv1a.h"
#include "models/layer_tensors.h"
#include "models/llama.h"
#include "models/safetensors_writer.h"

namespace innerq {
namespace {

constexpr char kConfigFile[] = "config.json";
constexpr char kCardFile[] = "README.md";
constexpr char kWeightsFile[] = "model.safetensors";
constexpr std::string_view kWeightSuffix = ".weight";

// What the matrices of a stack have in common.
struct SharedInputs {
  const InputStatistics* statistics = nullptr;  // null: none were seen
  InputClip clip;                               // of static activations
  size_t matrices_left = 0;                     // to encode
  std::optional<FeedbackFactor> factor;         // of their Hessian, while it is needed
};

// A matrix that becomes codes, and its place in the report.
struct MatrixTarget {
  size_t index = 0;
  SharedInputs* inputs = nullptr;
  LowBitSpec spec;
  double prune = 0;
};

// What a tensor of the source is written as: the same under a name, a matrix of codes, or both.
struct WrittenAs {
  std::string tensor, matrix;  // may be empty
};

// The shortest decimal that reads back as the number.
std::string ShortestText(double number) {
  char text[32];
  return {text, std::to_chars(std::begin(text), std::end(text), number).ptr};
}

std::span<const std::byte> BytesOf(const ConstTensorView& view) {
  return {view.data, static_cast<size_t>(view.bytes())};
}

std::string SpecText(const LowBitSpec& spec, const std::string& indent) {
  return indent + "\"scheme\": \"" + LowBitSchemeName(spec.scheme) + "\"," +  //
         indent + "\"bits\": " + std::to_string(spec.bits) + "," +            //
         indent + "\"group_size\": " + std::to_string(spec.group_size) + "," + indent +
         "\"activation_bits\": " + std::to_string(spec.activation_bits);
}

// The text of the source's config.json with the key added at its end, where it replaces a null one.
// The others stay as they are, to the last digit.
Result<std::string> ConfigWith(const QuantizeOptions& options,
                               const std::filesystem::path& directory) {
  ASSIGN_OR_RETURN(std::string text, ReadTextFile(directory / kConfigFile, kMaxTextFileBytes));
  const size_t end = text.rfind('}');
  CHECK(end != text.npos && end > 0, "a config.json that was read is an object with keys");
  text.resize(text.find_last_not_of(" \t\r\n", end - 1) + 1);
  text += ",\n  \"quantization_config\": {\n    \"quant_method\": \"sigma\",";
  text += SpecText(options.spec, "\n    ");
  text += std::string(",\n    \"scale\": \"") + LowBitScaleName(options.scale) + "\"";
  if (options.head) {
    text += ",\n    \"head\": {" + SpecText(*options.head, "\n      ") + "\n    }";
  }
  return text + "\n  }\n}\n";
}

Result<void> WriteText(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text << std::flush;
  if (!file) return CannotWrite(path, std::strerror(errno));
  return {};
}

// Whether a file of a model's directory is written anew, holds its weights in some format, or is
// the model's card, which says of what bits they are and how good.
bool IsReplaced(const std::string& name) {
  if (name == kConfigFile || name == kCardFile) return true;
  for (const char* end : {".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5",
                          ".msgpack", ".ot", ".onnx"}) {
    if (name.ends_with(end)) return true;
  }
  return false;
}

Result<void> CopyOthers(const std::filesystem::path& from, const std::filesystem::path& to) {
  std::error_code failed;
  for (std::filesystem::directory_iterator it(from, failed), end; !failed && it != end;
       it.increment(failed)) {
    // Models that the Hugging Face hub keeps are links to files.
    std::error_code unseen;
    if (!it->is_regular_file(unseen) || IsReplaced(it->path().filename().string())) continue;
    const std::filesystem::path copy = to / it->path().filename();
    std::filesystem::copy_file(it->path(), copy, failed);
    if (failed) return CannotWrite(copy, failed.message());
  }
  if (failed) {
    return Error{ErrorCode::kUnavailable, "cannot read " + from.string() + ": " + failed.message()};
  }
  return {};
}

// The share to prune of a layer's matrix.
double ShareToPrune(const QuantizeOptions& options, const std::string& matrix) {
  const PruneRule* const rule = FindPruneRule(options.prune_matrices, matrix);
  return rule == nullptr ? options.prune : rule->share;
}

// Bytes that encoding a matrix takes at most beside statistics. `args`: but for weights and the
// like.
int64_t EncodingBytes(const EncodeLowBitArgs& args, bool has_hessian) {
  const int64_t cols = args.cols, floats = args.rows * cols * DTypeBytes(DType::kF32);
  const int64_t encoding = floats + EncodeLowBitBytes(args, has_hessian);
  if (!has_hessian) return encoding;
  return std::max(FactorHessianBytes(cols), FeedbackFactorBytes(cols) + encoding);
}

// Bytes of all tensors as the low-bit model has them.
int64_t LowBitModelBytes(const Checkpoint& source, const QuantizeOptions& options) {
  ModelConfig config = source.config();
  config.low_bit = options.spec;
  config.low_bit_head = options.head;
  int64_t bytes = config.low_bit_bytes() + (options.head ? config.low_bit_head_bytes() : 0);
  std::set<std::string> coded;  // and held as nothing else
  for (const Stack& stack : LayerStacks(config)) {
    for (const Part& part : stack.parts) coded.insert(part.name + ".weight");
  }
  if (options.head && !config.tie_word_embeddings) coded.insert(std::string(kHeadName) + ".weight");
  for (const CheckpointTensor& tensor : source.tensors()) {
    if (!coded.contains(tensor.name)) bytes += tensor.view.bytes();
  }
  return bytes;
}

// Something that takes memory.
struct MemoryItem {
  int64_t bytes = 0;
  std::string what;
};

int64_t TotalBytes(std::span<const MemoryItem> items) {
  int64_t bytes = 0;
  for (const MemoryItem& item : items) bytes += item.bytes;
  return bytes;
}

std::string DescribeItems(std::span<const MemoryItem> items) {
  std::string text;
  for (const MemoryItem& item : items) {
    if (item.bytes == 0) continue;
    text += (text.empty() ? "" : ", ") + std::to_string(item.bytes) + " bytes for " + item.what;
  }
  return text;
}

// Reads a checkpoint's tensors in the order of their names and writes what becomes of them.
class Quantizer {
 public:
  Quantizer(const Checkpoint& source, const QuantizeOptions& options)
      : source_(source), options_(options) {}

  // Finds the matrices, with clips of static activations.
  Result<void> Prepare() {
    const LowBitSpec& spec = options_.spec;
    for (const Stack& stack : LayerStacks(source_.config())) {
      SharedInputs& inputs = inputs_.emplace_back();
      inputs.matrices_left = stack.parts.size();
      if (options_.inputs != nullptr) inputs.statistics = &options_.inputs->Of(stack.parts[0].name);
      if (HasStaticActivations(spec)) {
        CHECK(inputs.statistics != nullptr, "static activations without statistics of inputs");
        const auto clip = LearnInputClip(*inputs.statistics, spec);
        if (!clip) {
          return Error{clip.error().code, stack.parts[0].name + ": " + clip.error().message};
        }
        inputs.clip = *clip;
      }
      for (const Part& part : stack.parts) {
        const double prune = ShareToPrune(options_, part.name);
        targets_[part.name] = {report_.matrices.size(), &inputs, spec, prune};
        report_.matrices.push_back({.name = part.name,
                                    .rows = part.rows,
                                    .cols = stack.cols,
                                    .input_alpha = inputs.clip.alpha});
      }
    }
    if (!options_.head) return {};
    SharedInputs& inputs = inputs_.emplace_back();  // of which there are no statistics
    inputs.matrices_left = 1;
    targets_[kHeadName] = {report_.matrices.size(), &inputs, *options_.head, 0};
    const ModelConfig& config = source_.config();
    report_.matrices.push_back(
        {.name = kHeadName, .rows = config.vocab_size, .cols = config.hidden_size});
    return {};
  }

  Result<QuantizedCheckpoint> Write(const std::filesystem::path& path) {
    ASSIGN_OR_RETURN(SafetensorsWriter file,
                     SafetensorsWriter::Create(path, Outputs(), AskedMetadata()));
    for (const CheckpointTensor& tensor : source_.tensors()) {
      report_.source_bytes += tensor.view.bytes();
    }
    int64_t done = 0;
    for (const CheckpointTensor& tensor : source_.tensors()) {
      if (options_.progress && !options_.progress(done, report_.source_bytes)) {
        return Error{ErrorCode::kCancelled, "interrupted"};
      }
      Hash(tensor);
      const WrittenAs to = OutputsOf(tensor.name);
      if (!to.tensor.empty()) RETURN_IF_ERROR(file.Write(to.tensor, BytesOf(tensor.view)));
      if (!to.matrix.empty()) {
        const auto written = WriteMatrix(to.matrix, targets_.at(to.matrix), tensor.view, &file);
        if (!written) {
          const std::string where = source_.directory().string() + ": tensor " + tensor.name + ": ";
          return Error{written.error().code, where + written.error().message};
        }
      }
      done += tensor.view.bytes();
    }
    report_.zeros = zeros_ / static_cast<double>(report_.num_weights);
    char hash[17];  // of hexadecimal digits, and a zero
    std::snprintf(hash, sizeof(hash), "%016" PRIx64, hash_.value());
    RETURN_IF_ERROR(file.Finish(
        {{"zeros", ShortestText(report_.zeros)}, {"source", std::string("fnv1a64:") + hash}}));
    report_.file_bytes = file.bytes();
    return std::move(report_);
  }

 private:
  // "<name>" of "<name>.weight"; else an empty string.
  static std::string MatrixOf(const std::string& tensor) {
    return tensor.ends_with(kWeightSuffix) ? tensor.substr(0, tensor.size() - kWeightSuffix.size())
                                           : "";
  }

  // A head that is tied has codes beside the table, which then is the only matrix of floats of the
  // two: a checkpoint may have it under either name, or both.
  WrittenAs OutputsOf(const std::string& tensor) const {
    const std::string matrix = MatrixOf(tensor);
    if (options_.head && source_.config().tie_word_embeddings) {
      const std::string table = std::string(kTableName) + ".weight";
      const bool is_table =
          source_.Find(table) != nullptr ? matrix == kTableName : matrix == kHeadName;
      if (is_table) return {table, kHeadName};
      if (matrix == kHeadName) return {};
    }
    return targets_.contains(matrix) ? WrittenAs{"", matrix} : WrittenAs{tensor, ""};
  }

  std::vector<TensorToWrite> Outputs() const {
    std::vector<TensorToWrite> outputs;
    for (const CheckpointTensor& tensor : source_.tensors()) {
      const auto [name, matrix] = OutputsOf(tensor.name);
      if (!name.empty()) outputs.push_back({name, tensor.view.dtype, tensor.view.shape});
      if (matrix.empty()) continue;
      const LowBitSpec& spec = targets_.at(matrix).spec;
      const int64_t rows = tensor.view.shape[0], cols = tensor.view.shape[1];
      outputs.push_back({matrix + ".weight_codes", DType::kU8, {rows, spec.RowBytes(cols)}});
      outputs.push_back({matrix + ".weight_scales", DType::kF16, {rows, spec.Groups(cols)}});
      if (!HasStaticActivations(spec)) continue;
      outputs.push_back({matrix + ".input_clip", DType::kF32, {1}});
    }
    return outputs;
  }

  void Hash(const CheckpointTensor& tensor) {
    const std::string lines = tensor.name + "\n" + DTypeName(tensor.view.dtype) + "\n" +
                              tensor.view.shape.ToString() + "\n";
    hash_.Add(std::as_bytes(std::span(lines)));
    hash_.Add(BytesOf(tensor.view));
  }

  // Tensors come by name, those of a layer after those of another: few factors are held at once.
  Result<const FeedbackFactor*> FactorOf(SharedInputs& inputs) {
    if (inputs.statistics == nullptr) return nullptr;
    if (!inputs.factor) {
      ASSIGN_OR_RETURN(inputs.factor, FactorHessian(inputs.statistics->hessian(),
                                                    inputs.statistics->cols, options_.threads));
    }
    return &*inputs.factor;
  }

  Result<void> WriteMatrix(const std::string& name, const MatrixTarget& target,
                           const ConstTensorView& stored, SafetensorsWriter* file) {
    QuantizedMatrix& matrix = report_.matrices[target.index];
    SharedInputs& inputs = *target.inputs;
    ASSIGN_OR_RETURN(const FeedbackFactor* const factor, FactorOf(inputs));
    const int64_t count = stored.shape.num_elements();
    ASSIGN_OR_RETURN(Buffer floats, AllocateHost(count * DTypeBytes(DType::kF32)));
    auto* const weights = reinterpret_cast<float*>(floats.data());
    for (int64_t i = 0; i < count; ++i) weights[i] = ElementAsFloat(stored, i);
    ASSIGN_OR_RETURN(
        const EncodedLowBit encoded,
        EncodeLowBit({.spec = target.spec,
                      .rows = matrix.rows,
                      .cols = matrix.cols,
                      .weights = weights,
                      .hessian = factor == nullptr ? nullptr : inputs.statistics->hessian(),
                      .factor = factor,
                      .prune = target.prune,
                      .scale = options_.scale,
                      .threads = options_.threads}));
    if (--inputs.matrices_left == 0) inputs.factor.reset();
    const auto codes = std::as_bytes(std::span(encoded.codes));
    const auto scales = std::as_bytes(std::span(encoded.scales));
    RETURN_IF_ERROR(file->Write(name + ".weight_codes", codes));
    RETURN_IF_ERROR(file->Write(name + ".weight_scales", scales));
    if (HasStaticActivations(target.spec)) {
      const std::span<const float> clip(&inputs.clip.range, 1);
      RETURN_IF_ERROR(file->Write(name + ".input_clip", std::as_bytes(clip)));
    }
    matrix.alpha = encoded.alpha;
    matrix.zeros = encoded.zeros;
    matrix.error = encoded.error;
    report_.num_weights += matrix.rows * matrix.cols;
    report_.low_bit_bytes += static_cast<int64_t>(codes.size() + scales.size());
    zeros_ += encoded.zeros * static_cast<double>(matrix.rows * matrix.cols);
    return {};
  }

  std::map<std::string, std::string> AskedMetadata() const {
    const LowBitSpec& spec = options_.spec;
    std::map<std::string, std::string> metadata = {
        {"format", "pt"},
        {"scheme", LowBitSchemeName(spec.scheme)},
        {"bits", std::to_string(spec.bits)},
        {"group_size", std::to_string(spec.group_size)},
        {"activation_bits", std::to_string(spec.activation_bits)},
        {"scale", LowBitScaleName(options_.scale)},
        {"prune", ShortestText(options_.prune)}};
    std::string rules;
    for (const PruneRule& rule : options_.prune_matrices) {
      rules += (rules.empty() ? "" : ",") + rule.pattern + "=" + ShortestText(rule.share);
    }
    if (!rules.empty()) metadata["prune_matrices"] = rules;
    if (const auto& head = options_.head) {
      metadata["head"] =
          std::string(LowBitSchemeName(head->scheme)) + " " + std::to_string(head->bits);
    }
    return metadata;
  }

  const Checkpoint& source_;
  const QuantizeOptions& options_;
  std::deque<SharedInputs> inputs_;              // of each stack; do not move
  std::map<std::string, MatrixTarget> targets_;  // by matrix
  QuantizedCheckpoint report_;
  double zeros_ = 0;  // weights
  Fnv1a hash_;
};

}  // namespace

// Goes back to the last star alone when a character differs, which is enough.
bool PruneRule::Matches(std::string_view name) const {
  size_t at = 0, star = std::string::npos, after_star = 0;  // in the pattern, there, in the name
  for (size_t i = 0; i < name.size();) {
    if (at < pattern.size() && pattern[at] == '*') {
      star = at++;
      after_star = i;
    } else if (at < pattern.size() && pattern[at] == name[i]) {
      ++at;
      ++i;
    } else if (star != std::string::npos) {
      at = star + 1;
      i = ++after_star;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', at) == std::string::npos;
}

const PruneRule* FindPruneRule(std::span<const PruneRule> rules, std::string_view name) {
  const PruneRule* last = nullptr;
  for (const PruneRule& rule : rules) {
    if (rule.Matches(name)) last = &rule;
  }
  return last;
}

Result<void> CheckQuantizable(const Checkpoint& source, const QuantizeOptions& options) {
  CHECK(options.spec.valid() && (!options.head || options.head->valid()), "a valid spec");
  const ModelConfig& config = source.config();
  if (config.low_bit) {
    return InvalidArgument((source.directory() / kConfigFile).string() +
                           ": quantization_config: the model is quantized already");
  }
  RETURN_IF_ERROR(LlamaModel::CheckTensors(source));
  const auto check = [](const std::string& name, int64_t cols, const LowBitSpec& spec) {
    if (spec.Divides(cols)) return Result<void>();
    const int64_t unit = std::max(kLowBitUnit, spec.group_size);
    return Result<void>(InvalidArgument(
        name + ": " + std::to_string(cols) + " inputs are no multiple of " + std::to_string(unit),
        "group_size"));
  };
  std::vector<std::string> names;
  for (const Stack& stack : LayerStacks(config)) {
    for (const Part& part : stack.parts) names.push_back(part.name);
    RETURN_IF_ERROR(check(stack.parts[0].name, stack.cols, options.spec));
  }
  if (options.head) RETURN_IF_ERROR(check(kHeadName, config.hidden_size, *options.head));
  for (const PruneRule& rule : options.prune_matrices) {
    const auto matches = [&](const std::string& name) { return rule.Matches(name); };
    if (std::any_of(names.begin(), names.end(), matches)) continue;
    return InvalidArgument("no matrix matches " + rule.pattern + "; the first is " + names.front() +
                               ", the last " + names.back(),
                           "prune_matrices");
  }
  return {};
}

Result<void> CheckMemoryToQuantize(const Checkpoint& source, const QuantizeOptions& options,
                                   const CalibrationPlan& plan) {
  const ModelConfig& config = source.config();
  int64_t weights = 0, encoding = 0;
  for (const CheckpointTensor& tensor : source.tensors()) {
    weights += plan.runs ? tensor.view.bytes() : 0;
  }
  std::string largest;
  const auto look = [&](const std::string& name, const EncodeLowBitArgs& args, bool has_hessian) {
    const int64_t bytes = EncodingBytes(args, has_hessian);
    if (bytes <= encoding) return;
    encoding = bytes;
    largest = name;
  };
  for (const Stack& stack : LayerStacks(config)) {
    for (const Part& part : stack.parts) {
      look(part.name,
           {.spec = options.spec,
            .rows = part.rows,
            .cols = stack.cols,
            .prune = ShareToPrune(options, part.name),
            .threads = options.threads},
           plan.calibrates);
    }
  }
  if (options.head) {
    look(kHeadName,
         {.spec = *options.head,
          .rows = config.vocab_size,
          .cols = config.hidden_size,
          .threads = options.threads},
         false);
  }
  // q, k and v are not encoded one after the other: their factor may be there as well.
  if (plan.calibrates) encoding += FeedbackFactorBytes(config.hidden_size);
  const int64_t statistics = plan.calibrates ? InputCollector::Bytes(config) : 0;
  const std::vector<MemoryItem> quantizing = {
      {weights, "the float model"},
      {statistics, "statistics of the inputs of all matrices (4 K^2 for K inputs)"},
      {encoding, "encoding " + largest}};
  std::vector<MemoryItem> measuring;
  if (plan.scored_rows > 0) {
    measuring = {
        {weights, "the float model"},
        {LowBitModelBytes(source, options), "the low-bit model"},
        {plan.scored_rows * config.vocab_size * DTypeBytes(DType::kF32), "the logits of a text"}};
  }
  const int64_t available = AvailableHostBytes();
  const bool measuring_is_more = TotalBytes(measuring) > TotalBytes(quantizing);
  const std::vector<MemoryItem>& most = measuring_is_more ? measuring : quantizing;
  if (TotalBytes(most) <= available) return {};
  return Error{ErrorCode::kResourceExhausted,
               std::string(measuring_is_more ? "measuring" : "quantizing") + " takes " +
                   DescribeItems(most) + "; " + std::to_string(available) + " are available"};
}

Result<QuantizedCheckpoint> QuantizeCheckpoint(const Checkpoint& source,
                                               const QuantizeOptions& options,
                                               const std::filesystem::path& directory) {
  RETURN_IF_ERROR(CheckQuantizable(source, options));
  ASSIGN_OR_RETURN(const std::string config, ConfigWith(options, source.directory()));
  Quantizer quantizer(source, options);
  RETURN_IF_ERROR(quantizer.Prepare());
  RETURN_IF_ERROR(CopyOthers(source.directory(), directory));
  RETURN_IF_ERROR(WriteText(directory / kConfigFile, config));
  return quantizer.Write(directory / kWeightsFile);
}

}  // namespace innerq
