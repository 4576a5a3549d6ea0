#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <set>
#include <utility>

#include "kernels/cpu/cpu_attention.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/cpu/host_threads.h"
#include "kernels/cpu/low_bit_matmul.h"
#include "kernels/cpu/matmul_dnnl.h"
#include "kernels/cpu/matmul_pack.h"
#include "kernels/cpu/op_table.h"
#include "kernels/cpu/read_bandwidth.h"
#include "kernels/cpu/thread_index.h"

namespace innerq {
namespace {

// Work below these runs on the calling thread: waking another costs some microseconds.
[[maybe_unused]] constexpr int64_t kSerialElements = 16 * 1024;  // of a row operation
constexpr int64_t kSerialWeights = 64 * 1024;    // elements of a product's weight, and
constexpr int64_t kSerialProducts = 512 * 1024;  // its multiply-adds
// Tasks per thread that a product is cut into, so that a thread that lags behind costs little.
constexpr int64_t kTasksPerThread = 4;

// `requested` threads, or for 0 as many as there are cores to use. One in a build without OpenMP.
int NumThreads([[maybe_unused]] int requested) {
#if defined(_OPENMP)
  return requested > 0 ? requested : UsableCores();
#else
  return 1;
#endif
}

Result<CpuIsa> ChooseIsa(const std::string& variant) {
  const std::vector<CpuIsa>& supported = SupportedCpuIsas();
  if (variant == "auto") return supported.front();
  std::string names;
  for (const std::string& name : CpuVariants()) names += ", " + name;
  for (CpuIsa isa :
       {CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Vnni, CpuIsa::kAmx}) {
    if (variant != CpuIsaName(isa)) continue;
    if (std::find(supported.begin(), supported.end(), isa) != supported.end()) return isa;
    return Error{ErrorCode::kUnavailable,
                 "this machine cannot run CPU variant \"" + variant + "\"; it can run auto" + names,
                 "backend.variant"};
  }
  return InvalidArgument(
      "unknown CPU variant \"" + variant + "\"; this machine can run auto" + names,
      "backend.variant");
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(CpuIsa isa, int threads, std::unique_ptr<DnnlMatMul> dnnl)
      : name_("cpu/" + std::string(CpuIsaName(isa))),
        ops_(OpTableFor(isa)),
        low_bit_(LowBitKernelFor(isa)),
        threads_(threads),
        attention_(CpuAttention::Create(isa, threads)),
        dnnl_(std::move(dnnl)) {}

  std::string_view name() const override { return name_; }
  CodeOrder code_order() const override { return CodeOrder::kPanel16; }
  bool deterministic() const override { return dnnl_ == nullptr; }
  int threads() const override { return threads_; }
  int64_t available_bytes() const override { return AvailableHostBytes(); }
  Result<std::optional<double>> MeasureReadBandwidth() override {
    ASSIGN_OR_RETURN(const double bandwidth, innerq::MeasureReadBandwidth(threads_));
    return std::optional(bandwidth);
  }

  Result<Buffer> Allocate(int64_t bytes) override { return AllocateHost(bytes); }

  Result<Buffer> Import(ConstTensorView host) override {
    return Buffer(const_cast<std::byte*>(host.data), host.bytes(), nullptr);
  }

  Result<void> Reserve(const StepLimits& limits) override {
    const int64_t rows = RoundUp(limits.max_rows, kRowTile);
    const int64_t packed_bytes = std::max(rows * RoundUp(limits.max_features, kDepthUnit) * 4,
                                          LowBitInputBytes(limits.max_rows, limits.max_features));
    if (packed_bytes > packed_.bytes()) {
      ASSIGN_OR_RETURN(packed_, Allocate(packed_bytes));
    }
    if (scratch_.bytes() == 0) {
      ASSIGN_OR_RETURN(scratch_, Allocate(threads_ * kTaskScratchBytes));
    }
    return attention_->Reserve(limits);
  }

  Result<void> Synchronize() override {
    failed_seals_ = std::exchange(failing_, {});
    return std::exchange(error_, Result<void>());
  }

  std::vector<int64_t> failed_seals() const override {
    return {failed_seals_.begin(), failed_seals_.end()};
  }

 private:
  Result<void> DoPackWeight(std::span<const ConstTensorView> parts,
                            std::span<const ConstTensorView> bias_parts, Weight* weight) override {
    if (UsesDnnl(weight->format)) {
      ASSIGN_OR_RETURN(weight->data, dnnl_->Pack(parts, weight->format, ops_));
    } else {
      ASSIGN_OR_RETURN(weight->data,
                       Allocate(PanelBytes(weight->format, weight->rows, weight->cols)));
      PackPanels(parts, weight->format, ops_, threads_, weight->data.data());
    }
    return PackBias(bias_parts, weight);
  }

  Result<void> DoPackLowBitWeight(std::span<const LowBitMatrix> parts,
                                  std::span<const ConstTensorView> bias_parts,
                                  Weight* weight) override {
    const int64_t bytes = LowBitPanelBytes(*weight->low_bit, weight->rows, weight->cols);
    ASSIGN_OR_RETURN(weight->data, Allocate(bytes));
    PackLowBitPanels(parts, threads_, weight->data.data());
    return PackBias(bias_parts, weight);
  }

  bool UsesDnnl(WeightFormat format) const { return dnnl_ != nullptr && dnnl_->Handles(format); }

  // Keeps the first error until Synchronize.
  void Fail(Error error) {
    if (error_.ok()) error_ = std::move(error);
  }

  void DoEmbed(const EmbedArgs& args) override {
    const int64_t width = args.out.shape[1];
    const int64_t rows = args.out.shape[0];
#pragma omp parallel for num_threads(threads_) if (rows * width > kSerialElements)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t id = args.token_ids[static_cast<size_t>(row)];
      ReadFloats(args.table, id * width, width, ops_, args.out.As<float>() + row * width);
    }
  }

  void DoRmsNorm(const RmsNormArgs& args) override {
    const int64_t width = args.x.shape[1];
    const int64_t rows = args.x.shape[0];
#pragma omp parallel for num_threads(threads_) if (rows * width > kSerialElements)
    for (int64_t row = 0; row < rows; ++row) {
      ops_.rms_norm(args.x.As<float>() + row * width, args.weight.As<float>(), width, args.epsilon,
                    args.out.As<float>() + row * width);
    }
  }

  void DoMatMul(const MatMulArgs& args) override {
    const Weight& weight = *args.weight;
    const int64_t rows = args.x.shape[0];
    if (weight.low_bit) return MultiplyLowBitWeight(args);
    if (UsesDnnl(weight.format)) {
      CHECK(DnnlMatMul::ScratchBytes(rows, weight.cols) <= packed_.bytes(),
            "MatMul: larger than reserved");
      if (Result<void> result = dnnl_->Run(args, packed_.data()); !result.ok()) {
        Fail(result.error());
      }
      return;
    }
    const MatMulKernel& kernel = ops_.kernel(weight.format);
    const int64_t depth = PackedDepth(weight.format, weight.cols);
    const int64_t row_tiles = CeilDiv(rows, kRowTile);
    const int64_t block_rows = std::min(rows, kRowTile);
    const int64_t block_bytes = block_rows * depth * kernel.packed_element_bytes;
    CHECK(row_tiles * block_bytes <= packed_.bytes() && scratch_.bytes() > 0,
          "MatMul: larger than reserved");

    [[maybe_unused]] const bool parallel =
        weight.rows * depth > kSerialWeights || rows * weight.rows * depth > kSerialProducts;
    const int64_t panels = CeilDiv(weight.rows, kPanelOutputs);
    const int64_t row_chunks = CeilDiv(rows, kTaskRows);
    const int64_t task_panels =
        std::clamp(panels * row_chunks / (threads_ * kTasksPerThread), int64_t{1}, kTaskPanels);
    const int64_t num_tasks = CeilDiv(panels, task_panels) * row_chunks;
    PanelTask whole;
    whole.activations = kernel.pack != nullptr ? packed_.data() : args.x.data;
    whole.weight = weight.data.data();
    whole.bias = reinterpret_cast<const float*>(weight.bias.data());
    whole.out = args.out.As<float>();
    whole.m = rows;
    whole.n = weight.rows;
    whole.k = depth;
    whole.accumulate = args.accumulate;

#pragma omp parallel num_threads(threads_) if (parallel)
    {
      if (kernel.pack != nullptr) {
#pragma omp for
        for (int64_t tile = 0; tile < row_tiles; ++tile) {
          const int64_t row = tile * kRowTile;
          kernel.pack(args.x.As<float>() + row * weight.cols, std::min(kRowTile, rows - row),
                      block_rows, weight.cols, packed_.data() + tile * block_bytes);
        }
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < num_tasks; ++i) {
        PanelTask task = whole;
        task.scratch = scratch_.data() + ThreadIndex() * kTaskScratchBytes;
        task.row_begin = i % row_chunks * kTaskRows;
        task.row_end = std::min(task.row_begin + kTaskRows, rows);
        task.panel_begin = i / row_chunks * task_panels;
        task.panel_end = std::min(task.panel_begin + task_panels, panels);
        kernel.multiply(task);
      }
    }
  }

  void MultiplyLowBitWeight(const MatMulArgs& args) {
    static_assert(kLowBitScratchBytes <= kTaskScratchBytes);
    const Weight& weight = *args.weight;
    const int64_t rows = args.x.shape[0], cols = weight.cols;
    const int64_t stride = LowBitInputs(*weight.low_bit, cols).stride;
    CHECK(rows * stride <= packed_.bytes() && scratch_.bytes() > 0, "MatMul: larger than reserved");
    [[maybe_unused]] const bool parallel =
        weight.rows * cols > kSerialWeights || rows * weight.rows * cols > kSerialProducts;
    const int64_t panels = CeilDiv(weight.rows, kLowBitOutputs);
    const int64_t row_chunks = CeilDiv(rows, kLowBitTaskRows);
    const int64_t task_panels =
        std::clamp(panels * row_chunks / (threads_ * kTasksPerThread), int64_t{1}, kTaskPanels);
    const int64_t num_tasks = CeilDiv(panels, task_panels) * row_chunks;
#pragma omp parallel num_threads(threads_) if (parallel)
    {
      std::byte* const scratch = scratch_.data() + ThreadIndex() * kTaskScratchBytes;
#pragma omp for
      for (int64_t row = 0; row < rows; ++row) {
        RoundLowBitInputs(low_bit_, weight, args.x.As<float>() + row * cols,
                          packed_.data() + row * stride, scratch);
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < num_tasks; ++i) {
        LowBitTask task;
        task.inputs = packed_.data();
        task.weight = &weight;
        task.out = args.out.As<float>();
        task.scratch = scratch;
        task.row_begin = i % row_chunks * kLowBitTaskRows;
        task.row_end = std::min(task.row_begin + kLowBitTaskRows, rows);
        task.panel_begin = i / row_chunks * task_panels;
        task.panel_end = std::min(task.panel_begin + task_panels, panels);
        task.accumulate = args.accumulate;
        MultiplyLowBit(low_bit_, task);
      }
    }
  }

  void DoRopeTable(const RopeTableArgs& args) override {
    const int64_t rows = args.cos.shape[0];
    const int64_t half = args.cos.shape[1];
#pragma omp parallel for num_threads(threads_) if (rows * half > kSerialElements / 16)
    for (int64_t row = 0; row < rows; ++row) {
      const float position = static_cast<float>(args.positions[static_cast<size_t>(row)]);
      for (int64_t i = 0; i < half; ++i) {
        const double angle = position * args.inverse_frequency[static_cast<size_t>(i)];
        args.cos.As<float>()[row * half + i] = static_cast<float>(std::cos(angle));
        args.sin.As<float>()[row * half + i] = static_cast<float>(std::sin(angle));
      }
    }
  }

  void DoSwiGlu(const SwiGluArgs& args) override {
    const int64_t rows = args.out.shape[0];
    const int64_t width = args.out.shape[1];
#pragma omp parallel for num_threads(threads_) if (rows * width > kSerialElements)
    for (int64_t row = 0; row < rows; ++row) {
      const float* gate = args.gate_up.As<float>() + row * 2 * width;
      ops_.swiglu(gate, gate + width, width, args.out.As<float>() + row * width);
    }
  }

  void DoGatherRows(const GatherRowsArgs& args) override {
    const int64_t rows = args.out.shape[0];
    const int64_t width = args.out.shape[1];
#pragma omp parallel for num_threads(threads_) if (rows * width > kSerialElements)
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = args.x.As<float>() + args.rows[static_cast<size_t>(row)] * width;
      std::memcpy(args.out.As<float>() + row * width, from,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }

  void DoRopeAppend(const RopeAppendArgs& args) override { attention_->RopeAppend(args); }
  void DoComputeKeyNorm(const KeyNormArgs& args) override { attention_->ComputeKeyNorm(args); }
  void DoSeal(const SealArgs& args) override {
    const std::vector<int64_t> failed = attention_->Seal(args);
    if (failed.empty()) return;
    failing_.insert(failed.begin(), failed.end());
    Fail({ErrorCode::kInternal, "non-finite key or value in the cache"});
  }
  void DoAttention(const AttentionArgs& args) override { attention_->Attention(args); }

  std::string name_;
  OpTable ops_;
  LowBitKernel low_bit_;
  int threads_;
  std::unique_ptr<CpuAttention> attention_;
  std::unique_ptr<DnnlMatMul> dnnl_;  // null: all products are our own
  Buffer packed_;                     // activations of one product, as its kernel reads them
  Buffer scratch_;                    // [threads][kTaskScratchBytes]
  Result<void> error_;
  std::set<int64_t> failing_, failed_seals_;  // since, and before the last Synchronize
};

}  // namespace

std::vector<std::string> CpuVariants() {
  std::vector<std::string> names;
  for (CpuIsa isa : SupportedCpuIsas()) names.emplace_back(CpuIsaName(isa));
  return names;
}

Result<std::unique_ptr<Backend>> CreateCpuBackend(const BackendOptions& options) {
  ASSIGN_OR_RETURN(const CpuIsa isa, ChooseIsa(options.variant));
  if (options.threads < 0) {
    return InvalidArgument(
        "the number of threads must be 0 or more, not " + std::to_string(options.threads),
        "backend.threads");
  }
  const int threads = NumThreads(options.threads);
  std::unique_ptr<DnnlMatMul> dnnl;
  if (!options.deterministic && isa == SupportedCpuIsas().front()) {
    ASSIGN_OR_RETURN(dnnl, DnnlMatMul::Create(threads));
  }
  return std::unique_ptr<Backend>(std::make_unique<CpuBackend>(isa, threads, std::move(dnnl)));
}

}  // namespace innerq
