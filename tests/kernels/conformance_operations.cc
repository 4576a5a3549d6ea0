// Checks of the operations that know no cache.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <span>

#include "kernels/float16.h"
#include "tests/kernels/conformance_parts.h"
#include "tests/kernels/conformance_suite.h"
#include "tests/kernels/low_bit_case.h"

namespace innerq::conformance {
namespace {

std::string CheckEmbed(Backend& candidate) {
  std::mt19937_64 random(kSeed);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int64_t width : {8, 64, 100}) {
      const int64_t vocab = 37;
      std::vector<uint32_t> table(static_cast<size_t>(vocab * width));
      const std::vector<float> values = Normal(random, vocab * width);
      for (size_t i = 0; i < values.size(); ++i) {
        if (dtype == DType::kF32) {
          std::memcpy(&table[i], &values[i], 4);
        } else {
          reinterpret_cast<uint16_t*>(table.data())[i] =
              dtype == DType::kF16 ? F32ToF16(values[i]) : F32ToBF16(values[i]);
        }
      }
      const std::vector<int32_t> ids = {36, 0, 5, 5, 17};
      const Shape shape{static_cast<int64_t>(ids.size()), width};
      Guarded want(shape), got(shape);
      EmbedArgs args{ids,
                     {reinterpret_cast<const std::byte*>(table.data()), dtype, Shape{vocab, width}},
                     want.view()};
      CreateReferenceBackend()->Embed(args);
      args.out = got.view();
      candidate.Embed(args);
      RETURN_IF_WRONG(Failed(candidate, "Embed"));
      RETURN_IF_WRONG(Compare(want, got, shape.num_elements(), "Embed", [](int64_t) { return 0; }));
    }
  }
  return "";
}

std::string CheckRmsNorm(Backend& candidate) {
  std::mt19937_64 random(kSeed);
  for (const int64_t width : {8, 15, 16, 17, 64, 100, 2048}) {
    for (const int64_t rows : {1, 2, 33}) {
      std::vector<float> x = Normal(random, rows * width, 3.0f);
      x[0] = 1e4f;  // an outlier
      const std::vector<float> weight = Normal(random, width);
      const Shape shape{rows, width};
      Guarded want(shape), got(shape);
      RmsNormArgs args{View(x, shape), View(weight, Shape{width}), 1e-5f, want.view()};
      CreateReferenceBackend()->RmsNorm(args);
      args.out = got.view();
      candidate.RmsNorm(args);
      RETURN_IF_WRONG(Failed(candidate, "RmsNorm"));
      // The sum of squares has relative error width * u, its root half of that.
      RETURN_IF_WRONG(Compare(want, got, rows * width, "RmsNorm", [&](int64_t i) {
        return (static_cast<double>(width) / 2 + 4) * kU * std::fabs(want.data()[i]) + 1e-30;
      }));
      // In place.
      Guarded same(shape, &x);
      args.x = same.view();
      args.out = same.view();
      candidate.RmsNorm(args);
      RETURN_IF_WRONG(
          Compare(got, same, rows * width, "RmsNorm in place", [](int64_t) { return 0; }));
    }
  }
  return "";
}

// Rows [*, k] as CUDA multiplies them with F16 weights: see RoundLaunch.
std::vector<float> RowsInF16(std::vector<float> x, int64_t k) {
  for (size_t row = 0; row < x.size(); row += static_cast<size_t>(k)) {
    const std::span<float> elements(x.data() + row, static_cast<size_t>(k));
    float largest = 0;
    for (const float value : elements) largest = std::max(largest, std::fabs(value));
    const int up = 14 - std::ilogb(largest);
    for (float& value : elements) {
      value = std::ldexp(F16ToF32(F32ToF16(std::ldexp(value, up))), -up);
    }
  }
  return x;
}

std::string CheckMatMul(Backend& candidate) {
  std::mt19937_64 random(kSeed);
  struct Case {
    int64_t m, n, k;
  };
  const std::vector<Case> cases = {{1, 1, 8},    {1, 17, 64},   {2, 16, 32},   {3, 100, 48},
                                   {16, 33, 96}, {17, 15, 100}, {33, 64, 256}, {100, 48, 1000},
                                   {5, 20, 30},  {9, 3100, 40}, {2, 3100, 40}, {130, 140, 72}};
  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF16, WeightFormat::kF32}) {
    // The bound below is that of sums in F32: the reference's x is rounded where the candidate's
    // is.
    const bool rounds = format == WeightFormat::kF16 && candidate.name().starts_with("cuda/");
    for (const Case& c : cases) {
      for (const bool extras : {false, true}) {  // bias and accumulate
        const std::vector<float> x = Normal(random, c.m * c.k);
        const std::vector<float> w = Normal(random, c.n * c.k);
        const std::vector<float> bias = Normal(random, c.n);
        const std::vector<float> residual = Normal(random, c.m * c.n, 10.0f);
        // Two parts, as fused projections are packed.
        const int64_t first = c.n / 2;
        std::vector<ConstTensorView> parts, biases;
        for (const auto& [begin, end] : {std::pair{int64_t{0}, first}, {first, c.n}}) {
          if (begin == end) continue;
          parts.push_back({reinterpret_cast<const std::byte*>(w.data() + begin * c.k), DType::kF32,
                           Shape{end - begin, c.k}});
          biases.push_back({reinterpret_cast<const std::byte*>(bias.data() + begin), DType::kF32,
                            Shape{end - begin}});
        }
        if (!extras) biases.clear();
        Result<Weight> exact = reference->PackWeight(parts, biases, format);
        Result<Weight> packed = candidate.PackWeight(parts, biases, format);
        if (!packed.ok()) return "PackWeight: " + packed.error().message;
        const Shape shape{c.m, c.n};
        Guarded want(shape, extras ? &residual : nullptr);
        Guarded got(shape, extras ? &residual : nullptr);
        const std::vector<float> met = rounds ? RowsInF16(x, c.k) : x;
        MatMulArgs args{View(met, Shape{c.m, c.k}), &*exact, extras, want.view()};
        reference->MatMul(args);
        args.x = View(x, Shape{c.m, c.k});
        args.weight = &*packed;
        args.out = got.view();
        candidate.MatMul(args);
        RETURN_IF_WRONG(Failed(candidate, "MatMul"));
        RETURN_IF_WRONG(Compare(want, got, c.m * c.n, "MatMul", [&](int64_t i) {
          const int64_t row = i / c.n, col = i % c.n;
          double sum = extras ? std::fabs(bias[static_cast<size_t>(col)]) +
                                    std::fabs(residual[static_cast<size_t>(i)])
                              : 0;
          for (int64_t k = 0; k < c.k; ++k) {
            sum += std::fabs(static_cast<double>(x[static_cast<size_t>(row * c.k + k)]) *
                             w[static_cast<size_t>(col * c.k + k)]);
          }
          return 2 * static_cast<double>(c.k + 2) * kU * sum;
        }));
      }
    }
  }
  return "";
}

// Codes in place of floats: integer sums, so few roundings.
std::string CheckLowBitMatMul(Backend& candidate) {
  std::mt19937_64 random(kSeed);
  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  const int64_t m = 11, n = 50, k = 256;
  for (const LowBitSpec& spec : LowBitSpecs({0, 64}, {8, 16})) {
    const LowBitCase c(random, spec, n, k);
    const Weight exact = reference->PackLowBitWeight({&c.matrix, 1}, {}).value();
    const Result<Weight> packed = candidate.PackLowBitWeight({&c.matrix, 1}, {});
    if (!packed.ok()) return "PackLowBitWeight: " + packed.error().message;
    const std::vector<float> x = Normal(random, m * k);
    Guarded want(Shape{m, n}), got(Shape{m, n});
    reference->MatMul({View(x, Shape{m, k}), &exact, false, want.view()});
    candidate.MatMul({View(x, Shape{m, k}), &*packed, false, got.view()});
    RETURN_IF_WRONG(Failed(candidate, "MatMul"));
    RETURN_IF_WRONG(Compare(want, got, m * n, "MatMul of low-bit weights", [&](int64_t i) {
      double sum = 0;
      for (int64_t j = 0; j < k; ++j) {
        sum += std::fabs(x[static_cast<size_t>(i / n * k + j)] * c.matrix.Value(i % n, j));
      }
      return 24 * kU * sum;
    }));
  }
  return "";
}

std::string CheckRopeTable(Backend& candidate) {
  const std::vector<int64_t> positions = {31, 0, 1, 4095, 131071};
  const std::vector<float> frequency = {1.0f, 0.75f, 0.01f, 1e-5f};
  const Shape shape{5, 4};
  Guarded want_cos(shape), want_sin(shape), got_cos(shape), got_sin(shape);
  CreateReferenceBackend()->RopeTable({positions, frequency, want_cos.view(), want_sin.view()});
  candidate.RopeTable({positions, frequency, got_cos.view(), got_sin.view()});
  RETURN_IF_WRONG(Failed(candidate, "RopeTable"));
  const auto bound = [](int64_t) { return 2 * kU; };
  RETURN_IF_WRONG(Compare(want_cos, got_cos, 20, "RopeTable.cos", bound));
  return Compare(want_sin, got_sin, 20, "RopeTable.sin", bound);
}

std::string CheckSwiGlu(Backend& candidate) {
  std::mt19937_64 random(kSeed);
  for (const int64_t width : {8, 15, 16, 17, 100, 1000}) {
    const int64_t rows = 3;
    std::vector<float> gate_up = Normal(random, rows * 2 * width, 4.0f);
    gate_up[0] = -100.0f;  // silu underflows to 0
    gate_up[1] = 100.0f;
    Guarded want(Shape{rows, width}), got(Shape{rows, width});
    CreateReferenceBackend()->SwiGlu({View(gate_up, Shape{rows, 2 * width}), want.view()});
    candidate.SwiGlu({View(gate_up, Shape{rows, 2 * width}), got.view()});
    RETURN_IF_WRONG(Failed(candidate, "SwiGlu"));
    // exp, one addition, one division, one product.
    RETURN_IF_WRONG(Compare(want, got, rows * width, "SwiGlu", [&](int64_t i) {
      return 16 * kU * std::fabs(want.data()[i]) + 1e-30;
    }));
  }
  return "";
}

std::string CheckGatherRows(Backend& candidate) {
  std::mt19937_64 random(kSeed);
  const std::vector<float> x = Normal(random, 7 * 33);
  const std::vector<int64_t> rows = {6, 0, 3, 3};
  Guarded want(Shape{4, 33}), got(Shape{4, 33});
  CreateReferenceBackend()->GatherRows({View(x, Shape{7, 33}), rows, want.view()});
  candidate.GatherRows({View(x, Shape{7, 33}), rows, got.view()});
  RETURN_IF_WRONG(Failed(candidate, "GatherRows"));
  return Compare(want, got, 4 * 33, "GatherRows", [](int64_t) { return 0; });
}

// Rows of logits that are hard to choose from.
std::vector<std::pair<const char*, std::vector<float>>> LogitCases(int64_t rows, int64_t width) {
  std::mt19937_64 random(kSeed);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  constexpr float kMax = std::numeric_limits<float>::max();
  const std::vector<float> normal = Normal(random, rows * width, 4.0f);
  const auto made = [&](const std::function<float(int64_t column, float was)>& make) {
    std::vector<float> x = normal;
    for (size_t i = 0; i < x.size(); ++i) x[i] = make(static_cast<int64_t>(i) % width, x[i]);
    return x;
  };
  std::vector<float> broken = normal;  // the last columns of rows, and one column of the last row
  for (int64_t row = 0; row < rows; ++row) {
    const float all[] = {-kInfinity, kNaN, kInfinity, -kNaN};
    broken[static_cast<size_t>((row + 1) * width - 1)] = all[row % 4];
  }
  broken[static_cast<size_t>((rows - 1) * width + width / 2)] = kNaN;
  return {
      {"normal", normal},
      {"tied", made([](int64_t, float was) { return std::round(was); })},
      {"equal", made([](int64_t, float) { return -7.5f; })},
      {"zeros of both signs", made([](int64_t, float was) { return std::copysign(0.0f, was); })},
      {"ascending", made([](int64_t c, float) { return static_cast<float>(c) - 500; })},
      {"descending", made([](int64_t c, float) { return static_cast<float>(-c); })},
      // 64 threads of a block, 128 columns apart, have the largest; the last of them smaller ones.
      {"periodic", made([](int64_t c, float was) {
         return was + (c % 128 < 63 ? 200 : c % 128 == 63 ? 100 : 0);
       })},
      {"largest and least", made([](int64_t c, float) { return c % 3 == 1 ? kMax : -kMax; })},
      {"not finite", broken},
  };
}

std::string CheckSelectTop(Backend& candidate) {
  struct Case {
    int64_t rows, width;
  };
  for (const auto& [rows, width] : std::vector<Case>{
           {3, 1}, {1, 63}, {5, 64}, {2, 129}, {4, 1000}, {2, 4096}, {3, 4097}, {1, 300000}}) {
    for (const auto& [name, x] : LogitCases(rows, width)) {
      for (const int64_t k : {1, 2, 40, 64}) {
        if (k > width) continue;
        Guarded want(Shape{rows, 2 * k}), got(Shape{rows, 2 * k});
        const auto size = static_cast<size_t>(rows * k);
        const auto top = [size](Guarded& out) {
          return std::span(reinterpret_cast<TopLogit*>(out.data()), size);
        };
        CreateReferenceBackend()->SelectTop({View(x, Shape{rows, width}), k, top(want)});
        candidate.SelectTop({View(x, Shape{rows, width}), k, top(got)});
        RETURN_IF_WRONG(Failed(candidate, "SelectTop"));
        if (!got.intact()) return "SelectTop: wrote outside its output";
        for (size_t i = 0; i < size; ++i) {
          const TopLogit& wanted = top(want)[i];
          const TopLogit& found = top(got)[i];
          if (std::memcmp(&wanted, &found, sizeof(TopLogit)) == 0) continue;
          return std::string("SelectTop, ") + name + ", width " + std::to_string(width) + ", k " +
                 std::to_string(k) + ", " + std::to_string(i) + ": expected " +
                 std::to_string(wanted.logit) + " of " + std::to_string(wanted.id) + ", got " +
                 std::to_string(found.logit) + " of " + std::to_string(found.id);
        }
      }
    }
  }
  return "";
}

}  // namespace

const std::vector<ConformanceCheck>& ConformanceChecks() {
  static const std::vector<ConformanceCheck> checks = {
      {"Embed", CheckEmbed},           {"RmsNorm", CheckRmsNorm},     {"MatMul", CheckMatMul},
      {"MatMul", CheckLowBitMatMul},   {"RopeTable", CheckRopeTable}, {"SwiGlu", CheckSwiGlu},
      {"GatherRows", CheckGatherRows}, {"SelectTop", CheckSelectTop},
  };
  return checks;
}

std::string CheckMatMulRows(Backend& candidate) {
  std::mt19937_64 random(kSeed);
  const int64_t most = 150, n = 100, k = 1100;
  const std::vector<float> x = Normal(random, most * k), w = Normal(random, n * k);
  const ConstTensorView part = View(w, Shape{n, k});
  for (const WeightFormat format : {WeightFormat::kBF16, WeightFormat::kF16, WeightFormat::kF32}) {
    Result<Weight> weight = candidate.PackWeight({&part, 1}, {}, format);
    if (!weight.ok()) return weight.error().message;
    std::vector<float> whole;
    for (const int64_t m : {most, int64_t{1}, int64_t{8}, int64_t{9}, int64_t{16}, int64_t{17},
                            int64_t{32}, int64_t{33}, int64_t{64}, int64_t{65}, int64_t{128}}) {
      Guarded out(Shape{m, n});
      candidate.MatMul({View(x, Shape{m, k}), &*weight, false, out.view()});
      RETURN_IF_WRONG(Failed(candidate, "MatMul"));
      if (m == most) whole.assign(out.data(), out.data() + m * n);
      if (std::memcmp(out.data(), whole.data(), static_cast<size_t>(m * n) * 4) != 0) {
        return std::string(WeightFormatName(format)) + ": rows of M = " + std::to_string(m) +
               " are not those of M = " + std::to_string(most);
      }
    }
  }
  return "";
}

}  // namespace innerq::conformance
