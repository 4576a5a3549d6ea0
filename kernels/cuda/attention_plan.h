// AttentionPlan: how attention is cut into the work of warps. Plain arithmetic, host only, without
// a CUDA header, so that it is tested where there is no GPU; the structs are read by the kernels.
//
// A row is one query head of one token. For a key/value head, the rows of a sequence's slice are
// numbered token by token: row f is query head f % N of token f / N, N = H / G.
//
// A block takes a tile of rows, one key/value head, and walks strips of 32 tokens. Strips are
// joined in segments of kSegmentTokens, counted from the start of the sequence: within a segment a
// row's softmax is accumulated strip by strip, and the states of segments are merged in order. A
// tile is attended by one block from its first segment to its last, or by several, which keep the
// states of all segments for a second kernel to merge; both do the same operations on the same
// numbers. So what a row gives depends on its position alone, if all numbers are finite: not on its
// neighbours, its tile, or how the tile was split.
//
// Blocks are warps where every lane holds all rows (attention.cu); on tensor cores they have
// several (attention_mma.cuh).
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/backend.h"

namespace innerq {

constexpr int64_t kStripTokens = 32;     // one per lane of a warp
constexpr int64_t kSegmentTokens = 512;  // a multiple of every page size
constexpr int64_t kSegmentStrips = kSegmentTokens / kStripTokens;
constexpr int64_t kMostItemSegments = 16;  // of split tiles
constexpr int64_t kWaves = 3;              // of blocks: as many keep the device busy to the end
constexpr int kMaxTileRows = 32;
constexpr int kMmaTeamRows = 8;  // up to which the warps of a block on tensor cores share the rows
constexpr int kMmaTeams = 4;     // warps that do; see attention_mma.cuh

// Rows [first_row, first_row + num_rows) of a slice: all of their tokens lie in one strip and on
// one side of the slice's exact_before, so they see the same pages in the same form. Strips are
// counted from the start of the sequence.
struct PlannedTile {
  int32_t slice = 0;      // not for kernels
  int32_t first_row = 0;  // likewise
  int32_t num_rows = 0;
  int32_t num_segments = 0;
  int64_t first_state = -1;  // see StateIndex; -1: not split
  int64_t first_page = 0;    // of the sequence's page table in the step's
  int32_t last_strip = 0;    // in which the tokens lie
  int32_t sealed_begin = 0;  // strips that the tokens see sealed
  int32_t sealed_end = 0;
  int32_t norm_id = -1;
  int32_t first_token = 0;   // of the step
  int32_t first_offset = 0;  // the same token's, in the strip
  int32_t first_head = 0;    // of the group: of first_row
  int32_t reserved = 0;
};

// What one block does, for each key/value head: segments [begin, end) of a tile.
struct AttentionItem {
  int32_t tile = 0;  // -1: nothing
  int32_t begin = 0;
  int32_t end = 0;
};

// Where the state of row r of a tile of up to `tile_rows` rows is kept, counted in states.
INNERQ_HOST_DEVICE inline int64_t StateIndex(const PlannedTile& tile, int tile_rows,
                                             int64_t kv_head, int64_t segment, int64_t r) {
  return tile.first_state + ((kv_head * tile.num_segments + segment) * tile_rows + r);
}
// Floats of a state: the weighted sum of values [D], the largest score, the sum of weights; padded.
INNERQ_HOST_DEVICE constexpr int64_t StateFloats(int64_t head_dim) { return head_dim + 8; }

// The tiles that one launch attends to, with kernels for `tile_rows` rows.
struct AttentionLaunch {
  int tile_rows = kMaxTileRows;
  std::vector<PlannedTile> tiles;
  std::vector<AttentionItem> items;
  int64_t num_states = 0;
  bool in_one_go = false;  // an item is all segments of its tile, and some tile has several
  bool split() const { return num_states > 0; }
};

// What the plan must know of layer and device.
struct AttentionShape {
  int64_t group = 1;     // N = H / G
  int64_t kv_heads = 1;  // G
  int64_t head_dim = 0;
  bool tensor_cores = false;
  int64_t max_states = 0;       // that the scratch memory holds
  int64_t max_items = 0;        // likewise, of one launch
  int64_t resident_blocks = 0;  // that the device holds at once, about
};

// Channels of V that a lane sums: a power of two in [2, 8], 32 lanes cover the head.
constexpr int LaneChannels(int64_t head_dim) {
  return head_dim <= 64 ? 2 : head_dim <= 128 ? 4 : 8;
}

// Rows of a tile that a block has registers for.
constexpr int MostTileRows(const AttentionShape& shape) {
  if (shape.tensor_cores) return kMaxTileRows;
  return LaneChannels(shape.head_dim) == 8 ? 4 : 8;
}

// Tiles have 1, 2, 4, ... rows.
constexpr int TileRowsFor(int64_t rows, const AttentionShape& shape) {
  int tile_rows = 1;
  while (tile_rows < rows && tile_rows < MostTileRows(shape)) tile_rows *= 2;
  return tile_rows;
}

// Up to an eighth more items, so that their number stays for a while as the context grows, and with
// it the launch.
constexpr int64_t PaddedItems(int64_t num_items) {
  const auto below = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(num_items)));
  return RoundUp(num_items, std::max<int64_t>(1, below / 8));
}

// Cuts a step into two launches: sequences with one token (decode), and the others. Reuses its
// memory from call to call; Reserve makes it enough for a step.
class AttentionPlan {
 public:
  void Reserve(int64_t max_rows, int64_t max_group, int64_t max_items) {
    for (AttentionLaunch* launch : {&decode_, &prefill_}) {
      launch->tiles.reserve(static_cast<size_t>(max_rows * max_group));
      launch->items.reserve(
          static_cast<size_t>(PaddedItems(std::max(max_items, max_rows * max_group))));
    }
  }

  // The page tables of the slices follow one another, each up to the slice's last token.
  void Make(std::span<const SequenceSlice> slices, const PageWindows& windows,
            const AttentionShape& shape) {
    Begin(decode_, TileRowsFor(shape.group, shape));
    Begin(prefill_, MostTileRows(shape));
    PlannedTile tile;
    for (const SequenceSlice& slice : slices) {
      tile.norm_id = slice.norm_id;
      CutTiles(slice, windows, shape.group, tile, slice.num_rows == 1 ? decode_ : prefill_);
      ++tile.slice;
      tile.first_page += windows.PageOf(slice.first_position + slice.num_rows - 1) + 1;
    }
    Split(decode_, shape);
    Split(prefill_, shape);
  }

  const AttentionLaunch& decode() const { return decode_; }
  const AttentionLaunch& prefill() const { return prefill_; }

 private:
  static void Begin(AttentionLaunch& launch, int tile_rows) {
    launch.tile_rows = tile_rows;
    launch.tiles.clear();
    launch.items.clear();
    launch.num_states = 0;
    launch.in_one_go = false;
  }

  // Appends the slice's tiles; `tile` has what they have in common.
  static void CutTiles(const SequenceSlice& slice, const PageWindows& windows, int64_t group,
                       PlannedTile tile, AttentionLaunch& launch) {
    const int64_t end = slice.first_position + slice.num_rows;
    const int64_t page_strips = windows.page_tokens / kStripTokens;
    for (int64_t at = slice.first_position; at < end;) {
      // [at, next): tokens that see the same pages in the same form.
      int64_t next = std::min(end, (at / kStripTokens + 1) * kStripTokens);
      if (at < slice.exact_before) next = std::min(next, slice.exact_before);
      const PageRange sealed = windows.SealedPages(at, slice.exact_before);
      tile.last_strip = static_cast<int32_t>(at / kStripTokens);
      tile.sealed_begin = static_cast<int32_t>(sealed.begin * page_strips);
      tile.sealed_end = static_cast<int32_t>(sealed.end * page_strips);
      tile.num_segments = static_cast<int32_t>(CeilDiv(next, kSegmentTokens));
      const int64_t last_row = (next - slice.first_position) * group;
      for (int64_t row = (at - slice.first_position) * group; row < last_row;
           row += launch.tile_rows) {
        const int64_t token = row / group;
        tile.first_row = static_cast<int32_t>(row);
        tile.num_rows = static_cast<int32_t>(std::min<int64_t>(launch.tile_rows, last_row - row));
        tile.first_token = static_cast<int32_t>(slice.row_begin + token);
        tile.first_offset = static_cast<int32_t>((slice.first_position + token) % kStripTokens);
        tile.first_head = static_cast<int32_t>(row % group);
        launch.tiles.push_back(tile);
      }
      at = next;
    }
  }

  // The segments of an item that end first, by this measure: blocks run in waves of as many as the
  // device holds, and take a segment's time for each of theirs and one for their beginning.
  static int64_t SegmentsPerItem(const AttentionLaunch& launch, const AttentionShape& shape,
                                 int64_t longest) {
    int64_t best = 1, least = std::numeric_limits<int64_t>::max();
    for (int64_t size = 1; size <= std::min(longest, kMostItemSegments); ++size) {
      int64_t num_items = 0;
      for (const PlannedTile& tile : launch.tiles) num_items += CeilDiv(tile.num_segments, size);
      const int64_t time =
          CeilDiv(num_items * shape.kv_heads, std::max<int64_t>(shape.resident_blocks, 1)) *
          (size + 1);
      if (time >= least) continue;
      least = time;
      best = size;
    }
    return best;
  }

  // Several items per tile where one would leave the device idle and the states of all segments
  // fit; on tensor cores tiles of few rows whenever they fit, for only then a block's warps share
  // them.
  static void Split(AttentionLaunch& launch, const AttentionShape& shape) {
    const auto num_tiles = static_cast<int64_t>(launch.tiles.size());
    int64_t num_segments = 0, longest = 0;
    for (const PlannedTile& tile : launch.tiles) {
      num_segments += tile.num_segments;
      longest = std::max<int64_t>(longest, tile.num_segments);
    }
    const int64_t num_states = num_segments * shape.kv_heads * launch.tile_rows;
    const bool few = num_tiles * shape.kv_heads < kWaves * shape.resident_blocks;
    const bool teams = shape.tensor_cores && launch.tile_rows <= kMmaTeamRows;
    const bool split = (few || teams) && longest > 1 && num_segments <= shape.max_items &&
                       num_states <= shape.max_states;
    const int64_t per_item = split ? SegmentsPerItem(launch, shape, longest) : longest;
    launch.in_one_go = !split && longest > 1;
    for (int32_t i = 0; i < static_cast<int32_t>(num_tiles); ++i) {
      PlannedTile& tile = launch.tiles[static_cast<size_t>(i)];
      if (split) {
        tile.first_state = launch.num_states;
        launch.num_states += tile.num_segments * shape.kv_heads * launch.tile_rows;
      }
      for (int32_t begin = 0; begin < tile.num_segments; begin += static_cast<int32_t>(per_item)) {
        const int32_t end = begin + static_cast<int32_t>(per_item);
        launch.items.push_back({i, begin, std::min(end, tile.num_segments)});
      }
    }
    const auto count = static_cast<int64_t>(launch.items.size());
    launch.items.resize(static_cast<size_t>(PaddedItems(count)), {.tile = -1});
  }

  AttentionLaunch decode_, prefill_;
};

}  // namespace innerq
