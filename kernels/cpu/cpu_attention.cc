#include "kernels/cpu/cpu_attention.h"

#include <algorithm>
#include <new>
#include <string>
#include <vector>

#include "kernels/cpu/attention_ops.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/seal.h"
#include "kernels/cpu/thread_index.h"

namespace innerq {
namespace {

// Pages are attended in segments of this many tokens, counted from the start of the sequence, and
// the segments' states are merged in order. So a row's sums are the same whether one thread takes
// all segments or each goes to another.
constexpr int64_t kSegmentTokens = 2048;
constexpr size_t kPartsPerThread = 8;  // states of segments that may wait for their merge

template <typename T>
void Grow(std::vector<std::unique_ptr<T>>& scratch, size_t count) {
  while (scratch.size() < count) scratch.push_back(std::make_unique<T>());
}

class CpuAttentionImpl final : public CpuAttention {
 public:
  CpuAttentionImpl(CpuIsa isa, int threads)
      : ops_(AttentionOpsFor(isa)), encode_(EncodeFunctionFor(isa)), threads_(threads) {
    CHECK(threads > 0, "CpuAttention needs a thread");
  }

  Result<void> Reserve(const StepLimits& limits) override {
    if (limits.max_head_dim > kMaxInner) {
      return InvalidArgument("head_dim must be at most " + std::to_string(kMaxInner) + ", not " +
                             std::to_string(limits.max_head_dim));
    }
    if (limits.max_group > kCachedTileRows) {
      return InvalidArgument("num_attention_heads / num_key_value_heads must be at most " +
                             std::to_string(kCachedTileRows) + ", not " +
                             std::to_string(limits.max_group));
    }
    const auto threads = static_cast<size_t>(threads_);
    try {
      tiles_.reserve(static_cast<size_t>(limits.max_rows));
      slice_tiles_.reserve(static_cast<size_t>(limits.max_rows));
      Grow(tile_scratch_, threads);
      Grow(seal_scratch_, threads);
      Grow(half_scratch_, threads);
      Grow(parts_, threads * kPartsPerThread);
      Grow(totals_, threads * kPartsPerThread);
    } catch (const std::bad_alloc&) {
      return Error{ErrorCode::kResourceExhausted, "not enough memory for the attention of " +
                                                      std::to_string(threads_) + " threads"};
    }
    return {};
  }

  void RopeAppend(const RopeAppendArgs& args) override {
    CHECK(!half_scratch_.empty(), "RopeAppend before Reserve");
    const int64_t num_rows = args.qkv.shape[0];
#pragma omp parallel for num_threads(threads_) schedule(static) if (num_rows > 1)
    for (int64_t row = 0; row < num_rows; ++row) {
      RopeAppendRow(args, row, *half_scratch_[static_cast<size_t>(ThreadIndex())]);
    }
  }

  void ComputeKeyNorm(const KeyNormArgs& args) override {
    const int64_t heads = args.kv.layout->kv_heads;
    const int64_t count = static_cast<int64_t>(args.items.size()) * heads;
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      ComputeHeadKeyNorm(args.kv, args.items[static_cast<size_t>(i / heads)], i % heads);
    }
  }

  std::vector<int64_t> Seal(const SealArgs& args) override {
    CHECK(!seal_scratch_.empty(), "Seal before Reserve");
    const int64_t heads = args.kv.layout->kv_heads;
    const int64_t count = static_cast<int64_t>(args.items.size()) * heads;
    std::vector<int64_t> failed;
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      SealScratch& scratch = *seal_scratch_[static_cast<size_t>(ThreadIndex())];
      if (!SealHead(encode_, args.kv, args.items[static_cast<size_t>(i / heads)], i % heads,
                    scratch)) {
#pragma omp critical(failed_seals)
        failed.push_back(i / heads);
      }
    }
    std::sort(failed.begin(), failed.end());
    failed.erase(std::unique(failed.begin(), failed.end()), failed.end());
    return failed;
  }

  void Attention(const AttentionArgs& args) override {
    CHECK(!tile_scratch_.empty(), "Attention before Reserve");
    const int64_t most_pages = MakeTiles(args);
    const int64_t units = static_cast<int64_t>(tiles_.size()) * args.kv.layout->kv_heads;
    const int64_t parts = static_cast<int64_t>(parts_.size());
    const int64_t segment_pages = kSegmentTokens / args.kv.layout->page_tokens;
    if (units >= 4 * threads_ || most_pages <= segment_pages || 2 * units > parts) {
      AttendByTile(args, units);
    } else {
      AttendBySegment(args, units, CeilDiv(most_pages, segment_pages));
    }
  }

 private:
  // The tiles of one slice.
  struct SliceTiles {
    int64_t begin, count;
  };

  // One head of one token on its way into a page.
  struct HeadScratch {
    float rotated[kMaxInner];
    uint16_t halves[kMaxInner];
  };

  void RopeAppendRow(const RopeAppendArgs& args, int64_t row, HeadScratch& scratch) const {
    const KvLayerLayout& layout = *args.kv.layout;
    const int64_t dim = layout.head_dim;
    const int64_t num_heads = args.q.shape[1] / dim;
    const auto after = std::upper_bound(
        args.slices.begin(), args.slices.end(), row,
        [](int64_t r, const SequenceSlice& candidate) { return r < candidate.row_begin; });
    const SequenceSlice& slice = *(after - 1);
    const int64_t position = slice.first_position + row - slice.row_begin;
    const float* x = args.qkv.As<float>() + row * args.qkv.shape[1];
    const float* cos = args.cos.As<float>() + row * (dim / 2);
    const float* sin = args.sin.As<float>() + row * (dim / 2);
    for (int64_t h = 0; h < num_heads; ++h) {
      ops_.rotate(x + h * dim, cos, sin, dim, args.q.As<float>() + (row * num_heads + h) * dim);
    }
    const int64_t open_id = slice.pages[static_cast<size_t>(position / layout.page_tokens)].open_id;
    CHECK(open_id >= 0, "RopeAppend: no open page");
    const int64_t t = position % layout.page_tokens;
    for (int64_t g = 0; g < layout.kv_heads; ++g) {
      ops_.rotate(x + (num_heads + g) * dim, cos, sin, dim, scratch.rotated);
      ops_.float_to_half(scratch.rotated, dim, scratch.halves);
      uint16_t* keys = args.kv.OpenKeys(open_id, g);
      for (int64_t d = 0; d < dim; ++d) keys[layout.OpenKeyIndex(t, d)] = scratch.halves[d];
      uint16_t* values = args.kv.OpenValues(open_id, g) + layout.OpenValueIndex(t, 0);
      ops_.float_to_half(x + (num_heads + layout.kv_heads + g) * dim, dim, values);
      std::fill(values + dim, values + layout.padded_dim(), uint16_t{0});
    }
  }

  // Cuts the slices into tiles of KV head 0; returns the most pages that one sees.
  int64_t MakeTiles(const AttentionArgs& args) {
    const KvLayerLayout& layer = *args.kv.layout;
    const int64_t head_rows = args.num_heads / layer.kv_heads;
    CHECK(head_rows <= kCachedTileRows, "Attention: too many query heads per key/value head");
    const int64_t most_tokens = TileAttention::MostRows(ops_, layer) / head_rows;
    int64_t most_pages = 0;
    tiles_.clear();
    slice_tiles_.clear();
    for (const SequenceSlice& slice : args.slices) {
      const size_t first_tile = tiles_.size();
      const int64_t slice_end = slice.first_position + slice.num_rows;
      for (int64_t at = slice.first_position; at < slice_end;) {
        const int64_t page_end = (at / layer.page_tokens + 1) * layer.page_tokens;
        int64_t end = std::min({slice_end, page_end, at + most_tokens});
        if (at < slice.exact_before) end = std::min(end, slice.exact_before);
        tiles_.push_back({&slice, slice.row_begin + at - slice.first_position, at, end - at, 0});
        at = end;
      }
      slice_tiles_.resize(tiles_.size(), {static_cast<int64_t>(first_tile),
                                          static_cast<int64_t>(tiles_.size() - first_tile)});
      most_pages = std::max(most_pages, CeilDiv(slice_end, layer.page_tokens));
    }
    return most_pages;
  }

  // Units are [slice][KV head][tile], so that a head's pages stay in the cache for all of a prompt.
  AttentionTile TileOf(int64_t unit, int64_t kv_heads) const {
    const SliceTiles& tiles = slice_tiles_[static_cast<size_t>(unit / kv_heads)];
    const int64_t of_slice = unit - tiles.begin * kv_heads;
    AttentionTile tile = tiles_[static_cast<size_t>(tiles.begin + of_slice % tiles.count)];
    tile.kv_head = of_slice / tiles.count;
    return tile;
  }

  // A thread takes a tile from its first page to its last.
  void AttendByTile(const AttentionArgs& args, int64_t units) {
    const int64_t kv_heads = args.kv.layout->kv_heads, dim = args.kv.layout->padded_dim();
    const int64_t segment_pages = kSegmentTokens / args.kv.layout->page_tokens;
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; ++unit) {
      TileScratch& scratch = *tile_scratch_[static_cast<size_t>(ThreadIndex())];
      const AttentionTile tile = TileOf(unit, kv_heads);
      TileAttention attention(ops_, args, tile, scratch);
      scratch.total.Clear(attention.num_rows(), dim);
      for (int64_t begin = 0; begin < attention.num_pages(); begin += segment_pages) {
        scratch.part.Clear(attention.num_rows(), dim);
        attention.Attend(begin, std::min(begin + segment_pages, attention.num_pages()),
                         scratch.part.View());
        ops_.merge(scratch.part.View(), attention.num_rows(), dim, scratch.total.View());
      }
      attention.Finish(scratch.total.View());
    }
  }

  // Few tiles, long sequences: threads take segments, as many at a time as there is memory for.
  void AttendBySegment(const AttentionArgs& args, int64_t units, int64_t num_segments) {
    const int64_t kv_heads = args.kv.layout->kv_heads, dim = args.kv.layout->padded_dim();
    const int64_t segment_pages = kSegmentTokens / args.kv.layout->page_tokens;
    const int64_t wave = std::min(num_segments, static_cast<int64_t>(parts_.size()) / units);
    for (int64_t unit = 0; unit < units; ++unit) {
      totals_[static_cast<size_t>(unit)]->Clear(kTileRows, dim);
    }
    for (int64_t first = 0; first < num_segments; first += wave) {
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 1)
      for (int64_t i = 0; i < units * wave; ++i) {
        const AttentionTile tile = TileOf(i / wave, kv_heads);
        TileAttention attention(ops_, args, tile,
                                *tile_scratch_[static_cast<size_t>(ThreadIndex())]);
        const int64_t begin = (first + i % wave) * segment_pages;
        const int64_t end = std::min(begin + segment_pages, attention.num_pages());
        AttentionStateBuffer& part = *parts_[static_cast<size_t>(i)];
        part.Clear(attention.num_rows(), dim);
        if (begin < end) attention.Attend(begin, end, part.View());
      }
#pragma omp parallel for num_threads(threads_) schedule(static)
      for (int64_t unit = 0; unit < units; ++unit) {
        const AttentionTile tile = TileOf(unit, kv_heads);
        TileAttention attention(ops_, args, tile,
                                *tile_scratch_[static_cast<size_t>(ThreadIndex())]);
        AttentionStateBuffer& total = *totals_[static_cast<size_t>(unit)];
        for (int64_t i = 0; i < wave; ++i) {
          if ((first + i) * segment_pages >= attention.num_pages()) break;
          ops_.merge(parts_[static_cast<size_t>(unit * wave + i)]->View(), attention.num_rows(),
                     dim, total.View());
        }
        if (first + wave >= num_segments) attention.Finish(total.View());
      }
    }
  }

  const AttentionOps ops_;
  const EncodeFunction encode_;
  const int threads_;
  std::vector<AttentionTile> tiles_;                           // of KV head 0
  std::vector<SliceTiles> slice_tiles_;                        // per tile
  std::vector<std::unique_ptr<TileScratch>> tile_scratch_;     // per thread
  std::vector<std::unique_ptr<SealScratch>> seal_scratch_;     // per thread
  std::vector<std::unique_ptr<HeadScratch>> half_scratch_;     // per thread
  std::vector<std::unique_ptr<AttentionStateBuffer>> parts_;   // of waiting segments
  std::vector<std::unique_ptr<AttentionStateBuffer>> totals_;  // per unit of AttendBySegment
};

}  // namespace

std::unique_ptr<CpuAttention> CpuAttention::Create(CpuIsa isa, int threads) {
  return std::make_unique<CpuAttentionImpl>(isa, threads);
}

}  // namespace innerq
