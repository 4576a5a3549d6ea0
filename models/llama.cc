#include "models/llama.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <string>
#include <utility>

#include "kernels/cpu/low_bit_decode.h"
#include "models/layer_tensors.h"
#include "models/tensor_source.h"

namespace innerq {
namespace {

// A packed matrix, and the names of those stacked in it.
struct Matrix {
  Weight weight;
  std::vector<std::string> names;
};

// Weights of one layer. Norms are F32.
struct Layer {
  Buffer attention_norm;  // [C]
  Matrix qkv;             // [(H + 2G) * D, C]
  Matrix output;          // [C, H * D]
  Buffer mlp_norm;        // [C]
  Matrix gate_up;         // [2 * I, C]
  Matrix down;            // [C, I]
};

// Memory of the largest step, F32.
struct Activations {
  Buffer hidden;     // [T, C] the residual stream
  Buffer normed;     // [T, C]
  Buffer qkv;        // [T, (H + 2G) * D]
  Buffer q;          // [T, H * D]
  Buffer attention;  // [T, H * D]
  Buffer gate_up;    // [T, 2 * I]
  Buffer gated;      // [T, I]
  Buffer cos, sin;   // [T, D / 2]
  Buffer gathered;   // [R, C]
  Buffer logits;     // [R, V]
  // For a host that cannot read `logits`, else empty.
  Buffer logits_for_host;  // [R, V]
  Buffer top;              // [R, k <= kMaxTopLogits] TopLogit
  Buffer top_for_host;
};

constexpr char kFinalNorm[] = "model.norm.weight";

// The matrix of embeddings [V, C]. Tied matrices may be stored under either name.
std::string TableName(const ModelConfig& config, bool has_table) {
  return config.tie_word_embeddings && !has_table ? kHeadName : kTableName;
}

// The matrix that gives logits. A head that is tied is the table, unless it has codes of its own.
Stack HeadOf(const ModelConfig& config, const std::string& table) {
  const bool is_table = config.tie_word_embeddings && !config.low_bit_head;
  return {{{is_table ? table : kHeadName, config.vocab_size}}, config.hidden_size};
}

// Those of a stack are all codes, with the same clip of inputs, or none of them is.
Result<void> CheckCodes(const Checkpoint& checkpoint, const Stack& stack) {
  const std::string& first = stack.parts.front().name;
  const bool low_bit = checkpoint.HasLowBit(first);
  float clip = 0;  // of the first
  for (const Part& part : stack.parts) {
    const auto differs = [&](const std::string& tensor, const std::string& how) {
      return Error{ErrorCode::kDataLoss, checkpoint.directory().string() + ": tensor " + part.name +
                                             tensor + ": " + how + " " + first +
                                             ", with which it is multiplied"};
    };
    if (checkpoint.HasLowBit(part.name) != low_bit) {
      return low_bit ? differs(".weight_codes", "missing, unlike the codes of")
                     : differs(".weight_codes", "codes, unlike the floats of");
    }
    if (!low_bit) continue;
    ASSIGN_OR_RETURN(const LowBitMatrix matrix,
                     checkpoint.GetLowBit(part.name, {part.rows, stack.cols}));
    if (&part == &stack.parts.front()) clip = matrix.input_clip;
    if (matrix.input_clip != clip) return differs(".input_clip", "not that of");
  }
  return {};
}

Result<void> CheckStack(const Checkpoint& checkpoint, const Stack& stack) {
  RETURN_IF_ERROR(CheckCodes(checkpoint, stack));
  for (const Part& part : stack.parts) {
    if (!checkpoint.HasLowBit(part.name)) {
      RETURN_IF_ERROR(checkpoint.Get(part.name + ".weight", {part.rows, stack.cols}));
    }
    const std::string bias = part.name + ".bias";
    if (part.bias) {
      RETURN_IF_ERROR(checkpoint.Get(bias, {part.rows}));
    } else if (checkpoint.Has(bias)) {
      return InvalidArgument(checkpoint.directory().string() + ": tensor " + bias +
                             ": config.json declares no bias of this matrix (attention_bias, "
                             "mlp_bias)");
    }
  }
  return {};
}

// The decoder with q, k, v and gate, up fused into one matrix each.
class FusedLlama : public LlamaModel {
 public:
  FusedLlama(const ModelConfig& config, Backend* backend, std::unique_ptr<TensorSource> source,
             LoadOptions options)
      : config_(config),
        backend_(backend),
        source_(std::move(source)),
        options_(std::move(options)),
        inverse_frequency_(config.InverseFrequencies()) {
    CHECK(options_.max_rows > 0 && options_.max_logit_rows > 0, "a step has rows");
  }

  // A step's memory comes first: what cannot be had is known before weights are read.
  Result<void> Build() {
    if (const Result<void> step = ReadyStep(); !step.ok()) {
      Error error = step.error();
      if (error.code == ErrorCode::kResourceExhausted) {
        error.param = "scheduler.max_batch_tokens";
        error.message = error.param + ": the memory of a step of " +
                        std::to_string(options_.max_rows) + " tokens: " + error.message;
      }
      return error;
    }
    return BuildWeights();
  }

  const ModelConfig& config() const override { return config_; }
  int64_t weight_bytes() const override { return weight_bytes_; }
  int64_t step_weight_bytes() const override { return weight_bytes_ - embedding_buffer_.bytes(); }

  ConstTensorView Forward(const ForwardBatch& batch, const KvLayout& layout,
                          std::span<const PagedKvView> layers) override {
    const int64_t rows = batch.num_rows();
    CHECK(rows > 0 && rows <= options_.max_rows, "rows of the step: " + std::to_string(rows));
    CHECK(static_cast<int64_t>(layers.size()) == config_.num_layers, "one cache view per layer");
    const TensorView x = Rows(act_.hidden, rows, hidden());
    const TensorView cos = Rows(act_.cos, rows, config_.head_dim / 2);
    const TensorView sin = Rows(act_.sin, rows, config_.head_dim / 2);
    backend_->Embed({batch.token_ids, embedding_, x});
    backend_->RopeTable({batch.positions, inverse_frequency_, cos, sin});
    for (size_t i = 0; i < layers_.size(); ++i) {
      RunAttention(layers_[i], batch, layout, layers[i], x);
      RunMlp(layers_[i], x);
    }
    return RunHead(batch, x);
  }

  Result<void> ReservePages(int64_t max_pages) override {
    if (max_pages <= max_pages_) return {};
    RETURN_IF_ERROR(ReserveFor(max_pages));
    max_pages_ = max_pages;
    return {};
  }

  std::span<const TopLogit> top_logits(int64_t row) const override {
    if (num_top_.empty()) return {};
    const auto* top = reinterpret_cast<const TopLogit*>(act_.top_for_host.data());
    return {top + row * top_stride_, static_cast<size_t>(num_top_[static_cast<size_t>(row)])};
  }

 private:
  int64_t hidden() const { return config_.hidden_size; }
  int64_t query_dim() const { return config_.num_heads * config_.head_dim; }
  int64_t key_dim() const { return config_.num_kv_heads * config_.head_dim; }

  // --- Loading ---

  Result<void> BuildWeights() {
    const std::string table = TableName(config_, source_->Has(std::string(kTableName) + ".weight"));
    embedding_name_ = table + ".weight";
    ASSIGN_OR_RETURN(embedding_, source_->Get(embedding_name_, {config_.vocab_size, hidden()}));
    const bool shared = IsPackedTable();
    if (!shared) {
      ASSIGN_OR_RETURN(embedding_buffer_, backend_->Import(embedding_));
      embedding_.data = embedding_buffer_.data();
      weight_bytes_ += embedding_buffer_.bytes();
    }
    RETURN_IF_ERROR(ReportProgress(1));

    layers_.resize(static_cast<size_t>(config_.num_layers));
    for (size_t i = 0; i < layers_.size(); ++i) RETURN_IF_ERROR(BuildLayer(i));
    ASSIGN_OR_RETURN(final_norm_, BuildNorm(kFinalNorm));
    ASSIGN_OR_RETURN(lm_head_, BuildMatrix(HeadOf(config_, table)));
    if (shared) {
      embedding_.data = lm_head_.weight.data.data();
      source_->Drop(embedding_name_);
    }
    return {};
  }

  // Whether the head will hold the table as it is stored.
  bool IsPackedTable() const {
    const WeightFormat stored = StoredFormat({embedding_});
    return config_.tie_word_embeddings && !config_.low_bit_head &&
           options_.format.value_or(stored) == stored && backend_->packs_row_major(hidden());
  }

  Result<void> BuildLayer(size_t index) {
    Layer& layer = layers_[index];
    const LayerTensors tensors = TensorsOfLayer(config_, static_cast<int64_t>(index));
    ASSIGN_OR_RETURN(layer.attention_norm, BuildNorm(tensors.attention_norm));
    ASSIGN_OR_RETURN(layer.qkv, BuildMatrix(tensors.qkv));
    ASSIGN_OR_RETURN(layer.output, BuildMatrix(tensors.output));
    ASSIGN_OR_RETURN(layer.mlp_norm, BuildNorm(tensors.mlp_norm));
    ASSIGN_OR_RETURN(layer.gate_up, BuildMatrix(tensors.gate_up));
    ASSIGN_OR_RETURN(layer.down, BuildMatrix(tensors.down));
    return {};
  }

  Result<Matrix> BuildMatrix(const Stack& stack) {
    Matrix matrix;
    std::vector<ConstTensorView> biases;
    for (const Part& part : stack.parts) {
      matrix.names.push_back(part.name);
      if (!part.bias) continue;
      ASSIGN_OR_RETURN(const ConstTensorView bias, source_->Get(part.name + ".bias", {part.rows}));
      biases.push_back(bias);
    }
    const bool low_bit = source_->HasLowBit(stack.parts.front().name);
    ASSIGN_OR_RETURN(matrix.weight, low_bit ? PackCodes(stack, biases) : PackFloats(stack, biases));
    weight_bytes_ += matrix.weight.data.bytes() + matrix.weight.bias.bytes();
    RETURN_IF_ERROR(ReportProgress(static_cast<int64_t>(stack.parts.size())));
    return matrix;
  }

  Result<Weight> PackFloats(const Stack& stack, std::span<const ConstTensorView> biases) {
    std::vector<ConstTensorView> weights;
    for (const Part& part : stack.parts) {
      ASSIGN_OR_RETURN(const ConstTensorView weight,
                       source_->Get(part.name + ".weight", {part.rows, stack.cols}));
      weights.push_back(weight);
    }
    ASSIGN_OR_RETURN(
        Weight packed,
        backend_->PackWeight(weights, biases, options_.format.value_or(StoredFormat(weights))));
    for (const Part& part : stack.parts) {
      if (part.name + ".weight" != embedding_name_) source_->Drop(part.name + ".weight");
    }
    return packed;
  }

  // As codes, or decoded to the format that was asked for.
  Result<Weight> PackCodes(const Stack& stack, std::span<const ConstTensorView> biases) {
    std::vector<LowBitMatrix> parts;
    for (const Part& part : stack.parts) {
      ASSIGN_OR_RETURN(const LowBitMatrix matrix,
                       source_->GetLowBit(part.name, {part.rows, stack.cols}));
      parts.push_back(matrix);
    }
    const auto drop = [&] {
      for (const Part& part : stack.parts) source_->Drop(part.name);
    };
    if (!options_.format) {
      Result<Weight> packed = backend_->PackLowBitWeight(parts, biases);
      drop();
      return packed;
    }
    std::vector<Buffer> decoded;
    std::vector<ConstTensorView> weights;
    for (const LowBitMatrix& part : parts) {
      ASSIGN_OR_RETURN(Buffer values, DecodeLowBit(part, backend_->threads()));
      weights.push_back({values.data(), DType::kF32, Shape{part.rows, part.cols}});
      decoded.push_back(std::move(values));
    }
    drop();
    return backend_->PackWeight(weights, biases, *options_.format);
  }

  // The format that holds every part without loss.
  static WeightFormat StoredFormat(const std::vector<ConstTensorView>& parts) {
    const DType dtype = parts.front().dtype;
    for (const ConstTensorView& part : parts) {
      if (part.dtype != dtype) return WeightFormat::kF32;
    }
    if (dtype == DType::kBF16) return WeightFormat::kBF16;
    return dtype == DType::kF16 ? WeightFormat::kF16 : WeightFormat::kF32;
  }

  // A vector [C], converted to F32.
  Result<Buffer> BuildNorm(const std::string& name) {
    ASSIGN_OR_RETURN(const ConstTensorView stored, source_->Get(name, {hidden()}));
    std::vector<float>& values = norms_.emplace_back();
    for (int64_t i = 0; i < hidden(); ++i) values.push_back(ElementAsFloat(stored, i));
    source_->Drop(name);
    ASSIGN_OR_RETURN(Buffer buffer,
                     backend_->Import({reinterpret_cast<const std::byte*>(values.data()),
                                       DType::kF32, Shape{hidden()}}));
    weight_bytes_ += buffer.bytes();
    RETURN_IF_ERROR(ReportProgress(1));
    return buffer;
  }

  Result<void> ReportProgress(int64_t tensors) {
    constexpr int64_t kPerLayer = 9, kOthers = 3;  // two norms, seven matrices; table, norm, head
    tensors_done_ += tensors;
    const int64_t total = config_.num_layers * kPerLayer + kOthers;
    if (options_.progress && !options_.progress(tensors_done_, total)) {
      return Error{ErrorCode::kCancelled, "interrupted"};
    }
    return {};
  }

  // --- Memory of a step ---

  Result<void> ReadyStep() {
    RETURN_IF_ERROR(AllocateActivations());
    return ReserveFor(max_pages_);
  }

  Result<void> ReserveFor(int64_t max_pages) {
    return backend_->Reserve(
        {.max_rows = std::max(options_.max_rows, options_.max_logit_rows),
         .max_features = std::max({hidden(), query_dim(), config_.intermediate_size}),
         .max_head_dim = config_.head_dim,
         .max_group = config_.num_heads / config_.num_kv_heads,
         .max_pages = max_pages,
         .max_logit_rows = options_.max_logit_rows,
         .max_vocab = config_.vocab_size});
  }

  Result<void> AllocateActivations() {
    int64_t total = 0;
    const auto allocate = [&](Buffer& buffer, int64_t count, int64_t width) -> Result<void> {
      const int64_t bytes = count * width * DTypeBytes(DType::kF32);
      total += bytes;
      ASSIGN_OR_RETURN(buffer, backend_->Allocate(bytes));
      return {};
    };
    const int64_t rows = options_.max_rows;
    const int64_t logit_rows = options_.max_logit_rows;
    RETURN_IF_ERROR(allocate(act_.hidden, rows, hidden()));
    RETURN_IF_ERROR(allocate(act_.normed, rows, hidden()));
    RETURN_IF_ERROR(allocate(act_.qkv, rows, query_dim() + 2 * key_dim()));
    RETURN_IF_ERROR(allocate(act_.q, rows, query_dim()));
    RETURN_IF_ERROR(allocate(act_.attention, rows, query_dim()));
    RETURN_IF_ERROR(allocate(act_.gate_up, rows, 2 * config_.intermediate_size));
    RETURN_IF_ERROR(allocate(act_.gated, rows, config_.intermediate_size));
    RETURN_IF_ERROR(allocate(act_.cos, rows, config_.head_dim / 2));
    RETURN_IF_ERROR(allocate(act_.sin, rows, config_.head_dim / 2));
    RETURN_IF_ERROR(allocate(act_.gathered, logit_rows, hidden()));
    RETURN_IF_ERROR(allocate(act_.logits, logit_rows, config_.vocab_size));
    CHECK(total == ActivationBytes(config_, rows, logit_rows), "memory was planned otherwise");
    if (backend_->host_visible()) return {};
    const int64_t top_bytes = logit_rows * kMaxTopLogits * static_cast<int64_t>(sizeof(TopLogit));
    ASSIGN_OR_RETURN(act_.logits_for_host, backend_->AllocateForHost(act_.logits.bytes()));
    ASSIGN_OR_RETURN(act_.top, backend_->Allocate(top_bytes));
    ASSIGN_OR_RETURN(act_.top_for_host, backend_->AllocateForHost(top_bytes));
    return {};
  }

  // --- One step ---

  static TensorView Rows(Buffer& buffer, int64_t rows, int64_t width) {
    return buffer.View(DType::kF32, Shape{rows, width});
  }

  void Norm(const TensorView& x, Buffer& weight, const TensorView& out) {
    backend_->RmsNorm({x, weight.View(DType::kF32, Shape{hidden()}),
                       static_cast<float>(config_.rms_norm_eps), out});
  }

  // A product of a layer, whose inputs are shown to `observe` first.
  void Multiply(const ConstTensorView& x, const Matrix& matrix, bool accumulate,
                const TensorView& out) {
    if (options_.observe && backend_->host_visible()) options_.observe(matrix.names, x);
    backend_->MatMul({x, &matrix.weight, accumulate, out});
  }

  // x += attention of x.
  void RunAttention(Layer& layer, const ForwardBatch& batch, const KvLayout& layout,
                    const PagedKvView& kv, const TensorView& x) {
    const int64_t rows = batch.num_rows();
    const TensorView normed = Rows(act_.normed, rows, hidden());
    const TensorView qkv = Rows(act_.qkv, rows, query_dim() + 2 * key_dim());
    const TensorView q = Rows(act_.q, rows, query_dim());
    const TensorView attention = Rows(act_.attention, rows, query_dim());
    const TensorView cos = Rows(act_.cos, rows, config_.head_dim / 2);
    const TensorView sin = Rows(act_.sin, rows, config_.head_dim / 2);
    Norm(x, layer.attention_norm, normed);
    Multiply(normed, layer.qkv, false, qkv);
    backend_->RopeAppend({qkv, cos, sin, kv, batch.slices, q});
    if (!batch.key_norms.empty() && kv.layout->normalize_keys) {
      backend_->ComputeKeyNorm({kv, batch.key_norms});
    }
    if (!batch.seals.empty()) backend_->Seal({kv, batch.seals});
    const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
    backend_->Attention({q, kv, &layout, batch.slices, config_.num_heads, scale, attention});
    Multiply(attention, layer.output, true, x);
  }

  // x += MLP of x.
  void RunMlp(Layer& layer, const TensorView& x) {
    const int64_t rows = x.shape[0];
    const TensorView normed = Rows(act_.normed, rows, hidden());
    const TensorView gate_up = Rows(act_.gate_up, rows, 2 * config_.intermediate_size);
    const TensorView gated = Rows(act_.gated, rows, config_.intermediate_size);
    Norm(x, layer.mlp_norm, normed);
    Multiply(normed, layer.gate_up, false, gate_up);
    backend_->SwiGlu({gate_up, gated});
    Multiply(gated, layer.down, true, x);
  }

  ConstTensorView RunHead(const ForwardBatch& batch, const TensorView& x) {
    const auto count = static_cast<int64_t>(batch.logit_rows.size());
    num_top_.clear();
    CHECK(count <= options_.max_logit_rows, "rows with logits: " + std::to_string(count));
    const TensorView logits = Rows(act_.logits, count, config_.vocab_size);
    if (count == 0) return logits;
    const TensorView gathered = Rows(act_.gathered, count, hidden());
    backend_->GatherRows({x, batch.logit_rows, gathered});
    Norm(gathered, final_norm_, gathered);
    backend_->MatMul({gathered, &lm_head_.weight, false, logits});
    if (backend_->host_visible()) return logits;
    SelectTop(batch.num_top, logits);
    const TensorView readable = Rows(act_.logits_for_host, count, config_.vocab_size);
    ReadWhole(logits, readable);
    return readable;
  }

  // Reads the largest logits of rows of which they are enough, unless one wants as many as there
  // are. Every row gives as many as any wants: to single rows out would cost more than it saves.
  void SelectTop(std::span<const int32_t> num_top, const TensorView& logits) {
    const auto most = std::max_element(num_top.begin(), num_top.end());
    if (most == num_top.end() || *most == 0 || *most >= config_.vocab_size) return;
    CHECK(static_cast<int64_t>(num_top.size()) == logits.shape[0], "a number for every row");
    num_top_.assign(num_top.begin(), num_top.end());
    top_stride_ = *most;
    const auto size = static_cast<size_t>(logits.shape[0] * top_stride_);
    const std::span<TopLogit> top(reinterpret_cast<TopLogit*>(act_.top.data()), size);
    backend_->SelectTop({logits, top_stride_, top});
    backend_->ReadToHost(act_.top.data(), static_cast<int64_t>(top.size_bytes()),
                         act_.top_for_host.data());
  }

  // Reads the rows that are wanted as a whole, neighbours at once.
  void ReadWhole(const TensorView& logits, const TensorView& readable) {
    const int64_t count = logits.shape[0], row_bytes = logits.bytes() / count;
    const auto whole = [this](int64_t row) {
      return num_top_.empty() || num_top_[static_cast<size_t>(row)] == 0;
    };
    for (int64_t begin = 0, end = 0; begin < count; begin = end + 1) {
      for (end = begin; end < count && whole(end);) ++end;
      backend_->ReadToHost(logits.data + begin * row_bytes, (end - begin) * row_bytes,
                           readable.data + begin * row_bytes);
    }
  }

  const ModelConfig config_;
  Backend* const backend_;
  const std::unique_ptr<TensorSource> source_;  // owns the memory of the embedding table
  const LoadOptions options_;
  int64_t max_pages_ = options_.max_pages;      // of a step; grows
  const std::vector<float> inverse_frequency_;  // [D / 2]

  std::string embedding_name_;
  Buffer embedding_buffer_;               // empty where the head holds the table
  ConstTensorView embedding_;             // [V, C] over one of the two
  std::deque<std::vector<float>> norms_;  // memory that the norms' buffers may borrow
  std::vector<Layer> layers_;
  Buffer final_norm_;  // [C]
  Matrix lm_head_;     // [V, C]
  int64_t weight_bytes_ = 0;
  int64_t tensors_done_ = 0;
  Activations act_;
  // Of the last step, where rows were not read as a whole; else empty.
  std::vector<int32_t> num_top_;  // [R], 0 for those that were
  int64_t top_stride_ = 0;        // from row to row
};

}  // namespace

int64_t LlamaModel::ActivationBytes(const ModelConfig& config, int64_t rows, int64_t logit_rows) {
  const int64_t queries = config.num_heads * config.head_dim;
  const int64_t keys = config.num_kv_heads * config.head_dim;
  const int64_t width = 2 * config.hidden_size + 3 * queries + 2 * keys +
                        3 * config.intermediate_size + config.head_dim;
  return DTypeBytes(DType::kF32) *
         (rows * width + logit_rows * (config.hidden_size + config.vocab_size));
}

Result<void> LlamaModel::CheckTensors(const Checkpoint& checkpoint) {
  const ModelConfig& config = checkpoint.config();
  const Shape norm{config.hidden_size};
  const std::string table = TableName(config, checkpoint.Has(std::string(kTableName) + ".weight"));
  if (checkpoint.HasLowBit(kTableName)) {
    return Error{ErrorCode::kDataLoss,
                 checkpoint.directory().string() + ": tensor " + kTableName +
                     ".weight_codes: the table of embeddings cannot be codes"};
  }
  if (config.low_bit_head || checkpoint.HasLowBit(kHeadName)) {
    RETURN_IF_ERROR(checkpoint.GetLowBit(kHeadName, {config.vocab_size, config.hidden_size}));
  }
  RETURN_IF_ERROR(checkpoint.Get(table + ".weight", {config.vocab_size, config.hidden_size}));
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const LayerTensors tensors = TensorsOfLayer(config, i);
    for (const std::string& name : {tensors.attention_norm, tensors.mlp_norm}) {
      RETURN_IF_ERROR(checkpoint.Get(name, norm));
    }
    for (const Stack& stack : {tensors.qkv, tensors.output, tensors.gate_up, tensors.down}) {
      RETURN_IF_ERROR(CheckStack(checkpoint, stack));
    }
  }
  RETURN_IF_ERROR(checkpoint.Get(kFinalNorm, norm));
  return CheckStack(checkpoint, HeadOf(config, table));
}

Result<std::unique_ptr<LlamaModel>> LlamaModel::Load(std::shared_ptr<const Checkpoint> checkpoint,
                                                     Backend* backend, LoadOptions options) {
  RETURN_IF_ERROR(CheckTensors(*checkpoint));
  const ModelConfig& config = checkpoint->config();
  auto model = std::make_unique<FusedLlama>(config, backend, CreateCheckpointSource(checkpoint),
                                            std::move(options));
  RETURN_IF_ERROR(model->Build());
  return std::unique_ptr<LlamaModel>(std::move(model));
}

Result<std::unique_ptr<LlamaModel>> LlamaModel::Random(const ModelConfig& config, uint64_t seed,
                                                       Backend* backend, LoadOptions options) {
  auto model = std::make_unique<FusedLlama>(config, backend, CreateRandomSource(seed, config),
                                            std::move(options));
  RETURN_IF_ERROR(model->Build());
  return std::unique_ptr<LlamaModel>(std::move(model));
}

Result<std::unique_ptr<LlamaModel>> LlamaModel::Random(const ModelConfig& config,
                                                       WeightFormat format, uint64_t seed,
                                                       Backend* backend, int64_t max_rows,
                                                       int64_t max_logit_rows) {
  return Random(
      config, seed, backend,
      {.max_rows = max_rows, .max_logit_rows = max_logit_rows, .format = format, .progress = {}});
}

}  // namespace innerq
