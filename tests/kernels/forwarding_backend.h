// ForwardingBackend: another backend, every operation; what tests derive from to change one thing.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace innerq {

class ForwardingBackend : public Backend {
 public:
  explicit ForwardingBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  std::string_view name() const override { return inner_->name(); }
  CodeOrder code_order() const override { return inner_->code_order(); }
  bool deterministic() const override { return inner_->deterministic(); }
  Result<Buffer> Allocate(int64_t bytes) override { return inner_->Allocate(bytes); }
  Result<Buffer> Import(ConstTensorView host) override { return inner_->Import(host); }
  Result<void> Reserve(const StepLimits& limits) override { return inner_->Reserve(limits); }
  Result<void> Synchronize() override { return inner_->Synchronize(); }
  std::vector<int64_t> failed_seals() const override { return inner_->failed_seals(); }

 protected:
  Backend& inner() { return *inner_; }

  Result<void> DoPackWeight(std::span<const ConstTensorView> parts,
                            std::span<const ConstTensorView> bias, Weight* weight) override {
    ASSIGN_OR_RETURN(*weight, inner_->PackWeight(parts, bias, weight->format));
    return {};
  }
  Result<void> DoPackLowBitWeight(std::span<const LowBitMatrix> parts,
                                  std::span<const ConstTensorView> bias, Weight* weight) override {
    ASSIGN_OR_RETURN(*weight, inner_->PackLowBitWeight(parts, bias));
    return {};
  }
  void DoEmbed(const EmbedArgs& args) override { inner_->Embed(args); }
  void DoRmsNorm(const RmsNormArgs& args) override { inner_->RmsNorm(args); }
  void DoMatMul(const MatMulArgs& args) override { inner_->MatMul(args); }
  void DoRopeTable(const RopeTableArgs& args) override { inner_->RopeTable(args); }
  void DoRopeAppend(const RopeAppendArgs& args) override { inner_->RopeAppend(args); }
  void DoComputeKeyNorm(const KeyNormArgs& args) override { inner_->ComputeKeyNorm(args); }
  void DoSeal(const SealArgs& args) override { inner_->Seal(args); }
  void DoAttention(const AttentionArgs& args) override { inner_->Attention(args); }
  void DoSwiGlu(const SwiGluArgs& args) override { inner_->SwiGlu(args); }
  void DoGatherRows(const GatherRowsArgs& args) override { inner_->GatherRows(args); }
  void DoSelectTop(const SelectTopArgs& args) override { inner_->SelectTop(args); }
  void DoReadToHost(const std::byte* from, int64_t bytes, std::byte* to) override {
    inner_->ReadToHost(from, bytes, to);
  }

 private:
  const std::unique_ptr<Backend> inner_;
};

}  // namespace innerq
