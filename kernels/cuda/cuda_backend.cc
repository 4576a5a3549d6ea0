#include "kernels/cuda/cuda_backend.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/cublas_matmul.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/launch_queue.h"
#include "kernels/cuda/pack_rows.h"
#include "kernels/cuda/read_bandwidth.h"

namespace innerq {
namespace {

using namespace cuda;  // NOLINT: this file is the module's own

constexpr int64_t kMaxHeadDim = 256;
// States of split attention: 8 rows of 128 channels, 8 heads, 4 million tokens in segments.
constexpr int64_t kStateBytes = int64_t{256} << 20;
constexpr int64_t kMaxItems = 32768;     // of one launch of split attention
constexpr int64_t kBlocksPerSm = 4;      // of attention on tensor cores, at 3 bits on sm_90
constexpr int64_t kWarpsPerSm = 16;      // of attention without, whose blocks are warps
constexpr int64_t kSpareBytes = 262144;  // of staging, for small arguments

// A product of cuBLASLt on its way to the stream.
struct CublasLaunch {
  CublasMatMul* cublas = nullptr;
  MatMulLaunch product;
  int64_t x_stride = 0;
};
Result<void> LaunchCublas(const CublasLaunch& launch, cudaStream_t stream) {
  return launch.cublas->Run(launch.product, launch.x_stride, stream);
}

// One GPU, one stream, behind a queue that makes graphs of steps that recur. Weights are [N, K]
// row-major in their format, both extents padded with zeros to kMatMulUnit. Errors stick until
// Synchronize; after one, operations are skipped.
class CudaBackend final : public Backend {
 public:
  CudaBackend(CudaDevice device, std::unique_ptr<CublasMatMul> cublas,
              std::unique_ptr<LaunchQueue> queue, std::function<void(std::string_view)> warn)
      : device_(std::move(device)),
        name_("cuda/" + device_.architecture),
        cublas_(std::move(cublas)),
        warn_(std::move(warn)),
        queue_(std::move(queue)) {}

  std::string_view name() const override { return name_; }
  CodeOrder code_order() const override { return CodeOrder::kMmaFragment; }
  bool deterministic() const override { return cublas_ == nullptr; }
  bool host_visible() const override { return false; }
  bool packs_row_major(int64_t cols) const override { return cols % kMatMulUnit == 0; }
  int64_t available_bytes() const override {
    size_t available = 0, total = 0;
    if (cudaMemGetInfo(&available, &total) != cudaSuccess) return Backend::available_bytes();
    return static_cast<int64_t>(available);
  }

  Result<std::optional<double>> MeasureReadBandwidth() override {
    queue_->Flush();
    return cuda::MeasureReadBandwidth(queue_->stream(), device_.num_multiprocessors);
  }

  Result<Buffer> Allocate(int64_t bytes) override {
    ForgetRounded();
    return AllocateDevice(bytes);
  }
  Result<Buffer> AllocateForHost(int64_t bytes) override { return AllocatePinned(bytes); }

  Result<Buffer> Import(ConstTensorView host) override {
    ForgetRounded();
    ASSIGN_OR_RETURN(Buffer buffer, AllocateDevice(host.bytes()));
    // From pageable memory the copy may go on after the call, and our stream would not wait.
    RETURN_IF_CUDA_ERROR(cudaMemcpy(buffer.data(), host.data, static_cast<size_t>(host.bytes()),
                                    cudaMemcpyHostToDevice),
                         "copying to the device");
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(nullptr), "copying to the device");
    return buffer;
  }

  Result<void> Reserve(const StepLimits& limits) override {
    if (limits.max_head_dim > kMaxHeadDim) {
      return InvalidArgument("head_dim must be at most " + std::to_string(kMaxHeadDim) + ", not " +
                             std::to_string(limits.max_head_dim));
    }
    queue_->Flush();
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(queue_->stream()), "waiting for the device");
    // As integers, which take more than halves do.
    const int64_t rounded_bytes = LowBitInputBytes(limits.max_rows, limits.max_features);
    if (rounded_bytes > rounded_.bytes()) {
      ForgetRounded();
      ASSIGN_OR_RETURN(rounded_, AllocateDevice(rounded_bytes));
    }
    if (states_.bytes() == 0) {
      ASSIGN_OR_RETURN(states_, AllocateDevice(kStateBytes));
    }
    const auto flag_bytes = limits.max_pages * static_cast<int64_t>(sizeof(int32_t));
    if (flag_bytes > non_finite_.bytes()) {
      ASSIGN_OR_RETURN(non_finite_seen_, AllocatePinned(flag_bytes));
      ASSIGN_OR_RETURN(non_finite_, AllocateDevice(flag_bytes));
    }
    const int64_t key_bytes = limits.max_logit_rows * SelectParts(limits.max_vocab) *
                              kMaxTopLogits * static_cast<int64_t>(sizeof(uint64_t));
    if (key_bytes > select_keys_.bytes()) {
      ASSIGN_OR_RETURN(select_keys_, AllocateDevice(key_bytes));
    }
    plan_.Reserve(limits.max_rows, limits.max_group, kMaxItems);
    pages_.reserve(static_cast<size_t>(limits.max_pages));
    norm_ids_.reserve(static_cast<size_t>(limits.max_pages));
    norm_pages_.reserve(static_cast<size_t>(limits.max_pages));
    targets_.reserve(static_cast<size_t>(limits.max_rows));
    const int64_t tiles = limits.max_rows * limits.max_group;
    seals_.reserve(std::bit_ceil(static_cast<size_t>(limits.max_pages)));
    const int64_t per_row = sizeof(AppendTarget) + sizeof(SealItem) + 64;
    // Both launches of one attention, every page table, and what belongs to rows. Twice that, since
    // capacities are powers of two, and as much again for what grew out of its place.
    const int64_t once =
        2 * tiles * static_cast<int64_t>(sizeof(PlannedTile)) +
        2 * PaddedItems(std::max(kMaxItems, tiles)) * static_cast<int64_t>(sizeof(AttentionItem)) +
        limits.max_pages * static_cast<int64_t>(sizeof(PageRef) + 2 * sizeof(SealItem)) +
        limits.max_rows * per_row;
    return queue_->Reserve(4 * once + kSpareBytes);
  }

  Result<void> Synchronize() override {
    ForgetRounded();
    const size_t num_flags = std::exchange(num_flags_, 0);
    if (num_flags > 0) {
      const cudaStream_t stream = queue_->stream();
      const size_t bytes = num_flags * sizeof(int32_t);
      queue_->Flush();
      queue_->Check(cudaMemcpyAsync(non_finite_seen_.data(), non_finite_.data(), bytes,
                                    cudaMemcpyDeviceToHost, stream),
                    "reading the device's error flags");
      queue_->Check(cudaMemsetAsync(non_finite_.data(), 0, bytes, stream),
                    "clearing the device's error flags");
    }
    failed_seals_.clear();
    RETURN_IF_ERROR(queue_->Wait());
    const auto* flags = reinterpret_cast<const int32_t*>(non_finite_seen_.data());
    for (size_t i = 0; i < num_flags; ++i) {
      if (flags[i] != 0) failed_seals_.push_back(static_cast<int64_t>(i));
    }
    if (failed_seals_.empty()) return {};
    return Error{ErrorCode::kInternal, "non-finite key or value in the cache"};
  }

  std::vector<int64_t> failed_seals() const override { return failed_seals_; }

 private:
  Result<void> DoPackWeight(std::span<const ConstTensorView> parts,
                            std::span<const ConstTensorView> bias_parts, Weight* weight) override {
    only_bf16_ = only_bf16_ && weight->format == WeightFormat::kBF16;
    if (weight->format == WeightFormat::kF32 && warn_) {
      std::exchange(warn_, nullptr)(
          "products of F32 weights do without tensor cores and take many times as long as those of "
          "F16 or BF16 (model.dtype)");
    }
    ASSIGN_OR_RETURN(weight->data, PackRows(parts, *weight));
    return PackBias(bias_parts, weight);
  }

  Result<void> DoPackLowBitWeight(std::span<const LowBitMatrix> parts,
                                  std::span<const ConstTensorView> bias_parts,
                                  Weight* weight) override {
    only_bf16_ = false;
    ASSIGN_OR_RETURN(weight->data, PackCodes(parts, *weight, queue_->stream()));
    return PackBias(bias_parts, weight);
  }

  // Only the operation right after RmsNorm or SwiGlu may rely on `rounded_`: later its F32 memory
  // may be written or be other memory.
  void ForgetRounded() { rounded_from_ = nullptr; }
  // Where RmsNorm and SwiGlu leave their out in BF16, for a product that follows; or null, as for a
  // model that has other weights: few of its products, or none, take BF16.
  uint16_t* RoundAlong(const TensorView& out) {
    ForgetRounded();
    const int64_t rows = out.shape[0], width = out.shape[1];
    if (!only_bf16_ || width % kMatMulUnit != 0 || rows * width * 2 > rounded_.bytes()) {
      return nullptr;
    }
    rounded_from_ = out.data;
    rounded_shape_ = out.shape;
    return reinterpret_cast<uint16_t*>(rounded_.data());
  }

  void DoEmbed(const EmbedArgs& args) override {
    ForgetRounded();
    EmbedLaunch launch{.table = args.table.data,
                       .dtype = args.table.dtype,
                       .rows = args.out.shape[0],
                       .width = args.out.shape[1],
                       .out = args.out.As<float>()};
    if (!queue_->Stage(StagedArray{StagingSlot::kTokenIds, args.token_ids, &launch.token_ids})) {
      return;
    }
    queue_->Enqueue<LaunchEmbed>("Embed", launch);
  }

  void DoRmsNorm(const RmsNormArgs& args) override {
    queue_->Enqueue<LaunchRmsNorm>(
        "RmsNorm", {args.x.As<float>(), args.weight.As<float>(), args.epsilon, args.x.shape[0],
                    args.x.shape[1], args.out.As<float>(), RoundAlong(args.out)});
  }

  void DoMatMul(const MatMulArgs& args) override {
    const Weight& weight = *args.weight;
    if (weight.low_bit) return MultiplyLowBit(args);
    MatMulLaunch launch{.format = weight.format,
                        .x = args.x.data,
                        .weight = weight.data.data(),
                        .bias = reinterpret_cast<const float*>(weight.bias.data()),
                        .accumulate = args.accumulate,
                        .m = args.x.shape[0],
                        .n = weight.rows,
                        .k = weight.cols,
                        .out = args.out.As<float>(),
                        .parts = reinterpret_cast<float*>(states_.data()),
                        .num_part_sums = states_.bytes() / 4,
                        .num_multiprocessors = device_.num_multiprocessors};
    const bool is_rounded = std::exchange(rounded_from_, nullptr) == args.x.data &&
                            rounded_shape_ == args.x.shape && weight.format == WeightFormat::kBF16;
    int64_t x_stride = weight.cols;
    if (weight.format != WeightFormat::kF32) {
      x_stride = RoundUp(weight.cols, kMatMulUnit);
      const int64_t units_at = launch.m * x_stride * 2;
      CHECK(units_at + launch.m * 4 <= rounded_.bytes(), "MatMul: larger than reserved");
      RoundLaunch round{.format = weight.format,
                        .x = args.x.As<float>(),
                        .rows = launch.m,
                        .cols = launch.k,
                        .out = reinterpret_cast<uint16_t*>(rounded_.data())};
      if (weight.format == WeightFormat::kF16) {
        round.units = reinterpret_cast<float*>(rounded_.data() + units_at);
      }
      if (!is_rounded) queue_->Enqueue<LaunchRound>("MatMul", round);
      launch.x = rounded_.data();
      launch.units = round.units;
    }
    if (cublas_ == nullptr || !CublasMatMul::Handles(launch)) {
      queue_->Enqueue<LaunchMatMul>("MatMul", launch);
    } else {
      queue_->Enqueue<LaunchCublas>("MatMul", {cublas_.get(), launch, x_stride});
    }
  }

  void MultiplyLowBit(const MatMulArgs& args) {
    ForgetRounded();
    const Weight& weight = *args.weight;
    const LowBitLayout layout(*weight.low_bit, weight.rows, weight.cols);
    const int64_t m = args.x.shape[0];
    CHECK(LowBitInputLayout(layout, m).Bytes() <= rounded_.bytes(), "MatMul: larger than reserved");
    queue_->Enqueue<LaunchRoundLowBit>("MatMul", {.spec = *weight.low_bit,
                                                  .layout = layout,
                                                  .clip = weight.input_clip,
                                                  .x = args.x.As<float>(),
                                                  .m = m,
                                                  .out = rounded_.data()});
    queue_->Enqueue<LaunchLowBitMatMul>("MatMul",
                                        {.spec = *weight.low_bit,
                                         .layout = layout,
                                         .inputs = rounded_.data(),
                                         .weight = weight.data.data(),
                                         .bias = reinterpret_cast<const float*>(weight.bias.data()),
                                         .accumulate = args.accumulate,
                                         .m = m,
                                         .n = weight.rows,
                                         .out = args.out.As<float>(),
                                         .num_multiprocessors = device_.num_multiprocessors});
  }

  void DoRopeTable(const RopeTableArgs& args) override {
    ForgetRounded();
    RopeTableLaunch launch{.rows = args.cos.shape[0],
                           .half = args.cos.shape[1],
                           .cos = args.cos.As<float>(),
                           .sin = args.sin.As<float>()};
    if (launch.half == 0) return;
    if (!queue_->Stage(StagedArray{StagingSlot::kPositions, args.positions, &launch.positions},
                       StagedArray{StagingSlot::kInverseFrequency, args.inverse_frequency,
                                   &launch.inverse_frequency})) {
      return;
    }
    queue_->Enqueue<LaunchRopeTable>("RopeTable", launch);
  }

  void DoRopeAppend(const RopeAppendArgs& args) override {
    ForgetRounded();
    const KvLayerLayout& layout = *args.kv.layout;
    targets_.clear();
    for (const SequenceSlice& slice : args.slices) {
      for (int64_t i = 0; i < slice.num_rows; ++i) {
        const int64_t position = slice.first_position + i;
        const int32_t open_id =
            slice.pages[static_cast<size_t>(position / layout.page_tokens)].open_id;
        CHECK(open_id >= 0, "RopeAppend: no open page");
        targets_.push_back({open_id, static_cast<int32_t>(position % layout.page_tokens)});
      }
    }
    RopeAppendLaunch launch{.layout = layout,
                            .kv = args.kv,
                            .qkv = args.qkv.As<float>(),
                            .cos = args.cos.As<float>(),
                            .sin = args.sin.As<float>(),
                            .rows = args.qkv.shape[0],
                            .num_heads = args.q.shape[1] / layout.head_dim,
                            .q = args.q.As<float>()};
    const std::span<const AppendTarget> targets(targets_);
    if (!queue_->Stage(StagedArray{StagingSlot::kAppendTargets, targets, &launch.targets})) return;
    queue_->Enqueue<LaunchRopeAppend>("RopeAppend", launch);
  }

  void DoComputeKeyNorm(const KeyNormArgs& args) override {
    const size_t num_pages = args.items[0].open_ids.size();
    norm_ids_.clear();
    norm_pages_.clear();
    for (const KeyNormItem& item : args.items) {
      CHECK(item.open_ids.size() == num_pages, "ComputeKeyNorm: all norms span as many pages");
      norm_ids_.push_back(item.norm_id);
      norm_pages_.insert(norm_pages_.end(), item.open_ids.begin(), item.open_ids.end());
    }
    KeyNormLaunch launch{.layout = *args.kv.layout,
                         .kv = args.kv,
                         .num_items = static_cast<int64_t>(args.items.size()),
                         .num_pages = static_cast<int64_t>(num_pages)};
    const std::span<const int32_t> ids(norm_ids_), pages(norm_pages_);
    if (!queue_->Stage(StagedArray{StagingSlot::kNormIds, ids, &launch.norm_ids},
                       StagedArray{StagingSlot::kNormPages, pages, &launch.open_ids})) {
      return;
    }
    queue_->Enqueue<LaunchKeyNorm>("ComputeKeyNorm", launch);
  }

  // Steps that seal one page more or less are often the same launch: numbers are powers of two.
  void DoSeal(const SealArgs& args) override {
    seals_.assign(args.items.begin(), args.items.end());
    seals_.resize(std::bit_ceil(args.items.size()));
    SealLaunch launch{.layout = *args.kv.layout,
                      .kv = args.kv,
                      .num_items = static_cast<int64_t>(seals_.size()),
                      .non_finite = reinterpret_cast<int32_t*>(non_finite_.data())};
    CHECK(args.items.size() * sizeof(int32_t) <= static_cast<size_t>(non_finite_.bytes()),
          "Seal: more pages than reserved");
    num_flags_ = std::max(num_flags_, args.items.size());
    const std::span<const SealItem> items(seals_);
    if (!queue_->Stage(StagedArray{StagingSlot::kSealItems, items, &launch.items})) return;
    queue_->Enqueue<LaunchSeal>("Seal", launch);
  }

  void DoAttention(const AttentionArgs& args) override {
    ForgetRounded();
    const KvLayerLayout& layout = *args.kv.layout;
    CHECK(layout.order != CodeOrder::kPanel16, "Attention: a cache in another backend's order");
    CHECK(states_.bytes() > 0, "Attention before Reserve");
    pages_.clear();
    for (const SequenceSlice& slice : args.slices) {
      const int64_t last = slice.first_position + slice.num_rows - 1;
      pages_.insert(pages_.end(), slice.pages.begin(),
                    slice.pages.begin() + args.layout->PageOf(last) + 1);
    }
    const bool tensor_cores = layout.order == CodeOrder::kMmaFragment;
    plan_.Make(args.slices, args.layout->windows(),
               {.group = args.num_heads / layout.kv_heads,
                .kv_heads = layout.kv_heads,
                .head_dim = layout.head_dim,
                .tensor_cores = tensor_cores,
                .max_states = kStateBytes / (StateFloats(layout.head_dim) * 4),
                .max_items = kMaxItems,
                .resident_blocks =
                    device_.num_multiprocessors * (tensor_cores ? kBlocksPerSm : kWarpsPerSm)});
    AttentionKernelLaunch launch{.layout = layout,
                                 .kv = args.kv,
                                 .q = args.q.As<float>(),
                                 .out = args.out.As<float>(),
                                 .states = reinterpret_cast<float*>(states_.data()),
                                 .num_heads = args.num_heads,
                                 .group = static_cast<int>(args.num_heads / layout.kv_heads),
                                 .scale = args.scale};
    AttentionKernelLaunch decode = WithPlan(plan_.decode(), launch),
                          prefill = WithPlan(plan_.prefill(), launch);
    const std::span<const PageRef> pages(pages_);
    const std::span<const PlannedTile> decode_tiles(plan_.decode().tiles),
        prefill_tiles(plan_.prefill().tiles);
    const std::span<const AttentionItem> decode_items(plan_.decode().items),
        prefill_items(plan_.prefill().items);
    if (!queue_->Stage(StagedArray{StagingSlot::kPages, pages, &launch.pages},
                       StagedArray{StagingSlot::kDecodeTiles, decode_tiles, &decode.tiles},
                       StagedArray{StagingSlot::kDecodeItems, decode_items, &decode.items},
                       StagedArray{StagingSlot::kPrefillTiles, prefill_tiles, &prefill.tiles},
                       StagedArray{StagingSlot::kPrefillItems, prefill_items, &prefill.items})) {
      return;
    }
    for (AttentionKernelLaunch* part : {&decode, &prefill}) {
      if (part->num_tiles == 0) continue;
      part->pages = launch.pages;
      queue_->Enqueue<LaunchAttention>("Attention", *part);
    }
  }

  // The launch of one part of a plan, without its arrays.
  static AttentionKernelLaunch WithPlan(const AttentionLaunch& plan, AttentionKernelLaunch launch) {
    launch.tile_rows = plan.tile_rows;
    launch.split = plan.split();
    launch.in_one_go = plan.in_one_go;
    launch.num_tiles = static_cast<int64_t>(plan.tiles.size());
    launch.num_items = static_cast<int64_t>(plan.items.size());
    return launch;
  }

  void DoSwiGlu(const SwiGluArgs& args) override {
    queue_->Enqueue<LaunchSwiGlu>("SwiGlu",
                                  {args.gate_up.As<float>(), args.out.shape[0], args.out.shape[1],
                                   args.out.As<float>(), RoundAlong(args.out)});
  }

  void DoGatherRows(const GatherRowsArgs& args) override {
    ForgetRounded();
    GatherRowsLaunch launch{.x = args.x.As<float>(),
                            .num_rows = args.out.shape[0],
                            .width = args.out.shape[1],
                            .out = args.out.As<float>()};
    if (!queue_->Stage(StagedArray{StagingSlot::kGatherRows, args.rows, &launch.rows})) return;
    queue_->Enqueue<LaunchGatherRows>("GatherRows", launch);
  }

  void DoSelectTop(const SelectTopArgs& args) override {
    ForgetRounded();
    const SelectTopLaunch launch{.x = args.x.As<float>(),
                                 .rows = args.x.shape[0],
                                 .width = args.x.shape[1],
                                 .k = args.k,
                                 .keys = reinterpret_cast<uint64_t*>(select_keys_.data()),
                                 .out = args.out.data()};
    CHECK(launch.rows * SelectParts(launch.width) * launch.k *
                  static_cast<int64_t>(sizeof(uint64_t)) <=
              select_keys_.bytes(),
          "SelectTop: larger than reserved");
    queue_->Enqueue<LaunchSelectTop>("SelectTop", launch);
  }

  void DoReadToHost(const std::byte* from, int64_t bytes, std::byte* to) override {
    queue_->Flush();
    queue_->Check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost,
                                  queue_->stream()),
                  "ReadToHost");
  }

  const CudaDevice device_;
  const std::string name_;
  const std::unique_ptr<CublasMatMul> cublas_;  // null: all products are our own
  std::function<void(std::string_view)> warn_;  // of F32 weights; empty once it was told
  Buffer rounded_;                           // activations of one product as halves, or as integers
  const std::byte* rounded_from_ = nullptr;  // where they are in F32, or null: not known
  Shape rounded_shape_;
  bool only_bf16_ = true;                // of the weights that were packed
  Buffer states_;                        // of split attention, or parts of a split product
  Buffer select_keys_;                   // of SelectTop
  Buffer non_finite_, non_finite_seen_;  // int32 per item: Seal met a NaN or an infinity
  size_t num_flags_ = 0;                 // of them, that calls of Seal may have set
  std::vector<int64_t> failed_seals_;
  AttentionPlan plan_;
  // Arguments on their way to staging; kept for their memory.
  std::vector<PageRef> pages_;
  std::vector<AppendTarget> targets_;
  std::vector<SealItem> seals_;
  std::vector<int32_t> norm_ids_, norm_pages_;
  const std::unique_ptr<LaunchQueue> queue_;  // last: waits before the memory above is freed
};

}  // namespace

Result<std::unique_ptr<Backend>> CreateCudaBackend(const BackendOptions& options) {
  if (options.threads > 1) {
    return InvalidArgument("backend.threads is for the cpu device; cuda takes 0 or 1, not " +
                               std::to_string(options.threads),
                           "backend.threads");
  }
  ASSIGN_OR_RETURN(CudaDevice device, OpenDevice());
  ASSIGN_OR_RETURN(std::unique_ptr<LaunchQueue> queue, LaunchQueue::Create(options.warn));
  std::unique_ptr<CublasMatMul> cublas;
  if (!options.deterministic) {
    ASSIGN_OR_RETURN(cublas, CublasMatMul::Create());
  }
  return std::unique_ptr<Backend>(std::make_unique<CudaBackend>(
      std::move(device), std::move(cublas), std::move(queue), options.warn));
}

}  // namespace innerq
