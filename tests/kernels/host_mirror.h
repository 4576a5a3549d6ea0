// HostMirror: a backend whose memory the host cannot see, behind one that it can. Every operation
// takes its inputs to the device, runs there, waits, and brings back what it may have written, with
// guard bytes around outputs. So tests that read and write memory as they please check a device.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/host_memory.h"

namespace innerq {

class HostMirror final : public Backend {
 public:
  explicit HostMirror(std::unique_ptr<Backend> device) : device_(std::move(device)) {
    CHECK(!device_->host_visible(), "only a device needs a mirror");
  }

  std::string_view name() const override { return device_->name(); }
  CodeOrder code_order() const override { return device_->code_order(); }
  bool deterministic() const override { return device_->deterministic(); }

  // Host memory, known by its address so that operations find all of what a view points into.
  Result<Buffer> Allocate(int64_t bytes) override {
    ASSIGN_OR_RETURN(Buffer made, AllocateHost(bytes));
    auto owned = std::make_shared<Buffer>(std::move(made));
    std::byte* data = owned->data();
    (*pools_)[data] = bytes;
    return Buffer(data, bytes, [pools = pools_, owned](std::byte* freed) { pools->erase(freed); });
  }
  Result<Buffer> Import(ConstTensorView host) override {
    return Buffer(const_cast<std::byte*>(host.data), host.bytes(), nullptr);
  }
  Result<void> Reserve(const StepLimits& limits) override { return device_->Reserve(limits); }
  Result<void> Synchronize() override {
    failed_seals_ = std::exchange(failing_, {});
    return std::exchange(error_, Result<void>());
  }
  std::vector<int64_t> failed_seals() const override { return failed_seals_; }

 private:
  // On the device.
  Result<void> DoPackWeight(std::span<const ConstTensorView> parts,
                            std::span<const ConstTensorView> bias, Weight* weight) override {
    ASSIGN_OR_RETURN(*weight, device_->PackWeight(parts, bias, weight->format));
    return {};
  }

  Result<void> DoPackLowBitWeight(std::span<const LowBitMatrix> parts,
                                  std::span<const ConstTensorView> bias, Weight* weight) override {
    ASSIGN_OR_RETURN(*weight, device_->PackLowBitWeight(parts, bias));
    return {};
  }

  using Pools = std::map<std::byte*, int64_t>;
  static constexpr int64_t kGuard = 256;
  static constexpr std::byte kGuardByte{0x5a};

  // The device's memory of one operation. Finish brings back what it wrote.
  class Step {
   public:
    explicit Step(HostMirror& mirror) : mirror_(mirror) {}

    ConstTensorView In(const ConstTensorView& view) {
      return {Copy(view.data, view.bytes()).data(), view.dtype, view.shape};
    }
    // Also an input: what it holds is taken along.
    TensorView Out(const TensorView& view) {
      const int64_t bytes = view.bytes();
      std::vector<std::byte> guarded(static_cast<size_t>(bytes + 2 * kGuard), kGuardByte);
      if (bytes > 0) std::memcpy(guarded.data() + kGuard, view.data, static_cast<size_t>(bytes));
      Buffer& copy = Copy(guarded.data(), bytes + 2 * kGuard);
      outputs_.push_back({view.data, bytes, &copy, kGuard});
      return {copy.data() + kGuard, view.dtype, view.shape};
    }
    PagedKvView Cache(const PagedKvView& kv) {
      PagedKvView copy = kv;
      copy.open_pages = Pool(kv.open_pages);
      copy.sealed_pages = Pool(kv.sealed_pages);
      copy.key_norms = reinterpret_cast<float*>(Pool(reinterpret_cast<std::byte*>(kv.key_norms)));
      return copy;
    }
    void Finish() {
      std::deque<std::vector<std::byte>> read;
      for (const Output& output : outputs_) {
        std::vector<std::byte>& bytes =
            read.emplace_back(static_cast<size_t>(output.copy->bytes()));
        mirror_.device_->ReadToHost(output.copy->data(), output.copy->bytes(), bytes.data());
      }
      Result<void> result = mirror_.device_->Synchronize();
      if (!result.ok()) {
        mirror_.failing_ = mirror_.device_->failed_seals();
        return mirror_.Fail(result.error());
      }
      for (size_t i = 0; i < outputs_.size(); ++i) {
        const Output& output = outputs_[i];
        const auto bytes = static_cast<size_t>(output.bytes);
        const auto guard = static_cast<size_t>(output.guard);
        if (bytes > 0) std::memcpy(output.to, read[i].data() + guard, bytes);
        for (size_t g = 0; g < guard; ++g) {
          if (read[i][g] != kGuardByte || read[i][guard + bytes + g] != kGuardByte) {
            return mirror_.Fail({ErrorCode::kInternal, "wrote outside its output"});
          }
        }
      }
    }

   private:
    struct Output {
      std::byte* to;
      int64_t bytes;
      Buffer* copy;
      int64_t guard;
    };
    Buffer& Copy(const std::byte* data, int64_t bytes) {
      Result<Buffer> copy = mirror_.device_->Import({data, DType::kF16, Shape{CeilDiv(bytes, 2)}});
      CHECK(copy.ok(), copy.error().message);
      return buffers_.emplace_back(std::move(*copy));
    }
    // Copies the whole allocation that `data` points into, once.
    std::byte* Pool(std::byte* data) {
      if (data == nullptr) return nullptr;
      auto after = mirror_.pools_->upper_bound(data);
      CHECK(after != mirror_.pools_->begin(), "a cache of another backend");
      const auto& [begin, bytes] = *--after;
      for (const Output& output : outputs_) {
        if (output.to == begin) return output.copy->data() + (data - begin);
      }
      Buffer& copy = Copy(begin, bytes);
      outputs_.push_back({begin, bytes, &copy, 0});
      return copy.data() + (data - begin);
    }

    HostMirror& mirror_;
    std::deque<Buffer> buffers_;
    std::vector<Output> outputs_;
  };

  void Fail(Error error) {
    if (error_.ok()) error_ = std::move(error);
  }

  void DoEmbed(const EmbedArgs& args) override {
    Step step(*this);
    device_->Embed({args.token_ids, step.In(args.table), step.Out(args.out)});
    step.Finish();
  }
  void DoRmsNorm(const RmsNormArgs& args) override {
    Step step(*this);
    const TensorView out = step.Out(args.out);
    const ConstTensorView x = args.x.data == args.out.data ? out : step.In(args.x);
    device_->RmsNorm({x, step.In(args.weight), args.epsilon, out});
    step.Finish();
  }
  void DoMatMul(const MatMulArgs& args) override {
    Step step(*this);
    device_->MatMul({step.In(args.x), args.weight, args.accumulate, step.Out(args.out)});
    step.Finish();
  }
  void DoRopeTable(const RopeTableArgs& args) override {
    Step step(*this);
    device_->RopeTable(
        {args.positions, args.inverse_frequency, step.Out(args.cos), step.Out(args.sin)});
    step.Finish();
  }
  void DoRopeAppend(const RopeAppendArgs& args) override {
    Step step(*this);
    device_->RopeAppend({step.In(args.qkv), step.In(args.cos), step.In(args.sin),
                         step.Cache(args.kv), args.slices, step.Out(args.q)});
    step.Finish();
  }
  void DoComputeKeyNorm(const KeyNormArgs& args) override {
    Step step(*this);
    device_->ComputeKeyNorm({step.Cache(args.kv), args.items});
    step.Finish();
  }
  void DoSeal(const SealArgs& args) override {
    Step step(*this);
    device_->Seal({step.Cache(args.kv), args.items});
    step.Finish();
  }
  void DoAttention(const AttentionArgs& args) override {
    Step step(*this);
    AttentionArgs there = args;
    there.q = step.In(args.q);
    there.kv = step.Cache(args.kv);
    there.out = step.Out(args.out);
    device_->Attention(there);
    step.Finish();
  }
  void DoSwiGlu(const SwiGluArgs& args) override {
    Step step(*this);
    device_->SwiGlu({step.In(args.gate_up), step.Out(args.out)});
    step.Finish();
  }
  void DoGatherRows(const GatherRowsArgs& args) override {
    Step step(*this);
    device_->GatherRows({step.In(args.x), args.rows, step.Out(args.out)});
    step.Finish();
  }
  void DoSelectTop(const SelectTopArgs& args) override {
    Step step(*this);
    const auto size = static_cast<int64_t>(args.out.size());
    const TensorView out =
        step.Out({reinterpret_cast<std::byte*>(args.out.data()), DType::kF32, Shape{size, 2}});
    device_->SelectTop({step.In(args.x), args.k, {out.As<TopLogit>(), args.out.size()}});
    step.Finish();
  }

  std::unique_ptr<Backend> device_;
  std::shared_ptr<Pools> pools_ = std::make_shared<Pools>();
  Result<void> error_;
  std::vector<int64_t> failing_, failed_seals_;  // since, and before the last Synchronize
};

}  // namespace innerq
