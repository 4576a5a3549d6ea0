#include "kernels/cpu/attention_tile.h"

#include <algorithm>
#include <limits>

namespace innerq {
namespace {

constexpr float kLog2E = 1.44269504f;

// The code that stands for zero where zeros are implied.
int32_t CodeOffset(const QuantSpec& spec) { return spec.has_zero() ? 0 : 1 << (spec.bits - 1); }

// Rows whose products fit TileScratch::dots and, where that leaves enough rows, the L1 cache.
int64_t RowStep(const DotArgs& dot) {
  constexpr int64_t kCachedDots = 8 << 10;
  const int64_t cached = kCachedDots / dot.row_dots() / kRowBlock * kRowBlock;
  return std::clamp<int64_t>(cached, kRowBlock, kTileRows);
}

const uint16_t* Halves(const std::byte* memory) {
  return reinterpret_cast<const uint16_t*>(memory);
}

}  // namespace

void AttentionStateBuffer::Clear(int64_t num_rows, int64_t padded_dim) {
  std::fill(max, max + kTileRows, -std::numeric_limits<float>::infinity());
  std::fill(sum, sum + kTileRows, 0.0f);
  std::fill(out, out + num_rows * padded_dim, 0.0f);
}

TileAttention::TileAttention(const AttentionOps& ops, const AttentionArgs& args,
                             const AttentionTile& tile, TileScratch& scratch)
    : ops_(ops),
      args_(args),
      tile_(tile),
      scratch_(scratch),
      layer_(*args.kv.layout),
      head_rows_(args.num_heads / layer_.kv_heads),
      num_rows_(tile.num_tokens * head_rows_),
      last_page_(args.layout->PageOf(tile.first_position)),
      sealed_(args.layout->SealedPages(tile.first_position, tile.slice->exact_before)),
      padded_dim_(layer_.padded_dim()),
      attend_coded_pages_(CodedPagesFor(ops, layer_, num_rows_)),
      query_rows_{scratch.query_bytes, IntegerRows::Stride(layer_.head_dim),
                  BlockOf(layer_.key.group_size), HighShift(layer_.key.bits)},
      weight_rows_{scratch.weight_bytes, IntegerRows::Stride(layer_.page_tokens),
                   BlockOf(layer_.value.group_size), HighShift(layer_.value.bits)} {
  LoadQueries();
}

void TileAttention::LoadQueries() {
  const int64_t dim = layer_.head_dim;
  const int64_t q_stride = args_.num_heads * dim;
  const float factor = args_.scale * kLog2E;
  const bool reads_codes = sealed_.size() > 0 && layer_.key.quantized();
  const float* norm = reads_codes && layer_.normalize_keys
                          ? args_.kv.KeyNorm(tile_.slice->norm_id, tile_.kv_head)
                          : nullptr;
  for (int64_t r = 0; r < num_rows_; ++r) {
    const float* from = args_.q.As<float>() + (tile_.first_row + r / head_rows_) * q_stride +
                        (tile_.kv_head * head_rows_ + r % head_rows_) * dim;
    float* q = scratch_.q + r * padded_dim_;
    float* sealed_q = scratch_.sealed_q + r * padded_dim_;
    for (int64_t d = 0; d < dim; ++d) {
      q[d] = from[d] * factor;
      sealed_q[d] = norm != nullptr ? q[d] * norm[d] : q[d];
    }
    std::fill(q + dim, q + padded_dim_, 0.0f);
    std::fill(sealed_q + dim, sealed_q + padded_dim_, 0.0f);
    const int64_t position = tile_.first_position + r / head_rows_;
    scratch_.visible[r] = static_cast<int32_t>(position % layer_.page_tokens + 1);
  }
  if (!reads_codes || layer_.key.axis != QuantAxis::kInner) return;
  QuantizeArgs quantize;
  quantize.x = scratch_.sealed_q;
  quantize.stride = padded_dim_;
  quantize.num_rows = num_rows_;
  quantize.n = dim;
  quantize.group_size = layer_.key.group_size;
  quantize.rows = query_rows_;
  quantize.scales = scratch_.query_scales;
  quantize.sums = scratch_.query_sums;
  ops_.quantize(quantize);
}

void TileAttention::Attend(int64_t begin, int64_t end, const AttentionState& state) {
  ops_.begin(num_rows_);
  const int64_t sealed_begin = std::max(begin, sealed_.begin);
  const int64_t sealed_end = std::min(end, sealed_.end);
  for (int64_t page = begin; page < end; ++page) {
    if (attend_coded_pages_ != nullptr && page == sealed_begin && page < sealed_end) {
      AttendCodedPages(page, sealed_end, state);
      page = sealed_end - 1;
      continue;
    }
    if (page < last_page_) StartPrefetch(page + 1);
    AttendPage(page, state);
  }
  ops_.end(num_rows_);
}

// Asks for the page's bytes of this head while the one before it is worked on, a part at a time:
// the processor holds up work while more lines are on their way than it can track.
void TileAttention::StartPrefetch(int64_t page) {
  const PageRef ref = tile_.slice->pages[static_cast<size_t>(page)];
  const bool sealed = IsSealed(page);
  prefetch_at_ =
      sealed ? args_.kv.SealedHead(ref.sealed_id, tile_.kv_head)
             : reinterpret_cast<const std::byte*>(args_.kv.OpenKeys(ref.open_id, tile_.kv_head));
  prefetch_bytes_ = sealed ? layer_.sealed_head_bytes : layer_.open_head_bytes;
}

void TileAttention::PrefetchMore() {
  constexpr int64_t kCacheLine = 64;
  constexpr int64_t kPart = 8 * kCacheLine;
  const int64_t bytes = std::min(kPart, prefetch_bytes_);
  for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(prefetch_at_ + at);
  prefetch_at_ += bytes;
  prefetch_bytes_ -= bytes;
}

TileAttention::CodedSide TileAttention::Keys(const std::byte* head) const {
  return {
      layer_.key,      head + layer_.key_codes, head + layer_.key_scales, head + layer_.key_zeros,
      layer_.head_dim, layer_.page_tokens};
}

TileAttention::CodedSide TileAttention::Values(const std::byte* head) const {
  return {layer_.value,
          head + layer_.value_codes,
          head + layer_.value_scales,
          head + layer_.value_zeros,
          layer_.page_tokens,
          layer_.head_dim};
}

void TileAttention::AttendPage(int64_t page, const AttentionState& state) {
  const PageRef ref = tile_.slice->pages[static_cast<size_t>(page)];
  const bool sealed = IsSealed(page), last_page = page == last_page_;
  const std::byte* head = sealed ? args_.kv.SealedHead(ref.sealed_id, tile_.kv_head) : nullptr;
  PrefetchMore();
  Score(ref, sealed);
  PrefetchMore();

  const bool codes = sealed && layer_.value.quantized();
  const bool integers = codes && layer_.value.axis == QuantAxis::kInner;
  SoftmaxArgs softmax;
  softmax.scores = scratch_.scores;
  softmax.num_tokens = layer_.page_tokens;
  const bool integer_scores =
      sealed && layer_.key.quantized() && layer_.key.axis == QuantAxis::kInner;
  softmax.scales = integer_scores ? scratch_.query_scales : nullptr;
  softmax.visible = last_page ? scratch_.visible : nullptr;
  softmax.num_rows = num_rows_;
  softmax.state = state;
  softmax.keep = scratch_.keep;
  softmax.add = scratch_.add;
  softmax.rows = weight_rows_;
  softmax.group_size = layer_.value.group_size;
  softmax.sums = scratch_.weight_sums;
  integers ? ops_.softmax_to_integers(softmax) : ops_.softmax_to_float(softmax);

  PrefetchMore();
  if (!codes) {
    const uint16_t* values = sealed ? Halves(head + layer_.value_codes)
                                    : args_.kv.OpenValues(ref.open_id, tile_.kv_head);
    return AddHalfValues(values, last_page, state);
  }
  const Target target{scratch_.keep, scratch_.add, state.out};
  if (integers) return MultiplyInner(Values(head), weight_rows_, scratch_.weight_sums, target);
  MultiplyOuter(Values(head), scratch_.scores, layer_.page_tokens, target);
}

TileAttention::CodedPagesFunction TileAttention::CodedPagesFor(const AttentionOps& ops,
                                                               const KvLayerLayout& layer,
                                                               int64_t num_rows) {
  const auto fits = [](const QuantSpec& spec) {
    return spec.quantized() && spec.axis == QuantAxis::kInner && spec.group_size % kMaxBlock == 0;
  };
  const auto is_small = [](const QuantSpec& spec) { return spec.bits <= 4 && !spec.has_zero(); };
  if (layer.page_tokens != CodedPagesArgs::kTokens || layer.head_dim % kMaxBlock != 0 ||
      !fits(layer.key) || !fits(layer.value)) {
    return nullptr;
  }
  if (num_rows < kRowBlock) return ops.attend_coded_pages_few;
  return is_small(layer.key) && is_small(layer.value) ? ops.attend_small_coded_pages_many
                                                      : ops.attend_coded_pages_many;
}

void TileAttention::AttendCodedPages(int64_t begin, int64_t end, const AttentionState& state) {
  const auto side = [](const QuantSpec& spec, int64_t codes, int64_t scales, int64_t zeros) {
    return CodedPagesArgs::Side{codes,           scales,           zeros,          spec.bits,
                                spec.group_size, CodeOffset(spec), spec.has_zero()};
  };
  constexpr int64_t kMaxPages = 64;
  const std::byte* heads[kMaxPages];
  CodedPagesArgs args;
  args.heads = heads;
  args.head_bytes = layer_.sealed_head_bytes;
  args.key = side(layer_.key, layer_.key_codes, layer_.key_scales, layer_.key_zeros);
  args.value = side(layer_.value, layer_.value_codes, layer_.value_scales, layer_.value_zeros);
  args.head_dim = layer_.head_dim;
  args.num_rows = num_rows_;
  args.queries = query_rows_;
  args.query_scales = scratch_.query_scales;
  args.query_sums = scratch_.query_sums;
  args.state = state;
  args.scratch = &scratch_.coded_pages;
  args.advance = ops_.advance;
  for (int64_t page = begin; page < end; page += args.num_pages) {
    args.num_pages = std::min(end - page, kMaxPages);
    for (int64_t i = 0; i < args.num_pages; ++i) {
      const PageRef ref = tile_.slice->pages[static_cast<size_t>(page + i)];
      heads[i] = args_.kv.SealedHead(ref.sealed_id, tile_.kv_head);
    }
    attend_coded_pages_(args);
  }
}

void TileAttention::Score(const PageRef& page, bool sealed) {
  const std::byte* head = sealed ? args_.kv.SealedHead(page.sealed_id, tile_.kv_head) : nullptr;
  if (sealed && layer_.key.quantized()) {
    if (layer_.key.axis == QuantAxis::kInner) {
      const Target target{nullptr, nullptr, scratch_.scores};  // the softmax scales by query
      return MultiplyInner(Keys(head), query_rows_, scratch_.query_sums, target);
    }
    const Target target{nullptr, nullptr, scratch_.scores};
    return MultiplyOuter(Keys(head), scratch_.sealed_q, padded_dim_, target);
  }
  HalfScoresArgs scores;
  scores.keys =
      sealed ? Halves(head + layer_.key_codes) : args_.kv.OpenKeys(page.open_id, tile_.kv_head);
  scores.num_tokens = layer_.page_tokens;
  scores.head_dim = layer_.head_dim;
  scores.q = scratch_.q;
  scores.num_rows = num_rows_;
  scores.scores = scratch_.scores;
  ops_.half_scores(scores);
}

void TileAttention::AddHalfValues(const uint16_t* values, bool last_page,
                                  const AttentionState& state) {
  // In the last page tokens see different numbers of values; the rest may be anything.
  const int64_t step = last_page ? head_rows_ : num_rows_;
  for (int64_t row = 0; row < num_rows_; row += step) {
    HalfValuesArgs add;
    add.values = values;
    add.num_tokens = last_page ? scratch_.visible[row] : layer_.page_tokens;
    add.padded_dim = padded_dim_;
    add.p = scratch_.scores + row * layer_.page_tokens;
    add.p_stride = layer_.page_tokens;
    add.num_rows = step;
    add.keep = scratch_.keep + row;
    add.add = scratch_.add + row;
    add.out = state.out + row * padded_dim_;
    ops_.half_values(add);
  }
}

DotArgs TileAttention::Unpack(const CodedSide& side) {
  const QuantSpec& spec = side.spec;
  const bool inner = spec.axis == QuantAxis::kInner;
  DotArgs dot;
  UnpackArgs& unpack = dot.side;
  unpack.packed = reinterpret_cast<const uint8_t*>(side.codes);
  unpack.bits = spec.bits;
  unpack.inner = side.inner;
  unpack.outer = RoundUp(side.outer, kPanelWidth);
  unpack.group_size = inner ? spec.group_size : side.inner;
  unpack.offset = CodeOffset(spec);
  unpack.num_rows = num_rows_;
  unpack.codes = scratch_.codes;
  dot.codes = ops_.unpack(unpack);
  const int64_t num_scales = inner ? side.inner / spec.group_size * unpack.outer
                                   : side.outer / spec.group_size * side.inner;
  ops_.half_to_float(Halves(side.scales), num_scales, scratch_.scales);
  if (spec.has_zero()) ops_.half_to_float(Halves(side.zeros), num_scales, scratch_.zeros);
  return dot;
}

void TileAttention::MultiplyInner(const CodedSide& side, const IntegerRows& rows,
                                  const int32_t* sums, const Target& target) {
  DotArgs dot = Unpack(side);
  PrefetchMore();
  dot.rows = rows;
  dot.sums = sums;
  dot.panel_end = dot.side.outer / kPanelWidth;
  dot.dots = scratch_.dots;
  InnerScaleArgs scale;
  scale.dots = scratch_.dots;
  scale.groups = dot.groups();
  scale.outer = dot.side.outer;
  scale.scales = scratch_.scales;
  scale.zeros = side.spec.has_zero() ? scratch_.zeros : nullptr;
  const int64_t row_step = RowStep(dot);
  for (int64_t row = 0; row < num_rows_; row += row_step) {
    dot.row_begin = row;
    dot.row_end = std::min(row + row_step, num_rows_);
    ops_.dot(dot);
    PrefetchMore();
    scale.sums = sums + row * scale.groups;
    scale.num_rows = dot.row_end - row;
    scale.keep = target.keep != nullptr ? target.keep + row : nullptr;
    scale.add = target.add != nullptr ? target.add + row : nullptr;
    scale.out = target.out + row * scale.outer;
    ops_.scale_inner(scale);
  }
}

// A group holds one inner element of several outer ones, so its scale belongs to the inner element:
// for each span of outer elements the rows are multiplied by the scales and quantized again.
void TileAttention::MultiplyOuter(const CodedSide& side, const float* rows, int64_t stride,
                                  const Target& target) {
  DotArgs dot = Unpack(side);
  PrefetchMore();
  QuantizeArgs fold;
  fold.x = rows;
  fold.stride = stride;
  fold.num_rows = num_rows_;
  fold.n = side.inner;
  fold.group_size = side.inner;
  fold.rows = {scratch_.folded_bytes, IntegerRows::Stride(side.inner), BlockOf(side.inner),
               HighShift(side.spec.bits)};
  fold.scales = scratch_.folded_scales;
  fold.sums = scratch_.folded_sums;
  fold.constants = scratch_.folded_constants;
  dot.rows = fold.rows;
  dot.sums = fold.sums;
  dot.dots = scratch_.dots;
  const int64_t row_step = RowStep(dot);
  OuterScaleArgs scale;
  scale.dots = scratch_.dots;
  scale.outer = dot.side.outer;
  for (int64_t begin = 0; begin < side.outer; begin += side.spec.group_size) {
    const int64_t first = begin / side.spec.group_size * side.inner;
    fold.factors = scratch_.scales + first;
    fold.zeros = side.spec.has_zero() ? scratch_.zeros + first : nullptr;
    ops_.quantize(fold);
    scale.begin = begin;
    scale.end = begin + side.spec.group_size;
    dot.panel_begin = scale.begin / kPanelWidth;
    dot.panel_end = CeilDiv(scale.end, kPanelWidth);
    for (int64_t row = 0; row < num_rows_; row += row_step) {
      dot.row_begin = row;
      dot.row_end = std::min(row + row_step, num_rows_);
      ops_.dot(dot);
      scale.scales = scratch_.folded_scales + row;
      scale.constants = side.spec.has_zero() ? scratch_.folded_constants + row : nullptr;
      scale.num_rows = dot.row_end - row;
      scale.keep = target.keep != nullptr ? target.keep + row : nullptr;
      scale.add = target.add != nullptr ? target.add + row : nullptr;
      scale.out = target.out + row * scale.outer;
      ops_.scale_outer(scale);
    }
  }
}

void TileAttention::Finish(const AttentionState& state) const {
  const int64_t dim = layer_.head_dim;
  for (int64_t r = 0; r < num_rows_; ++r) {
    float* to = args_.out.As<float>() + (tile_.first_row + r / head_rows_) * args_.num_heads * dim +
                (tile_.kv_head * head_rows_ + r % head_rows_) * dim;
    const float* from = state.out + r * padded_dim_;
    const float inverse = 1.0f / state.sum[r];
    for (int64_t c = 0; c < dim; ++c) to[c] = from[c] * inverse;
  }
}

}  // namespace innerq
