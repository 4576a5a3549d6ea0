// Attention of many rows to pages of codes with AMX tiles: scores, weights and values in one pass.
//
// A step is a page and a block of 16 rows. Tiles take about as long as vectors do, and neither
// waits for the other: while vectors turn step s's products into weights, tiles store those of
// values of step s - 1 and multiply the keys of step s + 1, which they store while vectors add what
// step s - 1 has. A row's float operations are those of AttentionOps' single functions, in their
// order.
#include "kernels/cpu/attention_ops.h"

#if defined(__x86_64__)
// g++ 12 takes the undefined operands inside its AVX-512 intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <algorithm>

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

// Codes of `side` less its offset and, shifted as the high bytes of rows are worth, once more:
// [outer/16][inner/32][plain, shifted][8][16 outer][4 inner], each block of which is a B tile.
template <int kBits>
INNERQ_TARGET void UnpackTiles(const CodedPagesArgs::Side& side, const std::byte* head,
                               int64_t num_codes, uint8_t* tiles) {
  alignas(64) uint8_t places[64], shifts[64], codes[2][64];
  for (int i = 0; i < 64; ++i) {
    places[i] = static_cast<uint8_t>(i / 8 * kBits + (i % 8 < kBits ? i % 8 : 0));
    shifts[i] = static_cast<uint8_t>(i % 8 * kBits);
    const int code = i % (1 << kBits) - side.offset;
    codes[0][i] = static_cast<uint8_t>(code);
    codes[1][i] = static_cast<uint8_t>(code * (1 << HighShift(kBits)));
  }
  const __m512i place = _mm512_load_si512(places), shift = _mm512_load_si512(shifts);
  const __m512i plain = _mm512_load_si512(codes[0]), shifted = _mm512_load_si512(codes[1]);
  const __m512i mask = _mm512_set1_epi8((1 << kBits) - 1);
  for (int64_t i = 0; i < num_codes; i += kPlane, tiles += 2 * kPlane) {
    for (int64_t j = 0; j < kPlane; j += kQuad) {
      const __m512i bytes = _mm512_loadu_si512(head + side.codes + (i + j) / 8 * kBits);
      const __m512i lanes = _mm512_permutexvar_epi8(place, bytes);
      const __m512i code = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, lanes), mask);
      _mm512_store_si512(tiles + j, _mm512_permutexvar_epi8(code, plain));
      _mm512_store_si512(tiles + kPlane + j, _mm512_permutexvar_epi8(code, shifted));
    }
  }
}

INNERQ_TARGET void UnpackSide(const CodedPagesArgs::Side& side, const std::byte* head,
                              int64_t num_codes, uint8_t* tiles) {
  if (side.bits == 2) UnpackTiles<2>(side, head, num_codes, tiles);
  if (side.bits == 3) UnpackTiles<3>(side, head, num_codes, tiles);
  if (side.bits == 4) UnpackTiles<4>(side, head, num_codes, tiles);
}

INNERQ_TARGET void UnpackScales(const std::byte* halves, int64_t count, float* scales) {
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + i * 2));
    _mm512_store_ps(scales + i, _mm512_cvtph_ps(x));
  }
}

// op over the lanes of each of 16 vectors: Max or Sum.
struct Max {
  INNERQ_TARGET static inline __m512 Of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};
struct Sum {
  INNERQ_TARGET static inline __m512 Of(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};
template <class Op>
INNERQ_TARGET inline __m512 ReduceRows(const __m512 (&x)[16]) {
  __m512 quads[4];  // of rows 4 i to 4 i + 3 in each 128 bits
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512d pairs[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 a = x[4 * i + 2 * j], b = x[4 * i + 2 * j + 1];
      pairs[j] = _mm512_castps_pd(Op::Of(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    }
    quads[i] = Op::Of(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                      _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
  }
  __m512 halves[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = quads[2 * i], b = quads[2 * i + 1];
    halves[i] = Op::Of(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  return Op::Of(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

class CodedPages {
 public:
  explicit CodedPages(const CodedPagesArgs& args)
      : args_(args),
        scratch_(*args.scratch),
        dim_(args.head_dim),
        key_groups_(dim_ / args.key.group_size),
        num_blocks_(CeilDiv(args.num_rows, kRowBlock)),
        num_steps_(args.num_pages * num_blocks_),
        num_buffers_(num_blocks_ > 1 ? 2 : 3) {}

  INNERQ_TARGET void Attend() const {
    BeginStep(0);
    StoreKeyTiles();
    for (int64_t step = 0; step < num_steps_; ++step) {
      Weigh(step);
      if (step > 0) {
        AddValues(step - 1);
      } else if (num_steps_ > 1) {
        StoreKeyTiles();
      }
      MultiplyValues(step);
    }
    for (int64_t i = 0; i < 4; ++i) StoreValueTile(i);
    AddValues(num_steps_ - 1);
  }

 private:
  // A step's values are added when the page of the step after the next is unpacked.
  CodedPagesScratch::Values& ValuesOf(int64_t page) const {
    return scratch_.values[page % num_buffers_];
  }
  CodedPagesScratch::Block& BlockOf(int64_t step) const { return scratch_.blocks[step % 2]; }
  int64_t RowOf(int64_t step) const { return step % num_blocks_ * kRowBlock; }

  INNERQ_TARGET void BeginStep(int64_t step) const {
    if (step % num_blocks_ == 0) Unpack(step / num_blocks_);
    MultiplyKeys(step);
  }

  INNERQ_TARGET void Unpack(int64_t index) const {
    CodedPagesScratch::Values& values = ValuesOf(index);
    const std::byte* head = args_.heads[index];
    if (index + 1 < args_.num_pages) {
      const auto* next = reinterpret_cast<const char*>(args_.heads[index + 1]);
      for (int64_t i = 0; i < args_.head_bytes; i += 64) __builtin_prefetch(next + i);
    }
    UnpackSide(args_.key, head, dim_ * kTokens, scratch_.keys);
    UnpackSide(args_.value, head, dim_ * kTokens, values.tiles);
    UnpackScales(head + args_.key.scales, key_groups_ * kTokens, scratch_.key_scales);
    UnpackScales(head + args_.value.scales, dim_, values.scales);
  }

  // Products of queries with keys, two groups of channels at a time; the last ones stay in tiles.
  INNERQ_TARGET void MultiplyKeys(int64_t step) const {
    const int64_t group_blocks = args_.key.group_size / kMaxBlock;
    const int64_t stride = args_.queries.stride, panel_bytes = 2 * dim_ * kPanelWidth;
    const int8_t* rows = args_.queries.Row(RowOf(step));
    const uint8_t* keys = scratch_.keys;
    for (int64_t g = 0; g < key_groups_; g += 2) {
      if (g > 0) StoreTiles(scratch_.key_dots + (g - 2) * kTokens, KeyStride());
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t i = 0; i < group_blocks; ++i, rows += kTileRowBytes, keys += 2 * kPlane) {
        _tile_loadd(4, rows, stride);
        _tile_loadd(6, keys, kTileRowBytes);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, keys + panel_bytes, kTileRowBytes);
        _tile_dpbssd(1, 4, 7);
      }
      if (g + 1 == key_groups_) break;
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
  }

  // Tile i, in [0, 4), of the last ones, if there are so many.
  INNERQ_TARGET inline void StoreKeyTile(int64_t i) const {
    const int64_t first = (key_groups_ - 1) / 2 * 2;
    if (i < (key_groups_ - first) * 2) {
      StoreTile(i, scratch_.key_dots + first * kTokens + i * kPanelWidth, KeyStride());
    }
  }

  // Products of weights with values, 64 channels at a time; the last ones stay in tiles.
  INNERQ_TARGET void MultiplyValues(int64_t step) const {
    _tile_loadd(4, scratch_.weights, kTileRowBytes);
    const uint8_t* values = ValuesOf(step / num_blocks_).tiles;
    for (int64_t channel = 0; channel < dim_; channel += kTileChannels, values += 8 * kPlane) {
      if (channel > 0) StoreTiles(scratch_.value_dots + channel - kTileChannels, dim_);
      _tile_zero(0);
      _tile_zero(1);
      _tile_loadd(6, values, kTileRowBytes);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, values + 2 * kPlane, kTileRowBytes);
      _tile_dpbssd(1, 4, 7);
      if (channel + 2 * kPanelWidth == dim_) break;
      _tile_zero(2);
      _tile_zero(3);
      _tile_loadd(6, values + 4 * kPlane, kTileRowBytes);
      _tile_dpbssd(2, 4, 6);
      _tile_loadd(7, values + 6 * kPlane, kTileRowBytes);
      _tile_dpbssd(3, 4, 7);
    }
  }

  INNERQ_TARGET void StoreKeyTiles() const {
    for (int64_t i = 0; i < 4; ++i) StoreKeyTile(i);
  }

  INNERQ_TARGET inline void StoreValueTile(int64_t i) const {
    const int64_t first = (dim_ - 1) / kTileChannels * kTileChannels;
    const int64_t channel = first + i * kPanelWidth;
    if (channel < dim_) StoreTile(i, scratch_.value_dots + channel, dim_);
  }

  INNERQ_TARGET static inline void StoreTile(int64_t i, int32_t* dots, int64_t row_dots) {
    if (i == 0) _tile_stored(0, dots, row_dots * 4);
    if (i == 1) _tile_stored(1, dots, row_dots * 4);
    if (i == 2) _tile_stored(2, dots, row_dots * 4);
    if (i == 3) _tile_stored(3, dots, row_dots * 4);
  }
  // Four tiles, side by side.
  INNERQ_TARGET static void StoreTiles(int32_t* dots, int64_t row_dots) {
    for (int64_t i = 0; i < 4; ++i) StoreTile(i, dots + i * kPanelWidth, row_dots);
  }

  int64_t KeyStride() const { return key_groups_ * kTokens; }

  INNERQ_TARGET void Weigh(int64_t step) const {
    if (key_groups_ == 2) return Weigh<2>(step);
    if (key_groups_ == 4) return Weigh<4>(step);
    Weigh<0>(step);
  }

  // Scores, their largest, and weights relative to it. kGroups: the groups of keys, or 0 for any.
  template <int kGroups>
  INNERQ_TARGET void Weigh(int64_t step) const {
    const int64_t groups = kGroups > 0 ? kGroups : key_groups_, row_dots = groups * kTokens;
    const int32_t* dots = scratch_.key_dots;
    const float* key_scales = scratch_.key_scales;
    float* scores = scratch_.scores();  // in the place of the first group's products
    __m512 of_row[kRowBlock];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRowBlock; ++r) {
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
      _mm512_store_ps(scores + r * row_dots, score[0]);
      _mm512_store_ps(scores + r * row_dots + kPanelWidth, score[1]);
      of_row[r] = _mm512_max_ps(score[0], score[1]);
    }
    alignas(64) float largest[kRowBlock], factors[kRowBlock], page_max[kRowBlock];
    const __m512 max = ReduceRows<Max>(of_row);
    const __m512 query_scale = _mm512_loadu_ps(args_.query_scales + RowOf(step));
    _mm512_store_ps(largest, max);
    _mm512_store_ps(factors, _mm512_mul_ps(query_scale, _mm512_set1_ps(kWeightUnits)));
    _mm512_store_ps(page_max, _mm512_mul_ps(max, query_scale));
    const int high_shift = HighShift(args_.value.bits);
    const WeightTables tables(high_shift);
    int8_t* bytes = scratch_.weights;
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRowBlock; ++r) {
      const __m512 row_max = _mm512_set1_ps(largest[r]), factor = _mm512_set1_ps(factors[r]);
      const float* score = scores + r * row_dots;
      const __m512 a = _mm512_sub_ps(_mm512_load_ps(score), row_max);
      const __m512 b = _mm512_sub_ps(_mm512_load_ps(score + kPanelWidth), row_max);
      const __m512i weights = tables.Weights(a, factor, b, factor);
      of_row[r] = _mm512_castsi512_ps(tables.Sums(weights));
      _mm512_store_si512(bytes + r * kTileRowBytes, tables.Bytes(weights));
      if (step > 0 && r % 3 == 2 && r < 12) StoreValueTile(r / 3);
    }
    if (step + 1 < num_steps_) BeginStep(step + 1);  // its products may replace the scores
    alignas(64) float sums[kRowBlock];
    _mm512_store_ps(sums, _mm512_cvtepi32_ps(_mm512_castps_si512(ReduceRows<Sum>(of_row))));
    AdvanceArgs advance;
    advance.page_max = page_max;
    advance.sums = sums;
    advance.unit = 1.0f / static_cast<float>(MaxRowInteger(high_shift));
    advance.num_rows = kRowBlock;
    advance.state = {args_.state.max + RowOf(step), args_.state.sum + RowOf(step), nullptr};
    advance.keep = BlockOf(step).keep;
    advance.add = BlockOf(step).add;
    args_.advance(advance);
  }

  INNERQ_TARGET void AddValues(int64_t step) const {
    int64_t channel = 0;
    for (; channel + kTileChannels <= dim_; channel += kTileChannels) AddColumns<4>(step, channel);
    if (channel < dim_) AddColumns<2>(step, channel);
  }

  // Adds kVectors of each row's products to its output.
  template <int kVectors>
  INNERQ_TARGET void AddColumns(int64_t step, int64_t channel) const {
    const CodedPagesScratch::Block& block = BlockOf(step);
    const int64_t dim = dim_;
    const int32_t* dots = scratch_.value_dots + channel;
    float* out = args_.state.out + RowOf(step) * dim + channel;
    __m512 scale[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      scale[i] = _mm512_load_ps(ValuesOf(step / num_blocks_).scales + channel + i * kPanelWidth);
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRowBlock; ++r, dots += dim, out += dim) {
      const __m512 factor = _mm512_set1_ps(block.add[r]);
      __m512 kept[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) kept[i] = _mm512_load_ps(out + i * kPanelWidth);
      if (block.keep[r] != 1.0f) {  // seldom: most pages do not raise the largest score
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
      // The tiles of the step after the next.
      if (step + 2 < num_steps_ && channel == 0 && r >= 8 && r % 2 == 1) StoreKeyTile(r / 2 - 4);
    }
  }

  const CodedPagesArgs& args_;
  CodedPagesScratch& scratch_;
  const int64_t dim_, key_groups_, num_blocks_, num_steps_;
  const int64_t num_buffers_;  // of values: those added may be of the page before the last one
};

}  // namespace

void AttendCodedPagesAmx(const CodedPagesArgs& args) { CodedPages(args).Attend(); }

}  // namespace innerq

#endif  // __x86_64__
