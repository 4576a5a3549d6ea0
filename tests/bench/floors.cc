#include "tests/bench/floors.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <dnnl.hpp>
#include <vector>

#include "kernels/cpu/read_bandwidth.h"
#include "kernels/float16.h"

namespace innerq {

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

double Fastest(const std::vector<double>& values) {
  return *std::min_element(values.begin(), values.end());
}

double ReadBandwidth(int threads) { return *MeasureReadBandwidth(threads); }

double DnnlBf16Seconds(int64_t m, int64_t n, int64_t k, int threads) {
  using Memory = dnnl::memory;
  constexpr int kRuns = 9;
  constexpr size_t kRotatedBytes = size_t{256} << 20;
  omp_set_num_threads(threads);
  dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const auto any = Memory::format_tag::any;
  const Memory::desc x_any({m, k}, Memory::data_type::bf16, any);
  const Memory::desc w_any({k, n}, Memory::data_type::bf16, any);
  const Memory::desc out_plain({m, n}, Memory::data_type::f32, Memory::format_tag::ab);
  const dnnl::matmul::primitive_desc plan(dnnl::matmul::desc(x_any, w_any, out_plain), engine);
  const dnnl::matmul product(plan);

  // Written, non-zero memory in plain layout, reordered into the plan's.
  const auto filled = [&](const Memory::desc& plain, const Memory::desc& wanted) {
    Memory from(plain, engine), to(wanted, engine);
    auto* data = static_cast<uint16_t*>(from.get_data_handle());
    const size_t count = plain.get_size() / 2;
    for (size_t i = 0; i < count; ++i) {
      data[i] = F32ToBF16(static_cast<float>(i * 2654435761u % 2048) / 1024.0f - 1.0f);
    }
    dnnl::reorder(from, to).execute(stream, from, to);
    stream.wait();
    return to;
  };
  Memory x = filled({{m, k}, Memory::data_type::bf16, Memory::format_tag::ab}, plan.src_desc());
  std::vector<Memory> weights;
  const size_t copies = std::max<size_t>(2, kRotatedBytes / static_cast<size_t>(n * k * 2));
  for (size_t i = 0; i < copies; ++i) {
    weights.push_back(
        filled({{k, n}, Memory::data_type::bf16, Memory::format_tag::ab}, plan.weights_desc()));
  }
  Memory out(out_plain, engine);
  std::vector<double> seconds;
  for (int run = 0; run < kRuns; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    product.execute(stream, {{DNNL_ARG_SRC, x},
                             {DNNL_ARG_WEIGHTS, weights[static_cast<size_t>(run) % copies]},
                             {DNNL_ARG_DST, out}});
    stream.wait();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + kRuns / 2, seconds.end());
  return seconds[kRuns / 2];
}

}  // namespace innerq
