#include "models/weight_quantizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>
#include <set>
#include <tuple>

#include "kernels/cpu/low_bit_encoder.h"
#include "kernels/cpu/lower_triangle.h"
#include "models/files.h"
#include "models/input_statistics.h"
#include "models/layer_tensors.h"
#include "models/llama.h"
#include "models/safetensors.h"
#include "models/safetensors_writer.h"
#include "models/tensor_source.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

using nlohmann::json;

std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

json HeaderOf(const std::filesystem::path& path) {
  const std::string file = ReadAll(path);
  uint64_t size = 0;
  std::memcpy(&size, file.data(), sizeof(size));
  EXPECT_EQ(size % 8, 0u);
  return json::parse(file.substr(sizeof(size), size));
}

TEST(SafetensorsWriter, WritesWhatIsReadInAnyOrderAndAligned) {
  const TemporaryDirectory directory;
  const std::filesystem::path path = directory.path() / "a.safetensors";
  auto writer = SafetensorsWriter::Create(path, {{"codes", DType::kU8, {3, 1}},
                                                 {"half", DType::kF16, {1}},
                                                 {"odd \"name\"\n", DType::kU8, {5}},
                                                 {"wide", DType::kF32, {2}},
                                                 {"brain", DType::kBF16, {1, 1, 3}}});
  ASSERT_TRUE(writer.ok());
  const std::string codes = "abc", half = "de", odd = "12345", wide = "ABCDEFGH", brain = "uvwxyz";
  ASSERT_TRUE(writer->Write("codes", Bytes(codes)).ok());
  ASSERT_TRUE(writer->Write("brain", Bytes(brain)).ok());
  ASSERT_TRUE(writer->Write("wide", Bytes(wide)).ok());
  ASSERT_TRUE(writer->Write("odd \"name\"\n", Bytes(odd)).ok());
  ASSERT_TRUE(writer->Write("half", Bytes(half)).ok());
  ASSERT_TRUE(writer->Finish({{"format", "pt"}, {"bits", "3"}}).ok());
  EXPECT_EQ(static_cast<uint64_t>(writer->bytes()), std::filesystem::file_size(path));
  EXPECT_EQ(HeaderOf(path)["__metadata__"], (json{{"format", "pt"}, {"bits", "3"}}));

  const auto file = MappedFile::Open(path);
  ASSERT_TRUE(file.ok());
  const auto parsed = ParseSafetensors(file->bytes(), "a");
  ASSERT_TRUE(parsed.ok()) << parsed.error().message;
  EXPECT_EQ(parsed->metadata,
            (std::map<std::string, std::string>{{"format", "pt"}, {"bits", "3"}}));
  std::string found;
  for (const CheckpointTensor& tensor : parsed->tensors) {
    found += tensor.name + ":" + DTypeName(tensor.view.dtype) + tensor.view.shape.ToString() + "=" +
             std::string(reinterpret_cast<const char*>(tensor.view.data),
                         static_cast<size_t>(tensor.view.bytes())) +
             ";";
  }
  EXPECT_EQ(found,
            "wide:F32[2]=ABCDEFGH;brain:BF16[1, 1, 3]=uvwxyz;half:F16[1]=de;codes:U8[3, 1]=abc;"
            "odd \"name\"\n:U8[5]=12345;");
}

TEST(SafetensorsWriter, HoldsMetadataOfAnySizeThatIsKnownBefore) {
  const TemporaryDirectory directory;
  const std::filesystem::path path = directory.path() / "a.safetensors";
  const std::string large(10'000, 'x');
  auto writer = SafetensorsWriter::Create(path, {{"a", DType::kU8, {4}}}, {{"asked", large}});
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(writer->Write("a", Bytes("four")).ok());
  ASSERT_TRUE(writer->Finish({{"reached", "0.5"}}).ok());
  EXPECT_EQ(HeaderOf(path)["__metadata__"], (json{{"asked", large}, {"reached", "0.5"}}));
}

TEST(SafetensorsWriter, RefusesAFileThatIsThereAndLeavesNoneThatReads) {
  const TemporaryDirectory directory;
  const std::filesystem::path path = directory.path() / "a.safetensors";
  {
    auto writer = SafetensorsWriter::Create(path, {{"a", DType::kU8, {4}}});
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE(writer->Write("a", Bytes("four")).ok());
  }
  const auto file = MappedFile::Open(path);
  ASSERT_TRUE(file.ok());
  EXPECT_FALSE(ParseSafetensors(file->bytes(), "a").ok()) << "it was not finished";
  const auto again = SafetensorsWriter::Create(path, {});
  ASSERT_FALSE(again.ok());
  EXPECT_EQ(again.error().message, "cannot write " + path.string() + ": File exists");
}

// N(0, 1), as inputs of one matrix.
InputStatistics NormalInputs(double sigma) {
  constexpr int64_t kCols = 4, kRows = 50'000;
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  std::vector<float> x(kRows * kCols);
  double squares = 0;
  for (float& value : x) {
    value = normal(random) * static_cast<float>(sigma);
    squares += static_cast<double>(value) * value;
  }
  InputStatistics inputs;
  inputs.rows = kRows;
  inputs.cols = kCols;
  constexpr int64_t kElements = TriangleElements(kCols);
  auto* const gram = new double[kElements]();
  for (int64_t i = 0; i < kCols; ++i) gram[TriangleElements(i) + i] = squares / kCols;
  inputs.gram = Buffer(reinterpret_cast<std::byte*>(gram), kElements * 8,
                       [](std::byte* data) { delete[] reinterpret_cast<double*>(data); });
  inputs.magnitudes.Add(x);
  return inputs;
}

TEST(InputClip, IsTheOneWithTheLeastError) {
  for (const double sigma : {1.0, 3e-5, 700.0}) {
    const InputStatistics inputs = NormalInputs(sigma);
    EXPECT_NEAR(inputs.sigma() / sigma, 1, 0.01);
    // Of a normal distribution's best uniform codes (Max, Quantizing for minimum distortion, 1960,
    // for 7 and 15 levels around zero): error 0.0469 and 0.0129 of the variance.
    for (const auto& [bits, alpha, error] :
         {std::tuple(3, 1.96, 0.0469), std::tuple(4, 2.48, 0.0129)}) {
      LowBitSpec spec;
      spec.activation_bits = bits;
      const auto clip = LearnInputClip(inputs, spec);
      ASSERT_TRUE(clip.ok());
      EXPECT_NEAR(clip->alpha, alpha, 0.08);
      EXPECT_NEAR(clip->range, clip->alpha * inputs.sigma(), 1e-6 * clip->range);
      EXPECT_NEAR(inputs.magnitudes.RoundingError(spec, clip->range) / (sigma * sigma), error,
                  0.03 * error);
    }
  }
}

TEST(InputClip, HasNoneForInputsThatAreAllZero) {
  InputStatistics inputs = NormalInputs(0);
  const auto clip = LearnInputClip(inputs, {.activation_bits = 4});
  ASSERT_FALSE(clip.ok());
  EXPECT_EQ(clip.error().message, "all inputs are zero in the calibration texts");
}

// A small model's directory to quantize.
class WeightQuantizerTest : public testing::Test {
 protected:
  void SetUp() override {
    source_ = directory_.path() / "source";
    output_ = directory_.path() / "output";
    std::filesystem::create_directory(source_);
    std::filesystem::create_directory(output_);
    for (const char* name : {"config.json", "model.safetensors"}) {
      std::filesystem::copy_file(TinyLlamaDirectory() / name, source_ / name);
    }
  }

  Result<QuantizedCheckpoint> Quantize(QuantizeOptions options) {
    const auto source = Checkpoint::Open(source_);
    if (!source) return source.error();
    return QuantizeCheckpoint(**source, options, output_);
  }
  QuantizedCheckpoint Quantized(QuantizeOptions options) {
    auto result = Quantize(std::move(options));
    EXPECT_TRUE(result.ok()) << (result.ok() ? "" : result.error().message);
    return result.ok() ? *result : QuantizedCheckpoint();
  }
  std::shared_ptr<const Checkpoint> Open(const std::filesystem::path& directory) {
    const auto checkpoint = Checkpoint::Open(directory);
    EXPECT_TRUE(checkpoint.ok()) << (checkpoint.ok() ? "" : checkpoint.error().message);
    return checkpoint.ok() ? *checkpoint : nullptr;
  }
  // Changes the tensors of the source.
  void Rewrite(const std::function<void(StoredTensor&)>& change) {
    std::vector<StoredTensor> tensors = StoredTensors(*Open(source_));
    for (StoredTensor& tensor : tensors) change(tensor);
    WriteAll(source_ / "model.safetensors", Safetensors(tensors));
  }
  std::string SourceHash() {
    return HeaderOf(output_ / "model.safetensors")["__metadata__"]["source"];
  }

  static constexpr LowBitSpec kSpec{.scheme = LowBitScheme::kUniform, .bits = 4, .group_size = 32};

  TemporaryDirectory directory_;
  std::filesystem::path source_, output_;
};

TEST_F(WeightQuantizerTest, ReplacesTheLayersMatricesAndCopiesAllElse) {
  WriteAll(source_ / "tokenizer.json", "{}");
  WriteAll(source_ / "LICENSE", "free");
  WriteAll(source_ / "README.md", "BF16");
  WriteAll(source_ / "model.safetensors.index.json", "{}");
  WriteAll(source_ / "pytorch_model.bin", "old");
  std::filesystem::create_directory(source_ / "eval");
  std::filesystem::create_symlink(source_ / "LICENSE", source_ / "COPYING");
  const QuantizedCheckpoint result = Quantized({.spec = kSpec});
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(output_)) {
    names.insert(entry.path().filename());
    EXPECT_FALSE(entry.is_symlink()) << "a copy, not a link to the source";
  }
  EXPECT_EQ(names, (std::set<std::string>{"COPYING", "LICENSE", "config.json", "model.safetensors",
                                          "tokenizer.json"}))
      << "not the card, which would speak of other weights";
  EXPECT_EQ(ReadAll(output_ / "COPYING"), "free");

  const auto source = Open(source_), output = Open(output_);
  ASSERT_NE(output, nullptr);
  EXPECT_EQ(output->config().low_bit, kSpec);
  ASSERT_EQ(result.matrices.size(), 14u);
  EXPECT_EQ(result.matrices[0].name, "model.layers.0.self_attn.q_proj");
  EXPECT_EQ(result.matrices[13].name, "model.layers.1.mlp.down_proj");
  EXPECT_EQ(output->tensors().size(), source->tensors().size() + 14);
  int64_t copied = 0;
  for (const CheckpointTensor& tensor : source->tensors()) {
    const CheckpointTensor* copy = output->Find(tensor.name);
    if (copy == nullptr) continue;
    ++copied;
    ASSERT_EQ(copy->view.dtype, tensor.view.dtype);
    ASSERT_EQ(copy->view.shape, tensor.view.shape);
    EXPECT_EQ(
        std::memcmp(copy->view.data, tensor.view.data, static_cast<size_t>(tensor.view.bytes())), 0)
        << tensor.name;
  }
  EXPECT_EQ(copied, static_cast<int64_t>(source->tensors().size()) - 14);

  int64_t weights = 0;
  double zeros = 0;
  for (const QuantizedMatrix& matrix : result.matrices) {
    const auto codes = output->GetLowBit(matrix.name, {matrix.rows, matrix.cols});
    ASSERT_TRUE(codes.ok()) << codes.error().message;
    EXPECT_EQ(codes->input_clip, 0) << "of activations of 16 bits";
    const CheckpointTensor* stored = source->Find(matrix.name + ".weight");
    double error = 0, squares = 0;
    for (int64_t n = 0; n < matrix.rows; ++n) {
      for (int64_t k = 0; k < matrix.cols; ++k) {
        const double w = ElementAsFloat(stored->view, n * matrix.cols + k);
        error += std::pow(codes->Value(n, k) - w, 2);
        squares += w * w;
        zeros += codes->Level(n, k) == 0 ? 1 : 0;
      }
    }
    weights += matrix.rows * matrix.cols;
    EXPECT_NEAR(matrix.error, error / squares, 1e-5) << matrix.name;
    EXPECT_LT(matrix.error, 0.02) << "4 bits uniform: 0.0129 for normal weights and one clip";
  }
  EXPECT_EQ(result.num_weights, weights);
  EXPECT_EQ(result.low_bit_bytes, weights / 2 + weights / 32 * 2);
  EXPECT_NEAR(result.zeros, zeros / static_cast<double>(weights), 1e-9);
  EXPECT_EQ(static_cast<uint64_t>(result.file_bytes),
            std::filesystem::file_size(output_ / "model.safetensors"));
}

TEST_F(WeightQuantizerTest, LeavesOutWhatNobodyHereCanRead) {
  Quantized({.spec = kSpec});
  const std::string expected = ReadAll(output_ / "model.safetensors");
  std::filesystem::remove_all(output_);
  std::filesystem::create_directory(output_);
  std::vector<StoredTensor> tensors = StoredTensors(*Open(source_));
  tensors.push_back({"model.position_ids", {1, 4}, std::string(32, '\0'), "I64"});
  WriteAll(source_ / "model.safetensors", Safetensors(tensors));
  Quantized({.spec = kSpec});
  EXPECT_TRUE(ReadAll(output_ / "model.safetensors") == expected);
}

TEST_F(WeightQuantizerTest, KeepsTheConfigAndAddsTheKey) {
  json config = json::parse(ReadAll(source_ / "config.json"));
  config["quantization_config"] = nullptr;
  WriteAll(source_ / "config.json", config.dump() + "\n\n");
  Quantized(
      {.spec = {.scheme = LowBitScheme::kPow2, .bits = 3, .group_size = 0, .activation_bits = 8}});
  config["quantization_config"] = {
      {"quant_method", "sigma"}, {"scheme", "pow2"},     {"bits", 3},
      {"group_size", 0},         {"activation_bits", 8}, {"scale", "free"}};
  EXPECT_EQ(json::parse(ReadAll(output_ / "config.json")), config);
}

TEST_F(WeightQuantizerTest, TellsWhatWasAskedAndOfWhichWeights) {
  const QuantizedCheckpoint result = Quantized({.spec = kSpec, .prune = 0.5});
  EXPECT_NEAR(result.zeros, 0.5, 0.02);
  const json metadata = HeaderOf(output_ / "model.safetensors")["__metadata__"];
  EXPECT_EQ(metadata["format"], "pt");
  EXPECT_EQ(metadata["scheme"], "uniform");
  EXPECT_EQ(metadata["bits"], "4");
  EXPECT_EQ(metadata["group_size"], "32");
  EXPECT_EQ(metadata["activation_bits"], "16");
  EXPECT_EQ(metadata["scale"], "free");
  EXPECT_FALSE(metadata.contains("prune_matrices"));
  EXPECT_NEAR(std::stod(metadata["prune"].get<std::string>()), 0.5, 1e-6);
  EXPECT_NEAR(std::stod(metadata["zeros"].get<std::string>()), result.zeros, 1e-5);

  const std::string hash = SourceHash();
  EXPECT_EQ(hash.size(), std::string("fnv1a64:").size() + 16);
  std::filesystem::remove_all(output_);
  std::filesystem::create_directory(output_);
  Quantized({.spec = kSpec});
  EXPECT_EQ(SourceHash(), hash) << "the same source";
  std::filesystem::remove_all(output_);
  std::filesystem::create_directory(output_);
  Rewrite([](StoredTensor& tensor) {
    if (tensor.name == "model.norm.weight") tensor.bytes[0] ^= 1;
  });
  Quantized({.spec = kSpec});
  EXPECT_NE(SourceHash(), hash);
}

TEST_F(WeightQuantizerTest, ScalesArePowersOfTwoWhereAskedFor) {
  const QuantizedCheckpoint result = Quantized({.spec = kSpec, .scale = LowBitScale::kPow2});
  EXPECT_EQ(HeaderOf(output_ / "model.safetensors")["__metadata__"]["scale"], "pow2");
  const auto output = Open(output_);
  ASSERT_NE(output, nullptr);
  EXPECT_EQ(output->config().low_bit_scale, LowBitScale::kPow2);
  const auto source = CreateCheckpointSource(output);  // which refuses others
  for (const QuantizedMatrix& matrix : result.matrices) {
    const auto codes = source->GetLowBit(matrix.name, {matrix.rows, matrix.cols});
    ASSERT_TRUE(codes.ok()) << codes.error().message;
    for (int64_t i = 0; i < matrix.rows * kSpec.Groups(matrix.cols); ++i) {
      EXPECT_TRUE(codes->scales[i] != 0 && IsPowerOfTwoScale(codes->scales[i])) << matrix.name;
    }
  }
}

// Tied or not, and under whichever name a tied table is stored.
TEST_F(WeightQuantizerTest, TheHeadIsEncodedBesideATableOrInItsPlace) {
  constexpr LowBitSpec kHeadSpec{.scheme = LowBitScheme::kUniform, .bits = 8, .group_size = 32};
  const json config = json::parse(ReadAll(source_ / "config.json"));
  const std::vector<StoredTensor> stored = StoredTensors(*Open(source_));
  const std::string table = "model.embed_tokens.weight", head = "lm_head.weight";
  for (const auto& [tied, names] : std::vector<std::pair<bool, std::vector<std::string>>>{
           {true, {table}}, {true, {head}}, {true, {table, head}}, {false, {table, head}}}) {
    json changed = config;
    changed["tie_word_embeddings"] = tied;
    WriteAll(source_ / "config.json", changed.dump());
    std::vector<StoredTensor> tensors;
    for (const StoredTensor& tensor : stored) {
      if (tensor.name != table) tensors.push_back(tensor);
      for (const std::string& name : names) {
        if (tensor.name != table) continue;
        tensors.push_back(tensor);
        tensors.back().name = name;
      }
    }
    WriteAll(source_ / "model.safetensors", Safetensors(tensors));
    const QuantizedCheckpoint result =
        Quantized({.spec = kSpec, .head = kHeadSpec, .prune = 0.5, .prune_matrices = {{"*", 0.5}}});
    ASSERT_EQ(result.matrices.size(), 15u);
    const QuantizedMatrix& matrix = result.matrices.back();
    EXPECT_EQ(matrix.name, "lm_head");
    EXPECT_EQ(matrix.rows, 128);
    EXPECT_EQ(matrix.cols, 64);
    EXPECT_LT(matrix.error, 1e-4) << "8 bits";
    EXPECT_LT(matrix.zeros, 0.05) << "it is not pruned";

    const auto output = Open(output_);
    ASSERT_NE(output, nullptr);
    EXPECT_EQ(output->config().low_bit_head, kHeadSpec);
    EXPECT_TRUE(LlamaModel::CheckTensors(*output).ok());
    EXPECT_EQ(output->metadata().at("head"), "uniform 8");
    EXPECT_EQ(output->Find(head), nullptr);
    const auto floats = output->Get(table, {128, 64});
    ASSERT_TRUE(floats.ok()) << floats.error().message;
    const auto codes = output->GetLowBit("lm_head", {128, 64});
    ASSERT_TRUE(codes.ok()) << codes.error().message;
    double error = 0, squares = 0;
    for (int64_t i = 0; i < 128 * 64; ++i) {
      const double w = ElementAsFloat(*floats, i);
      error += std::pow(codes->Value(i / 64, i % 64) - w, 2);
      squares += w * w;
    }
    EXPECT_NEAR(matrix.error, error / squares, 1e-6);
    std::filesystem::remove_all(output_);
    std::filesystem::create_directory(output_);
  }
}

TEST(PruneRule, StarsStandForAnyCharacters) {
  const auto matches = [](const std::string& pattern) {
    return PruneRule{.pattern = pattern}.Matches("model.layers.10.mlp.down_proj");
  };
  for (const char* pattern : {"model.layers.10.mlp.down_proj", "*", "**", "*.down_proj",
                              "model.layers.10.*", "model.layers.1*", "*.mlp.*", "*1*0*mlp*",
                              "model.*.10.*.down_proj", "*down_proj*", "*.*.*.*.*", "*_p*oj"}) {
    EXPECT_TRUE(matches(pattern)) << pattern;
  }
  for (const char* pattern : {"", "model.layers.1.*", "down_proj", "model.layers.10.mlp.down_pro",
                              "model.layers.10.mlp.down_projx", "*.up_proj", "*.*.*.*.*.*",
                              "model?layers*", "*mlp", "*p", "mlp*"}) {
    EXPECT_FALSE(matches(pattern)) << pattern;
  }
  const std::vector<PruneRule> rules = {{"*.mlp.*", 0.5}, {"*.0.*", 0.25}};
  EXPECT_EQ(FindPruneRule(rules, "model.layers.1.mlp.up_proj"), &rules[0]);
  EXPECT_EQ(FindPruneRule(rules, "model.layers.0.mlp.up_proj"), &rules[1]) << "the last";
  EXPECT_EQ(FindPruneRule(rules, "model.layers.1.self_attn.q_proj"), nullptr);
}

TEST_F(WeightQuantizerTest, PrunesEachMatrixAsTheLastRuleThatMatchesSays) {
  QuantizeOptions options{.spec = kSpec, .prune = 0.5};
  options.prune_matrices = {{"model.layers.0.*", 0.7}, {"*.down_proj", 0.625}, {"*.v_proj", 0}};
  const QuantizedCheckpoint result = Quantized(options);
  const auto output = Open(output_);
  ASSERT_NE(output, nullptr);
  double unpruned = 0;
  for (const QuantizedMatrix& matrix : result.matrices) {
    const auto codes = output->GetLowBit(matrix.name, {matrix.rows, matrix.cols});
    ASSERT_TRUE(codes.ok()) << codes.error().message;
    double zeros = 0;
    for (int64_t i = 0; i < matrix.rows * matrix.cols; ++i) {
      zeros += codes->Level(i / matrix.cols, i % matrix.cols) == 0 ? 1 : 0;
    }
    zeros /= static_cast<double>(matrix.rows * matrix.cols);
    EXPECT_NEAR(matrix.zeros, zeros, 1e-9) << matrix.name;
    if (matrix.name.ends_with("v_proj")) {
      EXPECT_LT(zeros, 0.3) << "rounding alone";
      unpruned += zeros;
      continue;
    }
    const double asked = matrix.name.ends_with("down_proj")                   ? 0.625
                         : matrix.name.find("layers.0.") != std::string::npos ? 0.7
                                                                              : 0.5;
    EXPECT_NEAR(zeros, asked, 0.001) << matrix.name;
  }
  EXPECT_GT(unpruned, 0);
  const json metadata = HeaderOf(output_ / "model.safetensors")["__metadata__"];
  EXPECT_EQ(metadata["prune"], "0.5");
  EXPECT_EQ(metadata["prune_matrices"], "model.layers.0.*=0.7,*.down_proj=0.625,*.v_proj=0");
}

// Inputs of which each resembles the one before it, of another scale for every stack.
std::unique_ptr<InputCollector> CorrelatedInputs(const ModelConfig& config) {
  auto inputs = InputCollector::Create(config, 1);
  CHECK(inputs.ok(), inputs.error().message);
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  float scale = 1;
  for (const Stack& stack : LayerStacks(config)) {
    scale *= 1.5f;
    constexpr int64_t kRows = 200;
    std::vector<float> x;
    float state = 0;
    for (int64_t i = 0; i < kRows * stack.cols; ++i) {
      x.push_back(scale * (state = 0.9f * state + normal(random)));
    }
    (*inputs)->Add(
        std::span(&stack.parts[0].name, 1),
        {reinterpret_cast<const std::byte*>(x.data()), DType::kF32, Shape{kRows, stack.cols}});
  }
  return std::move(*inputs);
}

TEST_F(WeightQuantizerTest, EveryMatrixIsEncodedByTheHessianOfItsInputs) {
  const auto source = Open(source_);
  const auto inputs = CorrelatedInputs(source->config());
  const QuantizedCheckpoint result = Quantized({.spec = kSpec, .inputs = inputs.get()});
  const auto output = Open(output_);
  ASSERT_NE(output, nullptr);
  ASSERT_EQ(result.matrices.size(), 14u);
  for (const QuantizedMatrix& matrix : result.matrices) {
    const ConstTensorView stored = source->Find(matrix.name + ".weight")->view;
    std::vector<float> weights;
    for (int64_t i = 0; i < matrix.rows * matrix.cols; ++i) {
      weights.push_back(ElementAsFloat(stored, i));
    }
    const auto alone = EncodeLowBit({.spec = kSpec,
                                     .rows = matrix.rows,
                                     .cols = matrix.cols,
                                     .weights = weights.data(),
                                     .hessian = inputs->Of(matrix.name).hessian()});
    ASSERT_TRUE(alone.ok()) << alone.error().message;
    EXPECT_EQ(matrix.error, alone->error) << matrix.name;
    const CheckpointTensor* codes = output->Find(matrix.name + ".weight_codes");
    EXPECT_EQ(std::memcmp(codes->view.data, alone->codes.data(), alone->codes.size()), 0)
        << matrix.name;
  }
}

TEST_F(WeightQuantizerTest, StaticActivationsBringTheirClip) {
  const auto inputs = InputCollector::Create(Open(source_)->config(), 1);
  ASSERT_TRUE(inputs.ok()) << inputs.error().message;
  EXPECT_NE((*inputs)->Check().error().message.find("no inputs were seen"), std::string::npos);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const auto add = [&](const std::string& name, int64_t cols, float sigma) {
    std::vector<float> x(static_cast<size_t>(1000 * cols));
    for (float& value : x) value = sigma * normal(random);
    (*inputs)->Add(std::span(&name, 1),
                   {reinterpret_cast<const std::byte*>(x.data()), DType::kF32, Shape{1000, cols}});
  };
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    add(layer + "self_attn.q_proj", 64, 2);
    add(layer + "self_attn.o_proj", 256, 1);
    add(layer + "mlp.gate_proj", 64, 0.5);
    add(layer + "mlp.down_proj", 96, 0.25);
  }
  ASSERT_TRUE((*inputs)->Check().ok());
  LowBitSpec spec = kSpec;
  spec.activation_bits = 3;
  const QuantizedCheckpoint result = Quantized({.spec = spec, .inputs = inputs->get()});
  const auto output = Open(output_);
  ASSERT_NE(output, nullptr);
  for (const QuantizedMatrix& matrix : result.matrices) {
    EXPECT_NEAR(matrix.input_alpha, 1.96, 0.08) << matrix.name;
    const auto codes = output->GetLowBit(matrix.name, {matrix.rows, matrix.cols});
    ASSERT_TRUE(codes.ok()) << codes.error().message;
    const double sigma = matrix.cols == 256  ? 1
                         : matrix.cols == 96 ? 0.25
                         : matrix.rows == 96 ? 0.5
                                             : 2;
    EXPECT_NEAR(codes->input_clip, matrix.input_alpha * sigma, 0.05 * sigma) << matrix.name;
  }

  add("model.layers.1.mlp.down_proj", 96, std::numeric_limits<float>::infinity());
  EXPECT_NE((*inputs)->Check().error().message.find("down_proj: inputs are not finite"),
            std::string::npos);
}

TEST_F(WeightQuantizerTest, LooksAtItsMemoryBeforeItTakesAny) {
  const auto check = [&](const QuantizeOptions& options, const CalibrationPlan& plan) {
    const auto fits = CheckMemoryToQuantize(*Open(source_), options, plan);
    return fits.ok() ? "" : fits.error().message;
  };
  const CalibrationPlan kAll{.runs = true, .calibrates = true};
  EXPECT_EQ(check({.spec = kSpec, .prune = 0.5}, kAll), "");
  json config = json::parse(ReadAll(source_ / "config.json"));
  config["intermediate_size"] = 1 << 20;
  config["hidden_size"] = 1 << 19;
  config["num_hidden_layers"] = 1;
  WriteAll(source_ / "config.json", config.dump());
  // 4 N K of floats, N K / 2 of codes, 2 N K / 32 of scales and as much four times for sigmas; 24 N
  // and some more is little.
  constexpr double kWeights = double{1 << 19} * (1 << 20);
  const auto encoding = [](const std::string& message) {
    std::smatch found;
    const std::regex part(
        "([0-9]+) bytes for encoding model\\.layers\\.0\\.mlp\\.down_proj; [0-9]+ are available$");
    EXPECT_TRUE(std::regex_search(message, found, part)) << message;
    return found.empty() ? 0 : std::stod(found[1]) / kWeights;
  };
  const std::string plain = check({.spec = kSpec}, {});
  EXPECT_EQ(plain.find("quantizing takes "), 0u);
  EXPECT_EQ(plain.find("statistics"), plain.npos);
  EXPECT_EQ(plain.find("float model"), plain.npos);
  EXPECT_NEAR(encoding(plain), 4 + 0.5 + 10.0 / 32, 0.01);
  EXPECT_NEAR(encoding(check({.spec = kSpec, .prune = 0.5}, {})), 8 + 0.5 + 10.0 / 32, 0.01);
  const std::string calibrated = check({.spec = kSpec}, kAll);
  const auto source = Open(source_);
  int64_t stored = 0;
  for (const CheckpointTensor& tensor : source->tensors()) stored += tensor.view.bytes();
  EXPECT_EQ(calibrated.find("quantizing takes " + std::to_string(stored) +
                            " bytes for the float model, "),
            0u)
      << calibrated;
  int64_t lower = 0;  // halves of squares, with their diagonals
  for (const int64_t k : {1 << 19, 256, 1 << 19, 1 << 20}) lower += (k * k + k) / 2;
  const std::string statistics = std::to_string(8 * lower);
  EXPECT_NE(calibrated.find(statistics + " bytes for statistics of the inputs of all matrices (4 "
                                         "K^2 for K inputs), "),
            calibrated.npos)
      << calibrated;
  // The factor and H for down_proj of K = 2 N, 2 K^2 each, and a factor of q, k and v.
  EXPECT_NEAR(encoding(calibrated), 4 + 0.5 + 10.0 / 32 + 2 * 2 * 2 + 1, 0.01);
}

TEST_F(WeightQuantizerTest, LooksAtTheMemoryOfMeasuringToo) {
  const auto source = Open(source_);
  const LowBitSpec head{.scheme = LowBitScheme::kUniform, .bits = 8, .group_size = 32};
  for (const auto& coded_head : {std::optional<LowBitSpec>(), std::optional(head)}) {
    const QuantizeOptions options{.spec = kSpec, .head = coded_head};
    CalibrationPlan plan{.runs = true, .scored_rows = 2047};
    EXPECT_TRUE(CheckMemoryToQuantize(*source, options, plan).ok());
    plan.scored_rows = int64_t{1} << 40;
    const auto fits = CheckMemoryToQuantize(*source, options, plan);
    ASSERT_FALSE(fits.ok());
    EXPECT_EQ(fits.error().code, ErrorCode::kResourceExhausted);
    std::filesystem::remove_all(output_);
    std::filesystem::create_directory(output_);
    Quantized(options);
    int64_t stored = 0, coded = 0;
    for (const CheckpointTensor& tensor : source->tensors()) stored += tensor.view.bytes();
    const auto made = Open(output_);
    for (const CheckpointTensor& tensor : made->tensors()) coded += tensor.view.bytes();
    const int64_t logits = plan.scored_rows * source->config().vocab_size * 4;
    EXPECT_EQ(fits.error().message.find("measuring takes " + std::to_string(stored) +
                                        " bytes for the float model, " + std::to_string(coded) +
                                        " bytes for the low-bit model, " + std::to_string(logits) +
                                        " bytes for the logits of a text; "),
              0u)
        << fits.error().message;
  }
}

TEST_F(WeightQuantizerTest, RefusesWhatItCannotQuantize) {
  const auto no_groups = Quantize({.spec = {.group_size = 64}});
  ASSERT_FALSE(no_groups.ok());
  EXPECT_EQ(no_groups.error().message,
            "model.layers.0.mlp.down_proj: 96 inputs are no multiple of 64");
  EXPECT_EQ(no_groups.error().param, "group_size");
  EXPECT_TRUE(std::filesystem::is_empty(output_)) << "nothing was written yet";
  const auto no_head = Quantize({.spec = kSpec, .head = LowBitSpec{.group_size = 128}});
  ASSERT_FALSE(no_head.ok());
  EXPECT_EQ(no_head.error().message, "lm_head: 64 inputs are no multiple of 128");
  EXPECT_EQ(no_head.error().param, "group_size");

  const auto no_matrix = Quantize({.spec = kSpec, .prune_matrices = {{"*", 0}, {"*.head", 0}}});
  ASSERT_FALSE(no_matrix.ok());
  EXPECT_EQ(no_matrix.error().message,
            "no matrix matches *.head; the first is model.layers.0.self_attn.q_proj, the last "
            "model.layers.1.mlp.down_proj");
  EXPECT_EQ(no_matrix.error().param, "prune_matrices");
  EXPECT_TRUE(std::filesystem::is_empty(output_)) << "nothing was written yet";

  const auto stopped =
      Quantize({.spec = kSpec, .progress = [](int64_t, int64_t) { return false; }});
  ASSERT_FALSE(stopped.ok());
  EXPECT_EQ(stopped.error().code, ErrorCode::kCancelled);

  const auto there = Quantize({.spec = kSpec});
  ASSERT_FALSE(there.ok());
  EXPECT_EQ(there.error().code, ErrorCode::kUnavailable) << "what the last one left is there";
  std::filesystem::remove_all(output_);
  std::filesystem::create_directory(output_);

  Quantized({.spec = kSpec});
  source_.swap(output_);
  const auto twice = Quantize({.spec = kSpec});
  ASSERT_FALSE(twice.ok());
  EXPECT_EQ(twice.error().message, (source_ / "config.json").string() +
                                       ": quantization_config: the model is quantized already");
  source_.swap(output_);
  std::filesystem::remove_all(output_);
  std::filesystem::create_directory(output_);

  Rewrite([](StoredTensor& tensor) {
    if (tensor.name.ends_with("1.mlp.up_proj.weight"))
      tensor.bytes[0] = tensor.bytes[1] = '\xff', tensor.bytes[2] = tensor.bytes[3] = '\xff';
  });
  const auto nan = Quantize({.spec = kSpec});
  ASSERT_FALSE(nan.ok());
  EXPECT_NE(nan.error().message.find("tensor model.layers.1.mlp.up_proj.weight: "),
            std::string::npos)
      << nan.error().message;
  Rewrite([](StoredTensor& tensor) {
    if (tensor.name.ends_with("1.mlp.up_proj.weight")) tensor.name = "model.layers.1.mlp.other";
  });
  const auto missing = Quantize({.spec = kSpec});
  ASSERT_FALSE(missing.ok());
  EXPECT_NE(missing.error().message.find("up_proj.weight: missing"), std::string::npos);
}

}  // namespace
}  // namespace innerq
