// StepModel: the seam between the engine and whatever computes a step; tests script it.
#pragma once

#include <span>
#include <vector>

#include "kernels/paged_kv.h"
#include "kernels/result.h"
#include "models/forward_batch.h"

namespace innerq {

// Computes steps over a cache that it owns. Called by the engine thread alone.
class StepModel {
 public:
  virtual ~StepModel() = default;
  virtual int64_t vocab_size() const = 0;
  virtual const KvLayout& layout() const = 0;
  virtual int64_t num_open_pages() const = 0;    // size of the F16 pool
  virtual int64_t num_sealed_pages() const = 0;  // size of the quantized pool
  virtual int64_t num_norm_slots() const = 0;    // sequences that can hold a key norm
  // Rows of a step whose logits it can return; at least one per sequence that runs.
  virtual int64_t max_logit_rows() const = 0;
  // Threads of the host that are free between steps.
  virtual int host_threads() const { return 1; }
  // Groups of all pages sealed so far, per layer; empty for models that do not count them.
  virtual std::vector<LayerGroups> sealed_groups() const { return {}; }
  // Runs the step and waits for it. Returns logits [R][V] F32, valid until the next call; a row
  // that top_logits() has is not in them.
  // Errors: internal for a failed step; unavailable if the device is lost for good. A step may be
  // run again, as a whole or without some of its sequences.
  virtual Result<std::span<const float>> Step(const ForwardBatch& batch) = 0;
  // The batch.num_top[row] largest of the last step's logits `row`, the largest first, valid as
  // long as they; empty if Step returned all. See SelectTopArgs.
  virtual std::span<const TopLogit> top_logits(int64_t /*row*/) const { return {}; }
  // Which of the batch's `seals` made the last step fail, ascending: what their pages hold is not
  // finite. Empty if it failed for a reason that is no sequence's own, or not.
  virtual std::vector<int64_t> failed_seals() const { return {}; }
};

}  // namespace innerq
