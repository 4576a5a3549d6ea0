// TileAttention: one thread's attention of a tile of rows, page by page.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/attention_ops.h"

namespace innerq {

// Consecutive tokens of one slice that see the same pages in the same form, for one KV head. Its
// rows are its tokens times the H / G query heads of that KV head, at most kTileRows.
struct AttentionTile {
  const SequenceSlice* slice = nullptr;
  int64_t first_row = 0;  // of the step
  int64_t first_position = 0;
  int64_t num_tokens = 0;
  int64_t kv_head = 0;
};

// Memory behind an AttentionState.
struct alignas(64) AttentionStateBuffer {
  float max[kTileRows];
  float sum[kTileRows];
  float out[kTileRows * kMaxInner];

  AttentionState View() { return {max, sum, out}; }
  // Makes it the empty state of `num_rows` rows of `padded_dim` channels.
  void Clear(int64_t num_rows, int64_t padded_dim);
};

// Scratch memory of one thread. Strides are those of the layer at hand, not the largest.
struct alignas(64) TileScratch {
  static constexpr int64_t kMaxScales = kMaxInner / 8 * kMaxPageTokens;  // groups of at least 8
  static constexpr int64_t kDots = 64 << 10;  // of a call of AttentionOps::dot
  static_assert(kDots >= kRowBlock * kMaxScales, "a block of rows must fit");
  static constexpr int64_t kSlack = 64;  // elements read beyond the end

  float q[kTileRows * kMaxInner];                 // [R][Dp] times scale * log2(e)
  float sealed_q[kTileRows * kMaxInner];          // times the key norm as well
  int8_t query_bytes[2 * kTileRows * kMaxInner];  // of IntegerRows
  float query_scales[kTileRows];
  int32_t query_sums[kTileRows * kMaxInner / 8];
  int8_t folded_bytes[2 * kTileRows * kMaxInner];  // q or p times the scales of an outer group
  float folded_scales[kTileRows];
  int32_t folded_sums[kTileRows];
  float folded_constants[kTileRows];
  int8_t weight_bytes[2 * kTileRows * kMaxPageTokens];
  int32_t weight_sums[kTileRows * kMaxPageTokens / 8];
  float scores[kTileRows * kMaxPageTokens];
  float keep[kTileRows];
  float add[kTileRows];
  int32_t visible[kTileRows];  // tokens of the last page that a row sees
  // A panel beyond the largest may be read, of [outer/16][inner].
  uint8_t codes[UnpackArgs::kCodeBytes * kMaxInner * (kMaxPageTokens + kPanelWidth)];
  float scales[kMaxScales + kSlack];
  float zeros[kMaxScales + kSlack];
  int32_t dots[kDots];
  CodedPagesScratch coded_pages;
  AttentionStateBuffer total;
  AttentionStateBuffer part;
};

// The attention of one tile; cheap to make. Borrows everything.
class TileAttention {
 public:
  // Scales and quantizes the tile's queries.
  TileAttention(const AttentionOps& ops, const AttentionArgs& args, const AttentionTile& tile,
                TileScratch& scratch);

  // Rows of a tile of a long prompt.
  static int64_t MostRows(const AttentionOps& ops, const KvLayerLayout& layer) {
    return CodedPagesFor(ops, layer, kTileRows) != nullptr ? kTileRows : kCachedTileRows;
  }

  int64_t num_rows() const { return num_rows_; }
  // Logical pages that the rows see, the last one in part.
  int64_t num_pages() const { return last_page_ + 1; }
  // Adds logical pages [begin, end) to `state`, in order.
  void Attend(int64_t begin, int64_t end, const AttentionState& state);
  // Divides and writes the rows of args.out.
  void Finish(const AttentionState& state) const;

 private:
  // The codes of one side, keys or values, of this head of a page.
  struct CodedSide {
    const QuantSpec& spec;
    const std::byte* codes;
    const std::byte* scales;
    const std::byte* zeros;
    int64_t inner, outer;  // extents; outer without padding
  };
  // Where products with codes go: out[r] = keep[r] * out[r] + add[r] * product, or, with both null,
  // out[r] = product.
  struct Target {
    const float* keep;  // [R]
    const float* add;   // [R]
    float* out;         // [R][outer rounded up to 16]
  };

  // What takes the sealed pages in one pass; null: nothing.
  using CodedPagesFunction = void (*)(const CodedPagesArgs& args);
  static CodedPagesFunction CodedPagesFor(const AttentionOps& ops, const KvLayerLayout& layer,
                                          int64_t num_rows);

  bool IsSealed(int64_t page) const { return page >= sealed_.begin && page < sealed_.end; }
  CodedSide Keys(const std::byte* head) const;
  CodedSide Values(const std::byte* head) const;
  void LoadQueries();
  void StartPrefetch(int64_t page);
  void PrefetchMore();
  void AttendPage(int64_t page, const AttentionState& state);
  void AttendCodedPages(int64_t begin, int64_t end, const AttentionState& state);
  void Score(const PageRef& page, bool sealed);
  void AddHalfValues(const uint16_t* values, bool last_page, const AttentionState& state);
  // Unpacks codes, scales and zeros. What it returns lacks the rows to multiply the codes with.
  DotArgs Unpack(const CodedSide& side);
  // Products with integer rows [R][inner] and the sums of their groups.
  void MultiplyInner(const CodedSide& side, const IntegerRows& rows, const int32_t* sums,
                     const Target& target);
  // Products with float rows [R][stride].
  void MultiplyOuter(const CodedSide& side, const float* rows, int64_t stride,
                     const Target& target);

  const AttentionOps& ops_;
  const AttentionArgs& args_;
  const AttentionTile& tile_;
  TileScratch& scratch_;
  const KvLayerLayout& layer_;
  const int64_t head_rows_;  // H / G
  const int64_t num_rows_;
  const int64_t last_page_;
  const PageRange sealed_;
  const int64_t padded_dim_;
  const CodedPagesFunction attend_coded_pages_;
  const IntegerRows query_rows_, weight_rows_;
  const std::byte* prefetch_at_ = nullptr;  // of the next page's bytes, those not yet asked for
  int64_t prefetch_bytes_ = 0;
};

}  // namespace innerq
