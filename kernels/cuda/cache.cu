// RopeAppend, ComputeKeyNorm, Seal: operations that write the cache.
//
// T page_tokens, D head dimension, Dp D rounded up to 16, N group size.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/strip_index.h"
#include "kernels/float16.h"
#include "kernels/quant_group.h"

namespace innerq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxGroup = 128;

// The view of a launch with its layout where the kernel can read it.
template <typename Launch>
__device__ PagedKvView ViewOf(const Launch& args) {
  PagedKvView kv = args.kv;
  kv.layout = &args.layout;
  return kv;
}

// Channel d of a rotated head; channel d pairs with d + D/2.
__device__ float Rotated(const float* x, const float* cos, const float* sin, int dim, int d) {
  const int half = dim / 2;
  const int i = d < half ? d : d - half;
  const float turned = d < half ? -x[d + half] : x[d - half];
  return x[d] * cos[i] + turned * sin[i];
}

// Grid: [rows of the step, H + 2G]. Block: 128 threads rotate and store one head of one row: of
// queries, keys or values. No shared memory.
__global__ void RopeAppendKernel(const __grid_constant__ RopeAppendLaunch args) {
  const KvLayerLayout& layout = args.layout;
  const PagedKvView kv = ViewOf(args);
  const int64_t row = blockIdx.x;
  const int dim = static_cast<int>(layout.head_dim);
  const int padded = static_cast<int>(layout.padded_dim());
  const int heads = static_cast<int>(args.num_heads), kv_heads = static_cast<int>(layout.kv_heads);
  const int head = static_cast<int>(blockIdx.y);
  const float* x = args.qkv + (row * (heads + 2 * kv_heads) + head) * dim;
  const float* cos = args.cos + row * (dim / 2);
  const float* sin = args.sin + row * (dim / 2);
  if (head < heads) {
    float* q = args.q + (row * heads + head) * dim;
    for (int d = threadIdx.x; d < dim; d += kThreads) q[d] = Rotated(x, cos, sin, dim, d);
    return;
  }
  const AppendTarget target = args.targets[row];
  if (head < heads + kv_heads) {
    uint16_t* keys = kv.OpenKeys(target.open_id, head - heads);
    for (int d = threadIdx.x; d < dim; d += kThreads) {
      keys[layout.OpenKeyIndex(target.token, d)] = F32ToF16(Rotated(x, cos, sin, dim, d));
    }
    return;
  }
  uint16_t* values = kv.OpenValues(target.open_id, head - heads - kv_heads);
  for (int c = threadIdx.x; c < padded; c += kThreads) {
    values[layout.OpenValueIndex(target.token, c)] = c < dim ? F32ToF16(x[c]) : uint16_t{0};
  }
}

// Grid: [items, G]. Block: 128 threads, a channel each at a time, over all tokens of the pages.
// No shared memory.
__global__ void KeyNormKernel(const __grid_constant__ KeyNormLaunch args) {
  const KvLayerLayout& layout = args.layout;
  const PagedKvView kv = ViewOf(args);
  const int64_t head = blockIdx.y;
  for (int64_t d = threadIdx.x; d < layout.head_dim; d += kThreads) {
    float largest = 0;
    for (int64_t p = 0; p < args.num_pages; ++p) {
      const uint16_t* keys = kv.OpenKeys(args.open_ids[blockIdx.x * args.num_pages + p], head);
      for (int64_t t = 0; t < layout.page_tokens; ++t) {
        const float k = fabsf(F16ToF32(keys[layout.OpenKeyIndex(t, d)]));
        if (isnan(k) || k > largest) largest = k;  // NaN stays
      }
    }
    kv.KeyNorm(args.norm_ids[blockIdx.x], head)[d] = largest == 0 ? 1.0f : sqrtf(largest);
  }
}

// One side, keys or values, of one head of a page on its way into the sealed pool.
struct SealSide {
  const QuantSpec* spec = nullptr;
  const uint16_t* from = nullptr;  // F16
  std::byte* codes = nullptr;
  uint16_t* scales = nullptr;
  uint16_t* zeros = nullptr;
  const float* norm = nullptr;  // [D], keys are divided by it; null: by nothing
  int64_t columns = 0;          // D for keys, Dp for values
  bool is_key = false;
  bool along_channels = false;  // what a group runs along
};

__device__ int64_t OpenIndex(const KvLayerLayout& layout, const SealSide& side, PageElement at) {
  return side.is_key ? layout.OpenKeyIndex(at.t, at.d) : layout.OpenValueIndex(at.t, at.d);
}
__device__ int64_t CodeIndex(const KvLayerLayout& layout, const SealSide& side, PageElement at) {
  return side.is_key ? layout.KeyCodeIndex(at.t, at.d) : layout.ValueCodeIndex(at.t, at.d);
}
__device__ int64_t ScaleIndex(const KvLayerLayout& layout, const SealSide& side, PageElement at) {
  return side.is_key ? layout.KeyScaleIndex(at.t, at.d) : layout.ValueScaleIndex(at.t, at.d);
}

// Copies a side that keeps 16 bits. Returns whether all real elements that this thread saw are
// finite.
__device__ bool CopyHalves(const KvLayerLayout& layout, const SealSide& side) {
  bool finite = true;
  auto* to = reinterpret_cast<uint16_t*>(side.codes);
  for (int64_t i = threadIdx.x; i < layout.page_tokens * side.columns; i += kThreads) {
    to[i] = side.from[i];
    if (i % side.columns < layout.head_dim) finite &= (side.from[i] & 0x7c00u) != 0x7c00u;
  }
  return finite;
}

// Encodes group j: its codes, one a byte, to shared memory, its parameters to the page. Returns
// whether its elements are finite; a group that is not gets codes and parameters of 0.
__device__ bool EncodeGroup(const KvLayerLayout& layout, const SealSide& side, int64_t j,
                            uint8_t* codes) {
  const QuantSpec& spec = *side.spec;
  float x[kMaxGroup], weights[kMaxGroup];
  uint8_t group_codes[kMaxGroup];
  bool finite = true;
  for (int i = 0; i < spec.group_size; ++i) {
    const PageElement at = GroupElement(layout, spec.group_size, side.along_channels, i, j);
    const float value = F16ToF32(side.from[OpenIndex(layout, side, at)]);
    const float norm = side.norm != nullptr ? side.norm[at.d] : 1.0f;
    x[i] = side.norm != nullptr ? value / norm : value;
    // An error of a key along channels costs what a query sees of it, norm^2.
    weights[i] = side.norm != nullptr && side.along_channels ? norm * norm : 1.0f;
    finite &= isfinite(x[i]);
    group_codes[i] = 0;
  }
  StoredParams stored;
  if (finite) {
    GroupParams params;
    EncodeGroups<1>(spec, x, weights, spec.group_size, group_codes, &params);
    stored = StoreParams(params, spec.bits);
  }
  for (int i = 0; i < spec.group_size; ++i) {
    const PageElement at = GroupElement(layout, spec.group_size, side.along_channels, i, j);
    codes[CodeIndex(layout, side, at)] = group_codes[i];
  }
  const int64_t at =
      ScaleIndex(layout, side, GroupElement(layout, spec.group_size, side.along_channels, 0, j));
  side.scales[at] = stored.scale;
  if (spec.has_zero()) side.zeros[at] = stored.zero;
  return finite;
}

// Grid: [items, G, 2]: keys, values. Block: 128 threads seal one side of one head of one page, a
// group each at a time. Shared: the side's codes, one a byte, in the page's order.
__global__ void SealKernel(const __grid_constant__ SealLaunch args) {
  extern __shared__ uint8_t codes[];
  const KvLayerLayout& layout = args.layout;
  const PagedKvView kv = ViewOf(args);
  const SealItem item = args.items[blockIdx.x];
  if (item.open_id < 0) return;
  const int64_t head = blockIdx.y;
  std::byte* page = kv.SealedHead(item.sealed_id, head);
  SealSide side;
  side.is_key = blockIdx.z == 0;
  if (side.is_key) {
    side.spec = &layout.key;
    side.from = kv.OpenKeys(item.open_id, head);
    side.codes = page + layout.key_codes;
    side.scales = reinterpret_cast<uint16_t*>(page + layout.key_scales);
    side.zeros = reinterpret_cast<uint16_t*>(page + layout.key_zeros);
    side.norm = layout.normalize_keys ? kv.KeyNorm(item.norm_id, head) : nullptr;
    side.columns = layout.head_dim;
    side.along_channels = layout.key.axis == QuantAxis::kInner;
  } else {
    side.spec = &layout.value;
    side.from = kv.OpenValues(item.open_id, head);
    side.codes = page + layout.value_codes;
    side.scales = reinterpret_cast<uint16_t*>(page + layout.value_scales);
    side.zeros = reinterpret_cast<uint16_t*>(page + layout.value_zeros);
    side.columns = layout.padded_dim();
    side.along_channels = layout.value.axis == QuantAxis::kOuter;
  }
  bool finite = true;
  if (!side.spec->quantized()) {
    finite = CopyHalves(layout, side);
  } else {
    const int64_t num_codes = layout.page_tokens * side.columns;
    for (int64_t i = threadIdx.x; i < num_codes; i += kThreads) codes[i] = 0;  // padding stays 0
    __syncthreads();
    const int64_t num_groups = layout.page_tokens * layout.head_dim / side.spec->group_size;
    for (int64_t j = threadIdx.x; j < num_groups; j += kThreads) {
      finite &= EncodeGroup(layout, side, j, codes);
    }
    __syncthreads();
    const int bits = side.spec->bits;
    if (layout.order == CodeOrder::kMmaFragment) {
      const int64_t square_words = kSquareCodes * bits / 32;
      auto* packed = reinterpret_cast<uint32_t*>(side.codes);
      for (int64_t i = threadIdx.x; i < num_codes * bits / 32; i += kThreads) {
        const uint8_t* square = codes + i / square_words * kSquareCodes;
        packed[i] = PackFragmentWord(square, bits, i % square_words);
      }
    } else {
      auto* packed = reinterpret_cast<uint8_t*>(side.codes);
      for (int64_t i = threadIdx.x; i < num_codes / 8; i += kThreads) {
        PackEightCodes(codes + i * 8, bits, packed + i * bits);
      }
    }
  }
  if (!finite) atomicExch(args.non_finite + blockIdx.x, 1);
}

}  // namespace

cudaError_t LaunchRopeAppend(const RopeAppendLaunch& launch, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(launch.rows),
                  static_cast<unsigned>(launch.num_heads + 2 * launch.layout.kv_heads));
  RopeAppendKernel<<<grid, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchKeyNorm(const KeyNormLaunch& launch, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(launch.num_items),
                  static_cast<unsigned>(launch.layout.kv_heads));
  KeyNormKernel<<<grid, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchSeal(const SealLaunch& launch, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(launch.num_items),
                  static_cast<unsigned>(launch.layout.kv_heads), 2);
  const auto codes = static_cast<size_t>(launch.layout.page_tokens * launch.layout.padded_dim());
  SealKernel<<<grid, kThreads, codes, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace innerq::cuda
