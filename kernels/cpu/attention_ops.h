// AttentionOps: the inner functions of CpuAttention for one instruction set, chosen once.
//
// They work on one head of one page at a time and on the rows that share it. R rows (a row is one
// query head of one token), T tokens of the page, D head dimension, Dp = D rounded up to 16, N
// values of a group. Outer is the axis of a page whose elements are lanes: tokens for keys,
// channels for values; inner is the axis a product reduces.
//
// Every function computes a row from that row and the page alone, by one sequence of float
// operations, however many rows it is given. Products of codes are integers, hence exact, so any
// implementation may be mixed with any other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>

#include "kernels/cpu/cpu_isa.h"
#include "kernels/paged_kv.h"

namespace innerq {

constexpr int64_t kTileRows = 128;       // most rows R that share a page
constexpr int64_t kCachedTileRows = 64;  // where one operation after the other passes over them
constexpr int64_t kRowBlock = 16;        // rows that a product with codes takes together
constexpr int64_t kMaxPageTokens = 128;  // largest T
constexpr int64_t kMaxInner = 256;       // largest D or T

// Products with codes take rows as integers of two signed bytes, x = low + (high << HighShift).
// A code of up to 4 bits times 2^HighShift still fits a byte, so both bytes of x can go into one
// sum of byte products: low * code + high * (code << HighShift). That leaves 14, 13 and 12 bits of
// x for codes of 2, 3 and 4 bits, finer than F16's 11 relative to the largest of a row. Codes of 8
// bits take two sums and 15 bits.
constexpr int HighShift(int code_bits) { return code_bits <= 4 ? 8 - code_bits : 7; }
constexpr int32_t MaxRowInteger(int high_shift) { return 127 << high_shift; }

// Elements of a row whose low bytes, then high bytes, lie together: a divisor of every group.
constexpr int64_t kMaxBlock = 32;
constexpr int64_t BlockOf(int64_t group_size) { return std::gcd(group_size, kMaxBlock); }

// Rows of such integers, each [inner/block][low, high][block].
struct IntegerRows {
  int8_t* data = nullptr;
  int64_t stride = 0;  // bytes from row to row, a multiple of 64
  int64_t block = kMaxBlock;
  int high_shift = 0;

  static constexpr int64_t Stride(int64_t inner) { return 2 * RoundUp(inner, kMaxBlock); }
  int8_t* Row(int64_t row) const { return data + row * stride; }
};

// scores[r][t] = q[r] . k[t].
struct HalfScoresArgs {
  const uint16_t* keys = nullptr;  // [T/16][D][16] F16
  int64_t num_tokens = 0;          // T, a multiple of 32
  int64_t head_dim = 0;            // D, even
  const float* q = nullptr;        // [R][Dp]
  int64_t num_rows = 0;            // R
  float* scores = nullptr;         // [R][T]
};

// out[r] = keep[r] * out[r] + add[r] * sum over t < num_tokens of p[r][t] * v[t].
struct HalfValuesArgs {
  const uint16_t* values = nullptr;  // [T][Dp] F16
  int64_t num_tokens = 0;            // those to read, <= T
  int64_t padded_dim = 0;            // Dp
  const float* p = nullptr;          // [R][p_stride]
  int64_t p_stride = 0;
  int64_t num_rows = 0;         // R
  const float* keep = nullptr;  // [R]
  const float* add = nullptr;   // [R]
  float* out = nullptr;         // [R][Dp]
};

// rows[r] = round(y / scale) with y = x[r] * factors and scale = max|y| / MaxRowInteger.
struct QuantizeArgs {
  const float* x = nullptr;  // [R][stride], zero from n to stride
  int64_t stride = 0;        // a multiple of 16
  int64_t num_rows = 0;      // R
  int64_t n = 0;
  const float* factors = nullptr;  // [n], readable (and finite) up to stride; null: all one
  const float* zeros = nullptr;    // likewise; null: no constants
  int64_t group_size = 0;          // N
  IntegerRows rows;                // [R][n]
  float* scales = nullptr;         // [R]
  int32_t* sums = nullptr;         // [R][n/N] sums of the integers of a group
  float* constants = nullptr;      // [R] sum of x[r] * zeros; written if zeros is set
};

// The codes of a bit string for DotArgs, whose `dot` alone knows their layout: in `codes`, or where
// they are packed. May read 64 bytes beyond the string.
struct UnpackArgs {
  const uint8_t* packed = nullptr;  // [outer/16][inner/4][16 outer][4 inner] codes of `bits`
  int bits = 0;
  int64_t inner = 0;         // extent of the inner axis
  int64_t outer = 0;         // a multiple of 16
  int64_t group_size = 0;    // N, divides inner, a multiple of 8
  int32_t offset = 0;        // the code that stands for zero where zeros are implied, else 0
  int64_t num_rows = 0;      // R of the products to come
  uint8_t* codes = nullptr;  // memory for [kCodeBytes * outer * inner], readable for a panel more

  static constexpr int64_t kCodeBytes = 3;  // that `codes` has for each
};

// dots[r - row_begin][g][o] = sum over i in group g of (codes(o, i) - offset) * rows[r][i], for
// outer elements o of the panels and rows r of the range. May write garbage to the rows of dots up
// to the next multiple of kRowBlock.
struct DotArgs {
  UnpackArgs side;                         // as the codes were unpacked
  const uint8_t* codes = nullptr;          // where that left them
  int64_t panel_begin = 0, panel_end = 0;  // of [outer/16]
  IntegerRows rows;                        // [R][inner]
  const int32_t* sums = nullptr;           // [R][inner/N] sums of the integers of a group
  int64_t row_begin = 0, row_end = 0;      // row_begin is a multiple of kRowBlock
  int32_t* dots = nullptr;                 // [R][inner/N][outer]

  int64_t groups() const { return side.inner / side.group_size; }
  int64_t row_dots() const { return groups() * side.outer; }
  int32_t* Dots(int64_t row, int64_t group, int64_t panel) const {
    return dots + (row - row_begin) * row_dots() + group * side.outer + panel * kPanelWidth;
  }
};

// What DotArgs says of the sums of some rows and panels, read once: the compiler takes any store
// for one to `args`.
struct DotOutputs {
  int32_t* dots;
  const int32_t* sums;
  int64_t groups, row_dots, outer;
  int32_t offset;

  DotOutputs(const DotArgs& args, int64_t row, int64_t panel)
      : dots(args.Dots(row, 0, panel)),
        sums(args.sums + row * args.groups()),
        groups(args.groups()),
        row_dots(args.row_dots()),
        outer(args.side.outer),
        offset(args.side.offset) {}

  // Where the sums of a group begin: less what the code that stands for zero adds.
  int32_t Start(int64_t r, int64_t group) const { return -offset * sums[r * groups + group]; }
  int32_t* Dots(int64_t r, int64_t group, int64_t p) const {
    return dots + r * row_dots + group * outer + p * kPanelWidth;
  }
};

// total[r] = sum over g of scales[g] * dots[r][g] + zeros[g] * sums[r][g]; out[r] = total[r] or,
// with `add`, keep[r] * out[r] + add[r] * total[r].
struct InnerScaleArgs {
  const int32_t* dots = nullptr;  // [R][groups][outer]
  const int32_t* sums = nullptr;  // [R][groups]; read if there are zeros
  int64_t groups = 0;
  int64_t outer = 0;              // a multiple of 16
  const float* scales = nullptr;  // [groups][outer]
  const float* zeros = nullptr;   // likewise, or null
  int64_t num_rows = 0;           // R
  const float* keep = nullptr;    // [R], with `add`
  const float* add = nullptr;     // [R], or null
  float* out = nullptr;           // [R][outer]
};

// For outer elements [begin, end) alone, which share the group's folded scale:
// out[r] = keep[r] * out[r] + add[r] * (scales[r] * dots[r] + constants[r]).
struct OuterScaleArgs {
  const int32_t* dots = nullptr;  // [R][outer]
  int64_t outer = 0;
  int64_t begin = 0, end = 0;        // multiples of 8
  const float* scales = nullptr;     // [R]
  const float* constants = nullptr;  // [R], or null
  int64_t num_rows = 0;              // R
  const float* keep = nullptr;       // [R]; null: out is overwritten
  const float* add = nullptr;        // [R]; null: one
  float* out = nullptr;              // [R][outer]
};

// A partial attention over some pages, before the division: out = sum p * v, sum = sum p with
// p = 2^(score - max). The empty state is max = -infinity, sum = 0, out = 0.
struct AttentionState {
  float* max = nullptr;  // [kTileRows]
  float* sum = nullptr;  // [kTileRows]
  float* out = nullptr;  // [R][Dp]
};

// Turns a page's scores into weights p = 2^(score - page maximum), 0 beyond `visible`, adds them to
// the state's sum, and says how to add the page's output:
// out = keep * out + add * sum p v.
struct SoftmaxArgs {
  float* scores = nullptr;           // [R][T] in units of `scales`; SoftmaxToFloat writes p here
  const float* scales = nullptr;     // [R], not negative; null: one
  int64_t num_tokens = 0;            // T
  const int32_t* visible = nullptr;  // [R] tokens that a row sees, at least 1; null: all
  int64_t num_rows = 0;              // R
  AttentionState state;
  float* keep = nullptr;   // [kTileRows]
  float* add = nullptr;    // [kTileRows]
  IntegerRows rows;        // SoftmaxToIntegers: p in units of 1 / MaxRowInteger (as is `add`)
  int64_t group_size = 0;  // likewise: N
  // Likewise: [R][T/N] sums of the integers of a group, writable up to the next multiple of 16.
  int32_t* sums = nullptr;
};

// Moves the state to the maximum over its pages and this one, adds the page's weights to the
// state's sum, and says how to add its output, as SoftmaxArgs does.
struct AdvanceArgs {
  const float* page_max = nullptr;  // [R]
  const float* sums = nullptr;      // [R] sums of the page's weights, in units of `unit`
  float unit = 1;
  int64_t num_rows = 0;  // R, a multiple of 16
  AttentionState state;
  float* keep = nullptr;  // [R]
  float* add = nullptr;   // [R]
};

// Scratch memory of attention to CodedPagesArgs: codes, queries and weights in the order of the
// kernel at hand.
struct alignas(64) CodedPagesScratch {
  static constexpr int64_t kTokens = 32;
  static constexpr int64_t kCodes = kMaxInner * kTokens;
  struct alignas(64) Values {
    uint8_t codes[2 * kCodes];
    float scales[kMaxInner];  // [D]
  };
  struct alignas(64) Block {
    float keep[kRowBlock];
    float add[kRowBlock];
  };
  uint8_t keys[2 * kCodes];
  Values values[3];
  Block blocks[2];
  float factors[kRowBlock];  // of scores, as WeightTables takes them
  float origins[kRowBlock];  // likewise
  float page_max[kRowBlock];
  float scores[kRowBlock * kTokens];
  int8_t weights[kRowBlock * 2 * kTokens];
  // Of AttendCodedPagesVnni alone: the starts are where sums of products with codes begin.
  int8_t queries[2 * kTileRows * kMaxInner];
  float query_sums[kTileRows * kMaxInner / kMaxBlock];  // of the groups of queries
  int32_t key_starts[kTileRows * kMaxInner / kMaxBlock];
  int32_t value_starts[kRowBlock];
  float weight_sums[kRowBlock];
  // Of AttendCodedPagesAmx alone.
  float key_scales[kMaxInner / kMaxBlock * kTokens];  // [D/N][32]
  int32_t key_dots[kRowBlock * kMaxInner];            // [16][D/N][32]
  int32_t value_dots[kRowBlock * kMaxInner];          // [16][D]
};

// The whole attention to pages of 32 tokens, both sides of which are codes in inner groups of a
// multiple of 32. May write garbage to the rows of the state up to the next multiple of kRowBlock.
struct CodedPagesArgs {
  static constexpr int64_t kTokens = CodedPagesScratch::kTokens;
  struct Side {
    // Offsets of codes, as in UnpackArgs, and of F16 [groups][outer].
    int64_t codes = 0, scales = 0, zeros = 0;
    int bits = 0;
    int64_t group_size = 0;  // N
    int32_t offset = 0;      // as in UnpackArgs
    bool has_zeros = false;
  };
  const std::byte* const* heads = nullptr;  // of `num_pages` pages, in order
  int64_t head_bytes = 0;
  int64_t num_pages = 0;  // at least 1
  Side key, value;
  int64_t head_dim = 0;  // D, a multiple of 32
  int64_t num_rows = 0;  // R
  IntegerRows queries;   // [R][D]
  const float* query_scales = nullptr;
  const int32_t* query_sums = nullptr;  // [R][D/N] sums of the integers of a group
  AttentionState state;
  CodedPagesScratch* scratch = nullptr;
  void (*advance)(const AdvanceArgs& args) = nullptr;
};

struct AttentionOps {
  void (*half_to_float)(const uint16_t* x, int64_t n, float* out);
  void (*float_to_half)(const float* x, int64_t n, uint16_t* out);
  // Rotates one head of a token: channel d by angle d with channel d + D/2. out must not be x.
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t head_dim, float* out);
  void (*half_scores)(const HalfScoresArgs& args);
  void (*half_values)(const HalfValuesArgs& args);
  void (*quantize)(const QuantizeArgs& args);
  // A thread calls these around its calls of unpack, dot and attend_... for so many rows.
  void (*begin)(int64_t num_rows);
  void (*end)(int64_t num_rows);
  const uint8_t* (*unpack)(const UnpackArgs& args);
  void (*dot)(const DotArgs& args);
  void (*scale_inner)(const InnerScaleArgs& args);
  void (*scale_outer)(const OuterScaleArgs& args);
  void (*softmax_to_float)(const SoftmaxArgs& args);
  void (*softmax_to_integers)(const SoftmaxArgs& args);
  void (*advance)(const AdvanceArgs& args);
  // The attention to pages as the functions above give it, in one pass; any may be null.
  void (*attend_coded_pages_few)(const CodedPagesArgs& args);   // fewer rows than kRowBlock
  void (*attend_coded_pages_many)(const CodedPagesArgs& args);  // kRowBlock rows or more
  // Likewise where both sides have codes of up to 4 bits and no zeros.
  void (*attend_small_coded_pages_many)(const CodedPagesArgs& args);
  // into = the attention over the pages of `into` and of `from`, in this order.
  void (*merge)(const AttentionState& from, int64_t num_rows, int64_t padded_dim,
                const AttentionState& into);
};

// The functions for one instruction set that this machine supports.
AttentionOps AttentionOpsFor(CpuIsa isa);

// Overlays for the integer products: those with AMX tiles need enough rows, else they are VNNI's.
const uint8_t* UnpackVnni(const UnpackArgs& args);
void BeginAmx(int64_t num_rows);
void EndAmx(int64_t num_rows);
const uint8_t* UnpackAmx(const UnpackArgs& args);
void DotVnni(const DotArgs& args);
void AttendCodedPagesVnni(const CodedPagesArgs& args);
void DotAmx(const DotArgs& args);
void AttendCodedPagesAmx(const CodedPagesArgs& args);  // kRowBlock rows or more, small codes

}  // namespace innerq
