// class Backend: every operation a decoder needs, each with its contract.
//
// T rows (tokens) in the step, R rows that need logits, H query heads, G key/value heads,
// D head dimension, C hidden size, I intermediate size, V vocabulary, M/N/K of a matrix product.
// All activations are F32, dense, row-major.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/low_bit_weight.h"
#include "kernels/paged_kv.h"
#include "kernels/result.h"
#include "kernels/tensor.h"

namespace innerq {

// How a weight matrix of floats is held and multiplied.
//   kBF16  activations are rounded to BF16 (nearest even), products summed in F32
//   kF16   activations stay F32, weights are exact in F32, products summed in F32; on CUDA
//          activations are rounded to F16, relative to their row (RoundLaunch)
//   kF32   activations and weights stay F32, products summed in F32
enum class WeightFormat { kBF16, kF16, kF32 };

constexpr const char* WeightFormatName(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBF16:
      return "bf16";
    case WeightFormat::kF16:
      return "f16";
    case WeightFormat::kF32:
      return "f32";
  }
  return "?";
}

// A weight matrix [N, K] in its backend's own layout, with an optional bias [N]. Move-only.
struct Weight {
  WeightFormat format = WeightFormat::kBF16;
  int64_t rows = 0;  // N, outputs
  int64_t cols = 0;  // K, inputs
  Buffer data;       // layout of the backend that packed it
  Buffer bias;       // [N] F32, or empty
  // Set: the matrix is one of codes, multiplied as low_bit_weight.h says, whatever `format` is.
  std::optional<LowBitSpec> low_bit;
  float input_clip = 0;  // as of LowBitMatrix
};

// One sequence's rows in a step: rows [row_begin, row_begin + num_rows) are its positions
// [first_position, first_position + num_rows).
struct SequenceSlice {
  int64_t row_begin = 0;
  int64_t num_rows = 0;
  int64_t first_position = 0;
  std::span<const PageRef> pages;  // logical pages [0, PageOf(last position)]
  int32_t norm_id = -1;            // slot of the sequence's key norm; -1 while it has none
  int64_t exact_before = 0;        // see KvLayout::SealedPages
};

// A page to seal: its F16 source, its quantized destination, the key norm to divide by.
struct SealItem {
  int32_t open_id = -1;
  int32_t sealed_id = -1;
  int32_t norm_id = -1;  // -1 when no layer normalizes keys
};

// A key norm to compute from the pages KvLayout::KeyNormPages(), all open and full.
struct KeyNormItem {
  int32_t norm_id = -1;
  std::vector<int32_t> open_ids;
};

struct EmbedArgs {
  std::span<const int32_t> token_ids;  // [T], each in [0, V)
  ConstTensorView table;               // [V, C] F32, F16 or BF16
  TensorView out;                      // [T, C]
};

// out = x / sqrt(mean(x^2) + epsilon) * weight, per row. out may be x.
struct RmsNormArgs {
  ConstTensorView x;       // [T, C]
  ConstTensorView weight;  // [C]
  float epsilon = 1e-5f;   // added to the mean square
  TensorView out;          // [T, C]
};

// out = x W^T + bias, or out += when `accumulate`. A row of out depends on its row of x alone,
// never on M, when the backend is deterministic.
struct MatMulArgs {
  ConstTensorView x;               // [M, K]
  const Weight* weight = nullptr;  // [N, K]
  bool accumulate = false;         // add to what out holds (a residual)
  TensorView out;                  // [M, N]; must not overlap x
};

// Angles of rotary embedding: cos and sin of position * inverse_frequency, the product in F32.
struct RopeTableArgs {
  std::span<const int64_t> positions;        // [T]
  std::span<const float> inverse_frequency;  // [D/2], per position
  TensorView cos;                            // [T, D/2]
  TensorView sin;                            // [T, D/2]
};

// Rotates queries and keys (channel d pairs with d + D/2), writes queries out and appends keys and
// values, rounded to F16, to their open pages.
struct RopeAppendArgs {
  ConstTensorView qkv;                    // [T, (H + 2G) * D]: queries, keys, values
  ConstTensorView cos;                    // [T, D/2]
  ConstTensorView sin;                    // [T, D/2]
  PagedKvView kv;                         // one layer
  std::span<const SequenceSlice> slices;  // cover rows [0, T)
  TensorView q;                           // [T, H * D]
};

// norm[g][d] = sqrt(max over the pages' tokens of |K[t][g][d]|), 1 where that is 0, NaN where a key
// is NaN: then Seal reports it.
struct KeyNormArgs {
  PagedKvView kv;
  std::span<const KeyNormItem> items;
};

// Encodes open pages into sealed ones by the layer's codecs; keys divided by their norm first
// (division in F32). Non-finite input makes Synchronize return an internal error, and failed_seals
// say whose it was.
struct SealArgs {
  PagedKvView kv;
  std::span<const SealItem> items;
};

// Causal attention of each row over its sequence's pages, F16 or sealed as
// KvLayout::SealedPages says; all heads. Query head h reads key/value head h / (H / G).
struct AttentionArgs {
  ConstTensorView q;  // [T, H * D], rotated
  PagedKvView kv;
  const KvLayout* layout = nullptr;       // the visibility rule
  std::span<const SequenceSlice> slices;  // cover rows [0, T)
  int64_t num_heads = 0;                  // H
  float scale = 0;                        // multiplies q.k, usually 1/sqrt(D)
  TensorView out;                         // [T, H * D]; must not overlap q
};

// out = silu(gate) * up.
struct SwiGluArgs {
  ConstTensorView gate_up;  // [T, 2 * I]: gate, up
  TensorView out;           // [T, I]
};

struct GatherRowsArgs {
  ConstTensorView x;              // [T, C]
  std::span<const int64_t> rows;  // [R]
  TensorView out;                 // [R, C]
};

// A token and its logit.
struct TopLogit {
  float logit = 0;
  int32_t id = 0;
};
constexpr int64_t kMaxTopLogits = 64;  // that SelectTop takes of a row

// The k largest elements of each row, the largest first, of equals the lower column first; zeros of
// both signs are equal. NaN and infinities of both signs rank above all finite numbers and equal
// each other, so that the first of a row's elements that are not finite shows.
struct SelectTopArgs {
  ConstTensorView x;        // [R, V]
  int64_t k = 1;            // [1, min(V, kMaxTopLogits)]
  std::span<TopLogit> out;  // [R, k], this backend's memory
};

// The largest step a backend must be ready for; sizes its scratch memory.
struct StepLimits {
  int64_t max_rows = 512;    // T
  int64_t max_features = 0;  // the largest K of any MatMul
  int64_t max_head_dim = 256;
  int64_t max_group = 16;      // the largest H / G
  int64_t max_pages = 65536;   // entries of all page tables together
  int64_t max_logit_rows = 0;  // R of SelectTop
  int64_t max_vocab = 0;       // V of SelectTop
};

// Allocates memory and runs operations in the order of the calls. One thread at a time may call it.
// Operations are checked at the door (CHECK), may run later, and report through Synchronize.
// Only the packing of weights, Allocate, Import, Reserve, MeasureReadBandwidth and the default
// SelectTop allocate; other operations do for what they keep of a shape that they meet first, plans
// of products and graphs of launches, of which there is a bounded number.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;  // "reference", "cpu/avx2"
  virtual CodeOrder code_order() const = 0;
  virtual bool deterministic() const = 0;

  // 64-byte aligned, zeroed memory. Errors: resource exhausted, with the size.
  virtual Result<Buffer> Allocate(int64_t bytes) = 0;
  // Makes host memory readable by operations. CPU backends borrow it: `host` must outlive the
  // buffer. Devices copy it.
  virtual Result<Buffer> Import(ConstTensorView host) = 0;
  // Packs [n_i, K] parts (F32, F16 or BF16, host memory), stacked along N, converted to `format`;
  // `bias_parts` is empty or one [n_i] per part. The host memory is not needed afterwards.
  Result<Weight> PackWeight(std::span<const ConstTensorView> parts,
                            std::span<const ConstTensorView> bias_parts, WeightFormat format);
  // The same of low-bit parts, which share their spec and input_clip.
  Result<Weight> PackLowBitWeight(std::span<const LowBitMatrix> parts,
                                  std::span<const ConstTensorView> bias_parts);
  // Whether PackWeight leaves rows of K columns as they are: the first N * K elements of its data
  // are [N, K] row-major in its format, which Embed takes for a table.
  virtual bool packs_row_major(int64_t /*cols*/) const { return false; }
  // Readies scratch memory; must be called before the first step, and again before a larger one,
  // also when steps have run. What an earlier call reserved stays, at least.
  virtual Result<void> Reserve(const StepLimits& limits) = 0;
  // Waits for all operations; returns the first error since the last call, and clears it.
  virtual Result<void> Synchronize() = 0;
  // The items that non-finite input kept from being sealed before the last Synchronize: their
  // places in SealArgs::items, ascending, of all calls together. The other items are sealed.
  virtual std::vector<int64_t> failed_seals() const = 0;

  // Threads of the host that compute an operation.
  virtual int threads() const { return 1; }
  // Bytes that Allocate could still give; the largest number where nobody knows.
  virtual int64_t available_bytes() const { return std::numeric_limits<int64_t>::max(); }
  // Bytes per second at which a loop that does nothing else reads this backend's memory, measured
  // now, in about a second: what must read so many bytes takes no less. nullopt: there is no such
  // loop. Errors: resource exhausted without 1 GiB to read.
  virtual Result<std::optional<double>> MeasureReadBandwidth() { return std::optional<double>(); }

  // Whether the host may read and write this backend's memory at its addresses, once operations
  // are synchronized. Where it may not, ReadToHost is the way to what operations computed.
  virtual bool host_visible() const { return true; }
  // Host memory that ReadToHost copies to without a detour (page-locked, for a device), zeroed.
  virtual Result<Buffer> AllocateForHost(int64_t bytes) { return Allocate(bytes); }
  // Copies `bytes` of this backend's memory to host memory, in order with the operations: `to`
  // holds them after Synchronize.
  void ReadToHost(const std::byte* from, int64_t bytes, std::byte* to);

  void Embed(const EmbedArgs& args);
  void RmsNorm(const RmsNormArgs& args);
  void MatMul(const MatMulArgs& args);
  void RopeTable(const RopeTableArgs& args);
  void RopeAppend(const RopeAppendArgs& args);
  void ComputeKeyNorm(const KeyNormArgs& args);
  void Seal(const SealArgs& args);
  void Attention(const AttentionArgs& args);
  void SwiGlu(const SwiGluArgs& args);
  void GatherRows(const GatherRowsArgs& args);
  void SelectTop(const SelectTopArgs& args);

 protected:
  // Makes the bias of a weight whose extents are set, in F32. Errors: resource exhausted.
  Result<void> PackBias(std::span<const ConstTensorView> bias_parts, Weight* weight);

 private:
  // Makes the data and the bias of a weight whose format and extents are set.
  virtual Result<void> DoPackWeight(std::span<const ConstTensorView> parts,
                                    std::span<const ConstTensorView> bias_parts,
                                    Weight* weight) = 0;
  virtual Result<void> DoPackLowBitWeight(std::span<const LowBitMatrix> parts,
                                          std::span<const ConstTensorView> bias_parts,
                                          Weight* weight) = 0;
  virtual void DoEmbed(const EmbedArgs& args) = 0;
  virtual void DoRmsNorm(const RmsNormArgs& args) = 0;
  virtual void DoMatMul(const MatMulArgs& args) = 0;
  virtual void DoRopeTable(const RopeTableArgs& args) = 0;
  virtual void DoRopeAppend(const RopeAppendArgs& args) = 0;
  virtual void DoComputeKeyNorm(const KeyNormArgs& args) = 0;
  virtual void DoSeal(const SealArgs& args) = 0;
  virtual void DoAttention(const AttentionArgs& args) = 0;
  virtual void DoSwiGlu(const SwiGluArgs& args) = 0;
  virtual void DoGatherRows(const GatherRowsArgs& args) = 0;
  // Of memory that the host sees, unless a device does better.
  virtual void DoSelectTop(const SelectTopArgs& args);
  virtual void DoReadToHost(const std::byte* from, int64_t bytes, std::byte* to);
};

// How to make a backend, straight from the configuration.
struct BackendOptions {
  std::string device = "cpu";    // cpu, cuda, reference
  std::string variant = "auto";  // auto, or one of CpuVariants()
  int threads = 0;               // of the CPU; 0: one per available core
  bool deterministic = true;     // rows of MatMul independent of M, on every variant
  // Is told, in words for a person, of what works as it should but not as well as it could. By the
  // thread that calls the backend; may be empty.
  std::function<void(std::string_view)> warn{};
};

// Plain loops with double sums: the specification of every operation.
std::unique_ptr<Backend> CreateReferenceBackend();

// The CPU variants this machine can run, best first, e.g. amx, avx512, avx2, scalar.
std::vector<std::string> CpuVariants();

// Errors: invalid argument for an unknown device or variant, unavailable for one this machine or
// build lacks; the message names what there is.
Result<std::unique_ptr<Backend>> CreateBackend(const BackendOptions& options);

}  // namespace innerq
