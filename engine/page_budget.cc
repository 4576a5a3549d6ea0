#include "engine/page_budget.h"

#include <algorithm>

namespace innerq {
namespace {

// Pages that are sealed once positions [0, num_positions) have been computed.
int64_t NumSealed(const KvLayout& layout, int64_t num_positions, int64_t exact_before) {
  return num_positions == 0 ? 0 : layout.SealedPages(num_positions - 1, exact_before).size();
}

int64_t NumNorms(const KvLayout& layout, int64_t num_sealed) {
  return layout.normalizes_keys() && num_sealed > 0 ? 1 : 0;
}

}  // namespace

std::string ToString(const PageCounts& counts) {
  return std::to_string(counts.open) + " open pages, " + std::to_string(counts.sealed) +
         " sealed pages, " + std::to_string(counts.norms) + " key norms";
}

PageCounts ChunkPages(const KvLayout& layout, int64_t begin, int64_t end, int64_t exact_before) {
  const int64_t page_tokens = layout.page_tokens();
  const int64_t sealed_before = NumSealed(layout, begin, exact_before);
  const int64_t sealed_after = NumSealed(layout, end, exact_before);
  return {.open = CeilDiv(end, page_tokens) - CeilDiv(begin, page_tokens),
          .sealed = sealed_after - sealed_before,
          .norms = NumNorms(layout, sealed_after) - NumNorms(layout, sealed_before)};
}

PageCounts PeakPages(const KvLayout& layout, int64_t num_positions, int64_t exact_before) {
  const int64_t pages = CeilDiv(num_positions, layout.page_tokens());
  const int64_t sealed = NumSealed(layout, num_positions, exact_before);
  // Nothing seals before the row at `exact_before` has been appended.
  const int64_t open_until_first_seal = CeilDiv(exact_before + 1, layout.page_tokens());
  const int64_t open =
      layout.quantized() ? std::max(OpenWindowPages(layout), open_until_first_seal) : pages;
  return {.open = std::min(pages, open), .sealed = sealed, .norms = NumNorms(layout, sealed)};
}

PageCounts WorstPeakPages(const KvLayout& layout, int64_t num_positions, bool exact_prefill) {
  PageCounts worst = PeakPages(layout, num_positions, /*exact_before=*/0);
  if (exact_prefill) worst.open = CeilDiv(num_positions, layout.page_tokens());
  return worst;
}

int64_t OpenWindowPages(const KvLayout& layout) {
  return layout.sink_pages() + layout.recent_pages() + 2;
}

}  // namespace innerq
