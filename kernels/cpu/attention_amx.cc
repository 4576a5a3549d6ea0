// The integer products of codes with AMX tiles.
//
// Codes are unpacked less the code that stands for zero where zeros are implied, and those of up to
// 4 bits a second time, shifted as the high bytes of rows are worth. So a block of a panel, [plain,
// shifted][8][16 outer][4 inner], is a B tile as it lies, a block of 16 IntegerRows, [16][low,
// high][32], is an A tile, and one tile of sums takes both bytes. Codes of 8 bits, which cannot be
// shifted, lie between planes of zeros.
#include "kernels/cpu/amx_tiles.h"
#include "kernels/cpu/attention_ops.h"

#if defined(__x86_64__)
// g++ 12 takes the undefined operands inside its AVX-512 intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>

#define INNERQ_TARGET __attribute__((target("avx512f,avx512bw,amx-tile,amx-int8")))

namespace innerq {
namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kPlaneBytes = kMaxBlock * kPanelWidth;  // a block of a panel
constexpr int64_t kPlanes = 2, kWidePlanes = 3;           // of an unpacked block
// With fewer rows VNNI is quicker: tiles are half empty.
constexpr int64_t kMinRows = kRowBlock;

bool UsesTiles(const UnpackArgs& side) {
  return side.num_rows >= kMinRows && side.group_size % kMaxBlock == 0;
}

constexpr TileConfig MakeTileConfig() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = kTileRowBytes;
    config.rows[tile] = 16;
  }
  return config;
}
constexpr TileConfig kConfig = MakeTileConfig();

// Tiles 0 to 3 += tile 4 or 5 times tile 6 or 7, of signed codes or of plain ones. (The intrinsics
// are macros that take nothing but literal tiles.)
template <bool kSigned>
INNERQ_TARGET inline void Multiply46() {
  if constexpr (kSigned) {
    _tile_dpbssd(0, 4, 6);
  } else {
    _tile_dpbsud(0, 4, 6);
  }
}
template <bool kSigned>
INNERQ_TARGET inline void Multiply47() {
  if constexpr (kSigned) {
    _tile_dpbssd(1, 4, 7);
  } else {
    _tile_dpbsud(1, 4, 7);
  }
}
template <bool kSigned>
INNERQ_TARGET inline void Multiply56() {
  if constexpr (kSigned) {
    _tile_dpbssd(2, 5, 6);
  } else {
    _tile_dpbsud(2, 5, 6);
  }
}
template <bool kSigned>
INNERQ_TARGET inline void Multiply57() {
  if constexpr (kSigned) {
    _tile_dpbssd(3, 5, 7);
  } else {
    _tile_dpbsud(3, 5, 7);
  }
}

// One group of a pair of panels. Where panels are odd in number, the last pair's second one is
// garbage that is not stored.
struct GroupProduct {
  const DotArgs& args;
  int64_t panel, group;
  int64_t panel_bytes, num_blocks;  // of unpacked codes; of the group
  bool two_panels;

  GroupProduct(const DotArgs& dot_args, int64_t first_panel, int64_t which_group, int64_t planes)
      : args(dot_args),
        panel(first_panel),
        group(which_group),
        panel_bytes(planes * args.side.inner * kPanelWidth),
        num_blocks(args.side.group_size / kMaxBlock),
        two_panels(panel + 1 < args.panel_end) {}

  const uint8_t* Codes(int64_t block, int64_t planes) const {
    return args.codes + panel * panel_bytes + (group * num_blocks + block) * planes * kPlaneBytes;
  }
  const int8_t* Rows(int64_t row, int64_t block) const {
    return args.rows.Row(row) + (group * num_blocks + block) * kTileRowBytes;
  }
};

// Codes of up to 4 bits: two blocks of rows at a time, by both panels.
template <bool kSigned>
INNERQ_TARGET void MultiplyGroup(const GroupProduct& product) {
  const DotArgs& args = product.args;
  const int64_t stride = args.rows.stride, dots_stride = args.row_dots() * 4;
  const auto load_codes = [&product](int64_t block) INNERQ_TARGET {
    const uint8_t* codes = product.Codes(block, kPlanes);
    _tile_loadd(6, codes, kTileRowBytes);
    _tile_loadd(7, codes + product.panel_bytes, kTileRowBytes);
  };
  if (product.num_blocks == 1) load_codes(0);
  for (int64_t row = args.row_begin; row < args.row_end; row += 2 * kRowBlock) {
    const bool two_blocks = row + kRowBlock < args.row_end;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t block = 0; block < product.num_blocks; ++block) {
      if (product.num_blocks > 1) load_codes(block);
      const int8_t* rows = product.Rows(row, block);
      _tile_loadd(4, rows, stride);
      Multiply46<kSigned>();
      Multiply47<kSigned>();
      if (two_blocks) {
        _tile_loadd(5, rows + kRowBlock * stride, stride);
        Multiply56<kSigned>();
        Multiply57<kSigned>();
      }
    }
    int32_t* dots = args.Dots(row, product.group, product.panel);
    _tile_stored(0, dots, dots_stride);
    if (product.two_panels) _tile_stored(1, dots + kPanelWidth, dots_stride);
    if (!two_blocks) break;
    dots += kRowBlock * args.row_dots();
    _tile_stored(2, dots, dots_stride);
    if (product.two_panels) _tile_stored(3, dots + kPanelWidth, dots_stride);
  }
}

// Codes of 8 bits: a block of rows at a time, by both panels. Between planes of zeros the codes
// meet either the low bytes of rows or the high ones.
template <bool kSigned>
INNERQ_TARGET void MultiplyWideGroup(const GroupProduct& product) {
  const DotArgs& args = product.args;
  for (int64_t row = args.row_begin; row < args.row_end; row += kRowBlock) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t block = 0; block < product.num_blocks; ++block) {
      const uint8_t* codes = product.Codes(block, kWidePlanes);
      const int8_t* rows = product.Rows(row, block);
      _tile_loadd(4, rows, args.rows.stride);
      _tile_loadd(5, rows, args.rows.stride);
      _tile_loadd(6, codes + kPlaneBytes, kTileRowBytes);
      _tile_loadd(7, codes + product.panel_bytes + kPlaneBytes, kTileRowBytes);
      Multiply46<kSigned>();
      Multiply47<kSigned>();
      _tile_loadd(6, codes, kTileRowBytes);
      _tile_loadd(7, codes + product.panel_bytes, kTileRowBytes);
      Multiply56<kSigned>();
      Multiply57<kSigned>();
    }
    alignas(64) int32_t sums[2][2][kTileBytes / 4];  // [low, high][panel]
    _tile_stored(0, sums[0][0], kTileRowBytes);
    _tile_stored(1, sums[0][1], kTileRowBytes);
    _tile_stored(2, sums[1][0], kTileRowBytes);
    _tile_stored(3, sums[1][1], kTileRowBytes);
    const int64_t num_rows = std::min(kRowBlock, args.row_end - row);
    for (int64_t p = 0; p < (product.two_panels ? 2 : 1); ++p) {
      for (int64_t r = 0; r < num_rows; ++r) {
        const __m512i low = _mm512_load_si512(sums[0][p] + r * kPanelWidth);
        const __m512i high = _mm512_load_si512(sums[1][p] + r * kPanelWidth);
        _mm512_storeu_si512(args.Dots(row + r, product.group, product.panel + p),
                            _mm512_add_epi32(_mm512_slli_epi32(high, HighShift(8)), low));
      }
    }
  }
}

template <bool kSigned>
void DotAll(const DotArgs& args) {
  const bool wide = args.side.bits > 4;
  for (int64_t panel = args.panel_begin; panel < args.panel_end; panel += 2) {
    for (int64_t group = 0; group < args.groups(); ++group) {
      const GroupProduct product(args, panel, group, wide ? kWidePlanes : kPlanes);
      wide ? MultiplyWideGroup<kSigned>(product) : MultiplyGroup<kSigned>(product);
    }
  }
}

// Codes of up to 4 bits less the offset, [outer/16][inner/32][plain, shifted][8][16 outer][4
// inner].
INNERQ_TARGET void UnpackPlanes(const UnpackArgs& args) {
  const int64_t num_codes = args.outer * args.inner;
  UnpackArgs plain = args;  // behind those to come
  plain.codes = args.codes + kPlanes * num_codes;
  UnpackVnni(plain);
  const int high_shift = HighShift(args.bits);
  const __m128i shift = _mm_cvtsi32_si128(high_shift);
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(args.offset));
  const __m512i shifted_offset = _mm512_set1_epi8(static_cast<char>(args.offset << high_shift));
  uint8_t* codes = args.codes;
  for (int64_t at = 0; at < num_codes; at += kPlaneBytes, codes += kPlanes * kPlaneBytes) {
    for (int64_t i = 0; i < kPlaneBytes; i += 64) {
      const __m512i code = _mm512_load_si512(plain.codes + at + i);
      const __m512i shifted = _mm512_sll_epi16(code, shift);  // every code stays in its byte
      _mm512_store_si512(codes + i, _mm512_sub_epi8(code, offset));
      _mm512_store_si512(codes + kPlaneBytes + i, _mm512_sub_epi8(shifted, shifted_offset));
    }
  }
}

// Codes of 8 bits less the offset, [outer/16][inner/32][zeros, codes, zeros][8][16 outer][4 inner].
INNERQ_TARGET void UnpackWide(const UnpackArgs& args) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(args.offset));
  uint8_t* codes = args.codes;
  for (int64_t at = 0; at < args.outer * args.inner; at += kPlaneBytes) {
    for (int64_t i = 0; i < kPlaneBytes; i += 64) {
      const __m512i code = _mm512_loadu_si512(args.packed + at + i);
      _mm512_store_si512(codes + i, zero);
      _mm512_store_si512(codes + kPlaneBytes + i, _mm512_sub_epi8(code, offset));
      _mm512_store_si512(codes + 2 * kPlaneBytes + i, zero);
    }
    codes += kWidePlanes * kPlaneBytes;
  }
}

}  // namespace

INNERQ_TARGET void BeginAmx(int64_t num_rows) {
  if (num_rows >= kMinRows) _tile_loadconfig(&kConfig);
}

INNERQ_TARGET void EndAmx(int64_t num_rows) {
  if (num_rows >= kMinRows) _tile_release();
}

const uint8_t* UnpackAmx(const UnpackArgs& args) {
  if (!UsesTiles(args)) return UnpackVnni(args);
  args.bits > 4 ? UnpackWide(args) : UnpackPlanes(args);
  return args.codes;
}

void DotAmx(const DotArgs& args) {
  if (!UsesTiles(args.side)) return DotVnni(args);
  args.side.offset != 0 ? DotAll<true>(args) : DotAll<false>(args);
}

}  // namespace innerq

#endif  // __x86_64__
