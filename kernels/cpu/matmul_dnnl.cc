#include "kernels/cpu/matmul_dnnl.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <dnnl.hpp>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/cpu/host_memory.h"
#include "kernels/cpu/matmul_pack.h"
#include "kernels/float16.h"

namespace innerq {
namespace {

using Memory = dnnl::memory;

// Every M has plans of its own, so chunks of changing length would add to them without end: beyond
// this many all are dropped, and those in use made anew.
constexpr size_t kMaxPlans = 64;
constexpr int64_t kLayoutRows = 512;  // M that the weight layout is chosen for; it serves every M

Memory::data_type TypeOf(WeightFormat format) {
  return format == WeightFormat::kBF16 ? Memory::data_type::bf16 : Memory::data_type::f32;
}

Error DnnlError(const dnnl::error& error) {
  return {ErrorCode::kInternal, std::string("oneDNN: ") + error.what()};
}

// A matrix [rows, cols], row-major.
Memory::desc Plain(int64_t rows, int64_t cols, Memory::data_type type) {
  return {{rows, cols}, type, Memory::format_tag::ab};
}

// What makes two products share a plan.
struct PlanKey {
  WeightFormat format;
  int64_t m, n, k;
  bool bias, accumulate;
  auto Tie() const { return std::tie(format, m, n, k, bias, accumulate); }
  bool operator<(const PlanKey& other) const { return Tie() < other.Tie(); }
};

struct Plan {
  dnnl::matmul::primitive_desc description;
  dnnl::matmul product;
};

}  // namespace

struct DnnlMatMul::State {
  int threads = 1;
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<PlanKey, Plan> plans;

  // oneDNN takes the number of threads from the calling thread's OpenMP setting.
  void SetThreads() const {
#if defined(_OPENMP)
    omp_set_num_threads(threads);
#endif
  }

  Memory::desc WeightLayout(WeightFormat format, int64_t n, int64_t k) const {
    const auto type = TypeOf(format);
    const dnnl::matmul::desc product(Plain(kLayoutRows, k, type),
                                     Memory::desc({k, n}, type, Memory::format_tag::any),
                                     Plain(kLayoutRows, n, Memory::data_type::f32));
    return dnnl::matmul::primitive_desc(product, engine).weights_desc();
  }

  const Plan& PlanOf(const PlanKey& key) {
    const auto found = plans.find(key);
    if (found != plans.end()) return found->second;
    if (plans.size() >= kMaxPlans) plans.clear();
    const auto x = Plain(key.m, key.k, TypeOf(key.format));
    const auto weight = WeightLayout(key.format, key.n, key.k);
    const auto out = Plain(key.m, key.n, Memory::data_type::f32);
    const auto bias = Plain(1, key.n, Memory::data_type::f32);
    dnnl::primitive_attr attributes;
    if (key.accumulate) {
      dnnl::post_ops sum;
      sum.append_sum(1.0f);
      attributes.set_post_ops(sum);
    }
    const dnnl::matmul::desc product =
        key.bias ? dnnl::matmul::desc(x, weight, bias, out) : dnnl::matmul::desc(x, weight, out);
    const dnnl::matmul::primitive_desc description(product, attributes, engine);
    return plans.emplace(key, Plan{description, dnnl::matmul(description)}).first->second;
  }
};

Result<std::unique_ptr<DnnlMatMul>> DnnlMatMul::Create(int threads) {
  try {
    auto state = std::make_unique<State>();
    state->threads = threads;
    return std::make_unique<DnnlMatMul>(std::move(state));
  } catch (const dnnl::error& error) {
    return DnnlError(error);
  }
}

DnnlMatMul::DnnlMatMul(std::unique_ptr<State> state) : state_(std::move(state)) {}
DnnlMatMul::~DnnlMatMul() = default;

bool DnnlMatMul::Handles(WeightFormat format) const {
  switch (format) {
    case WeightFormat::kBF16:
      return SupportedCpuIsas().front() >= CpuIsa::kAvx512Vnni;
    case WeightFormat::kF16:
      return false;
    case WeightFormat::kF32:
      return true;
  }
  return false;
}

Result<Buffer> DnnlMatMul::Pack(std::span<const ConstTensorView> parts, WeightFormat format,
                                const OpTable& ops) {
  const int64_t k = parts[0].shape[1];
  int64_t n = 0;
  for (const ConstTensorView& part : parts) n += part.shape[0];
  const bool is_bf16 = format == WeightFormat::kBF16;
  ASSIGN_OR_RETURN(Buffer plain, AllocateHost(n * k * (is_bf16 ? 2 : 4)));
  std::byte* to = plain.data();
  std::vector<float> row(static_cast<size_t>(k));
  for (const ConstTensorView& part : parts) {
    for (int64_t r = 0; r < part.shape[0]; ++r) {
      float* values = is_bf16 ? row.data() : reinterpret_cast<float*>(to);
      ReadFloats(part, r * k, k, ops, values);
      if (is_bf16) {
        std::transform(values, values + k, reinterpret_cast<uint16_t*>(to), F32ToBF16);
      }
      to += k * (is_bf16 ? 2 : 4);
    }
  }
  try {
    state_->SetThreads();
    const Memory::desc layout = state_->WeightLayout(format, n, k);
    ASSIGN_OR_RETURN(Buffer packed, AllocateHost(static_cast<int64_t>(layout.get_size())));
    // [K, N] of oneDNN is [N, K] of ours, transposed.
    const Memory::desc ours({k, n}, TypeOf(format), Memory::format_tag::ba);
    Memory from(ours, state_->engine, plain.data());
    Memory into(layout, state_->engine, packed.data());
    dnnl::reorder(from, into).execute(state_->stream, from, into);
    state_->stream.wait();
    return packed;
  } catch (const dnnl::error& error) {
    return DnnlError(error);
  }
}

int64_t DnnlMatMul::ScratchBytes(int64_t m, int64_t k) { return m * k * 2; }

Result<void> DnnlMatMul::Run(const MatMulArgs& args, std::byte* scratch) {
  const Weight& weight = *args.weight;
  const int64_t m = args.x.shape[0], n = weight.rows, k = weight.cols;
  const bool has_bias = weight.bias.data() != nullptr;
  const std::byte* x = args.x.data;
  if (weight.format == WeightFormat::kBF16) {
    uint16_t* rounded = reinterpret_cast<uint16_t*>(scratch);
#pragma omp parallel for num_threads(state_->threads)
    for (int64_t row = 0; row < m; ++row) {
      const float* from = args.x.As<float>() + row * k;
      std::transform(from, from + k, rounded + row * k, F32ToBF16);
    }
    x = scratch;
  }
  try {
    state_->SetThreads();
    const PlanKey key{weight.format, m, n, k, has_bias, args.accumulate};
    const Plan& plan = state_->PlanOf(key);
    const auto bind = [&](const Memory::desc& layout, const std::byte* data) {
      return Memory(layout, state_->engine, const_cast<std::byte*>(data));
    };
    std::unordered_map<int, Memory> operands = {
        {DNNL_ARG_SRC, bind(plan.description.src_desc(), x)},
        {DNNL_ARG_WEIGHTS, bind(plan.description.weights_desc(), weight.data.data())},
        {DNNL_ARG_DST, bind(plan.description.dst_desc(), args.out.data)}};
    if (has_bias) {
      operands.emplace(DNNL_ARG_BIAS, bind(plan.description.bias_desc(), weight.bias.data()));
    }
    plan.product.execute(state_->stream, operands);
    state_->stream.wait();
    return {};
  } catch (const dnnl::error& error) {
    return DnnlError(error);
  }
}

}  // namespace innerq
