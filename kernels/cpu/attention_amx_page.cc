// Attention of many rows to pages of codes with AMX tiles: scores, weights and values in one pass.
//
// A step is a page and a block of 16 rows. Vectors score step s, between whose rows tiles store the
// products of values of step s - 1; they weigh it, between whose rows tiles store the products of
// keys of step s + 1; then they add the values of step s - 1. A tile's store waits for its products
// and holds up shuffles, so that stores one behind the other would hold up everything. A row's
// float operations are those of AttentionOps' single functions, in their order.
#include "kernels/cpu/attention_ops.h"

#if defined(__x86_64__)
// g++ 12 takes the undefined operands inside its AVX-512 intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <algorithm>

#include "kernels/cpu/attention_avx512.h"
#include "kernels/cpu/attention_weights.h"

#define INNERQ_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,amx-tile,amx-int8")))

namespace innerq {
namespace {

constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTokens = CodedPagesArgs::kTokens;
constexpr int64_t kQuad = 4 * kPanelWidth;           // codes of four inner elements of a panel
constexpr int64_t kTileChannels = 4 * kPanelWidth;   // of four tiles of products
constexpr int64_t kPlane = kMaxBlock * kPanelWidth;  // codes of a block of a panel

// Codes of `side` less its offset and, shifted as the high bytes of rows are worth, once more, as B
// tiles: [outer/16][inner/32][16][16 outer][4 inner], of which the 16 are kOrder's.
enum class TileOrder {
  kPlanes,  // plain ones, then shifted ones: as IntegerRows
  kQuads,   // four plain ones, the same shifted, in the order of WeightBytes
};
template <TileOrder kOrder, int kBits>
INNERQ_TARGET void UnpackTiles(const CodedPagesArgs::Side& side, const std::byte* head,
                               int64_t num_codes, uint8_t* tiles) {
  const PackedCodes<kBits> packed;
  const auto* from = reinterpret_cast<const uint8_t*>(head + side.codes);
  alignas(64) uint8_t codes[2][64];
  for (int i = 0; i < 64; ++i) {
    const int code = i % (1 << kBits) - side.offset;
    codes[0][i] = static_cast<uint8_t>(code);
    codes[1][i] = static_cast<uint8_t>(code * (1 << HighShift(kBits)));
  }
  const __m512i plain = _mm512_load_si512(codes[0]), shifted = _mm512_load_si512(codes[1]);
  for (int64_t i = 0; i < num_codes; i += kPlane, tiles += 2 * kPlane) {
#pragma GCC unroll 8
    for (int64_t quad = 0; quad < kPlane / kQuad; ++quad) {
      const __m512i code = packed.Load(from + (i + quad * kQuad) / 8 * kBits);
      const bool planes = kOrder == TileOrder::kPlanes;
      uint8_t* tile_rows = tiles + (planes ? quad : quad % 4 * 4 + quad / 4 * 2) * kQuad;
      _mm512_store_si512(tile_rows, _mm512_permutexvar_epi8(code, plain));
      _mm512_store_si512(tile_rows + (planes ? kPlane : kQuad),
                         _mm512_permutexvar_epi8(code, shifted));
    }
  }
}

template <TileOrder kOrder>
INNERQ_TARGET void UnpackSide(const CodedPagesArgs::Side& side, const std::byte* head,
                              int64_t num_codes, uint8_t* tiles) {
  if (side.bits == 2) UnpackTiles<kOrder, 2>(side, head, num_codes, tiles);
  if (side.bits == 3) UnpackTiles<kOrder, 3>(side, head, num_codes, tiles);
  if (side.bits == 4) UnpackTiles<kOrder, 4>(side, head, num_codes, tiles);
}

INNERQ_TARGET void UnpackScales(const std::byte* halves, int64_t count, float* scales) {
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + i * 2));
    _mm512_store_ps(scales + i, _mm512_cvtph_ps(x));
  }
}

// A row of weights as one of an A tile: eight times four low bytes, then the high ones of the same
// four, of elements 0, 16, 4, 20, 8, 24, 12 and 28 on, which is how WeightTables leaves them.
class WeightBytes {
 public:
  INNERQ_TARGET explicit WeightBytes(int high_shift) {
    const auto ones = uint64_t{0x01010101};
    const auto low_mask = static_cast<uint64_t>((1 << high_shift) - 1);
    const uint64_t to_high = (ones * static_cast<uint64_t>(high_shift)) << 32;
    shifts_ = _mm512_set1_epi64(static_cast<int64_t>(0x3020100030201000 + to_high));
    masks_ = _mm512_set1_epi64(static_cast<int64_t>((ones * 0xff) << 32 | ones * low_mask));
  }
  INNERQ_TARGET __m512i Of(__m512i weights) const {
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts_, weights), masks_);
  }

 private:
  __m512i shifts_, masks_;
};

// Products come in sets of four tiles: of keys two groups by two panels, of values four panels.
constexpr int64_t kSetTiles = 4;

// kDim: the head dimension; kGroups: the groups of keys; or both 0 for any.
template <int kDim, int kGroups>
class CodedPages {
 public:
  explicit CodedPages(const CodedPagesArgs& args)
      : args_(args),
        scratch_(*args.scratch),
        num_blocks_(CeilDiv(args.num_rows, kRowBlock)),
        num_steps_(args.num_pages * num_blocks_),
        num_buffers_(num_blocks_ > 1 ? 2 : 3) {}

  INNERQ_TARGET void Attend() const {
    BeginStep(0);
    for (int64_t r = 0; r < kRowBlock; ++r) TileTasks<Side::kKeys>(0, r);
    for (int64_t step = 0; step < num_steps_; ++step) {
      Score(step);
      if (step + 1 < num_steps_) BeginStep(step + 1);
      Weigh(step);
      if (step > 0) AddValues(step - 1);
      MultiplyValueSet(step, 0);
    }
    for (int64_t r = 0; r < kRowBlock; ++r) TileTasks<Side::kValues>(num_steps_ - 1, r);
    AddValues(num_steps_ - 1);
  }

 private:
  int64_t dim() const { return kDim > 0 ? kDim : args_.head_dim; }
  int64_t key_groups() const { return kGroups > 0 ? kGroups : dim() / args_.key.group_size; }
  int64_t key_sets() const { return CeilDiv(key_groups(), int64_t{2}); }
  int64_t value_sets() const { return CeilDiv(dim(), kTileChannels); }
  int high_shift() const { return HighShift(args_.value.bits); }

  // A step's values are added when the page of the step after the next is unpacked.
  CodedPagesScratch::Values& ValuesOf(int64_t step) const {
    return scratch_.values[step / num_blocks_ % num_buffers_];
  }
  CodedPagesScratch::Block& BlockOf(int64_t step) const { return scratch_.blocks[step % 2]; }
  int64_t RowOf(int64_t step) const { return step % num_blocks_ * kRowBlock; }

  INNERQ_TARGET void BeginStep(int64_t step) const {
    if (step % num_blocks_ == 0) Unpack(step);
    MultiplyKeySet(step, 0);
  }

  INNERQ_TARGET void Unpack(int64_t step) const {
    CodedPagesScratch::Values& values = ValuesOf(step);
    const std::byte* const* page = args_.heads + step / num_blocks_;
    const std::byte* head = *page;
    if (page + 1 < args_.heads + args_.num_pages) {
      const auto* next = reinterpret_cast<const char*>(page[1]);
      for (int64_t i = 0; i < args_.head_bytes; i += 64) __builtin_prefetch(next + i);
    }
    UnpackSide<TileOrder::kPlanes>(args_.key, head, dim() * kTokens, scratch_.keys);
    UnpackSide<TileOrder::kQuads>(args_.value, head, dim() * kTokens, values.codes);
    UnpackScales(head + args_.key.scales, key_groups() * kTokens, scratch_.key_scales);
    UnpackScales(head + args_.value.scales, dim(), values.scales);
  }

  // Tiles 0 to 3 = a set's products of queries with keys.
  INNERQ_TARGET void MultiplyKeySet(int64_t step, int64_t set) const {
    const int64_t group_blocks = args_.key.group_size / kMaxBlock;
    const int64_t stride = args_.queries.stride, panel_bytes = 2 * dim() * kPanelWidth;
    const int64_t first_block = set * 2 * group_blocks;
    const int8_t* rows = args_.queries.Row(RowOf(step)) + first_block * kTileRowBytes;
    const uint8_t* keys = scratch_.keys + first_block * 2 * kPlane;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < group_blocks; ++i, rows += kTileRowBytes, keys += 2 * kPlane) {
      _tile_loadd(4, rows, stride);
      _tile_loadd(6, keys, kTileRowBytes);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, keys + panel_bytes, kTileRowBytes);
      _tile_dpbssd(1, 4, 7);
    }
    if (set * 2 + 1 == key_groups()) return;
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < group_blocks; ++i, rows += kTileRowBytes, keys += 2 * kPlane) {
      _tile_loadd(5, rows, stride);
      _tile_loadd(6, keys, kTileRowBytes);
      _tile_dpbssd(2, 5, 6);
      _tile_loadd(7, keys + panel_bytes, kTileRowBytes);
      _tile_dpbssd(3, 5, 7);
    }
  }

  INNERQ_TARGET inline void StoreKeyTile(int64_t set, int64_t tile) const {
    const int64_t first = set * 2 * kTokens, row_dots = key_groups() * kTokens;
    if (first + tile * kPanelWidth < row_dots) {
      StoreTile(tile, scratch_.key_dots + first + tile * kPanelWidth, row_dots);
    }
  }

  // Tiles 0 to 3 = a set's products of weights with values.
  INNERQ_TARGET void MultiplyValueSet(int64_t step, int64_t set) const {
    const uint8_t* values = ValuesOf(step).codes + set * 8 * kPlane;
    _tile_loadd(4, scratch_.weights, kTileRowBytes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(6, values, kTileRowBytes);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, values + 2 * kPlane, kTileRowBytes);
    _tile_dpbssd(1, 4, 7);
    if (set * kTileChannels + 2 * kPanelWidth == dim()) return;
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(6, values + 4 * kPlane, kTileRowBytes);
    _tile_dpbssd(2, 4, 6);
    _tile_loadd(7, values + 6 * kPlane, kTileRowBytes);
    _tile_dpbssd(3, 4, 7);
  }

  INNERQ_TARGET inline void StoreValueTile(int64_t set, int64_t tile) const {
    const int64_t channel = set * kTileChannels + tile * kPanelWidth;
    if (channel < dim()) StoreTile(tile, scratch_.value_dots + channel, dim());
  }

  INNERQ_TARGET static inline void StoreTile(int64_t tile, int32_t* dots, int64_t row_dots) {
    if (tile == 0) _tile_stored(0, dots, row_dots * 4);
    if (tile == 1) _tile_stored(1, dots, row_dots * 4);
    if (tile == 2) _tile_stored(2, dots, row_dots * 4);
    if (tile == 3) _tile_stored(3, dots, row_dots * 4);
  }

  // What tiles do after row r of 16, the first set multiplied: they store it, multiply the next,
  // and so on, evenly spread.
  enum class Side { kKeys, kValues };
  template <Side kSide>
  INNERQ_TARGET inline void TileTasks(int64_t step, int64_t r) const {
    constexpr bool kKeys = kSide == Side::kKeys;
    const int64_t count = (kKeys ? key_sets() : value_sets()) * (kSetTiles + 1) - 1;
#pragma GCC unroll 2
    for (int64_t i = r * count / kRowBlock; i < (r + 1) * count / kRowBlock; ++i) {
      const int64_t set = i / (kSetTiles + 1), tile = i % (kSetTiles + 1);
      if (tile < kSetTiles) {
        kKeys ? StoreKeyTile(set, tile) : StoreValueTile(set, tile);
      } else {
        kKeys ? MultiplyKeySet(step, set + 1) : MultiplyValueSet(step, set + 1);
      }
    }
  }

  // Scores, and the largest of each row.
  INNERQ_TARGET void Score(int64_t step) const {
    const int64_t groups = key_groups();
    const int32_t* dots = scratch_.key_dots;
    const float* key_scales = scratch_.key_scales;
    float* scores = scratch_.scores;
    __m512 of_row[kRowBlock];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRowBlock; ++r, scores += kTokens) {
      __m512 score[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
#pragma GCC unroll 4
      for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 2
        for (int64_t i = 0; i < 2; ++i, dots += kPanelWidth) {
          const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots));
          const __m512 scale = _mm512_load_ps(key_scales + g * kTokens + i * kPanelWidth);
          score[i] = _mm512_fmadd_ps(dot, scale, score[i]);
        }
      }
      _mm512_store_ps(scores, score[0]);
      _mm512_store_ps(scores + kPanelWidth, score[1]);
      of_row[r] = _mm512_max_ps(score[0], score[1]);
      if (step > 0) TileTasks<Side::kValues>(step - 1, r);
    }
    const __m512 max = ReduceRows<MaxOfRow>(of_row);
    const __m512 query_scale = _mm512_loadu_ps(args_.query_scales + RowOf(step));
    const WeightTables::Steps steps = WeightTables::StepsOf(max, query_scale);
    _mm512_store_ps(scratch_.factors, steps.factor);
    _mm512_store_ps(scratch_.origins, steps.origin);
    _mm512_store_ps(scratch_.page_max, _mm512_mul_ps(max, query_scale));
  }

  // Weights relative to the largest scores, and what they do to the state.
  INNERQ_TARGET void Weigh(int64_t step) const {
    const WeightTables tables(high_shift());
    const WeightBytes weight_bytes(high_shift());
    const float* score = scratch_.scores;
    int8_t* bytes = scratch_.weights;
    __m512 of_row[kRowBlock];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRowBlock; ++r, score += kTokens, bytes += kTileRowBytes) {
      const __m512 factor = _mm512_set1_ps(scratch_.factors[r]);
      const __m512 origin = _mm512_set1_ps(scratch_.origins[r]);
      const __m512i weights = tables.Weights(_mm512_load_ps(score), factor, origin,
                                             _mm512_load_ps(score + kPanelWidth), factor, origin);
      of_row[r] = _mm512_castsi512_ps(tables.Sums(weights));
      _mm512_store_si512(bytes, weight_bytes.Of(weights));
      if (step + 1 < num_steps_) TileTasks<Side::kKeys>(step + 1, r);
    }
    alignas(64) float sums[kRowBlock];
    _mm512_store_ps(sums, _mm512_cvtepi32_ps(_mm512_castps_si512(ReduceRows<SumOfRow>(of_row))));
    AdvanceArgs advance;
    advance.page_max = scratch_.page_max;
    advance.sums = sums;
    advance.unit = 1.0f / static_cast<float>(MaxRowInteger(high_shift()));
    advance.num_rows = kRowBlock;
    advance.state = {args_.state.max + RowOf(step), args_.state.sum + RowOf(step), nullptr};
    advance.keep = BlockOf(step).keep;
    advance.add = BlockOf(step).add;
    args_.advance(advance);
  }

  INNERQ_TARGET void AddValues(int64_t step) const {
    int64_t channel = 0;
    for (; channel + kTileChannels <= dim(); channel += kTileChannels) AddColumns<4>(step, channel);
    if (channel < dim()) AddColumns<2>(step, channel);
  }

  // Adds kVectors of each row's products to its output.
  template <int kVectors>
  INNERQ_TARGET void AddColumns(int64_t step, int64_t channel) const {
    const CodedPagesScratch::Block& block = BlockOf(step);
    const int32_t* dots = scratch_.value_dots + channel;
    float* out = args_.state.out + RowOf(step) * dim() + channel;
    const __mmask16 rescaled =
        _mm512_cmp_ps_mask(_mm512_load_ps(block.keep), _mm512_set1_ps(1.0f), _CMP_NEQ_UQ);
    __m512 scale[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      scale[i] = _mm512_load_ps(ValuesOf(step).scales + channel + i * kPanelWidth);
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRowBlock; ++r, dots += dim(), out += dim()) {
      const __m512 factor = _mm512_set1_ps(block.add[r]);
      __m512 kept[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) kept[i] = _mm512_load_ps(out + i * kPanelWidth);
      if (rescaled >> r & 1) {  // seldom: most pages do not raise the largest score
        const __m512 of_old = _mm512_set1_ps(block.keep[r]);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) kept[i] = _mm512_mul_ps(of_old, kept[i]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots + i * kPanelWidth));
        const __m512 total = _mm512_fmadd_ps(dot, scale[i], _mm512_setzero_ps());
        _mm512_store_ps(out + i * kPanelWidth, _mm512_fmadd_ps(factor, total, kept[i]));
      }
    }
  }

  const CodedPagesArgs& args_;
  CodedPagesScratch& scratch_;
  const int64_t num_blocks_, num_steps_;
  const int64_t num_buffers_;  // of values: those added may be of the page before the last one
};

}  // namespace

void AttendCodedPagesAmx(const CodedPagesArgs& args) {
  const int64_t dim = args.head_dim, groups = dim / args.key.group_size;
  if (dim == 64 && groups == 2) return CodedPages<64, 2>(args).Attend();
  if (dim == 128 && groups == 4) return CodedPages<128, 4>(args).Attend();
  CodedPages<0, 0>(args).Attend();
}

}  // namespace innerq

#endif  // __x86_64__
