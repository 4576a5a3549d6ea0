// ForwardBatch: everything a model needs to run one step over many sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace innerq {

// T rows; slices cover them in order. `slices[i].pages` points into `page_tables[i]`.
struct ForwardBatch {
  std::vector<int32_t> token_ids;  // [T]
  std::vector<int64_t> positions;  // [T]
  std::vector<std::vector<PageRef>> page_tables;
  std::vector<SequenceSlice> slices;
  std::vector<KeyNormItem> key_norms;  // run after the rows are appended, before seals
  std::vector<SealItem> seals;         // run before attention
  std::vector<int64_t> logit_rows;     // [R] rows whose logits are wanted, ascending
  // [R] how many of the row's largest logits are enough, up to kMaxTopLogits; 0: all are wanted.
  // Empty: all of all rows.
  std::vector<int32_t> num_top;

  int64_t num_rows() const { return static_cast<int64_t>(token_ids.size()); }
};

}  // namespace innerq
