// KvLayout and PagedKvView: all page, window and address arithmetic of the KV cache.
//
// T page_tokens, G key/value heads, D head dimension, Dp = D rounded up to 16, B code bits.
//
// A page holds T consecutive tokens of one sequence in every layer. Open pages are F16 and may
// grow; sealed pages are quantized and immutable. Each pool is laid out [layer][page][head], so
// what one head needs of one page is contiguous:
//   open    K F16 [T][D], V F16 [T][Dp], in the backend's order
//   sealed  K codes, K scales F16, K zeros F16, V codes, V scales F16, V zeros F16
// Scales (and zeros) per (page, head), with N the group size:
//   K inner [D/N][T]   K outer [T/N][D]   V inner [T/N][Dp]   V outer [D/N][T]
// Codes are a little-endian bit string; the index of an element is CodeOrder's business.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "kernels/quant_group.h"
#include "kernels/result.h"

namespace innerq {

// The physical order of elements within one head of one page; a backend asks for exactly one.
enum class CodeOrder {
  kRowMajor,  // [T][D]: the canonical order
  // CPU panels. Codes: [outer/16][inner/4][16 outer][4 inner], K outer = tokens, V outer =
  // channels, so that one u8 x s8 quad dot product takes 4 inner elements of 16 outer ones. Open K
  // is [T/16][D][16 tokens], open V is [T][Dp].
  kPanel16,
  // CUDA tensor cores. Codes: [T/32][D/32] squares of 32 tokens and channels, each in the order in
  // which a warp's lanes take it into products, see FragmentIndex. Open K is [T][D], open V is
  // [T/8][D][8 tokens]. Layers of other shapes than these products serve are kRowMajor instead.
  kMmaFragment,
};

constexpr int64_t kPanelWidth = 16;
constexpr int64_t kSquareCodes = 32 * 32;  // of a square of kMmaFragment

INNERQ_HOST_DEVICE constexpr int64_t RoundUp(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit * unit;
}
INNERQ_HOST_DEVICE constexpr int64_t CeilDiv(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit;
}

// Index of the first code of the square of kMmaFragment that an element lies in.
INNERQ_HOST_DEVICE constexpr int64_t SquareIndex(int64_t t, int64_t d, int64_t head_dim) {
  return (t / 32 * (head_dim / 32) + d / 32) * kSquareCodes;
}

// Index of a code in its square. `inner` is its place along the dimension that the
// product reduces (channels of K, tokens of V), `outer` along the other one; both in [0, 32).
//
// A square is the B operand of two steps of mma.m16n8k16 for each of four tiles of eight columns
// (PTX ISA, "Matrix Fragments for mma.m16n8k16"). There lane 4g + i has column g and rows 2i,
// 2i + 1, 2i + 8, 2i + 9 of a step. Which outer place is a column and which inner one a row is ours
// to choose: column g of tile n is 8 (g/2) + 2n + g%2, and the eight rows that lane 4g + i has in
// both steps are 8i to 8i + 7. So a lane has 32 codes, and its sums, of columns 2i and 2i + 1 of
// each tile, are those of the outer places 8i to 8i + 7.
INNERQ_HOST_DEVICE constexpr int64_t FragmentIndex(int64_t inner, int64_t outer) {
  const int64_t lane = (outer / 8 * 2 + outer % 2) * 4 + inner / 8;
  const int64_t tile = outer % 8 / 2;
  return lane * 32 + tile * 8 + inner % 8;
}

// Where a lane's codes lie in its words, of which it has `bits`. Its codes 2p and 2p + 1 share
// field p of 16, one in each half of a word, for they are the halves of a register of the product.
// Masking a field out leaves a subnormal half, code * 2^(bit - 24), which the product takes as it
// is; so a field must come to lie below bit 10, at the bit of the same field of the other tiles
// (TileCodeBit), by few shifts. Three bits leave one bit of a half over in each word: those are the
// last field.
struct FragmentField {
  int word = 0;
  int bit = 0;  // of each half
};
INNERQ_HOST_DEVICE constexpr bool IsSplitField(int bits, int field) {
  return bits == 3 && field == 15;  // bit k of a code is the highest bit of a half of word k
}
INNERQ_HOST_DEVICE constexpr FragmentField FragmentFieldAt(int bits, int field) {
  if (bits != 3) return {field * bits / 16, field * bits % 16};
  const int tile = field / 4, pair = field % 4;
  if (tile < 3) return {tile, pair < 3 ? 3 * pair : tile == 1 ? 9 : 12};
  return pair == 0 ? FragmentField{0, 9} : pair == 1 ? FragmentField{2, 9} : FragmentField{1, 12};
}

// Index of a lane's word k in a square. Three words are read as two and one.
INNERQ_HOST_DEVICE constexpr int64_t FragmentWord(int bits, int64_t lane, int64_t k) {
  if (bits != 3) return lane * bits + k;
  return k < 2 ? lane * 2 + k : 2 * 32 + lane;
}

// Reads a code of a square.
inline uint32_t ReadFragmentCode(const uint8_t* square, int bits, int64_t index) {
  const auto half_of = [&](int64_t k) {
    uint16_t half;
    const int64_t word = FragmentWord(bits, index / 32, k);
    std::memcpy(&half, square + word * 4 + index % 2 * 2, sizeof(half));  // little endian
    return static_cast<uint32_t>(half);
  };
  const int field = static_cast<int>(index / 2 % 16);
  if (IsSplitField(bits, field))
    return half_of(0) >> 15 | half_of(1) >> 15 << 1 | half_of(2) >> 15 << 2;
  const FragmentField at = FragmentFieldAt(bits, field);
  return half_of(at.word) >> at.bit & ((1u << bits) - 1u);
}

// Keys and values of one layer: sizes and offsets within one head of one page, in bytes.
struct KvLayerLayout {
  int64_t page_tokens = 32;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  QuantSpec key;
  QuantSpec value;
  bool normalize_keys = false;
  CodeOrder order = CodeOrder::kRowMajor;

  int64_t key_codes = 0, key_scales = 0, key_zeros = 0;
  int64_t value_codes = 0, value_scales = 0, value_zeros = 0;
  int64_t sealed_head_bytes = 0;
  int64_t open_values = 0;
  int64_t open_head_bytes = 0;

  INNERQ_HOST_DEVICE int64_t padded_dim() const { return RoundUp(head_dim, kPanelWidth); }

  // Index of element (token t, channel d) among the codes of K, and likewise of V.
  INNERQ_HOST_DEVICE int64_t KeyCodeIndex(int64_t t, int64_t d) const {
    if (order == CodeOrder::kRowMajor) return t * head_dim + d;
    if (order == CodeOrder::kMmaFragment)
      return SquareIndex(t, d, head_dim) + FragmentIndex(d % 32, t % 32);
    return ((t / 16 * (head_dim / 4) + d / 4) * 16 + t % 16) * 4 + d % 4;
  }
  INNERQ_HOST_DEVICE int64_t ValueCodeIndex(int64_t t, int64_t c) const {
    if (order == CodeOrder::kRowMajor) return t * padded_dim() + c;
    if (order == CodeOrder::kMmaFragment)
      return SquareIndex(t, c, head_dim) + FragmentIndex(t % 32, c % 32);
    return ((c / 16 * (page_tokens / 4) + t / 4) * 16 + c % 16) * 4 + t % 4;
  }
  // Reads the code at an index of K or V, whose codes begin at `codes` and have `bits` bits.
  uint32_t ReadCodeAt(const uint8_t* codes, int bits, int64_t index) const {
    if (order != CodeOrder::kMmaFragment) return ReadCode(codes, bits, index);
    const int64_t square = index / kSquareCodes;
    return ReadFragmentCode(codes + square * kSquareCodes * bits / 8, bits, index % kSquareCodes);
  }
  // Index of the scale (and zero) that serves an element.
  INNERQ_HOST_DEVICE int64_t KeyScaleIndex(int64_t t, int64_t d) const {
    return key.axis == QuantAxis::kInner ? d / key.group_size * page_tokens + t
                                         : t / key.group_size * head_dim + d;
  }
  INNERQ_HOST_DEVICE int64_t ValueScaleIndex(int64_t t, int64_t c) const {
    return value.axis == QuantAxis::kInner ? t / value.group_size * padded_dim() + c
                                           : c / value.group_size * page_tokens + t;
  }
  // Index of an F16 element in an open page, and in a sealed one that keeps 16 bits.
  INNERQ_HOST_DEVICE int64_t OpenKeyIndex(int64_t t, int64_t d) const {
    if (order == CodeOrder::kPanel16) return (t / 16 * head_dim + d) * 16 + t % 16;
    return t * head_dim + d;
  }
  INNERQ_HOST_DEVICE int64_t OpenValueIndex(int64_t t, int64_t c) const {
    if (order == CodeOrder::kMmaFragment) return (t / 8 * head_dim + c) * 8 + t % 8;
    return t * padded_dim() + c;
  }

  int64_t open_page_bytes() const { return kv_heads * open_head_bytes; }
  INNERQ_HOST_DEVICE int64_t sealed_page_bytes() const { return kv_heads * sealed_head_bytes; }
  bool quantized() const { return key.quantized() || value.quantized(); }
};

// What a cache is to be: the model's shape, the windows and the codecs of each layer.
struct KvCacheSpec {
  struct Layer {
    QuantSpec key;
    QuantSpec value;
    bool normalize_keys = false;
  };
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t page_tokens = 32;
  int64_t sink_tokens = 32;    // F16 at the start; a multiple of page_tokens
  int64_t recent_tokens = 96;  // at least this many F16 before the open page; likewise
  std::vector<Layer> layers;
};

// A half-open range of logical pages.
struct PageRange {
  int64_t begin = 0;
  int64_t end = 0;
  INNERQ_HOST_DEVICE int64_t size() const { return end - begin; }
};

// The rule of which page a query sees in which form; plain data, so that kernels on a device apply
// the same definition.
struct PageWindows {
  int64_t page_tokens = 0;
  int64_t sink_pages = 0;
  int64_t recent_pages = 0;
  bool quantized = false;  // false: pages are never sealed

  INNERQ_HOST_DEVICE int64_t PageOf(int64_t position) const { return position / page_tokens; }

  // Pages that a query at `position` reads as sealed; those before and after it, up to its own,
  // it reads as F16. Depends on the position alone, except that queries below `exact_before`
  // (the prompt under "prefill": "exact", else 0) read everything as F16.
  INNERQ_HOST_DEVICE PageRange SealedPages(int64_t position, int64_t exact_before) const {
    const int64_t end = PageOf(position) - recent_pages;
    if (!quantized || position < exact_before || end <= sink_pages) return {sink_pages, sink_pages};
    return {sink_pages, end};
  }
};

// The layout of every layer and the rule of which page a query sees in which form.
class KvLayout {
 public:
  // Errors: invalid argument, with the reason, for any combination that cannot be stored.
  static Result<KvLayout> Create(const KvCacheSpec& spec, CodeOrder order);

  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }
  const KvLayerLayout& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  CodeOrder order() const { return order_; }  // what was asked for; a layer's may be kRowMajor
  const PageWindows& windows() const { return windows_; }
  int64_t page_tokens() const { return windows_.page_tokens; }
  int64_t sink_pages() const { return windows_.sink_pages; }
  int64_t recent_pages() const { return windows_.recent_pages; }
  int64_t kv_heads() const { return layers_[0].kv_heads; }
  int64_t head_dim() const { return layers_[0].head_dim; }
  bool quantized() const { return windows_.quantized; }  // false: pages are never sealed
  bool normalizes_keys() const { return normalizes_; }   // in at least one layer

  int64_t open_page_bytes() const { return open_page_bytes_; }      // all layers
  int64_t sealed_page_bytes() const { return sealed_page_bytes_; }  // all layers
  int64_t key_norm_bytes() const {                                  // one sequence, all layers, F32
    return num_layers() * kv_heads() * head_dim() * 4;
  }
  // Bits per cached element in sealed pages, scales included; 16 when nothing is quantized.
  double sealed_bits_per_element() const;
  // The same over a whole sequence of `tokens`, F16 windows, the open page's unused tail and the
  // key norm included.
  double effective_bits_per_element(int64_t tokens) const;

  int64_t PageOf(int64_t position) const { return windows_.PageOf(position); }

  // See PageWindows::SealedPages.
  PageRange SealedPages(int64_t position, int64_t exact_before = 0) const {
    return windows_.SealedPages(position, exact_before);
  }

  // Pages whose keys define a sequence's key norm: those that are F16 when the first page seals.
  PageRange KeyNormPages() const {
    return {windows_.sink_pages, windows_.sink_pages + windows_.recent_pages + 1};
  }

  // Bytes of the pools for so many pages and sequences' norms. Kernels may read up to
  // kPoolSlackBytes beyond the last page.
  int64_t open_pool_bytes(int64_t pages) const {
    return pages * open_page_bytes_ + kPoolSlackBytes;
  }
  int64_t sealed_pool_bytes(int64_t pages) const {
    return pages * sealed_page_bytes_ + kPoolSlackBytes;
  }
  static constexpr int64_t kPoolSlackBytes = 128;

 private:
  std::vector<KvLayerLayout> layers_;
  CodeOrder order_ = CodeOrder::kRowMajor;
  PageWindows windows_;
  int64_t open_page_bytes_ = 0, sealed_page_bytes_ = 0;
  bool normalizes_ = false;
};

// Where one logical page of a sequence lives: block ids in the two pools, -1 where absent.
struct PageRef {
  int32_t open_id = -1;
  int32_t sealed_id = -1;
};

// One layer's part of the pools. Borrowed for one step.
struct PagedKvView {
  const KvLayerLayout* layout = nullptr;
  std::byte* open_pages = nullptr;    // [pages][G][open_head_bytes]
  std::byte* sealed_pages = nullptr;  // [pages][G][sealed_head_bytes]; null if never sealed
  float* key_norms = nullptr;         // [norm slots][G][D] F32; null if keys are not normalized

  INNERQ_HOST_DEVICE uint16_t* OpenKeys(int64_t open_id, int64_t head) const {
    return reinterpret_cast<uint16_t*>(open_pages + (open_id * layout->kv_heads + head) *
                                                        layout->open_head_bytes);
  }
  INNERQ_HOST_DEVICE uint16_t* OpenValues(int64_t open_id, int64_t head) const {
    return OpenKeys(open_id, head) + layout->open_values / 2;
  }
  // Start of a head's part of a sealed page; add the layout's key_codes, key_scales, ... offsets.
  INNERQ_HOST_DEVICE std::byte* SealedHead(int64_t sealed_id, int64_t head) const {
    return sealed_pages + (sealed_id * layout->kv_heads + head) * layout->sealed_head_bytes;
  }
  INNERQ_HOST_DEVICE float* KeyNorm(int64_t norm_id, int64_t head) const {
    return key_norms + (norm_id * layout->kv_heads + head) * layout->head_dim;
  }
};

// How many groups keys or values have, and how many of them store a zero other than the one that a
// symmetric group implies. 16-bit sides have no groups.
struct GroupCount {
  int64_t groups = 0;
  int64_t asymmetric = 0;
  void Add(const GroupCount& other) {
    groups += other.groups;
    asymmetric += other.asymmetric;
  }
};
// The same of both sides of a layer.
struct LayerGroups {
  GroupCount key;
  GroupCount value;
};
// Counts the groups of one sealed page, all heads. The page must be in host memory. Looks at
// zeros only where a group may be of either kind.
LayerGroups CountSealedGroups(const PagedKvView& kv, int64_t sealed_id);

// Reads one key or value element of a sealed page through the layout, as the canonical decode does:
// scale * code + zero. Keys come back as stored, that is divided by the key norm. Slow; for the
// reference backend and tests.
float DecodeSealedKey(const PagedKvView& kv, int64_t sealed_id, int64_t head, int64_t t, int64_t d);
float DecodeSealedValue(const PagedKvView& kv, int64_t sealed_id, int64_t head, int64_t t,
                        int64_t c);

}  // namespace innerq
