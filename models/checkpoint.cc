#include "models/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "models/files.h"
#include "models/safetensors.h"

namespace innerq {
namespace {

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";

// What follows a matrix's name in those of its tensors.
constexpr char kCodes[] = ".weight_codes";
constexpr char kScales[] = ".weight_scales";
constexpr char kInputClip[] = ".input_clip";

// Which shard holds which tensor: the "weight_map" of the index.
Result<std::map<std::string, std::string>> ReadIndex(const std::filesystem::path& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxTextFileBytes));
  const auto damaged = [&path](const std::string& what) {
    return Error{ErrorCode::kDataLoss, path.string() + ": " + what};
  };
  const auto index = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!index.is_object()) return damaged("not a JSON object");
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object() || weight_map->empty()) {
    return damaged("no \"weight_map\" object with tensors in it");
  }
  std::map<std::string, std::string> shard_of;
  for (const auto& [tensor, value] : weight_map->items()) {
    const std::string where = "weight_map: tensor " + tensor + ": ";
    if (!value.is_string()) return damaged(where + "the file name is not a string");
    const auto& file = value.get_ref<const std::string&>();
    const bool plain_name = file.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
    if (!plain_name || !file.ends_with(".safetensors")) {
      return damaged(where + "\"" + file + "\" is not the name of a .safetensors file in the " +
                     "directory of the index");
    }
    shard_of[tensor] = file;
  }
  return shard_of;
}

// A checkpoint whose files are mapped.
class MappedCheckpoint : public Checkpoint {
 public:
  MappedCheckpoint(std::filesystem::path directory, ModelConfig config)
      : directory_(std::move(directory)), config_(std::move(config)) {}

  Result<void> MapFiles() {
    std::error_code ignored;  // what cannot be looked at counts as absent
    if (std::filesystem::exists(directory_ / kSingleFile, ignored)) return MapFile(kSingleFile);
    if (std::filesystem::exists(directory_ / kIndexFile, ignored)) return MapShards();
    return Error{ErrorCode::kNotFound, directory_.string() + ": neither " + kSingleFile + " nor " +
                                           kIndexFile + " is there"};
  }

  const ModelConfig& config() const override { return config_; }
  const std::filesystem::path& directory() const override { return directory_; }
  const std::vector<CheckpointTensor>& tensors() const override { return tensors_; }
  const std::map<std::string, std::string>& unreadable() const override { return unreadable_; }
  const std::map<std::string, std::string>& metadata() const override { return metadata_; }

  const CheckpointTensor* Find(std::string_view name) const override {
    const auto at = std::lower_bound(
        tensors_.begin(), tensors_.end(), name,
        [](const CheckpointTensor& tensor, std::string_view key) { return tensor.name < key; });
    return at != tensors_.end() && at->name == name ? &*at : nullptr;
  }

 private:
  // Adds a file's tensors, keeping all of them sorted by name.
  Result<void> MapFile(const std::string& name) {
    const std::filesystem::path path = directory_ / name;
    ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
    ASSIGN_OR_RETURN(SafetensorsFile found, ParseSafetensors(file.bytes(), path.string()));
    std::vector<std::string> names;
    for (const CheckpointTensor& tensor : found.tensors) names.push_back(tensor.name);
    for (const auto& [tensor, text] : found.unreadable) names.push_back(tensor);
    for (const std::string& tensor : names) {
      const auto [first, is_new] = file_of_.emplace(tensor, name);
      if (is_new) continue;
      return Error{ErrorCode::kDataLoss,
                   path.string() + ": tensor " + tensor + " is also in " + first->second};
    }
    files_.push_back(std::move(file));
    tensors_.insert(tensors_.end(), found.tensors.begin(), found.tensors.end());
    unreadable_.merge(found.unreadable);
    metadata_.merge(found.metadata);
    std::sort(tensors_.begin(), tensors_.end(),
              [](const CheckpointTensor& a, const CheckpointTensor& b) { return a.name < b.name; });
    return {};
  }

  Result<void> MapShards() {
    ASSIGN_OR_RETURN(const auto shard_of, ReadIndex(directory_ / kIndexFile));
    std::set<std::string> shards;
    for (const auto& [tensor, file] : shard_of) shards.insert(file);
    for (const std::string& file : shards) RETURN_IF_ERROR(MapFile(file));
    for (const auto& [tensor, file] : shard_of) {
      const auto found = file_of_.find(tensor);
      if (found == file_of_.end() || found->second != file) {
        return Error{ErrorCode::kDataLoss, (directory_ / file).string() + ": tensor " + tensor +
                                               " is missing, though " + kIndexFile +
                                               " says it is there"};
      }
    }
    return {};
  }

  std::filesystem::path directory_;
  ModelConfig config_;
  std::vector<MappedFile> files_;
  std::map<std::string, std::string> file_of_;  // by tensor
  std::vector<CheckpointTensor> tensors_;       // sorted by name
  std::map<std::string, std::string> unreadable_;
  std::map<std::string, std::string> metadata_;
};

Error BadTensor(const Checkpoint& checkpoint, const std::string& name, const std::string& what) {
  return Error{ErrorCode::kDataLoss,
               checkpoint.directory().string() + ": tensor " + name + ": " + what};
}

// A tensor of a shape, whatever it holds.
Result<ConstTensorView> GetShaped(const Checkpoint& checkpoint, const std::string& name,
                                  const Shape& shape) {
  const CheckpointTensor* tensor = checkpoint.Find(name);
  const auto unreadable = checkpoint.unreadable().find(name);
  if (unreadable != checkpoint.unreadable().end()) {
    return BadTensor(
        checkpoint, name,
        "expected F32, F16, BF16 or U8 " + shape.ToString() + ", found " + unreadable->second);
  }
  if (tensor == nullptr) {
    return BadTensor(checkpoint, name, "missing; expected shape " + shape.ToString());
  }
  if (!(tensor->view.shape == shape)) {
    return BadTensor(checkpoint, name,
                     "config.json asks for shape " + shape.ToString() + ", found " +
                         tensor->view.shape.ToString());
  }
  return tensor->view;
}

Result<ConstTensorView> GetTyped(const Checkpoint& checkpoint, const std::string& name, DType dtype,
                                 const Shape& shape) {
  ASSIGN_OR_RETURN(const ConstTensorView view, GetShaped(checkpoint, name, shape));
  if (view.dtype != dtype) {
    return BadTensor(
        checkpoint, name,
        std::string("expected ") + DTypeName(dtype) + ", found " + DTypeName(view.dtype));
  }
  return view;
}

}  // namespace

Result<ConstTensorView> Checkpoint::Get(const std::string& name, const Shape& shape) const {
  ASSIGN_OR_RETURN(const ConstTensorView view, GetShaped(*this, name, shape));
  if (view.dtype == DType::kU8) {
    return BadTensor(*this, name, "expected F32, F16 or BF16, found U8");
  }
  return view;
}

bool Checkpoint::HasLowBit(const std::string& name) const {
  return Has(name + kCodes) || Has(name + kScales) || Has(name + kInputClip);
}

Result<LowBitMatrix> Checkpoint::GetLowBit(const std::string& name, const Shape& shape) const {
  const std::optional<LowBitSpec>& spec = config().LowBitOf(name);
  if (!spec) {
    return BadTensor(*this, name + kCodes,
                     std::string("config.json has no \"quantization_config\"") +
                         (name == kHeadName ? " with a \"head\"" : "") +
                         ", which says how a matrix is coded");
  }
  if (Has(name + ".weight")) {
    return BadTensor(*this, name + ".weight",
                     "the matrix is also stored as codes or has their scales or clip");
  }
  LowBitMatrix matrix{.spec = *spec, .rows = shape[0], .cols = shape[1]};
  ASSIGN_OR_RETURN(
      const ConstTensorView codes,
      GetTyped(*this, name + kCodes, DType::kU8, {matrix.rows, matrix.spec.RowBytes(matrix.cols)}));
  ASSIGN_OR_RETURN(
      const ConstTensorView scales,
      GetTyped(*this, name + kScales, DType::kF16, {matrix.rows, matrix.spec.Groups(matrix.cols)}));
  matrix.codes = codes.As<uint8_t>();
  matrix.scales = scales.As<uint16_t>();
  if (!Has(name + kInputClip)) return matrix;
  ASSIGN_OR_RETURN(const ConstTensorView clip,
                   GetTyped(*this, name + kInputClip, DType::kF32, {1}));
  matrix.input_clip = clip.As<float>()[0];
  if (!(matrix.input_clip > 0) || !std::isfinite(matrix.input_clip)) {
    return BadTensor(
        *this, name + kInputClip,
        "expected a finite number above 0, found " + std::to_string(matrix.input_clip));
  }
  return matrix;
}

Result<std::shared_ptr<const Checkpoint>> Checkpoint::Open(const std::filesystem::path& directory) {
  ASSIGN_OR_RETURN(ModelConfig config, ReadModelConfig(directory));
  auto checkpoint = std::make_shared<MappedCheckpoint>(directory, std::move(config));
  RETURN_IF_ERROR(checkpoint->MapFiles());
  const auto is_code = [](const CheckpointTensor& tensor) { return tensor.name.ends_with(kCodes); };
  const std::vector<CheckpointTensor>& tensors = checkpoint->tensors();
  if (checkpoint->config().low_bit && std::none_of(tensors.begin(), tensors.end(), is_code)) {
    return Error{ErrorCode::kDataLoss,
                 (directory / "config.json").string() +
                     ": quantization_config: expected matrices of codes (\"<name>" + kCodes +
                     "\"), found floats alone"};
  }
  return std::shared_ptr<const Checkpoint>(std::move(checkpoint));
}

}  // namespace innerq
