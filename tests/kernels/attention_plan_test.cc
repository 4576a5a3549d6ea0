// The host-side arithmetic of the CUDA kernels: how attention is cut, and where bits are found.
#include "kernels/cuda/attention_plan.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <set>

#include "kernels/cuda/strip_index.h"
#include "tests/cuda_emulation/mma_fragments.h"

namespace innerq {
namespace {

struct PlanCase {
  int64_t group, head_dim, kv_heads;
  bool tensor_cores;
  std::vector<SequenceSlice> slices;
  int64_t resident_blocks = 2000;
};

std::vector<SequenceSlice> MixedStep() {
  // A decode, a prompt from 0, a chunk across strips and a segment, an exact prompt's last chunk.
  return {{0, 1, 5000, {}, -1, 0},
          {1, 70, 0, {}, -1, 0},
          {71, 40, 500, {}, -1, 0},
          {111, 9, 36, {}, -1, 40},
          {120, 1, 0, {}, -1, 0}};
}

std::vector<PlanCase> PlanCases() {
  std::vector<PlanCase> cases;
  for (const int64_t group : {1, 3, 4, 8, 12}) {
    for (const int64_t dim : {64, 128, 256}) {
      for (const int64_t busy : {0, 4, 2000}) {
        for (const bool tensor_cores : {false, true}) {
          cases.push_back({group, dim, 2, tensor_cores, MixedStep(), busy});
        }
      }
    }
  }
  return cases;
}

constexpr PageWindows kWindows = {
    .page_tokens = 64, .sink_pages = 1, .recent_pages = 2, .quantized = true};

AttentionShape ShapeOf(const PlanCase& c) {
  return {.group = c.group,
          .kv_heads = c.kv_heads,
          .head_dim = c.head_dim,
          .tensor_cores = c.tensor_cores,
          .max_states = 100000,
          .max_items = 1000,
          .resident_blocks = c.resident_blocks};
}

TEST(AttentionPlan, EveryRowIsInOneTileThatSeesItsPages) {
  for (const PlanCase& c : PlanCases()) {
    AttentionPlan plan;
    plan.Make(c.slices, kWindows, ShapeOf(c));
    std::set<std::pair<int32_t, int64_t>> rows;  // of a slice
    for (const AttentionLaunch* launch : {&plan.decode(), &plan.prefill()}) {
      EXPECT_LE(launch->tile_rows, MostTileRows(ShapeOf(c)));
      for (const PlannedTile& tile : launch->tiles) {
        const SequenceSlice& slice = c.slices[static_cast<size_t>(tile.slice)];
        EXPECT_EQ(slice.num_rows == 1, launch == &plan.decode());
        ASSERT_GT(tile.num_rows, 0);
        ASSERT_LE(tile.num_rows, launch->tile_rows);
        const int64_t first = slice.first_position + tile.first_row / c.group;
        for (int64_t row = tile.first_row; row < tile.first_row + tile.num_rows; ++row) {
          EXPECT_TRUE(rows.insert({tile.slice, row}).second) << "row " << row << " twice";
          const int64_t position = slice.first_position + row / c.group;
          ASSERT_LT(position, slice.first_position + slice.num_rows);
          EXPECT_EQ(position / kStripTokens, first / kStripTokens);
          EXPECT_EQ(position < slice.exact_before, first < slice.exact_before);
        }
        EXPECT_EQ(tile.num_segments, first / kSegmentTokens + 1);
        EXPECT_EQ(tile.last_strip, first / kStripTokens);
        EXPECT_EQ(tile.first_offset, first % kStripTokens);
        EXPECT_EQ(tile.first_token, slice.row_begin + tile.first_row / c.group);
        EXPECT_EQ(tile.first_head, tile.first_row % c.group);
        EXPECT_EQ(tile.norm_id, slice.norm_id);
        const PageRange sealed = kWindows.SealedPages(first, slice.exact_before);
        EXPECT_EQ(tile.sealed_begin, sealed.begin * 2);
        EXPECT_EQ(tile.sealed_end, sealed.end * 2);
        int64_t first_page = 0;
        for (int32_t i = 0; i < tile.slice; ++i) {
          const SequenceSlice& before = c.slices[static_cast<size_t>(i)];
          first_page += kWindows.PageOf(before.first_position + before.num_rows - 1) + 1;
        }
        EXPECT_EQ(tile.first_page, first_page);
      }
    }
    size_t expected = 0;
    for (const SequenceSlice& slice : c.slices) {
      expected += static_cast<size_t>(slice.num_rows * c.group);
    }
    EXPECT_EQ(rows.size(), expected);
  }
}

TEST(AttentionPlan, ItemsCoverEverySegmentOnceAndStatesDoNotOverlap) {
  int num_split = 0, num_longer = 0;
  for (const PlanCase& c : PlanCases()) {
    AttentionPlan plan;
    plan.Make(c.slices, kWindows, ShapeOf(c));
    for (const AttentionLaunch* launch : {&plan.decode(), &plan.prefill()}) {
      num_split += launch->split() ? 1 : 0;
      std::set<std::pair<int32_t, int32_t>> segments;  // of a tile
      std::set<int64_t> states;
      int64_t num_items = 0;
      for (const AttentionItem& item : launch->items) {
        if (item.tile < 0) continue;
        ++num_items;
        const PlannedTile& tile = launch->tiles[static_cast<size_t>(item.tile)];
        EXPECT_LT(item.begin, item.end);
        EXPECT_LE(item.end, tile.num_segments);
        num_longer += launch->split() && item.end - item.begin > 1 ? 1 : 0;
        EXPECT_TRUE(launch->split() || item.end - item.begin == tile.num_segments);
        for (int32_t segment = item.begin; segment < item.end; ++segment) {
          EXPECT_TRUE(segments.insert({item.tile, segment}).second);
          for (int64_t head = 0; head < c.kv_heads && launch->split(); ++head) {
            for (int r = 0; r < launch->tile_rows; ++r) {
              const int64_t at = StateIndex(tile, launch->tile_rows, head, segment, r);
              EXPECT_TRUE(at >= 0 && at < launch->num_states);
              EXPECT_TRUE(states.insert(at).second);
            }
          }
        }
      }
      size_t expected = 0;
      for (const PlannedTile& tile : launch->tiles) {
        expected += static_cast<size_t>(tile.num_segments);
      }
      EXPECT_EQ(segments.size(), expected);
      EXPECT_EQ(launch->items.size(), static_cast<size_t>(PaddedItems(num_items)));
    }
  }
  EXPECT_GT(num_longer, 0);
  EXPECT_GT(num_split, 0);
}

TEST(AttentionPlan, PaddingIsAtMostAnEighthAndLasts) {
  EXPECT_EQ(PaddedItems(0), 0);
  std::set<int64_t> sizes;
  for (int64_t n = 1; n <= 32768; ++n) {
    const int64_t padded = PaddedItems(n);
    EXPECT_GE(padded, n);
    EXPECT_LE(8 * (padded - n), n);
    EXPECT_EQ(PaddedItems(padded), padded);
    sizes.insert(padded);
  }
  EXPECT_LE(sizes.size(), 8u * 15) << "sizes of launches";
}

TEST(AttentionPlan, IsNotSplitBeyondItsMemory) {
  const std::vector<SequenceSlice> slices = {{0, 1, 5000, {}, -1, 0}};
  AttentionShape shape = ShapeOf({4, 128, 2, false, slices});
  AttentionPlan plan;
  plan.Make(slices, kWindows, shape);
  ASSERT_TRUE(plan.decode().split());
  const int64_t num_states = plan.decode().num_states;
  EXPECT_EQ(num_states, 10 * 2 * 4) << "10 segments, 2 heads, 4 rows";
  shape.max_states = num_states - 1;
  plan.Make(slices, kWindows, shape);
  EXPECT_FALSE(plan.decode().split());
  EXPECT_EQ(plan.decode().tiles[0].first_state, -1);
}

KvLayerLayout LayerOf(int64_t dim, int bits, QuantAxis axis, int64_t page_tokens) {
  KvCacheSpec spec;
  spec.kv_heads = 1;
  spec.head_dim = dim;
  spec.page_tokens = page_tokens;
  spec.sink_tokens = spec.recent_tokens = page_tokens;
  const QuantSpec side{.bits = bits, .axis = axis, .group_size = 8};
  spec.layers = {{side, side, false}};
  return KvLayout::Create(spec, CodeOrder::kRowMajor).value().layer(0);
}

// 32 bits from `bit` on, as the kernel's funnel shift reads them.
uint32_t ReadBits(const std::vector<uint32_t>& words, int64_t at, int64_t bit) {
  const auto i = static_cast<size_t>(at + (bit >> 5));
  const uint64_t two = words.at(i) | static_cast<uint64_t>(words.at(i + 1)) << 32;
  return static_cast<uint32_t>(two >> (bit & 31));
}

// Follows a strip of 32 tokens through shared memory, as CopyStrip lays it out and lanes read it.
TEST(StripIndex, LanesFindTheCodesThatTheLayoutPlaced) {
  std::mt19937 random(7);
  for (const int64_t dim : {8, 24, 48, 64, 80, 128, 256}) {
    for (const int bits : {2, 3, 4, 8}) {
      for (const int64_t page_tokens : {32, 128}) {
        const KvLayerLayout layer = LayerOf(dim, bits, QuantAxis::kInner, page_tokens);
        for (const bool keys : {true, false}) {
          const int64_t columns = keys ? dim : layer.padded_dim();
          std::vector<uint8_t> page(static_cast<size_t>(page_tokens * columns * bits / 8));
          for (uint8_t& byte : page) byte = static_cast<uint8_t>(random());
          const int64_t t0 = page_tokens - 32;
          const int64_t first = (keys ? layer.KeyCodeIndex(t0, 0) : layer.ValueCodeIndex(t0, 0));
          const uint8_t* strip = page.data() + first * bits / 8;
          const auto width = static_cast<int32_t>(columns);
          const PackedRows rows =
              keys ? PackRows(32, width, bits) : PackRowsDensely(32, width, bits);
          ASSERT_EQ(rows.pitch % 2 == 1 || !keys, true) << "lanes must meet different banks";
          ASSERT_EQ(static_cast<int64_t>(rows.num_words) * 4, 32 * columns * bits / 8);
          ASSERT_LE(rows.shared_words(), PlanAttentionShared(layer, 1, 2).floats -
                                             PlanAttentionShared(layer, 1, 2).strip);
          std::vector<uint32_t> shared(static_cast<size_t>(rows.shared_words()), 0xffffffffu);
          for (int32_t i = 0; i < rows.num_words; ++i) {
            uint32_t word;
            std::memcpy(&word, strip + i * 4, 4);
            shared.at(static_cast<size_t>(i / rows.row_words * rows.pitch + i % rows.row_words)) =
                word;
          }
          for (int64_t t = 0; t < 32; ++t) {
            for (int64_t d = 0; d < columns; ++d) {
              const int64_t index =
                  keys ? layer.KeyCodeIndex(t0 + t, d) : layer.ValueCodeIndex(t0 + t, d);
              const uint32_t want = ReadCode(page.data(), bits, index);
              // Keys: 8 codes a read, 4 where they have 8 bits. Values alike, from the lane's
              // first.
              const int64_t chunk = bits == 8 ? d / 4 * 4 : d / 8 * 8;
              const int64_t bit =
                  keys ? t * rows.lane_bits + chunk * bits : (t * columns + chunk) * bits;
              const int64_t at = keys ? t * rows.lane_words : 0;
              const uint32_t got =
                  ReadBits(shared, at, bit) >> ((d - chunk) * bits) & ((1u << bits) - 1u);
              ASSERT_EQ(got, want) << "dim " << dim << " bits " << bits << " t " << t << " d " << d;
            }
          }
        }
      }
    }
  }
}

// A square of codes, packed as sealing packs it, and taken by a warp's lanes into products: the
// sums must be where attention_mma.cuh expects them.
template <int kBits>
void ExpectSquareIsOperand() {
  std::mt19937 random(11);
  uint8_t codes[32][32], ordered[kSquareCodes];  // [inner][outer]; as FragmentIndex has them
  float rows[16][32];                            // [M][inner]
  for (int64_t inner = 0; inner < 32; ++inner) {
    for (auto& row : rows) row[inner] = static_cast<float>(random() % 17) - 8;
    for (int64_t outer = 0; outer < 32; ++outer) {
      codes[inner][outer] = static_cast<uint8_t>(random() & ((1u << kBits) - 1u));
      ordered[FragmentIndex(inner, outer)] = codes[inner][outer];
    }
  }
  alignas(16) uint32_t square[kSquareCodes * kBits / 32];
  for (int64_t i = 0; i < kSquareCodes * kBits / 32; ++i) {
    square[i] = PackFragmentWord(ordered, kBits, i);
  }
  for (int64_t i = 0; i < kSquareCodes; ++i) {
    ASSERT_EQ(ReadFragmentCode(reinterpret_cast<const uint8_t*>(square), kBits, i), ordered[i]);
  }
  const auto halves = [](float low, float high) {
    return F32ToF16(low) | static_cast<uint32_t>(F32ToF16(high)) << 16;
  };
  for (int tile = 0; tile < 4; ++tile) {
    float sums[32][4] = {};
    for (int step = 0; step < 2; ++step) {
      uint32_t a[32][4];
      emulation::MmaLane lanes[32];
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, first = lane % 4 * 8 + step * 4;
        uint32_t words[kBits];
        LoadLaneWords<kBits>(square, lane, words);
        for (int i = 0; i < 4; ++i) {
          const float* row = rows[g + i % 2 * 8] + first + i / 2 * 2;
          a[lane][i] = halves(row[0], row[1]);
        }
        for (int i = 0; i < 2; ++i) {
          const int pair = step * 2 + i, at = TileCodeBit(kBits, pair);
          const uint32_t two = TileCodes<kBits>(words, tile, pair);
          const uint32_t mask = ((1u << kBits) - 1u) * 0x00010001u << at;
          ASSERT_EQ(two & ~mask, 0u);
          ASSERT_LE(at + kBits, 10) << "a mantissa of F16 has 10 bits";
          lanes[lane].b[i] = halves(static_cast<float>((two & 0xffffu) >> at),
                                    static_cast<float>(two >> 16 >> at));
        }
        lanes[lane].a = a[lane];
        lanes[lane].c = sums[lane];
      }
      emulation::MultiplyAddFragments(lanes);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, outer = lane % 4 * 8 + 2 * tile + i % 2;
        float want = 0;
        for (int inner = 0; inner < 32; ++inner) {
          want += rows[row][inner] * static_cast<float>(codes[inner][outer]);
        }
        ASSERT_EQ(sums[lane][i], want) << kBits << " bits, tile " << tile << ", lane " << lane;
      }
    }
  }
}

TEST(StripIndex, SquaresOfCodesAreOperandsOfProducts) {
  ExpectSquareIsOperand<2>();
  ExpectSquareIsOperand<3>();
  ExpectSquareIsOperand<4>();
  ExpectSquareIsOperand<8>();
}

// Asynchronous copies move 16 bytes; a block of sm_120 has at most 99 KiB.
TEST(StripIndex, PartsOfAStageAreWholeVectorsAndFitABlock) {
  for (const int32_t dim : {64, 128}) {
    for (const int bits : {2, 3, 4, 8, 16}) {
      for (const QuantMode mode : {QuantMode::kSymmetric, QuantMode::kHybrid}) {
        const QuantSpec side{.bits = bits, .mode = mode};
        const KvLayerLayout layer =
            KvLayout::Create({.kv_heads = 1, .head_dim = dim, .layers = {{side, side, false}}},
                             CodeOrder::kMmaFragment)
                .value()
                .layer(0);
        for (const bool teams : {false, true}) {
          const MmaShape shape{dim, teams ? 1 : 2, teams ? kMmaTeams : 1};
          const MmaShared at = PlanMmaShared(layer, shape, 2, teams ? kMmaTeams * 32 : 64);
          // Pages of one strip lie in memory as in a stage.
          EXPECT_EQ(at.stage_bytes, bits == 16 ? 0 : layer.sealed_head_bytes);
          if (bits != 16) {
            EXPECT_EQ(at.key_scales, layer.key_scales);
            EXPECT_EQ(at.key_zeros, layer.key_zeros);
            EXPECT_EQ(at.value_codes, layer.value_codes);
            EXPECT_EQ(at.value_scales, layer.value_scales);
            EXPECT_EQ(at.value_zeros, layer.value_zeros);
          }
          for (const int32_t part :
               {at.key_scales, at.key_zeros, at.value_codes, at.value_scales, at.value_zeros,
                at.stage_bytes, at.team_bytes, at.parts, at.total, at.queries, shape.starts(),
                shape.sums(), shape.open_units(), shape.open_bytes(), shape.sealed_units(),
                shape.sealed_bytes()}) {
            EXPECT_EQ(part % 16, 0);
          }
          EXPECT_LE(at.bytes, 99 << 10);
        }
      }
    }
  }
}

TEST(StripIndex, GroupsPartitionAPageAndShareAScale) {
  for (const QuantAxis axis : {QuantAxis::kInner, QuantAxis::kOuter}) {
    for (const int64_t dim : {24, 64}) {
      const KvLayerLayout layer = LayerOf(dim, 3, axis, 64);
      for (const bool keys : {true, false}) {
        const bool along_channels = keys == (axis == QuantAxis::kInner);
        std::set<std::pair<int64_t, int64_t>> elements;
        std::set<int64_t> scales;
        for (int64_t j = 0; j < 64 * dim / 8; ++j) {
          std::set<int64_t> of_group;
          for (int64_t i = 0; i < 8; ++i) {
            const PageElement at = GroupElement(layer, 8, along_channels, i, j);
            EXPECT_TRUE(elements.insert({at.t, at.d}).second);
            of_group.insert(keys ? layer.KeyScaleIndex(at.t, at.d)
                                 : layer.ValueScaleIndex(at.t, at.d));
          }
          EXPECT_EQ(of_group.size(), 1u);
          EXPECT_TRUE(scales.insert(*of_group.begin()).second);
        }
        EXPECT_EQ(elements.size(), static_cast<size_t>(64 * dim));
      }
    }
  }
}

TEST(StripIndex, EightCodesPackAsOneByOne) {
  std::mt19937 random(3);
  for (const int bits : {2, 3, 4, 8}) {
    uint8_t codes[8], packed[8] = {}, expected[8] = {};
    for (int i = 0; i < 8; ++i) {
      codes[i] = static_cast<uint8_t>(random() & ((1u << bits) - 1u));
      WriteCode(expected, bits, i, codes[i]);
    }
    PackEightCodes(codes, bits, packed);
    EXPECT_EQ(std::memcmp(packed, expected, 8), 0) << bits;
  }
}

}  // namespace
}  // namespace innerq
