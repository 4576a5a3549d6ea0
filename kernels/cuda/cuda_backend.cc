#include "kernels/cuda/cuda_backend.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/cublas_matmul.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/staging.h"
#include "kernels/float16.h"

namespace innerq {
namespace {

using namespace cuda;  // NOLINT: this file is the module's own

constexpr int64_t kMaxHeadDim = 256;
// States of split attention: 8 rows of 128 channels, 8 heads, 4 million tokens in segments.
constexpr int64_t kStateBytes = int64_t{256} << 20;
constexpr int64_t kMaxItems = 32768;     // of one launch of split attention
constexpr int64_t kWarpsPerSm = 16;      // that keep a multiprocessor busy
constexpr int64_t kReadBlocksPerSm = 8;  // of 256 threads: as many as a multiprocessor has at once
constexpr int64_t kOwnRows = 16;         // up to which our products are no slower than cuBLASLt's
constexpr int64_t kSpareBytes = 65536;   // of staging, for small arguments

int64_t ElementBytes(WeightFormat format) { return format == WeightFormat::kF32 ? 4 : 2; }

void WriteElement(WeightFormat format, float x, std::byte* to) {
  switch (format) {
    case WeightFormat::kF32:
      std::memcpy(to, &x, sizeof(x));
      return;
    case WeightFormat::kF16:
    case WeightFormat::kBF16: {
      const uint16_t bits = format == WeightFormat::kF16 ? F32ToF16(x) : F32ToBF16(x);
      std::memcpy(to, &bits, sizeof(bits));
      return;
    }
  }
}

// One GPU, one stream. Weights are [N, K] row-major in their format, both extents padded with zeros
// to kMatMulUnit. Errors stick until Synchronize; after one, operations are skipped, for their
// inputs may be garbage.
class CudaBackend final : public Backend {
 public:
  CudaBackend(CudaDevice device, Stream stream, std::unique_ptr<CublasMatMul> cublas)
      : device_(std::move(device)),
        name_("cuda/" + device_.architecture),
        stream_(std::move(stream)),
        cublas_(std::move(cublas)) {}

  ~CudaBackend() override {
    // Nothing may run on memory that is about to be freed; what it failed with no longer matters.
    static_cast<void>(cudaStreamSynchronize(stream_.get()));
  }

  std::string_view name() const override { return name_; }
  CodeOrder code_order() const override { return CodeOrder::kMmaFragment; }
  bool deterministic() const override { return cublas_ == nullptr; }
  bool host_visible() const override { return false; }
  int64_t available_bytes() const override {
    size_t available = 0, total = 0;
    if (cudaMemGetInfo(&available, &total) != cudaSuccess) return Backend::available_bytes();
    return static_cast<int64_t>(available);
  }

  // Many launches between two times of the host's clock, so that waiting for them costs little.
  Result<std::optional<double>> MeasureReadBandwidth() override {
    using Clock = std::chrono::steady_clock;
    constexpr int64_t kBytes = int64_t{1} << 30;
    constexpr int kPasses = 8;
    constexpr int kRounds = 5;
    ASSIGN_OR_RETURN(Buffer memory, AllocateDevice(kBytes));
    ASSIGN_OR_RETURN(Buffer all_zero, AllocateDevice(sizeof(uint32_t)));
    const ReadLaunch launch{.quads = reinterpret_cast<uint4*>(memory.data()),
                            .num_quads = kBytes / static_cast<int64_t>(sizeof(uint4)),
                            .all_zero = reinterpret_cast<uint32_t*>(all_zero.data()),
                            .num_blocks = device_.num_multiprocessors * kReadBlocksPerSm};
    RETURN_IF_CUDA_ERROR(LaunchFill(launch, stream_.get()), "filling memory");
    RETURN_IF_CUDA_ERROR(LaunchRead(launch, stream_.get()), "reading memory");
    double fastest = std::numeric_limits<double>::infinity();
    for (int round = 0; round < kRounds; ++round) {
      RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()), "reading memory");
      const Clock::time_point begin = Clock::now();
      for (int pass = 0; pass < kPasses; ++pass) {
        RETURN_IF_CUDA_ERROR(LaunchRead(launch, stream_.get()), "reading memory");
      }
      RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()), "reading memory");
      fastest = std::min(fastest, std::chrono::duration<double>(Clock::now() - begin).count());
    }
    return std::optional(static_cast<double>(kPasses * kBytes) / fastest);
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
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()), "waiting for the device");
    const int64_t rounded_bytes = limits.max_rows * RoundUp(limits.max_features, kMatMulUnit) *
                                  ElementBytes(WeightFormat::kBF16);
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
    plan_.Reserve(limits.max_rows, limits.max_group, kMaxItems);
    pages_.reserve(static_cast<size_t>(limits.max_pages));
    slices_.reserve(static_cast<size_t>(limits.max_rows));
    targets_.reserve(static_cast<size_t>(limits.max_rows));
    const int64_t tiles = limits.max_rows * limits.max_group;
    const int64_t per_row = sizeof(DeviceSlice) + sizeof(AppendTarget) + sizeof(SealItem) + 64;
    // Both launches of one attention, every page table, and as much again for the rest of a step.
    const int64_t once =
        2 * tiles * static_cast<int64_t>(sizeof(PlannedTile)) +
        2 * std::max(kMaxItems, tiles) * static_cast<int64_t>(sizeof(AttentionItem)) +
        limits.max_pages * static_cast<int64_t>(sizeof(PageRef) + sizeof(SealItem)) +
        limits.max_rows * per_row;
    return staging_.Reserve(2 * once + kSpareBytes);
  }

  Result<void> Synchronize() override {
    const size_t num_flags = std::exchange(num_flags_, 0);
    if (num_flags > 0) {
      Check(cudaMemcpyAsync(non_finite_seen_.data(), non_finite_.data(),
                            num_flags * sizeof(int32_t), cudaMemcpyDeviceToHost, stream_.get()),
            "reading the device's error flags");
      Check(cudaMemsetAsync(non_finite_.data(), 0, num_flags * sizeof(int32_t), stream_.get()),
            "clearing the device's error flags");
    }
    Check(cudaStreamSynchronize(stream_.get()), "running operations");
    staging_.Reset();
    failed_seals_.clear();
    const auto* flags = reinterpret_cast<const int32_t*>(non_finite_seen_.data());
    for (size_t i = 0; i < num_flags && error_.ok(); ++i) {
      if (flags[i] != 0) failed_seals_.push_back(static_cast<int64_t>(i));
    }
    if (!failed_seals_.empty()) {
      return Error{ErrorCode::kInternal, "non-finite key or value in the cache"};
    }
    return std::exchange(error_, Result<void>());
  }

  std::vector<int64_t> failed_seals() const override { return failed_seals_; }

 private:
  Result<void> DoPackWeight(std::span<const ConstTensorView> parts,
                            std::span<const ConstTensorView> bias_parts, Weight* weight) override {
    const int64_t row_bytes = RoundUp(weight->cols, kMatMulUnit) * ElementBytes(weight->format);
    ASSIGN_OR_RETURN(weight->data, AllocateDevice(RoundUp(weight->rows, kMatMulUnit) * row_bytes));
    std::byte* to = weight->data.data();
    for (const ConstTensorView& part : parts) {
      RETURN_IF_ERROR(CopyRows(part, weight->format, row_bytes, to));
      to += part.shape[0] * row_bytes;
    }
    if (bias_parts.empty()) return {};
    std::vector<float> bias;
    for (const ConstTensorView& part : bias_parts) {
      for (int64_t i = 0; i < part.shape[0]; ++i) bias.push_back(ElementAsFloat(part, i));
    }
    ASSIGN_OR_RETURN(weight->bias, Import({reinterpret_cast<const std::byte*>(bias.data()),
                                           DType::kF32, Shape{weight->rows}}));
    return {};
  }

  // Keeps the first error until Synchronize; says whether all is well.
  bool Check(cudaError_t status, const char* what) {
    if (status != cudaSuccess && error_.ok()) error_ = ErrorOf(status, what);
    return error_.ok();
  }

  template <typename T>
  bool Upload(StagingSlot slot, std::span<const T> items, const T** on_device) {
    return Check(staging_.Upload(slot, items, stream_.get(), on_device), "copying arguments");
  }
  bool BeginUpload(int64_t bytes, int64_t num_arrays) {
    return error_.ok() && Check(staging_.Begin(bytes, num_arrays, stream_.get()),
                                "waiting for room for arguments");
  }
  template <typename T>
  bool UploadOne(StagingSlot slot, std::span<const T> items, const T** on_device) {
    return BeginUpload(static_cast<int64_t>(items.size_bytes()), 1) &&
           Upload(slot, items, on_device);
  }

  // Copies a part's rows [n, K] to the device, `row_bytes` apart, converted to `format`.
  Result<void> CopyRows(const ConstTensorView& part, WeightFormat format, int64_t row_bytes,
                        std::byte* to) {
    const int64_t rows = part.shape[0], cols = part.shape[1];
    const int64_t width = cols * ElementBytes(format);
    const bool as_stored = (format == WeightFormat::kF32 && part.dtype == DType::kF32) ||
                           (format == WeightFormat::kF16 && part.dtype == DType::kF16) ||
                           (format == WeightFormat::kBF16 && part.dtype == DType::kBF16);
    const int64_t chunk = as_stored ? rows : std::max<int64_t>(1, (int64_t{1} << 24) / width);
    std::vector<std::byte> converted;
    for (int64_t row = 0; row < rows; row += chunk) {
      const int64_t count = std::min(chunk, rows - row);
      const std::byte* from = part.data + row * width;
      if (!as_stored) {
        converted.resize(static_cast<size_t>(count * width));
        for (int64_t i = 0; i < count * cols; ++i) {
          WriteElement(format, ElementAsFloat(part, row * cols + i),
                       converted.data() + i * ElementBytes(format));
        }
        from = converted.data();
      }
      RETURN_IF_ERROR(CopyToDevice(from, count, width, row_bytes, to + row * row_bytes));
    }
    return {};
  }

  // Only the operation right after RmsNorm or SwiGlu may rely on `rounded_`: later its F32 memory
  // may be written or be other memory.
  void ForgetRounded() { rounded_from_ = nullptr; }
  // Where RmsNorm and SwiGlu leave their out in BF16, for a product that follows; or null.
  uint16_t* RoundAlong(const TensorView& out) {
    ForgetRounded();
    const int64_t rows = out.shape[0], width = out.shape[1];
    if (rows <= kOwnRows || width % kMatMulUnit != 0 || rows * width * 2 > rounded_.bytes()) {
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
    if (!UploadOne(StagingSlot::kTokenIds, args.token_ids, &launch.token_ids)) return;
    Check(LaunchEmbed(launch, stream_.get()), "Embed");
  }

  void DoRmsNorm(const RmsNormArgs& args) override {
    if (!error_.ok()) return;
    Check(LaunchRmsNorm({args.x.As<float>(), args.weight.As<float>(), args.epsilon, args.x.shape[0],
                         args.x.shape[1], args.out.As<float>(), RoundAlong(args.out)},
                        stream_.get()),
          "RmsNorm");
  }

  void DoMatMul(const MatMulArgs& args) override {
    if (!error_.ok()) return;
    const Weight& weight = *args.weight;
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
    const bool own =
        cublas_ == nullptr || !CublasMatMul::Handles(weight.format) ||
        (weight.format == WeightFormat::kBF16 && launch.m <= kOwnRows && TakesF32(launch));
    const bool is_rounded =
        std::exchange(rounded_from_, nullptr) == args.x.data && rounded_shape_ == args.x.shape;
    int64_t x_stride = weight.cols;
    if (weight.format == WeightFormat::kBF16 && !(own && TakesF32(launch))) {
      x_stride = RoundUp(weight.cols, kMatMulUnit);
      CHECK(launch.m * x_stride * 2 <= rounded_.bytes(), "MatMul: larger than reserved");
      auto* rounded = reinterpret_cast<uint16_t*>(rounded_.data());
      if (!is_rounded && !Check(LaunchRoundToBf16({args.x.As<float>(), launch.m, launch.k, rounded},
                                                  stream_.get()),
                                "MatMul")) {
        return;
      }
      launch.x = rounded_.data();
      launch.rounded = true;
    }
    if (own) {
      Check(LaunchMatMul(launch, stream_.get()), "MatMul");
    } else if (Result<void> result = cublas_->Run(launch, x_stride, stream_.get()); !result.ok()) {
      error_ = std::move(result);
    }
  }

  void DoRopeTable(const RopeTableArgs& args) override {
    ForgetRounded();
    RopeTableLaunch launch{.rows = args.cos.shape[0],
                           .half = args.cos.shape[1],
                           .cos = args.cos.As<float>(),
                           .sin = args.sin.As<float>()};
    if (launch.half == 0) return;
    if (!BeginUpload(
            static_cast<int64_t>(args.positions.size_bytes() + args.inverse_frequency.size_bytes()),
            2) ||
        !Upload(StagingSlot::kPositions, args.positions, &launch.positions) ||
        !Upload(StagingSlot::kInverseFrequency, args.inverse_frequency,
                &launch.inverse_frequency)) {
      return;
    }
    Check(LaunchRopeTable(launch, stream_.get()), "RopeTable");
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
    if (!UploadOne(StagingSlot::kAppendTargets, targets, &launch.targets)) return;
    Check(LaunchRopeAppend(launch, stream_.get()), "RopeAppend");
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
    if (!BeginUpload(static_cast<int64_t>(ids.size_bytes() + pages.size_bytes()), 2) ||
        !Upload(StagingSlot::kNormIds, ids, &launch.norm_ids) ||
        !Upload(StagingSlot::kNormPages, pages, &launch.open_ids)) {
      return;
    }
    Check(LaunchKeyNorm(launch, stream_.get()), "ComputeKeyNorm");
  }

  void DoSeal(const SealArgs& args) override {
    SealLaunch launch{.layout = *args.kv.layout,
                      .kv = args.kv,
                      .num_items = static_cast<int64_t>(args.items.size()),
                      .non_finite = reinterpret_cast<int32_t*>(non_finite_.data())};
    CHECK(args.items.size() * sizeof(int32_t) <= static_cast<size_t>(non_finite_.bytes()),
          "Seal: more pages than reserved");
    num_flags_ = std::max(num_flags_, args.items.size());
    if (!UploadOne(StagingSlot::kSealItems, args.items, &launch.items)) return;
    Check(LaunchSeal(launch, stream_.get()), "Seal");
  }

  void DoAttention(const AttentionArgs& args) override {
    ForgetRounded();
    const KvLayerLayout& layout = *args.kv.layout;
    CHECK(layout.order != CodeOrder::kPanel16, "Attention: a cache in another backend's order");
    CHECK(states_.bytes() > 0, "Attention before Reserve");
    pages_.clear();
    slices_.clear();
    for (const SequenceSlice& slice : args.slices) {
      slices_.push_back({.first_position = slice.first_position,
                         .exact_before = slice.exact_before,
                         .first_page = static_cast<int64_t>(pages_.size()),
                         .row_begin = static_cast<int32_t>(slice.row_begin),
                         .norm_id = slice.norm_id});
      const int64_t last = slice.first_position + slice.num_rows - 1;
      pages_.insert(pages_.end(), slice.pages.begin(),
                    slice.pages.begin() + args.layout->PageOf(last) + 1);
    }
    plan_.Make(args.slices, {.group = args.num_heads / layout.kv_heads,
                             .kv_heads = layout.kv_heads,
                             .head_dim = layout.head_dim,
                             .tensor_cores = layout.order == CodeOrder::kMmaFragment,
                             .max_states = kStateBytes / (StateFloats(layout.head_dim) * 4),
                             .max_items = kMaxItems,
                             .busy_warps = device_.num_multiprocessors * kWarpsPerSm});
    AttentionKernelLaunch launch{.layout = layout,
                                 .windows = args.layout->windows(),
                                 .kv = args.kv,
                                 .q = args.q.As<float>(),
                                 .out = args.out.As<float>(),
                                 .states = reinterpret_cast<float*>(states_.data()),
                                 .num_heads = args.num_heads,
                                 .scale = args.scale};
    const std::span<const DeviceSlice> slices(slices_);
    const std::span<const PageRef> pages(pages_);
    const std::span<const PlannedTile> decode_tiles(plan_.decode().tiles),
        prefill_tiles(plan_.prefill().tiles);
    const std::span<const AttentionItem> decode_items(plan_.decode().items),
        prefill_items(plan_.prefill().items);
    const size_t bytes = slices.size_bytes() + pages.size_bytes() + decode_tiles.size_bytes() +
                         prefill_tiles.size_bytes() + decode_items.size_bytes() +
                         prefill_items.size_bytes();
    if (!BeginUpload(static_cast<int64_t>(bytes), 6) ||
        !Upload(StagingSlot::kSlices, slices, &launch.slices) ||
        !Upload(StagingSlot::kPages, pages, &launch.pages)) {
      return;
    }
    Launch(plan_.decode(), {StagingSlot::kDecodeTiles, StagingSlot::kDecodeItems}, launch);
    Launch(plan_.prefill(), {StagingSlot::kPrefillTiles, StagingSlot::kPrefillItems}, launch);
  }

  struct LaunchSlots {
    StagingSlot tiles, items;
  };
  void Launch(const AttentionLaunch& plan, LaunchSlots slots, AttentionKernelLaunch launch) {
    if (plan.tiles.empty()) return;
    launch.tile_rows = plan.tile_rows;
    launch.split = plan.split();
    launch.num_tiles = static_cast<int64_t>(plan.tiles.size());
    launch.num_items = static_cast<int64_t>(plan.items.size());
    if (!Upload(slots.tiles, std::span<const PlannedTile>(plan.tiles), &launch.tiles) ||
        !Upload(slots.items, std::span<const AttentionItem>(plan.items), &launch.items)) {
      return;
    }
    Check(LaunchAttention(launch, stream_.get()), "Attention");
  }

  void DoSwiGlu(const SwiGluArgs& args) override {
    if (!error_.ok()) return;
    Check(LaunchSwiGlu({args.gate_up.As<float>(), args.out.shape[0], args.out.shape[1],
                        args.out.As<float>(), RoundAlong(args.out)},
                       stream_.get()),
          "SwiGlu");
  }

  void DoGatherRows(const GatherRowsArgs& args) override {
    ForgetRounded();
    GatherRowsLaunch launch{.x = args.x.As<float>(),
                            .num_rows = args.out.shape[0],
                            .width = args.out.shape[1],
                            .out = args.out.As<float>()};
    if (!UploadOne(StagingSlot::kGatherRows, args.rows, &launch.rows)) return;
    Check(LaunchGatherRows(launch, stream_.get()), "GatherRows");
  }

  void DoReadToHost(const std::byte* from, int64_t bytes, std::byte* to) override {
    if (!error_.ok()) return;
    Check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost,
                          stream_.get()),
          "ReadToHost");
  }

  const CudaDevice device_;
  const std::string name_;
  const Stream stream_;
  const std::unique_ptr<CublasMatMul> cublas_;  // null: all products are our own
  Staging staging_;
  Buffer rounded_;                           // activations of one product in BF16
  const std::byte* rounded_from_ = nullptr;  // where they are in F32, or null: not known
  Shape rounded_shape_;
  Buffer states_;                        // of split attention, or parts of a split product
  Buffer non_finite_, non_finite_seen_;  // int32 per item: Seal met a NaN or an infinity
  size_t num_flags_ = 0;                 // of them, that calls of Seal may have set
  std::vector<int64_t> failed_seals_;
  AttentionPlan plan_;
  // Arguments on their way to staging; kept for their memory.
  std::vector<DeviceSlice> slices_;
  std::vector<PageRef> pages_;
  std::vector<AppendTarget> targets_;
  std::vector<int32_t> norm_ids_, norm_pages_;
  Result<void> error_;
};

}  // namespace

Result<std::unique_ptr<Backend>> CreateCudaBackend(const BackendOptions& options) {
  if (options.threads > 1) {
    return InvalidArgument("backend.threads is for the cpu device; cuda takes 0 or 1, not " +
                               std::to_string(options.threads),
                           "backend.threads");
  }
  ASSIGN_OR_RETURN(CudaDevice device, OpenDevice());
  ASSIGN_OR_RETURN(Stream stream, CreateStream());
  std::unique_ptr<CublasMatMul> cublas;
  if (!options.deterministic) {
    ASSIGN_OR_RETURN(cublas, CublasMatMul::Create());
  }
  return std::unique_ptr<Backend>(
      std::make_unique<CudaBackend>(std::move(device), std::move(stream), std::move(cublas)));
}

}  // namespace innerq
