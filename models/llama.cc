#include "models/llama.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <string>

#include "models/tensor_source.h"

namespace innerq {
namespace {

// Weights of one layer. Norms are F32.
struct Layer {
  Buffer attention_norm;  // [C]
  Weight qkv;             // [(H + 2G) * D, C]
  Weight output;          // [C, H * D]
  Buffer mlp_norm;        // [C]
  Weight gate_up;         // [2 * I, C]
  Weight down;            // [C, I]
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
  Buffer for_host;   // [R, V] where the host can read them; empty if it can read `logits`
};

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

  Result<void> Build() {
    RETURN_IF_ERROR(BuildWeights());
    RETURN_IF_ERROR(AllocateActivations());
    StepLimits limits;
    limits.max_rows = std::max(options_.max_rows, options_.max_logit_rows);
    limits.max_features = std::max({hidden(), query_dim(), config_.intermediate_size});
    limits.max_head_dim = config_.head_dim;
    limits.max_group = config_.num_heads / config_.num_kv_heads;
    limits.max_pages = options_.max_pages;
    return backend_->Reserve(limits);
  }

  const ModelConfig& config() const override { return config_; }
  int64_t weight_bytes() const override { return weight_bytes_; }

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
    return RunHead(batch.logit_rows, x);
  }

 private:
  int64_t hidden() const { return config_.hidden_size; }
  int64_t query_dim() const { return config_.num_heads * config_.head_dim; }
  int64_t key_dim() const { return config_.num_kv_heads * config_.head_dim; }

  // --- Loading ---

  Result<void> BuildWeights() {
    const int64_t vocab = config_.vocab_size;
    // Tied matrices may be stored under either name.
    std::string table = "model.embed_tokens";
    if (config_.tie_word_embeddings && !source_->Has(table + ".weight")) table = "lm_head";
    embedding_name_ = table + ".weight";
    ASSIGN_OR_RETURN(embedding_, source_->Get(embedding_name_, {vocab, hidden()}));
    ASSIGN_OR_RETURN(embedding_buffer_, backend_->Import(embedding_));
    embedding_.data = embedding_buffer_.data();
    weight_bytes_ += embedding_buffer_.bytes();
    RETURN_IF_ERROR(ReportProgress(1));

    layers_.resize(static_cast<size_t>(config_.num_layers));
    for (size_t i = 0; i < layers_.size(); ++i) RETURN_IF_ERROR(BuildLayer(i));
    ASSIGN_OR_RETURN(final_norm_, BuildNorm("model.norm.weight"));
    const std::string head = config_.tie_word_embeddings ? table : "lm_head";
    ASSIGN_OR_RETURN(lm_head_, BuildMatrix({{head, vocab}}, hidden()));
    return {};
  }

  Result<void> BuildLayer(size_t index) {
    Layer& layer = layers_[index];
    const std::string prefix = "model.layers." + std::to_string(index) + ".";
    const std::string attention = prefix + "self_attn.";
    const std::string mlp = prefix + "mlp.";
    const int64_t inner = config_.intermediate_size;
    const bool attention_bias = config_.attention_bias;
    const bool mlp_bias = config_.mlp_bias;
    ASSIGN_OR_RETURN(layer.attention_norm, BuildNorm(prefix + "input_layernorm.weight"));
    ASSIGN_OR_RETURN(layer.qkv, BuildMatrix({{attention + "q_proj", query_dim(), attention_bias},
                                             {attention + "k_proj", key_dim(), attention_bias},
                                             {attention + "v_proj", key_dim(), attention_bias}},
                                            hidden()));
    ASSIGN_OR_RETURN(layer.output,
                     BuildMatrix({{attention + "o_proj", hidden(), attention_bias}}, query_dim()));
    ASSIGN_OR_RETURN(layer.mlp_norm, BuildNorm(prefix + "post_attention_layernorm.weight"));
    ASSIGN_OR_RETURN(layer.gate_up, BuildMatrix({{mlp + "gate_proj", inner, mlp_bias},
                                                 {mlp + "up_proj", inner, mlp_bias}},
                                                hidden()));
    ASSIGN_OR_RETURN(layer.down, BuildMatrix({{mlp + "down_proj", hidden(), mlp_bias}}, inner));
    return {};
  }

  // One matrix of a stack: "<name>.weight" [rows, K] and, if `bias`, "<name>.bias" [rows].
  struct Part {
    std::string name;
    int64_t rows = 0;
    bool bias = false;
  };

  // Packs matrices [n_i, cols], stacked along N.
  Result<Weight> BuildMatrix(const std::vector<Part>& parts, int64_t cols) {
    std::vector<ConstTensorView> weights, biases;
    for (const Part& part : parts) {
      ASSIGN_OR_RETURN(const ConstTensorView weight,
                       source_->Get(part.name + ".weight", {part.rows, cols}));
      weights.push_back(weight);
      if (!part.bias) continue;
      ASSIGN_OR_RETURN(const ConstTensorView bias, source_->Get(part.name + ".bias", {part.rows}));
      biases.push_back(bias);
    }
    ASSIGN_OR_RETURN(
        Weight packed,
        backend_->PackWeight(weights, biases, options_.format.value_or(StoredFormat(weights))));
    for (const Part& part : parts) {
      if (part.name + ".weight" != embedding_name_) source_->Drop(part.name + ".weight");
    }
    weight_bytes_ += packed.data.bytes() + packed.bias.bytes();
    RETURN_IF_ERROR(ReportProgress(static_cast<int64_t>(parts.size())));
    return packed;
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

  Result<void> AllocateActivations() {
    const auto allocate = [this](Buffer& buffer, int64_t count, int64_t width) -> Result<void> {
      ASSIGN_OR_RETURN(buffer, backend_->Allocate(count * width * DTypeBytes(DType::kF32)));
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
    if (!backend_->host_visible()) {
      ASSIGN_OR_RETURN(act_.for_host, backend_->AllocateForHost(act_.logits.bytes()));
    }
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
    backend_->MatMul({normed, &layer.qkv, false, qkv});
    backend_->RopeAppend({qkv, cos, sin, kv, batch.slices, q});
    if (!batch.key_norms.empty() && kv.layout->normalize_keys) {
      backend_->ComputeKeyNorm({kv, batch.key_norms});
    }
    if (!batch.seals.empty()) backend_->Seal({kv, batch.seals});
    const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
    backend_->Attention({q, kv, &layout, batch.slices, config_.num_heads, scale, attention});
    backend_->MatMul({attention, &layer.output, true, x});
  }

  // x += MLP of x.
  void RunMlp(Layer& layer, const TensorView& x) {
    const int64_t rows = x.shape[0];
    const TensorView normed = Rows(act_.normed, rows, hidden());
    const TensorView gate_up = Rows(act_.gate_up, rows, 2 * config_.intermediate_size);
    const TensorView gated = Rows(act_.gated, rows, config_.intermediate_size);
    Norm(x, layer.mlp_norm, normed);
    backend_->MatMul({normed, &layer.gate_up, false, gate_up});
    backend_->SwiGlu({gate_up, gated});
    backend_->MatMul({gated, &layer.down, true, x});
  }

  ConstTensorView RunHead(std::span<const int64_t> logit_rows, const TensorView& x) {
    const auto count = static_cast<int64_t>(logit_rows.size());
    CHECK(count <= options_.max_logit_rows, "rows with logits: " + std::to_string(count));
    const TensorView logits = Rows(act_.logits, count, config_.vocab_size);
    if (count == 0) return logits;
    const TensorView gathered = Rows(act_.gathered, count, hidden());
    backend_->GatherRows({x, logit_rows, gathered});
    Norm(gathered, final_norm_, gathered);
    backend_->MatMul({gathered, &lm_head_, false, logits});
    if (backend_->host_visible()) return logits;
    const TensorView readable = Rows(act_.for_host, count, config_.vocab_size);
    backend_->ReadToHost(logits.data, logits.bytes(), readable.data);
    return readable;
  }

  const ModelConfig config_;
  Backend* const backend_;
  const std::unique_ptr<TensorSource> source_;  // owns the memory of the embedding table
  const LoadOptions options_;
  const std::vector<float> inverse_frequency_;  // [D / 2]

  std::string embedding_name_;
  Buffer embedding_buffer_;
  ConstTensorView embedding_;             // [V, C] over embedding_buffer_
  std::deque<std::vector<float>> norms_;  // memory that the norms' buffers may borrow
  std::vector<Layer> layers_;
  Buffer final_norm_;  // [C]
  Weight lm_head_;     // [V, C]
  int64_t weight_bytes_ = 0;
  int64_t tensors_done_ = 0;
  Activations act_;
};

}  // namespace

Result<std::unique_ptr<LlamaModel>> LlamaModel::Load(std::shared_ptr<const Checkpoint> checkpoint,
                                                     Backend* backend, LoadOptions options) {
  const ModelConfig& config = checkpoint->config();
  auto model = std::make_unique<FusedLlama>(config, backend, CreateCheckpointSource(checkpoint),
                                            std::move(options));
  RETURN_IF_ERROR(model->Build());
  return std::unique_ptr<LlamaModel>(std::move(model));
}

Result<std::unique_ptr<LlamaModel>> LlamaModel::Random(const ModelConfig& config,
                                                       WeightFormat format, uint64_t seed,
                                                       Backend* backend, int64_t max_rows,
                                                       int64_t max_logit_rows) {
  LoadOptions options{
      .max_rows = max_rows, .max_logit_rows = max_logit_rows, .format = format, .progress = {}};
  auto model =
      std::make_unique<FusedLlama>(config, backend, CreateRandomSource(seed), std::move(options));
  RETURN_IF_ERROR(model->Build());
  return std::unique_ptr<LlamaModel>(std::move(model));
}

}  // namespace innerq
