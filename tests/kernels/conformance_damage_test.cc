// The conformance suite catches a backend that is wrong.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "tests/kernels/conformance_parts.h"
#include "tests/kernels/conformance_suite.h"
#include "tests/kernels/forwarding_backend.h"

namespace innerq::conformance {
namespace {

// The ways in which BrokenBackend damages what the reference computed.
enum class Damage { kOneElement, kOneNaN, kShiftedRow, kAllSlightly, kBeyondTheEnd };

constexpr Damage kDamages[] = {Damage::kOneElement, Damage::kOneNaN, Damage::kShiftedRow,
                               Damage::kAllSlightly, Damage::kBeyondTheEnd};
constexpr float kSlightly = 1.002f;

// The reference with one kind of damage in the outputs of one operation.
class BrokenBackend final : public ForwardingBackend {
 public:
  BrokenBackend(Damage damage, std::string_view operation)
      : ForwardingBackend(CreateReferenceBackend()), damage_(damage), operation_(operation) {}

 private:
  void Break(std::string_view operation, TensorView out) {
    if (operation != operation_) return;
    float* data = out.As<float>();
    const int64_t n = out.shape.num_elements(), width = n / out.shape[0];
    switch (damage_) {
      case Damage::kOneElement:
        data[n / 2] += 0.1f + 0.1f * std::fabs(data[n / 2]);
        break;
      case Damage::kOneNaN:
        data[n - 1] = std::numeric_limits<float>::quiet_NaN();
        break;
      case Damage::kShiftedRow:
        std::memmove(data, data + 1, static_cast<size_t>(width - 1) * 4);
        data[width - 1] = 0;
        break;
      case Damage::kAllSlightly:
        for (int64_t i = 0; i < n; ++i) data[i] *= kSlightly;
        break;
      case Damage::kBeyondTheEnd:
        data[n] = 1;
        break;
    }
  }
  void BreakKeyNorm(const KeyNormArgs& args) {
    const int64_t dim = args.kv.layout->head_dim;
    float* norm = args.kv.KeyNorm(args.items[0].norm_id, 0);
    switch (damage_) {
      case Damage::kOneElement:
        norm[1] *= 1.0001f;
        break;
      case Damage::kOneNaN:
        norm[dim - 1] = std::numeric_limits<float>::quiet_NaN();
        break;
      case Damage::kShiftedRow:
        std::memmove(norm, norm + 1, static_cast<size_t>(dim - 1) * 4);
        break;
      case Damage::kAllSlightly:
        for (int64_t d = 0; d < dim; ++d) norm[d] *= kSlightly;
        break;
      case Damage::kBeyondTheEnd:
        args.kv.KeyNorm(args.items[0].norm_id - 1, 0)[dim - 1] = 1;
        break;
    }
  }
  void BreakSeal(const SealArgs& args) {
    const KvLayerLayout& layout = *args.kv.layout;
    const int64_t last = args.items.back().sealed_id;
    std::byte* head = args.kv.SealedHead(last, layout.kv_heads - 1);
    const int64_t scales = layout.key.quantized() ? layout.key_scales : layout.value_scales;
    const auto key_bytes = static_cast<size_t>(layout.key_scales - layout.key_codes);
    switch (damage_) {
      case Damage::kOneElement:  // one bit of one code
        head[layout.value_codes + 3] ^= std::byte{1};
        break;
      case Damage::kOneNaN:  // as one scale
        std::memcpy(head + scales, &kHalfNaN, sizeof(kHalfNaN));
        break;
      case Damage::kShiftedRow:  // of codes
        std::memmove(head + layout.key_codes, head + layout.key_codes + 1, key_bytes - 1);
        break;
      case Damage::kAllSlightly:  // a scale by one unit of its last place
        head[scales] ^= std::byte{1};
        break;
      case Damage::kBeyondTheEnd:  // in the next page
        args.kv.SealedHead(last + 1, 0)[layout.value_codes] ^= std::byte{1};
        break;
    }
  }
  void DoEmbed(const EmbedArgs& args) override { inner().Embed(args), Break("Embed", args.out); }
  void DoRmsNorm(const RmsNormArgs& args) override {
    inner().RmsNorm(args), Break("RmsNorm", args.out);
  }
  void DoMatMul(const MatMulArgs& args) override {
    inner().MatMul(args), Break("MatMul", args.out);
  }
  void DoRopeTable(const RopeTableArgs& args) override {
    inner().RopeTable(args), Break("RopeTable", args.sin);
  }
  void DoRopeAppend(const RopeAppendArgs& args) override {
    inner().RopeAppend(args), Break("RopeAppend", args.q);
  }
  void DoComputeKeyNorm(const KeyNormArgs& args) override {
    inner().ComputeKeyNorm(args);
    if (operation_ == "ComputeKeyNorm") BreakKeyNorm(args);
  }
  void DoSeal(const SealArgs& args) override {
    inner().Seal(args);
    if (operation_ == "Seal") BreakSeal(args);
  }
  void DoAttention(const AttentionArgs& args) override {
    inner().Attention(args), Break("Attention", args.out);
  }
  void DoSwiGlu(const SwiGluArgs& args) override {
    inner().SwiGlu(args), Break("SwiGlu", args.out);
  }
  void DoGatherRows(const GatherRowsArgs& args) override {
    inner().GatherRows(args), Break("GatherRows", args.out);
  }
  void DoSelectTop(const SelectTopArgs& args) override {
    inner().SelectTop(args);
    Break("SelectTop", {reinterpret_cast<std::byte*>(args.out.data()), DType::kF32,
                        Shape{args.x.shape[0], 2 * args.k}});
  }

  const Damage damage_;
  const std::string_view operation_;
};

TEST(ConformanceSuite, CatchesEveryDamageInEveryOperation) {
  for (const Damage damage : kDamages) {
    for (const ConformanceCheck& check : ConformanceChecks()) {
      BrokenBackend broken(damage, check.name);
      EXPECT_NE(check.run(broken), "")
          << check.name << " passed with damage " << static_cast<int>(damage);
    }
  }
}

TEST(ConformanceSuite, CatchesEveryDamageInEveryCaseOfTheCache) {
  for (const Damage damage : kDamages) {
    for (const CacheCheck& check : CacheChecks()) {
      for (const CacheCase& c : CacheCases()) {
        if (!check.applies(c.spec.layers[0])) continue;
        BrokenBackend broken(damage, check.name);
        EXPECT_NE(check.run(broken, c), "")
            << check.name << ", " << c.name << " passed with damage " << static_cast<int>(damage);
      }
    }
  }
}

}  // namespace
}  // namespace innerq::conformance
