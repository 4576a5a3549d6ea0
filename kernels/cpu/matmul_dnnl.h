// DnnlMatMul: dense products by oneDNN, in its own packed weight layout.
#pragma once

#include <memory>
#include <span>

#include "kernels/backend.h"
#include "kernels/cpu/op_table.h"

namespace innerq {

// BF16 and F32 products whose rows may depend on M: oneDNN sums in another order for another number
// of rows. It picks its instructions for the machine, whatever variant the backend runs, and so
// serves the machine's best variant only. One thread at a time may call it.
class DnnlMatMul {
  struct State;

 public:
  // Errors: internal from oneDNN.
  static Result<std::unique_ptr<DnnlMatMul>> Create(int threads);
  explicit DnnlMatMul(std::unique_ptr<State> state);
  ~DnnlMatMul();

  // True for formats that oneDNN multiplies here without widening: F32 always, BF16 where the
  // machine has AVX512_BF16. F16 never.
  bool Handles(WeightFormat format) const;

  // Packs parts [n_i, K], stacked along N, into the layout that oneDNN prefers for 512 rows; needs
  // memory for a second copy while it runs. Errors: resource exhausted; internal from oneDNN.
  Result<Buffer> Pack(std::span<const ConstTensorView> parts, WeightFormat format,
                      const OpTable& ops);

  // Bytes of scratch memory for a product of m rows of k inputs.
  static int64_t ScratchBytes(int64_t m, int64_t k);

  // Runs one product; creates oneDNN's plan of a shape on its first use. Errors: internal.
  Result<void> Run(const MatMulArgs& args, std::byte* scratch);

 private:
  std::unique_ptr<State> state_;
};

}  // namespace innerq
