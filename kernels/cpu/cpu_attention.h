// CpuAttention: everything of the CPU backend that touches cache pages.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_isa.h"

namespace innerq {

// Appends to, seals and reads pages in CodeOrder::kPanel16, on `threads` OpenMP threads. One thread
// at a time may call it. The result of a row of Attention depends on that row and its pages alone:
// not on the other rows, the slices, or the number of threads.
class CpuAttention {
 public:
  static std::unique_ptr<CpuAttention> Create(CpuIsa isa, int threads);
  virtual ~CpuAttention() = default;

  // Sizes the scratch memory of all threads; nothing else allocates. Errors: invalid argument for
  // more query heads per key/value head, or channels, than a tile holds; resource exhausted.
  virtual Result<void> Reserve(const StepLimits& limits) = 0;
  virtual void RopeAppend(const RopeAppendArgs& args) = 0;
  virtual void ComputeKeyNorm(const KeyNormArgs& args) = 0;
  // Returns the items that a non-finite value kept from being sealed, ascending.
  virtual std::vector<int64_t> Seal(const SealArgs& args) = 0;
  virtual void Attention(const AttentionArgs& args) = 0;
};

}  // namespace innerq
