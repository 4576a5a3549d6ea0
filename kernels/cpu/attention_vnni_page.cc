// Attention to pages of codes with AVX-512 VNNI: scores, weights and values in one pass, so that
// products with codes never leave registers. Products are what such a pass takes: the rest (for few
// rows also unpacking) runs beside them. A row's float operations are those of AttentionOps' single
// functions, in their order.
#include "kernels/cpu/attention_ops.h"

#if defined(__x86_64__)
// g++ 12 takes the undefined operands inside its AVX-512 intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <algorithm>

#include "kernels/cpu/attention_avx512.h"
#include "kernels/cpu/attention_weights.h"
#include "kernels/cpu/vnni_dot.h"

#define INNERQ_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")))

namespace innerq {
namespace {

constexpr int64_t kTokens = CodedPagesArgs::kTokens;
constexpr int64_t kBlockVectors = kMaxBlock / 4;  // of codes of a block of a panel
constexpr int64_t kRowBytes = 2 * kMaxBlock;      // of a block of a row
constexpr int64_t kCacheLine = 64;
constexpr int kQuadRows = 4;  // rows that take a vector of codes one after the other

INNERQ_TARGET inline __m512 LoadHalves(const std::byte* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}

// Sums of products of some rows with two panels, those of low and of high bytes apart.
template <int kRows>
class Products {
 public:
  // starts[r]: where the sums of a row begin.
  INNERQ_TARGET explicit Products(const int32_t* starts) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      low_[r][0] = low_[r][1] = _mm512_set1_epi32(starts[r]);
      high_[r][0] = high_[r][1] = _mm512_setzero_si512();
    }
  }
  // Adds rows [kRows][low, high][kMaxBlock] times codes, of two panels so many vectors apart.
  template <class Codes>
  INNERQ_TARGET void Add(const Codes& codes, const uint8_t* at, int64_t panel_vectors,
                         const int8_t* rows) {
    const uint8_t* next = at + panel_vectors * codes.kBytes;
#pragma GCC unroll 8
    for (int64_t i = 0; i < kMaxBlock / 4; ++i) {
      const __m512i code[2] = {codes.Load(at + i * codes.kBytes),
                               codes.Load(next + i * codes.kBytes)};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) {
          AddDot(low_[r][p], code[p], rows + r * kRowBytes + i * 4);
          AddDot(high_[r][p], code[p], rows + r * kRowBytes + kMaxBlock + i * 4);
        }
      }
    }
  }
  INNERQ_TARGET __m512 Total(int r, int p, __m128i high_shift) const {
    return _mm512_cvtepi32_ps(
        _mm512_add_epi32(_mm512_sll_epi32(high_[r][p], high_shift), low_[r][p]));
  }

 private:
  __m512i low_[kRows][2], high_[kRows][2];
};

// KeyCodes and ValueCodes: how codes of a page are read.
template <class KeyCodes, class ValueCodes>
class CodedPages {
 public:
  explicit CodedPages(const CodedPagesArgs& args)
      : args_(args),
        scratch_(*args.scratch),
        dim_(args.head_dim),
        groups_(args.head_dim / args.key.group_size),
        key_shift_(HighShift(args.key.bits)),
        value_shift_(HighShift(args.value.bits)),
        prefetch_step_(
            RoundUp(args.head_bytes / (groups_ + dim_ / (2 * kPanelWidth)) + 1, kCacheLine)) {}

  INNERQ_TARGET void Attend() {
    ArrangeQueries();
    for (int64_t page = 0; page < args_.num_pages; ++page) {
      head_ = args_.heads[page];
      prefetch_left_ = 0;
      if (page + 1 < args_.num_pages) {
        prefetch_at_ = args_.heads[page + 1];
        prefetch_left_ = args_.head_bytes;
      }
      keys_ = CodesOf(args_.key, dim_, kTokens, scratch_.keys);
      values_ = CodesOf(args_.value, kTokens, dim_, scratch_.values[0].codes);
      for (int64_t row = 0; row < args_.num_rows; row += kRowBlock) {
        const int64_t num_rows = std::min(args_.num_rows - row, kRowBlock);
        for (int64_t r = 0; r < num_rows; r += kQuadRows) {
          if (num_rows - r == 1) Score<1>(row, r);
          if (num_rows - r == 2) Score<2>(row, r);
          if (num_rows - r > 2) Score<4>(row, r);
        }
        Weigh(row, num_rows);
        for (int64_t r = 0; r < num_rows; r += kQuadRows) {
          if (num_rows - r == 1) AddValues<1>(row, r);
          if (num_rows - r == 2) AddValues<2>(row, r);
          if (num_rows - r > 2) AddValues<4>(row, r);
        }
      }
    }
  }

 private:
  // Queries as [R/4][D/32][4][low, high][32], what belongs to their groups as [R/4][D/N][4].
  INNERQ_TARGET void ArrangeQueries() {
    const int64_t blocks = dim_ / kMaxBlock;
    for (int64_t r = 0; r < args_.num_rows; ++r) {
      const int64_t row = r / kQuadRows * kQuadRows, of_quad = r % kQuadRows;
      int8_t* to = scratch_.queries + (row * blocks + of_quad) * kRowBytes;
      for (int64_t b = 0; b < blocks; ++b) {
        std::copy_n(args_.queries.Row(r) + b * kRowBytes, kRowBytes,
                    to + b * kQuadRows * kRowBytes);
      }
      for (int64_t g = 0; g < groups_; ++g) {
        const int32_t sum = args_.query_sums[r * groups_ + g];
        const int64_t at = row * groups_ + g * kQuadRows + of_quad;
        scratch_.key_starts[at] = -args_.key.offset * sum;
        scratch_.query_sums[at] = static_cast<float>(sum);
      }
    }
  }

  // The codes of a side of the page, for many rows unpacked to `codes`.
  INNERQ_TARGET const uint8_t* CodesOf(const CodedPagesArgs::Side& side, int64_t inner,
                                       int64_t outer, uint8_t* codes) const {
    UnpackArgs unpack;
    unpack.packed = reinterpret_cast<const uint8_t*>(head_ + side.codes);
    if (args_.num_rows <= kQuadRows) return unpack.packed;
    unpack.bits = side.bits;
    unpack.inner = inner;
    unpack.outer = outer;
    unpack.codes = codes;
    return UnpackVnni(unpack);
  }

  INNERQ_TARGET void PrefetchMore() {
    const int64_t bytes = std::min(prefetch_step_, prefetch_left_);
    for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(prefetch_at_ + i);
    prefetch_at_ += bytes;
    prefetch_left_ -= bytes;
  }

  // The scores of kRows rows, row + r0 and on.
  template <int kRows>
  INNERQ_TARGET void Score(int64_t row, int64_t r0) {
    const KeyCodes codes;
    const __m128i high_shift = _mm_cvtsi32_si128(key_shift_);
    const int64_t blocks = dim_ / kMaxBlock, group_blocks = args_.key.group_size / kMaxBlock;
    const uint8_t* keys = keys_;
    const int8_t* rows = scratch_.queries + (row + r0) * blocks * kRowBytes;
    const int64_t first_group = (row + r0) * groups_;
    const int32_t* starts = scratch_.key_starts + first_group;
    const float* sums = scratch_.query_sums + first_group;
    const std::byte* scales = head_ + args_.key.scales;
    const std::byte* zeros = head_ + args_.key.zeros;
    float* scores = scratch_.scores + r0 * kTokens;
    __m512 score[kRows][2];
#pragma GCC unroll 4
    for (auto& of_row : score) of_row[0] = of_row[1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups_; ++g) {
      Products<kRows> products(starts);
      for (int64_t i = 0; i < group_blocks; ++i) {
        products.Add(codes, keys, blocks * kBlockVectors, rows);
        keys += kBlockVectors * codes.kBytes;
        rows += kQuadRows * kRowBytes;
      }
      PrefetchMore();
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        const __m512 scale = LoadHalves(scales + 2 * p * kPanelWidth);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          score[r][p] = _mm512_fmadd_ps(products.Total(r, p, high_shift), scale, score[r][p]);
        }
        if (!args_.key.has_zeros) continue;
        const __m512 zero = LoadHalves(zeros + 2 * p * kPanelWidth);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          score[r][p] = _mm512_fmadd_ps(_mm512_set1_ps(sums[r]), zero, score[r][p]);
        }
      }
      starts += kQuadRows;
      sums += kQuadRows;
      scales += 2 * kTokens;
      zeros += 2 * kTokens;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r, scores += kTokens) {
      _mm512_store_ps(scores, score[r][0]);
      _mm512_store_ps(scores + kPanelWidth, score[r][1]);
    }
  }

  // Weights relative to the largest scores, and what they do to the state.
  INNERQ_TARGET void Weigh(int64_t row, int64_t num_rows) {
    const int64_t extent = RoundUp(num_rows, kQuadRows);
    __m512 of_row[kRowBlock];
    for (int64_t r = 0; r < extent; ++r) {
      const float* score = scratch_.scores + r * kTokens;
      of_row[r] = _mm512_max_ps(_mm512_load_ps(score), _mm512_load_ps(score + kPanelWidth));
    }
    const __m512 max = ReduceRows<MaxOfRow>(of_row, num_rows);
    const __m512 query_scale = _mm512_loadu_ps(args_.query_scales + row);
    const WeightTables::Steps steps = WeightTables::StepsOf(max, query_scale);
    _mm512_store_ps(scratch_.factors, steps.factor);
    _mm512_store_ps(scratch_.origins, steps.origin);
    _mm512_store_ps(scratch_.page_max, _mm512_mul_ps(max, query_scale));
    const WeightTables tables(value_shift_);
    for (int64_t r = 0; r < extent; ++r) {
      const float* score = scratch_.scores + r * kTokens;
      const __m512 factor = _mm512_set1_ps(scratch_.factors[r]);
      const __m512 origin = _mm512_set1_ps(scratch_.origins[r]);
      const __m512i weights = tables.Weights(_mm512_load_ps(score), factor, origin,
                                             _mm512_load_ps(score + kPanelWidth), factor, origin);
      of_row[r] = _mm512_castsi512_ps(tables.Sums(weights));
      _mm512_store_si512(scratch_.weights + r * kRowBytes, tables.Bytes(weights));
    }
    const __m512i sums = _mm512_castps_si512(ReduceRows<SumOfRow>(of_row, num_rows));
    _mm512_store_ps(scratch_.weight_sums, _mm512_cvtepi32_ps(sums));
    _mm512_store_si512(scratch_.value_starts,
                       _mm512_mullo_epi32(sums, _mm512_set1_epi32(-args_.value.offset)));
    AdvanceArgs advance;
    advance.page_max = scratch_.page_max;
    advance.sums = scratch_.weight_sums;
    advance.unit = 1.0f / static_cast<float>(MaxRowInteger(value_shift_));
    advance.num_rows = kRowBlock;
    advance.state = {args_.state.max + row, args_.state.sum + row, nullptr};
    advance.keep = scratch_.blocks[0].keep;
    advance.add = scratch_.blocks[0].add;
    args_.advance(advance);
  }

  // Adds the values of kRows rows, row + r0 and on, to their output.
  template <int kRows>
  INNERQ_TARGET void AddValues(int64_t row, int64_t r0) {
    const ValueCodes codes;
    const __m128i high_shift = _mm_cvtsi32_si128(value_shift_);
    const int64_t dim = dim_;
    const uint8_t* values = values_;
    const float* keep = scratch_.blocks[0].keep + r0;
    const float* add = scratch_.blocks[0].add + r0;
    const std::byte* scales = head_ + args_.value.scales;
    const std::byte* zeros = head_ + args_.value.zeros;
    float* out = args_.state.out + (row + r0) * dim;
    bool rescaled = false;  // seldom: most pages do not raise the largest score
    for (int r = 0; r < kRows; ++r) rescaled |= keep[r] != 1.0f;
    for (int64_t c = 0; c < dim; c += 2 * kPanelWidth) {
      Products<kRows> products(scratch_.value_starts + r0);
      products.Add(codes, values, kBlockVectors, scratch_.weights + r0 * kRowBytes);
      values += 2 * kBlockVectors * codes.kBytes;
      PrefetchMore();
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p, out += kPanelWidth) {
        const __m512 scale = LoadHalves(scales + 2 * (c + p * kPanelWidth));
        __m512 total[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          total[r] = _mm512_fmadd_ps(products.Total(r, p, high_shift), scale, _mm512_setzero_ps());
        }
        if (args_.value.has_zeros) {
          const __m512 zero = LoadHalves(zeros + 2 * (c + p * kPanelWidth));
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            total[r] =
                _mm512_fmadd_ps(_mm512_set1_ps(scratch_.weight_sums[r0 + r]), zero, total[r]);
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          __m512 kept = _mm512_load_ps(out + r * dim);
          if (rescaled) kept = _mm512_mul_ps(_mm512_set1_ps(keep[r]), kept);
          _mm512_store_ps(out + r * dim, _mm512_fmadd_ps(_mm512_set1_ps(add[r]), total[r], kept));
        }
      }
    }
  }

  const CodedPagesArgs& args_;
  CodedPagesScratch& scratch_;
  const int64_t dim_, groups_;
  const int key_shift_, value_shift_;
  const int64_t prefetch_step_;             // bytes to ask for at a time
  const std::byte* head_ = nullptr;         // of the page at hand
  const uint8_t* keys_ = nullptr;           // its codes
  const uint8_t* values_ = nullptr;         // likewise
  const std::byte* prefetch_at_ = nullptr;  // of the next page's bytes, those not yet asked for
  int64_t prefetch_left_ = 0;
};

template <class KeyCodes>
void AttendFewRows(const CodedPagesArgs& args) {
  if (args.value.bits == 2) CodedPages<KeyCodes, PackedCodes<2>>(args).Attend();
  if (args.value.bits == 3) CodedPages<KeyCodes, PackedCodes<3>>(args).Attend();
  if (args.value.bits == 4) CodedPages<KeyCodes, PackedCodes<4>>(args).Attend();
  if (args.value.bits == 8) CodedPages<KeyCodes, ByteCodes>(args).Attend();
}

}  // namespace

void AttendCodedPagesVnni(const CodedPagesArgs& args) {
  if (args.num_rows > kQuadRows) return CodedPages<ByteCodes, ByteCodes>(args).Attend();
  if (args.key.bits == 2) AttendFewRows<PackedCodes<2>>(args);
  if (args.key.bits == 3) AttendFewRows<PackedCodes<3>>(args);
  if (args.key.bits == 4) AttendFewRows<PackedCodes<4>>(args);
  if (args.key.bits == 8) AttendFewRows<ByteCodes>(args);
}

}  // namespace innerq

#endif  // __x86_64__
