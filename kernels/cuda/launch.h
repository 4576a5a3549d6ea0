// Launchers: one function per kernel, taking a plain struct of device addresses and sizes. Each
// enqueues on a stream and returns what the runtime says of the launch; nothing here waits.
//
// T rows, H query heads, G key/value heads, D head dimension, M/N/K of a product.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/low_bit_layout.h"

namespace innerq::cuda {

// Whether this build has kernels that the current device can run.
cudaError_t ProbeKernels();

// --- rows.cu: operations on rows of activations ---

struct EmbedLaunch {
  const int32_t* token_ids = nullptr;  // [rows]
  const std::byte* table = nullptr;    // [V, width]
  DType dtype = DType::kF32;
  int64_t rows = 0, width = 0;
  float* out = nullptr;  // [rows, width]
};
cudaError_t LaunchEmbed(const EmbedLaunch& launch, cudaStream_t stream);

struct RmsNormLaunch {
  const float* x = nullptr;       // [rows, width]
  const float* weight = nullptr;  // [width]
  float epsilon = 0;
  int64_t rows = 0, width = 0;
  float* out = nullptr;         // [rows, width], may be x
  uint16_t* rounded = nullptr;  // null, or out in BF16 if the width is a multiple of kMatMulUnit
};
cudaError_t LaunchRmsNorm(const RmsNormLaunch& launch, cudaStream_t stream);

struct RopeTableLaunch {
  const int64_t* positions = nullptr;        // [rows]
  const float* inverse_frequency = nullptr;  // [half]
  int64_t rows = 0, half = 0;
  float* cos = nullptr;  // [rows, half]
  float* sin = nullptr;
};
cudaError_t LaunchRopeTable(const RopeTableLaunch& launch, cudaStream_t stream);

struct SwiGluLaunch {
  const float* gate_up = nullptr;  // [rows, 2 * width]
  int64_t rows = 0, width = 0;
  float* out = nullptr;         // [rows, width]
  uint16_t* rounded = nullptr;  // as of RmsNormLaunch
};
cudaError_t LaunchSwiGlu(const SwiGluLaunch& launch, cudaStream_t stream);

struct GatherRowsLaunch {
  const float* x = nullptr;       // [*, width]
  const int64_t* rows = nullptr;  // [num_rows]
  int64_t num_rows = 0, width = 0;
  float* out = nullptr;  // [num_rows, width]
};
cudaError_t LaunchGatherRows(const GatherRowsLaunch& launch, cudaStream_t stream);

// --- select.cu: the largest elements of rows ---

constexpr int64_t kSelectElements = 4096;  // that a block takes at once

// How many blocks share a row.
INNERQ_HOST_DEVICE constexpr int64_t SelectParts(int64_t width) {
  return CeilDiv(width, kSelectElements);
}

struct SelectTopLaunch {
  const float* x = nullptr;  // [rows, width]
  int64_t rows = 0, width = 0, k = 0;
  uint64_t* keys = nullptr;  // [rows][SelectParts(width)][k], scratch
  TopLogit* out = nullptr;   // [rows, k]
};
cudaError_t LaunchSelectTop(const SelectTopLaunch& launch, cudaStream_t stream);

// --- cache.cu: operations that write the cache ---

// Where a row's key and value go.
struct AppendTarget {
  int32_t open_id = -1;
  int32_t token = 0;  // in the page
};
struct RopeAppendLaunch {
  KvLayerLayout layout;
  PagedKvView kv;              // its layout pointer is not used
  const float* qkv = nullptr;  // [rows, (H + 2G) * D]
  const float* cos = nullptr;  // [rows, D/2]
  const float* sin = nullptr;
  const AppendTarget* targets = nullptr;  // [rows]
  int64_t rows = 0, num_heads = 0;
  float* q = nullptr;  // [rows, H * D]
};
cudaError_t LaunchRopeAppend(const RopeAppendLaunch& launch, cudaStream_t stream);

struct KeyNormLaunch {
  KvLayerLayout layout;
  PagedKvView kv;
  const int32_t* norm_ids = nullptr;  // [num_items]
  const int32_t* open_ids = nullptr;  // [num_items][num_pages]
  int64_t num_items = 0, num_pages = 0;
};
cudaError_t LaunchKeyNorm(const KeyNormLaunch& launch, cudaStream_t stream);

struct SealLaunch {
  KvLayerLayout layout;
  PagedKvView kv;
  const SealItem* items = nullptr;  // [num_items]; nothing is done for an open_id of -1
  int64_t num_items = 0;
  int32_t* non_finite = nullptr;  // [num_items], set to 1 where a key or value is not finite
};
cudaError_t LaunchSeal(const SealLaunch& launch, cudaStream_t stream);

// --- attention.cu, attention_mma_*.cu ---

struct AttentionKernelLaunch {
  KvLayerLayout layout;
  PagedKvView kv;
  const float* q = nullptr;        // [T, H * D]
  float* out = nullptr;            // [T, H * D]
  float* states = nullptr;         // [num_states][StateFloats(D)]
  const PageRef* pages = nullptr;  // of all slices
  const PlannedTile* tiles = nullptr;
  const AttentionItem* items = nullptr;
  int64_t num_tiles = 0, num_items = 0;
  int64_t num_heads = 0;
  int group = 1;  // H / G
  int tile_rows = 0;
  bool split = false;      // see AttentionLaunch
  bool in_one_go = false;  // likewise
  float scale = 0;
};
cudaError_t LaunchAttention(const AttentionKernelLaunch& launch, cudaStream_t stream);

// --- matmul.cu, matmul_mma.cu ---

constexpr int64_t kMatMulUnit = 16;  // weights are padded with zeros to multiples of it, N and K

// Bits of x as it meets weights of 16 bits, rows padded with zeros to a multiple of kMatMulUnit
// columns. BF16: rounded to it. F16: each row is multiplied by a power of two first, which takes
// its largest magnitude into [2^14, 2^15), or is 2^126 where that would take more. So nothing
// overflows, and an element x of a row whose largest is X is off by at most max(2^-11 |x|, 2^-39 X,
// 2^-151): half of F16's last place, or of its smallest number, 2^-24. NaN and infinities stay what
// they are; beside an infinity finite elements may become zeros.
struct RoundLaunch {
  WeightFormat format = WeightFormat::kBF16;
  const float* x = nullptr;  // [rows, cols]
  int64_t rows = 0, cols = 0;
  uint16_t* out = nullptr;  // [rows, RoundUp(cols, 16)]
  float* units = nullptr;   // F16: [rows], what 1 is worth, a power of two
};
cudaError_t LaunchRound(const RoundLaunch& launch, cudaStream_t stream);

struct MatMulLaunch {
  WeightFormat format = WeightFormat::kBF16;
  const std::byte* x = nullptr;       // what LaunchRound wrote; for F32 weights F32 [M, K]
  const float* units = nullptr;       // likewise; null but for F16
  const std::byte* weight = nullptr;  // [RoundUp(N, 16), RoundUp(K, 16)]
  const float* bias = nullptr;        // [N] or null
  bool accumulate = false;
  int64_t m = 0, n = 0, k = 0;
  float* out = nullptr;         // [M, N]
  float* parts = nullptr;       // [num_part_sums], scratch memory of products that are split
  int64_t num_part_sums = 0;    // 8 * M * N for one that may be
  int num_multiprocessors = 0;  // of the device; with 0 nothing is split
};
cudaError_t LaunchMatMul(const MatMulLaunch& launch, cudaStream_t stream);

// LaunchMatMul of BF16 and F16 weights.
cudaError_t LaunchMmaMatMul(const MatMulLaunch& launch, cudaStream_t stream);

// The rest of a product whose sums x * weight^T [M, N] are in `parts`, which may be `out`.
cudaError_t LaunchFinishMatMul(const MatMulLaunch& launch, cudaStream_t stream);

// --- low_bit.cu, low_bit_mma.cu; see low_bit_layout.h ---

struct PackLowBitLaunch {
  LowBitSpec spec;
  LowBitLayout layout;
  const uint8_t* codes = nullptr;    // [N][K * B / 8] as in a file
  const uint16_t* scales = nullptr;  // [N][groups]
  std::byte* out = nullptr;          // layout.Bytes()
};
cudaError_t LaunchPackLowBit(const PackLowBitLaunch& launch, cudaStream_t stream);

struct RoundLowBitLaunch {
  LowBitSpec spec;
  LowBitLayout layout;       // of the weight that they meet
  float clip = 0;            // of the weight: its input_clip
  const float* x = nullptr;  // [M, K]
  int64_t m = 0;
  std::byte* out = nullptr;  // LowBitInputLayout(layout, m).Bytes()
};
cudaError_t LaunchRoundLowBit(const RoundLowBitLaunch& launch, cudaStream_t stream);

struct LowBitMatMulLaunch {
  LowBitSpec spec;
  LowBitLayout layout;
  const std::byte* inputs = nullptr;  // [M, K] as LaunchRoundLowBit wrote them
  const std::byte* weight = nullptr;  // as LaunchPackLowBit wrote it
  const float* bias = nullptr;        // [N] or null
  bool accumulate = false;
  int64_t m = 0, n = 0;
  float* out = nullptr;         // [M, N]
  int num_multiprocessors = 0;  // of the device
  uint32_t table[4] = {};       // of the kernels, which LaunchLowBitMatMul fills in
};
cudaError_t LaunchLowBitMatMul(const LowBitMatMulLaunch& launch, cudaStream_t stream);

// --- bandwidth.cu ---

struct ReadLaunch {
  uint4* quads = nullptr;  // [num_quads]
  int64_t num_quads = 0;
  uint32_t* all_zero = nullptr;  // set to 1 by a thread whose quads are zero
  int64_t num_blocks = 0;        // of 256 threads
};
// Writes numbers of which no thread of LaunchRead finds zeros alone.
cudaError_t LaunchFill(const ReadLaunch& launch, cudaStream_t stream);
cudaError_t LaunchRead(const ReadLaunch& launch, cudaStream_t stream);

}  // namespace innerq::cuda
