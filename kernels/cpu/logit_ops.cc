// LogitOps in Highway, compiled once per instruction set.

// Scalar (the compiler's baseline), AVX2 and AVX-512: the steps between are not worth their size.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/logit_ops.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h.
#include <algorithm>
#include <limits>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/logit_ops.h"

#if HWY_ONCE
#include "kernels/result.h"
#endif

HWY_BEFORE_NAMESPACE();
namespace innerq {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32Tag = hn::CappedTag<float, 16>;
using F64Tag = hn::CappedTag<double, 8>;
using HalfTag = hn::Rebind<float, F64Tag>;
constexpr size_t kLanes = HWY_LANES(float);
constexpr size_t kWideLanes = HWY_LANES(double);
constexpr F32Tag kF32;
constexpr F64Tag kF64;
constexpr HalfTag kHalf;

LargestLogit Largest(std::span<const float> logits) {
  const size_t count = logits.size(), whole = count / kLanes * kLanes;
  constexpr float kNegative = -std::numeric_limits<float>::infinity();
  auto largest = hn::Set(kF32, kNegative);
  auto broken = hn::Zero(kF32);  // x - x is 0 for finite x, else NaN, and so are sums with it
  for (size_t i = 0; i < whole; i += kLanes) {
    const auto x = hn::LoadU(kF32, logits.data() + i);
    largest = hn::Max(largest, x);
    broken = hn::Add(broken, hn::Sub(x, x));
  }
  float max = hn::GetLane(hn::MaxOfLanes(kF32, largest));
  float sum = hn::GetLane(hn::SumOfLanes(kF32, broken));
  for (size_t i = whole; i < count; ++i) {
    max = std::max(max, logits[i]);
    sum += logits[i] - logits[i];
  }
  return {.value = max, .finite = sum == 0};
}

void Weigh(const WeighArgs& args) {
  const auto& [logits, max, temperature, weights, sums] = args;
  const auto origin = hn::Set(kF32, max), divisor = hn::Set(kF32, temperature);
  const auto weigh = [&](auto x) { return hn::Exp(kF32, hn::Div(hn::Sub(x, origin), divisor)); };
  for (size_t block = 0; block < sums.size(); ++block) {
    const size_t begin = block * static_cast<size_t>(kLogitBlock);
    const size_t end = std::min(begin + static_cast<size_t>(kLogitBlock), logits.size());
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      hn::StoreU(weigh(hn::LoadU(kF32, logits.data() + i)), kF32, weights.data() + i);
    }
    if (i < end) {
      HWY_ALIGN float tail[kLanes] = {};
      std::copy(logits.data() + i, logits.data() + end, tail);
      hn::Store(weigh(hn::Load(kF32, tail)), kF32, tail);
      std::copy(tail, tail + (end - i), weights.data() + i);
    }
    auto sum = hn::Zero(kF64);
    for (i = begin; i + kWideLanes <= end; i += kWideLanes) {
      sum = hn::Add(sum, hn::PromoteTo(kF64, hn::LoadU(kHalf, weights.data() + i)));
    }
    double total = hn::GetLane(hn::SumOfLanes(kF64, sum));
    for (; i < end; ++i) total += weights[i];
    sums[block] = total;
  }
}

LogitOps MakeLogitOps() { return {.largest = Largest, .weigh = Weigh}; }

}  // namespace HWY_NAMESPACE
}  // namespace innerq
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace innerq {

LogitOps LogitOpsFor(CpuIsa isa) {
#if HWY_ARCH_X86
  if (isa == CpuIsa::kAvx2) return N_AVX2::MakeLogitOps();
  if (isa >= CpuIsa::kAvx512) return N_AVX3::MakeLogitOps();
#endif
  CHECK(isa == CpuIsa::kScalar, "no such variant in this build");
  return HWY_STATIC_DISPATCH(MakeLogitOps)();
}

const LogitOps& BestLogitOps() {
  static const LogitOps ops = LogitOpsFor(SupportedCpuIsas().front());
  return ops;
}

}  // namespace innerq
#endif  // HWY_ONCE
