#include "kernels/cpu/seal.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/float16.h"
#include "kernels/quant_group.h"

namespace innerq {
namespace {

template <int kBits>
void PackBits(const uint8_t* codes, int64_t num_codes, uint8_t* packed) {
  for (int64_t i = 0; i < num_codes; i += 8) {
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) word |= static_cast<uint64_t>(codes[i + j]) << (j * kBits);
    for (int j = 0; j < kBits; ++j) *packed++ = static_cast<uint8_t>(word >> (8 * j));
  }
}

// Writes codes as a little-endian bit string; num_codes is a multiple of 8.
void Pack(const uint8_t* codes, int bits, int64_t num_codes, uint8_t* packed) {
  if (bits == 2) return PackBits<2>(codes, num_codes, packed);
  if (bits == 3) return PackBits<3>(codes, num_codes, packed);
  if (bits == 4) return PackBits<4>(codes, num_codes, packed);
  std::memcpy(packed, codes, static_cast<size_t>(num_codes));
}

// Where one side of a head goes.
struct SealTarget {
  uint8_t* codes;
  uint16_t* scales;
  uint16_t* zeros;
};

// Encodes x [T][D] and stores codes, scales and zeros. Groups run along tokens or channels; the
// other axis gives the lanes. `weights`, of errors along the groups' axis, or null: all 1.
// `code_index(t, d)` and `scale_index(t, d)` are the layout's.
template <typename CodeIndex, typename ScaleIndex>
void SealSide(EncodeFunction encode, const QuantSpec& spec, bool groups_of_tokens, int64_t tokens,
              int64_t dim, const float* x, const float* weights, uint8_t* codes,
              const SealTarget& target, CodeIndex code_index, ScaleIndex scale_index) {
  constexpr int kMaxGroup = 128;
  float group_x[kMaxGroup * kSealLanes];
  uint8_t group_codes[kMaxGroup * kSealLanes];
  GroupParams params[kSealLanes];
  const int64_t grouped = groups_of_tokens ? tokens : dim;
  const int64_t other = groups_of_tokens ? dim : tokens;
  const int64_t grouped_stride = groups_of_tokens ? dim : 1;
  const int64_t other_stride = groups_of_tokens ? 1 : dim;
  for (int64_t begin = 0; begin < grouped; begin += spec.group_size) {
    for (int64_t first = 0; first < other; first += kSealLanes) {
      const int64_t lanes = std::min<int64_t>(kSealLanes, other - first);
      for (int64_t i = 0; i < spec.group_size; ++i) {
        const float* from = x + (begin + i) * grouped_stride + first * other_stride;
        float* to = group_x + i * kSealLanes;
        for (int64_t l = 0; l < lanes; ++l) to[l] = from[l * other_stride];
        std::fill(to + lanes, to + kSealLanes, 0.0f);
      }
      encode(spec, group_x, weights == nullptr ? nullptr : weights + begin, spec.group_size,
             group_codes, params);
      for (int64_t l = 0; l < lanes; ++l) {
        const StoredParams stored = StoreParams(params[l], spec.bits);
        const int64_t at =
            groups_of_tokens ? scale_index(begin, first + l) : scale_index(first + l, begin);
        target.scales[at] = stored.scale;
        if (spec.has_zero()) target.zeros[at] = stored.zero;
        for (int64_t i = 0; i < spec.group_size; ++i) {
          const int64_t index = groups_of_tokens ? code_index(begin + i, first + l)
                                                 : code_index(first + l, begin + i);
          codes[index] = group_codes[i * kSealLanes + l];
        }
      }
    }
  }
}

bool AllFinite(const float* x, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= std::fabs(x[i]) <= 3.4e38f;
  return finite;
}

bool SealKeys(EncodeFunction encode, const PagedKvView& kv, const SealItem& item, int64_t head,
              SealScratch& scratch) {
  const KvLayerLayout& layout = *kv.layout;
  const int64_t tokens = layout.page_tokens, dim = layout.head_dim;
  const uint16_t* keys = kv.OpenKeys(item.open_id, head);
  std::byte* to = kv.SealedHead(item.sealed_id, head);
  const float* norm = layout.normalize_keys ? kv.KeyNorm(item.norm_id, head) : nullptr;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < dim; ++d) {
      const float k = F16ToF32(keys[layout.OpenKeyIndex(t, d)]);
      scratch.x[t * dim + d] = norm != nullptr ? k / norm[d] : k;
    }
  }
  if (!AllFinite(scratch.x, tokens * dim)) return false;
  if (!layout.key.quantized()) {
    std::memcpy(to + layout.key_codes, keys, static_cast<size_t>(tokens * dim * 2));
    return true;
  }
  // Groups of tokens share one channel: the weights would all be the same.
  const bool weighted = norm != nullptr && layout.key.axis == QuantAxis::kInner;
  for (int64_t d = 0; weighted && d < dim; ++d) scratch.weights[d] = norm[d] * norm[d];
  SealSide(
      encode, layout.key, layout.key.axis == QuantAxis::kOuter, tokens, dim, scratch.x,
      weighted ? scratch.weights : nullptr, scratch.codes,
      {reinterpret_cast<uint8_t*>(to + layout.key_codes),
       reinterpret_cast<uint16_t*>(to + layout.key_scales),
       reinterpret_cast<uint16_t*>(to + layout.key_zeros)},
      [&](int64_t t, int64_t d) { return layout.KeyCodeIndex(t, d); },
      [&](int64_t t, int64_t d) { return layout.KeyScaleIndex(t, d); });
  Pack(scratch.codes, layout.key.bits, tokens * dim,
       reinterpret_cast<uint8_t*>(to + layout.key_codes));
  return true;
}

bool SealValues(EncodeFunction encode, const PagedKvView& kv, const SealItem& item, int64_t head,
                SealScratch& scratch) {
  const KvLayerLayout& layout = *kv.layout;
  const int64_t tokens = layout.page_tokens, dim = layout.head_dim, padded = layout.padded_dim();
  const uint16_t* values = kv.OpenValues(item.open_id, head);
  std::byte* to = kv.SealedHead(item.sealed_id, head);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < dim; ++c) {
      scratch.x[t * dim + c] = F16ToF32(values[layout.OpenValueIndex(t, c)]);
    }
  }
  if (!AllFinite(scratch.x, tokens * dim)) return false;
  if (!layout.value.quantized()) {
    std::memcpy(to + layout.value_codes, values, static_cast<size_t>(tokens * padded * 2));
    return true;
  }
  // What pads the channels is zero: codes 0 of scale 0.
  std::fill(scratch.codes, scratch.codes + tokens * padded, uint8_t{0});
  std::memset(to + layout.value_scales, 0,
              static_cast<size_t>(layout.sealed_head_bytes - layout.value_scales));
  SealSide(
      encode, layout.value, layout.value.axis == QuantAxis::kInner, tokens, dim, scratch.x, nullptr,
      scratch.codes,
      {reinterpret_cast<uint8_t*>(to + layout.value_codes),
       reinterpret_cast<uint16_t*>(to + layout.value_scales),
       reinterpret_cast<uint16_t*>(to + layout.value_zeros)},
      [&](int64_t t, int64_t c) { return layout.ValueCodeIndex(t, c); },
      [&](int64_t t, int64_t c) { return layout.ValueScaleIndex(t, c); });
  Pack(scratch.codes, layout.value.bits, tokens * padded,
       reinterpret_cast<uint8_t*>(to + layout.value_codes));
  return true;
}

void EncodeBaseline(const QuantSpec& spec, const float* x, const float* weights, int n,
                    uint8_t* codes, GroupParams* params) {
  EncodeGroups<kSealLanes>(spec, x, weights, n, codes, params);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void EncodeAvx2(const QuantSpec& spec, const float* x,
                                                const float* weights, int n, uint8_t* codes,
                                                GroupParams* params) {
  EncodeGroups<kSealLanes>(spec, x, weights, n, codes, params);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void EncodeAvx512(
    const QuantSpec& spec, const float* x, const float* weights, int n, uint8_t* codes,
    GroupParams* params) {
  EncodeGroups<kSealLanes>(spec, x, weights, n, codes, params);
}
#endif

}  // namespace

EncodeFunction EncodeFunctionFor(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa >= CpuIsa::kAvx512) return EncodeAvx512;
  if (isa == CpuIsa::kAvx2) return EncodeAvx2;
#endif
  CHECK(isa == CpuIsa::kScalar, "no such variant in this build");
  return EncodeBaseline;
}

bool SealHead(EncodeFunction encode, const PagedKvView& kv, const SealItem& item, int64_t head,
              SealScratch& scratch) {
  return SealKeys(encode, kv, item, head, scratch) && SealValues(encode, kv, item, head, scratch);
}

void ComputeHeadKeyNorm(const PagedKvView& kv, const KeyNormItem& item, int64_t head) {
  const KvLayerLayout& layout = *kv.layout;
  constexpr uint16_t kMagnitude = 0x7fff;  // magnitudes of F16 compare as integers
  for (int64_t d = 0; d < layout.head_dim; ++d) {
    uint16_t largest = 0;
    for (const int32_t open_id : item.open_ids) {
      const uint16_t* keys = kv.OpenKeys(open_id, head);
      for (int64_t t = 0; t < layout.page_tokens; ++t) {
        const auto magnitude = static_cast<uint16_t>(keys[layout.OpenKeyIndex(t, d)] & kMagnitude);
        largest = std::max(largest, magnitude);
      }
    }
    kv.KeyNorm(item.norm_id, head)[d] = largest > 0 ? std::sqrt(F16ToF32(largest)) : 1.0f;
  }
}

}  // namespace innerq
