// The functions of OpTable in Highway, compiled once per instruction set.
//
// Lanes are outputs (products) or channels (rows): a product needs no sum across lanes, and its sum
// over k is one chain of multiply-adds per output, in the order of k, however rows are blocked.

// Scalar (the compiler's baseline), AVX2 and AVX-512: the steps between are not worth their size.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd_ops.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h.
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/float16_simd_inl.h"
#include "kernels/cpu/op_table.h"
#include "kernels/float16.h"

#if HWY_ONCE
#include "kernels/result.h"
#endif

HWY_BEFORE_NAMESPACE();
namespace innerq {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32Tag = hn::CappedTag<float, 16>;
using U32Tag = hn::RebindToUnsigned<F32Tag>;
using F32Vector = hn::Vec<F32Tag>;
constexpr int kLanes = static_cast<int>(HWY_LANES(float));
constexpr int kPanelVectors = static_cast<int>(kPanelOutputs) / kLanes;

// The largest block of rows that keeps its sums in registers; a power of two.
constexpr int kMaxBlockRows = kLanes >= 16 ? 8 : kLanes >= 8 ? 4 : 1;

// Vectors of outputs in a block: enough independent chains to hide the latency of multiply-add.
constexpr int BlockVectors(int rows) {
  return rows > 1 ? 2 : kPanelVectors < 8 ? kPanelVectors : 8;
}

template <class D>
HWY_INLINE hn::Vec<D> LoadBF16(D d, const uint16_t* x) {
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint16_t, D> d16;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(d16, x))));
}

// Nearest BF16, ties to even, as F32; NaN stays NaN.
template <class D>
HWY_INLINE hn::Vec<D> RoundToBF16(D d, hn::Vec<D> x) {
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(du, 0x7fff)), odd);
  const auto kept = hn::And(rounded, hn::Set(du, 0xffff0000u));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::BitCast(d, kept));
}

// Calls f(d, i) for all of [0, c): whole vectors, then single channels.
template <class F>
HWY_INLINE void ForChannels(int64_t c, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) f(F32Tag(), i);
  for (; i < c; ++i) f(hn::CappedTag<float, 1>(), i);
}

struct ScaleByWeight {
  template <class D>
  HWY_INLINE void operator()(D d, int64_t i) const {
    const auto scaled = hn::Mul(hn::LoadU(d, x + i), hn::Set(d, scale));
    hn::StoreU(hn::Mul(scaled, hn::LoadU(d, weight + i)), d, out + i);
  }
  const float* x;
  const float* weight;
  float scale;
  float* out;
};

void RmsNorm(const float* x, const float* weight, int64_t c, float epsilon, float* out) {
  const F32Tag d;
  F32Vector sums[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= c; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const F32Vector v = hn::LoadU(d, x + i + j * kLanes);
      sums[j] = hn::MulAdd(v, v, sums[j]);
    }
  }
  const F32Vector sum = hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3]));
  float square = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < c; ++i) square += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(square / static_cast<float>(c) + epsilon);
  ForChannels(c, ScaleByWeight{x, weight, scale, out});
}

struct GateUp {
  template <class D>
  HWY_INLINE void operator()(D d, int64_t i) const {
    const auto one = hn::Set(d, 1.0f);
    const auto g = hn::LoadU(d, gate + i);
    // exp(-|g|) cannot overflow: sigmoid(g) is 1 / (1 + e) or, for negative g, e / (1 + e).
    const auto e = hn::Exp(d, hn::Neg(hn::Abs(g)));
    const auto top = hn::IfThenElse(hn::Lt(g, hn::Zero(d)), e, one);
    const auto silu = hn::Mul(g, hn::Div(top, hn::Add(one, e)));
    hn::StoreU(hn::Mul(silu, hn::LoadU(d, up + i)), d, out + i);
  }
  const float* gate;
  const float* up;
  float* out;
};

void SwiGlu(const float* gate, const float* up, int64_t c, float* out) {
  ForChannels(c, GateUp{gate, up, out});
}

struct WidenF16 {
  template <class D>
  HWY_INLINE void operator()(D d, int64_t i) const {
    hn::StoreU(LoadF16(d, x + i), d, out + i);
  }
  const uint16_t* x;
  float* out;
};

void F16ToF32Row(const uint16_t* x, int64_t c, float* out) { ForChannels(c, WidenF16{x, out}); }

struct WidenBF16 {
  template <class D>
  HWY_INLINE void operator()(D d, int64_t i) const {
    hn::StoreU(LoadBF16(d, x + i), d, out + i);
  }
  const uint16_t* x;
  float* out;
};

void BF16ToF32Row(const uint16_t* x, int64_t c, float* out) { ForChannels(c, WidenBF16{x, out}); }

struct RoundRow {
  template <class D>
  HWY_INLINE void operator()(D d, int64_t i) const {
    hn::StoreU(RoundToBF16(d, hn::LoadU(d, x + i)), d, out + i);
  }
  const float* x;
  float* out;
};

// BF16 values, kept as F32: [M, K rounded up].
void PackRounded(const float* x, int64_t rows, int64_t block_rows, int64_t k, std::byte* packed) {
  const int64_t depth = PackedDepth(WeightFormat::kBF16, k);
  float* out = reinterpret_cast<float*>(packed);
  for (int64_t r = 0; r < rows; ++r) {
    ForChannels(k, RoundRow{x + r * k, out + r * depth});
    std::fill(out + r * depth + k, out + (r + 1) * depth, 0.0f);
  }
  std::fill(out + rows * depth, out + block_rows * depth, 0.0f);
}

// Adds k inputs of kRows rows times kVectors vectors of outputs of a panel to sum.
template <WeightFormat kFormat, int kRows, int kVectors>
HWY_INLINE void AddProducts(const float* x, int64_t k, const std::byte* panel,
                            F32Vector (&sum)[kRows][kVectors]) {
  const F32Tag d;
  const U32Tag du;
  constexpr int64_t kStep = kFormat == WeightFormat::kBF16 ? 2 : 1;
  constexpr int64_t kStepBytes = kPanelOutputs * (kFormat == WeightFormat::kF16 ? 2 : 4);
  constexpr int64_t kLaneBytes = kStepBytes / kPanelOutputs;
  constexpr int64_t kAhead = 4096;  // bytes: covers the latency of memory at the rate of one core
  for (int64_t i = 0; i < k; i += kStep, panel += kStepBytes) {
    if (kRows == 1) __builtin_prefetch(panel + kAhead);
    if (kRows == 1 && kStepBytes > 64) __builtin_prefetch(panel + kAhead + 64);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const std::byte* lanes = panel + v * kLanes * kLaneBytes;
      if constexpr (kFormat == WeightFormat::kBF16) {
        const auto pair = hn::LoadU(du, reinterpret_cast<const uint32_t*>(lanes));
        const F32Vector even = hn::BitCast(d, hn::ShiftLeft<16>(pair));
        const F32Vector odd = hn::BitCast(d, hn::And(pair, hn::Set(du, 0xffff0000u)));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sum[r][v] = hn::MulAdd(hn::Set(d, x[r * k + i]), even, sum[r][v]);
          sum[r][v] = hn::MulAdd(hn::Set(d, x[r * k + i + 1]), odd, sum[r][v]);
        }
      } else {
        F32Vector w;
        if constexpr (kFormat == WeightFormat::kF16) {
          w = LoadF16(d, reinterpret_cast<const uint16_t*>(lanes));
        } else {
          w = hn::LoadU(d, reinterpret_cast<const float*>(lanes));
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sum[r][v] = hn::MulAdd(hn::Set(d, x[r * k + i]), w, sum[r][v]);
        }
      }
    }
  }
}

// Writes one finished vector of sums to outputs [n, n + kLanes) of a row, as far as they exist.
HWY_INLINE void StoreSums(const PanelTask& task, int64_t row, int64_t n, F32Vector sum) {
  const F32Tag d;
  float* out = task.out + row * task.n + n;
  if (n + kLanes <= task.n) {
    if (task.bias != nullptr) sum = hn::Add(sum, hn::LoadU(d, task.bias + n));
    if (task.accumulate) sum = hn::Add(sum, hn::LoadU(d, out));
    hn::StoreU(sum, d, out);
    return;
  }
  alignas(64) float lanes[kLanes];
  hn::Store(sum, d, lanes);
  for (int64_t i = 0; i < task.n - n; ++i) {
    const float value = task.bias != nullptr ? lanes[i] + task.bias[n + i] : lanes[i];
    out[i] = task.accumulate ? value + out[i] : value;
  }
}

// Multiplies blocks of kRows rows from `row` on by one panel, then smaller blocks for the rest.
template <WeightFormat kFormat, int kRows>
HWY_INLINE void MultiplyRows(const PanelTask& task, int64_t panel, int64_t row) {
  constexpr int kVectors = BlockVectors(kRows);
  constexpr int64_t kWeightBytes = kFormat == WeightFormat::kF32 ? 4 : 2;
  const float* x = reinterpret_cast<const float*>(task.activations);
  const std::byte* weight = task.weight + panel * task.k * kPanelOutputs * kWeightBytes;
  constexpr int64_t kVectorBytes = kLanes * (kFormat == WeightFormat::kF16 ? 2 : 4);
  for (; row + kRows <= task.row_end; row += kRows) {
    for (int v = 0; v < kPanelVectors; v += kVectors) {
      F32Vector sum[kRows][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) sum[r][j] = hn::Zero(F32Tag());
      }
      AddProducts<kFormat, kRows, kVectors>(x + row * task.k, task.k, weight + v * kVectorBytes,
                                            sum);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
          const int64_t n = panel * kPanelOutputs + (v + j) * kLanes;
          if (n < task.n) StoreSums(task, row + r, n, sum[r][j]);
        }
      }
    }
  }
  if constexpr (kRows > 1) MultiplyRows<kFormat, kRows / 2>(task, panel, row);
}

template <WeightFormat kFormat>
void Multiply(const PanelTask& task) {
  for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
    MultiplyRows<kFormat, kMaxBlockRows>(task, panel, task.row_begin);
  }
}

OpTable MakeOpTable() {
  OpTable ops;
  ops.rms_norm = RmsNorm;
  ops.swiglu = SwiGlu;
  ops.f16_to_f32 = F16ToF32Row;
  ops.bf16_to_f32 = BF16ToF32Row;
  ops.matmul[static_cast<size_t>(WeightFormat::kBF16)] = {PackRounded, 4,
                                                          Multiply<WeightFormat::kBF16>};
  ops.matmul[static_cast<size_t>(WeightFormat::kF16)] = {nullptr, 0, Multiply<WeightFormat::kF16>};
  ops.matmul[static_cast<size_t>(WeightFormat::kF32)] = {nullptr, 0, Multiply<WeightFormat::kF32>};
  return ops;
}

}  // namespace HWY_NAMESPACE
}  // namespace innerq
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace innerq {

OpTable OpTableFor(CpuIsa isa) {
#if HWY_ARCH_X86
  if (isa == CpuIsa::kAvx2) return N_AVX2::MakeOpTable();
  if (isa >= CpuIsa::kAvx512) {
    OpTable ops = N_AVX3::MakeOpTable();
    MatMulKernel& bf16 = ops.matmul[static_cast<size_t>(WeightFormat::kBF16)];
    if (isa == CpuIsa::kAvx512Vnni) bf16 = Avx512Bf16MatMul();
    if (isa == CpuIsa::kAmx) bf16 = AmxMatMul();
    return ops;
  }
#endif
  CHECK(isa == CpuIsa::kScalar, "no such variant in this build");
  return HWY_STATIC_DISPATCH(MakeOpTable)();
}

}  // namespace innerq
#endif  // HWY_ONCE
