// One suite for all backends: every operation of every backend and variant against the reference.
//
// Each check makes hard inputs from a fixed seed, runs reference and candidate, and returns what is
// wrong, or an empty string. Outputs are filled with NaN and guarded by known bytes on both sides.
// Checks are plain functions so that the suite itself can be shown to fail on a broken backend.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>

#include "kernels/backend.h"
#include "kernels/float16.h"
#include "tests/kernels/cuda_test.h"
#include "tests/kernels/forwarding_backend.h"
#include "tests/kernels/host_mirror.h"
#include "tests/kernels/low_bit_case.h"

namespace innerq::conformance {
namespace {

constexpr uint64_t kSeed = 20260223;
constexpr double kU = 0x1p-24;  // unit roundoff of F32
constexpr size_t kGuard = 256;
constexpr std::byte kGuardByte{0xa5};
constexpr uint16_t kHalfInfinity = 0x7c00, kHalfNaN = 0x7e00;  // of F16

std::vector<float> Normal(std::mt19937_64& random, int64_t n, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = normal(random);
  return x;
}

ConstTensorView View(const std::vector<float>& x, Shape shape) {
  return {reinterpret_cast<const std::byte*>(x.data()), DType::kF32, shape};
}

// An output of F32, prefilled with NaN, with known bytes before and after it.
class Guarded {
 public:
  explicit Guarded(Shape shape, const std::vector<float>* initial = nullptr)
      : shape_(shape),
        bytes_(static_cast<size_t>(shape.num_elements()) * 4),
        memory_(bytes_ + 2 * kGuard, kGuardByte) {
    for (int64_t i = 0; i < shape.num_elements(); ++i) {
      data()[i] =
          initial ? (*initial)[static_cast<size_t>(i)] : std::numeric_limits<float>::quiet_NaN();
    }
  }
  float* data() { return reinterpret_cast<float*>(memory_.data() + kGuard); }
  TensorView view() { return {memory_.data() + kGuard, DType::kF32, shape_}; }
  bool intact() const {
    for (size_t i = 0; i < kGuard; ++i) {
      if (memory_[i] != kGuardByte || memory_[kGuard + bytes_ + i] != kGuardByte) return false;
    }
    return true;
  }

 private:
  Shape shape_;
  size_t bytes_;
  std::vector<std::byte> memory_;
};

// Compares element by element; `bound(i)` is the largest difference allowed. NaN never passes.
std::string Compare(Guarded& expected, Guarded& actual, int64_t n, const std::string& what,
                    const std::function<double(int64_t)>& bound) {
  if (!actual.intact()) return what + ": wrote outside its output";
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double want = expected.data()[i], got = actual.data()[i];
    largest = std::max(largest, std::fabs(want));
    const bool near = std::fabs(want - got) <= bound(i);
    if (!near) {
      return what + "[" + std::to_string(i) + "]: expected " + std::to_string(want) + ", got " +
             std::to_string(got) + ", bound " + std::to_string(bound(i));
    }
  }
  if (n > 0 && largest < 1e-2) return what + ": the case is trivial, its largest output is tiny";
  return "";
}

// The bound of an element adds up the worst of every rounding. Errors of independent sign add as
// squares, so all outputs together must be far closer: a few `units` of relative rounding, and
// within F16's unit.
std::string CompareRms(Guarded& expected, Guarded& actual, int64_t n, double units,
                       const std::string& what) {
  const double limit = std::min(1.5e-4 + 2.25 * units, 0x1p-10);
  double squares = 0, errors = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double want = expected.data()[i], difference = want - actual.data()[i];
    squares += want * want;
    errors += difference * difference;
  }
  const double relative = std::sqrt(errors / squares);
  const bool near = relative <= limit;
  return near ? "" : what + ": relative RMS error " + std::to_string(relative);
}

#define RETURN_IF_WRONG(expression)                                     \
  do {                                                                  \
    if (std::string wrong = (expression); !wrong.empty()) return wrong; \
  } while (false)

std::string Failed(Backend& backend, const std::string& what) {
  const Result<void> result = backend.Synchronize();
  return result.ok() ? "" : what + ": " + result.error().message;
}

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
        MatMulArgs args{View(x, Shape{c.m, c.k}), &*exact, extras, want.view()};
        reference->MatMul(args);
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

// One layer's cache of one sequence on one backend: page i of the sequence is open block
// num_pages - 1 - i and sealed block i, so that ids differ from logical pages.
struct Cache {
  Cache(Backend& owner, const KvCacheSpec& spec, int64_t pages)
      : layout(*KvLayout::Create(spec, owner.code_order())),
        num_pages(pages),
        open(*owner.Allocate(layout.open_pool_bytes(pages))),
        sealed(*owner.Allocate(layout.sealed_pool_bytes(pages))),
        norms(*owner.Allocate(2 * layout.key_norm_bytes())) {
    std::memset(open.data(), 0xff, static_cast<size_t>(open.bytes()));  // NaN in every format
    std::memset(sealed.data(), 0xff, static_cast<size_t>(sealed.bytes()));
    for (int64_t i = 0; i < pages; ++i) {
      table.push_back({static_cast<int32_t>(pages - 1 - i), static_cast<int32_t>(i)});
    }
  }
  PagedKvView view() {
    return {&layout.layer(0), open.data(), sealed.data(), reinterpret_cast<float*>(norms.data())};
  }
  uint16_t& Key(int64_t position, int64_t head, int64_t d) {
    const int64_t t = position % layout.page_tokens();
    return view().OpenKeys(OpenId(position), head)[layout.layer(0).OpenKeyIndex(t, d)];
  }
  uint16_t& Value(int64_t position, int64_t head, int64_t d) {
    const int64_t t = position % layout.page_tokens();
    return view().OpenValues(OpenId(position), head)[layout.layer(0).OpenValueIndex(t, d)];
  }
  int32_t OpenId(int64_t position) const {
    return table[static_cast<size_t>(layout.PageOf(position))].open_id;
  }
  // Into norm slot 1.
  void ComputeKeyNorm(Backend& backend) {
    KeyNormItem item{1, {}};
    for (int64_t p = layout.KeyNormPages().begin; p < layout.KeyNormPages().end; ++p) {
      item.open_ids.push_back(table[static_cast<size_t>(p)].open_id);
    }
    backend.ComputeKeyNorm({view(), {&item, 1}});
  }
  // The key norm, then every page that a query at `position` sees as sealed.
  void SealUpTo(Backend& backend, int64_t position) {
    const PageRange range = layout.SealedPages(position);
    if (range.size() == 0) return;
    if (layout.layer(0).normalize_keys) ComputeKeyNorm(backend);
    std::vector<SealItem> items;
    for (int64_t p = range.begin; p < range.end; ++p) {
      const PageRef ref = table[static_cast<size_t>(p)];
      items.push_back({ref.open_id, ref.sealed_id, 1});
    }
    backend.Seal({view(), items});
  }

  KvLayout layout;
  int64_t num_pages;
  Buffer open, sealed, norms;
  std::vector<PageRef> table;
};

struct CacheCase {
  std::string name;
  KvCacheSpec spec;
  int64_t group = 1;  // query heads per key/value head
};

std::vector<CacheCase> CacheCases() {
  const auto spec = [](int64_t heads, int64_t dim, QuantSpec key, QuantSpec value, bool normalize,
                       int64_t sink = 32, int64_t recent = 96, int64_t page_tokens = 32) {
    KvCacheSpec s;
    s.kv_heads = heads;
    s.head_dim = dim;
    s.page_tokens = page_tokens;
    s.sink_tokens = sink;
    s.recent_tokens = recent;
    s.layers.push_back({key, value, normalize});
    return s;
  };
  using enum QuantMode;
  using enum QuantAxis;
  using enum QuantCodec;
  const QuantSpec f16{.bits = 16};
  const QuantSpec sym3{.bits = 3};
  const QuantSpec kivi{2, kAsymmetric, kOuter, 32, kPaper};
  return {
      {"fp16", spec(2, 64, f16, f16, false), 4},
      {"innerq_base", spec(2, 128, sym3, sym3, true), 4},
      {"innerq_hybrid", spec(1, 64, sym3, {2, kHybrid, kInner, 32, kFitted}, true), 8},
      {"paper hybrid",
       spec(2, 64, {3, kSymmetric, kInner, 32, kPaper}, {2, kHybrid, kInner, 32, kPaper}, true), 1},
      {"kivi", spec(2, 64, kivi, kivi, false, 0, 128), 2},
      {"kivi_sink, dim 48", spec(2, 48, kivi, {2, kAsymmetric, kOuter, 16, kPaper}, false), 2},
      {"int8, dim 80",
       spec(1, 80, {8, kSymmetric, kInner, 16, kPaper}, {8, kSymmetric, kInner, 32, kPaper}, true),
       3},
      {"int4 asymmetric, group 8, dim 8",
       spec(4, 8, {4, kAsymmetric, kInner, 8, kFitted}, {4, kAsymmetric, kInner, 8, kFitted}, true),
       2},
      {"keys 16, values 2", spec(1, 64, f16, {2, kSymmetric, kInner, 32, kFitted}, false), 4},
      {"keys 3, values 16", spec(1, 64, sym3, f16, true), 4},
      {"keys 4 asymmetric in groups of 64, values 8 hybrid",
       spec(1, 128, {4, kAsymmetric, kInner, 64, kFitted}, {8, kHybrid, kInner, 32, kFitted}, true),
       3},
      {"keys 2 hybrid in groups of 128, values 4",
       spec(1, 128, {2, kHybrid, kInner, 128, kFitted}, {4, kSymmetric, kInner, 32, kPaper}, true),
       1},
      {"keys 8, values 3 hybrid, pages and groups of 64, 12 heads",
       spec(1, 64, {8, kSymmetric, kInner, 64, kPaper}, {3, kHybrid, kInner, 64, kFitted}, true, 64,
            64, 64),
       12},
      {"keys 3, values 4 in groups of 64, pages of 64",
       spec(2, 128, sym3, {4, kSymmetric, kInner, 64, kFitted}, true, 64, 64, 64), 4},
      {"keys 2 asymmetric, values 8 in groups of 128, pages of 128, 16 heads",
       spec(1, 128, {2, kAsymmetric, kInner, 32, kFitted}, {8, kSymmetric, kInner, 128, kFitted},
            true, 128, 128, 128),
       16},
  };
}

// Fills both caches with the same keys and values for positions [0, tokens). Keys have channels of
// very different size, as real ones do.
void Fill(Cache& a, Cache& b, int64_t tokens) {
  std::mt19937_64 random(kSeed);
  std::normal_distribution<float> normal;
  const int64_t dim = a.layout.head_dim();
  for (int64_t p = 0; p < tokens; ++p) {
    for (int64_t g = 0; g < a.layout.kv_heads(); ++g) {
      for (int64_t d = 0; d < dim; ++d) {
        const float size = d % 7 == 3 ? 8.0f : 0.5f + 0.1f * static_cast<float>(d % 5);
        a.Key(p, g, d) = b.Key(p, g, d) = F32ToF16(normal(random) * size);
        a.Value(p, g, d) = b.Value(p, g, d) = F32ToF16(normal(random) + 0.3f);
      }
    }
  }
}

std::string CheckRopeAppend(Backend& candidate, const CacheCase& c) {
  std::mt19937_64 random(kSeed);
  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  Cache want(*reference, c.spec, 4), got(candidate, c.spec, 4);
  const int64_t dim = c.spec.head_dim, heads = c.spec.kv_heads * c.group;
  const int64_t rows = 35, first = 30;  // crosses two page borders
  const std::vector<float> qkv = Normal(random, rows * (heads + 2 * c.spec.kv_heads) * dim);
  std::vector<float> cos, sin;
  for (int64_t i = 0; i < rows * dim / 2; ++i) {
    cos.push_back(std::cos(static_cast<float>(i)));
    sin.push_back(std::sin(static_cast<float>(i)));
  }
  // Two sequences' slices share the rows; the second has the last page for its own.
  std::vector<PageRef> other = {{want.table[3].open_id, -1}};
  Guarded want_q(Shape{rows, heads * dim}), got_q(Shape{rows, heads * dim});
  const auto append = [&](Backend& backend, Cache& cache, Guarded& q) {
    const std::vector<SequenceSlice> slices = {{0, rows - 2, first, cache.table, -1, 0},
                                               {rows - 2, 2, 7, other, -1, 0}};
    backend.RopeAppend({View(qkv, Shape{rows, (heads + 2 * c.spec.kv_heads) * dim}),
                        View(cos, Shape{rows, dim / 2}), View(sin, Shape{rows, dim / 2}),
                        cache.view(), slices, q.view()});
  };
  append(*reference, want, want_q);
  append(candidate, got, got_q);
  RETURN_IF_WRONG(Failed(candidate, "RopeAppend"));
  // Two products and a sum of numbers below 6.
  RETURN_IF_WRONG(Compare(want_q, got_q, rows * heads * dim, "RopeAppend.q " + c.name,
                          [](int64_t) { return 4 * kU * 12; }));
  const int64_t other_first = 3 * c.spec.page_tokens + 7;
  for (int64_t p = 0; p < 4 * c.spec.page_tokens; ++p) {
    const bool written =
        (p >= first && p < first + rows - 2) || (p >= other_first && p < other_first + 2);
    for (int64_t g = 0; g < c.spec.kv_heads; ++g) {
      for (int64_t d = 0; d < dim; ++d) {
        const float key = F16ToF32(want.Key(p, g, d)), key_got = F16ToF32(got.Key(p, g, d));
        // A sum near a rounding border may round either way: one unit of F16.
        const bool key_near = written
                                  ? std::fabs(key - key_got) <= 0x1p-10 * std::fabs(key) + 0x1p-24
                                  : want.Key(p, g, d) == got.Key(p, g, d);
        if (!key_near || want.Value(p, g, d) != got.Value(p, g, d)) {
          return "RopeAppend cache " + c.name + ": position " + std::to_string(p) + ", channel " +
                 std::to_string(d) + ": key " + std::to_string(key) + " " + std::to_string(key_got);
        }
      }
    }
  }
  return "";
}

std::string CheckComputeKeyNorm(Backend& candidate, const CacheCase& c) {
  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  Cache want(*reference, c.spec, 6), got(candidate, c.spec, 6);
  const int64_t page = c.spec.page_tokens;
  Fill(want, got, 6 * page);
  for (int64_t p = 0; p < 6 * page; ++p) {  // a channel that is always 0 keeps norm 1
    want.Key(p, 0, 2) = got.Key(p, 0, 2) = 0;
  }
  // Of a channel whose other keys are finite.
  want.Key(page + 18, 0, 3) = got.Key(page + 18, 0, 3) = kHalfNaN;
  want.ComputeKeyNorm(*reference);
  got.ComputeKeyNorm(candidate);
  RETURN_IF_WRONG(Failed(candidate, "ComputeKeyNorm"));
  for (int64_t g = 0; g < c.spec.kv_heads; ++g) {
    for (int64_t d = 0; d < c.spec.head_dim; ++d) {
      const float expected = want.view().KeyNorm(1, g)[d], actual = got.view().KeyNorm(1, g)[d];
      const bool same = g == 0 && d == 3 ? std::isnan(expected) && std::isnan(actual)
                                         : expected == actual && actual > 0;
      if (!same) {
        return "ComputeKeyNorm " + c.name + " channel " + std::to_string(d) + ": expected " +
               std::to_string(expected) + ", got " + std::to_string(actual);
      }
      if (got.view().KeyNorm(0, g)[d] != 0) return "ComputeKeyNorm: wrote to another slot";
    }
  }
  if (want.view().KeyNorm(1, 0)[2] != 1.0f) return "ComputeKeyNorm: a zero channel needs norm 1";
  return "";
}

std::string CheckSeal(Backend& candidate, const CacheCase& c) {
  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  const int64_t pages = 8, tokens = pages * c.spec.page_tokens;
  const int64_t sealed_token = c.spec.page_tokens + 8;  // of a page that seals
  Cache want(*reference, c.spec, pages), got(candidate, c.spec, pages);
  Fill(want, got, tokens);
  for (int64_t p = sealed_token; p < sealed_token + 8; ++p) {  // all-zero groups, a huge outlier
    for (int64_t d = 0; d < c.spec.head_dim; ++d) {
      want.Value(p, 0, d) = got.Value(p, 0, d) = 0;
      want.Key(p, 0, d) = got.Key(p, 0, d) = 0;
    }
  }
  want.Value(sealed_token + 10, 0, 1) = got.Value(sealed_token + 10, 0, 1) = F32ToF16(10000.0f);
  const int64_t position = tokens - 1;
  want.SealUpTo(*reference, position);
  got.SealUpTo(candidate, position);
  RETURN_IF_WRONG(Failed(candidate, "Seal"));
  const PageRange sealed = want.layout.SealedPages(position);
  const KvLayerLayout& layer = want.layout.layer(0);
  for (int64_t page = 0; page < pages; ++page) {
    const bool is_sealed = page >= sealed.begin && page < sealed.end;
    for (int64_t g = 0; g < c.spec.kv_heads; ++g) {
      if (!is_sealed) {  // not one byte of it may change
        const std::byte* bytes = got.view().SealedHead(page, g);
        for (int64_t i = 0; i < layer.sealed_head_bytes; ++i) {
          if (bytes[i] != std::byte{0xff}) return "Seal " + c.name + ": wrote to another page";
        }
        continue;
      }
      for (int64_t t = 0; t < c.spec.page_tokens; ++t) {
        for (int64_t d = 0; d < c.spec.head_dim; ++d) {
          const float key = DecodeSealedKey(want.view(), page, g, t, d);
          const float value = DecodeSealedValue(want.view(), page, g, t, d);
          // Equal decodes of every element mean equal codes, scales and zeros.
          if (!(key == DecodeSealedKey(got.view(), page, g, t, d)) ||
              !(value == DecodeSealedValue(got.view(), page, g, t, d))) {
            return "Seal " + c.name + ": page " + std::to_string(page) + " token " +
                   std::to_string(t) + " channel " + std::to_string(d);
          }
        }
      }
    }
  }
  // Non-finite input must surface, from either side, whether it is quantized or kept as F16.
  for (const bool is_key : {true, false}) {
    for (const uint16_t bad : {kHalfInfinity, kHalfNaN}) {
      Cache cache(candidate, c.spec, pages), other(*reference, c.spec, pages);
      Fill(cache, other, tokens);
      for (Cache* each : {&cache, &other}) {
        (is_key ? each->Key(sealed_token, 0, 3) : each->Value(sealed_token, 0, 3)) = bad;
      }
      cache.SealUpTo(candidate, position);
      other.SealUpTo(*reference, position);
      const Result<void> result = candidate.Synchronize();
      CHECK(!reference->Synchronize().ok(), "the reference seals anything");
      if (result.ok() || result.error().code != ErrorCode::kInternal) {
        return "Seal " + c.name + ": a non-finite " + (is_key ? "key" : "value") +
               " went unnoticed";
      }
      // Of the sealed pages, the one with the token; all of them where a NaN got into the norm.
      const int64_t bad_item = sealed_token / c.spec.page_tokens - sealed.begin;
      const std::vector<int64_t> failed = reference->failed_seals();
      CHECK(std::count(failed.begin(), failed.end(), bad_item) == 1, "the reference errs");
      CHECK(is_key || failed.size() == 1, "the reference blames other pages");
      if (candidate.failed_seals() != failed) {
        return "Seal " + c.name + ": a non-finite " + (is_key ? "key" : "value") +
               " is blamed on other pages";
      }
      if (!candidate.Synchronize().ok() || !candidate.failed_seals().empty()) {
        return "Synchronize: the error was not cleared";
      }
    }
  }
  return "";
}

// Largest |key| and |value| that attention reads, and the same of keys as stored.
struct Extremes {
  double key_sum = 0;  // max over tokens of sum over channels of |stored key|
  double value = 0;
  double norm = 1;
};

std::string CheckAttention(Backend& candidate, const CacheCase& c) {
  std::mt19937_64 random(kSeed);
  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  const int64_t pages = 9, dim = c.spec.head_dim, heads = c.spec.kv_heads * c.group;
  // The last page has an unused tail of NaN.
  const int64_t tokens = pages * c.spec.page_tokens - 5;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  Cache want(*reference, c.spec, pages), got(candidate, c.spec, pages);
  Fill(want, got, tokens);
  want.SealUpTo(*reference, tokens - 1);
  got.SealUpTo(candidate, tokens - 1);
  // Rows: page borders, windows not full, full, just flushed.
  struct Chunk {
    int64_t first, rows;
  };
  for (const Chunk& chunk : std::vector<Chunk>{{0, 1},
                                               {30, 4},
                                               {127, 2},
                                               {155, 40},
                                               {159, 1},
                                               {160, 1},
                                               {tokens - 33, 33},
                                               {tokens - 1, 1}}) {
    const int64_t first = chunk.first, rows = chunk.rows;
    const std::vector<float> q = Normal(random, rows * heads * dim, 1.5f);
    const Shape shape{rows, heads * dim};
    Guarded expected(shape), actual(shape);
    const auto attend = [&](Backend& backend, Cache& cache, Guarded& out) {
      const std::vector<SequenceSlice> slices = {{0, rows, first, cache.table, 1, 0}};
      backend.Attention(
          {View(q, shape), cache.view(), &cache.layout, slices, heads, scale, out.view()});
    };
    attend(*reference, want, expected);
    attend(candidate, got, actual);
    RETURN_IF_WRONG(Failed(candidate, "Attention"));
    Extremes most;
    for (int64_t g = 0; g < c.spec.kv_heads; ++g) {
      for (int64_t p = 0; p < first + rows; ++p) {
        double sum = 0;
        for (int64_t d = 0; d < dim; ++d) {
          sum += std::fabs(F16ToF32(want.Key(p, g, d)));
          most.value = std::max<double>(most.value, std::fabs(F16ToF32(want.Value(p, g, d))));
        }
        most.key_sum = std::max(most.key_sum, sum);
      }
      for (int64_t d = 0; d < dim && want.layout.layer(0).normalize_keys; ++d) {
        most.norm = std::max<double>(most.norm, want.view().KeyNorm(1, g)[d]);
      }
    }
    // The contract: a query may be held in integers relative to its largest (normalized) element,
    // of 14, 13, 12 and 15 bits where it meets codes of 2, 3, 4 and 8 bits, probabilities likewise
    // relative to their page's largest. A score's error acts twice (numerator, sum).
    double q_max = 0;
    for (const float v : q) q_max = std::max<double>(q_max, std::fabs(v));
    const auto step = [](const QuantSpec& spec) {
      if (!spec.quantized()) return 0.0;
      return 1.0 / (127 << (spec.bits <= 4 ? 8 - spec.bits : 7));
    };
    const KvCacheSpec::Layer& layer = c.spec.layers[0];
    const double score_error = scale * q_max * most.norm * most.key_sum *
                               (step(layer.key) / 2 + 2 * static_cast<double>(dim) * kU);
    const double bound = 2 * most.value * (score_error + 32 * step(layer.value) / 2 + 64 * kU);
    RETURN_IF_WRONG(Compare(expected, actual, shape.num_elements(),
                            "Attention " + c.name + " at " + std::to_string(first),
                            [&](int64_t) { return bound; }));
    RETURN_IF_WRONG(CompareRms(expected, actual, shape.num_elements(),
                               step(layer.key) + step(layer.value),
                               "Attention " + c.name + " at " + std::to_string(first)));
  }
  return "";
}

// The operations on the cache, each checked case by case. A layer without key norms has none to
// compute, one without codes nothing to seal.
struct CacheCheck {
  std::string_view name;
  std::string (*run)(Backend& candidate, const CacheCase& c);
  bool (*applies)(const KvCacheSpec::Layer& layer);
};

const std::vector<CacheCheck>& CacheChecks() {
  using Layer = KvCacheSpec::Layer;
  const auto always = [](const Layer&) { return true; };
  const auto normalizes = [](const Layer& layer) { return layer.normalize_keys; };
  const auto seals = [](const Layer& layer) {
    return layer.key.quantized() || layer.value.quantized();
  };
  static const std::vector<CacheCheck> checks = {
      {"RopeAppend", CheckRopeAppend, always},
      {"ComputeKeyNorm", CheckComputeKeyNorm, normalizes},
      {"Seal", CheckSeal, seals},
      {"Attention", CheckAttention, always},
  };
  return checks;
}

struct ConformanceCheck {
  std::string_view name;
  std::string (*run)(Backend& candidate);
};

// The other operations; with CacheChecks() one entry for every operation of Backend.
const std::vector<ConformanceCheck>& ConformanceChecks() {
  static const std::vector<ConformanceCheck> checks = {
      {"Embed", CheckEmbed},           {"RmsNorm", CheckRmsNorm},     {"MatMul", CheckMatMul},
      {"MatMul", CheckLowBitMatMul},   {"RopeTable", CheckRopeTable}, {"SwiGlu", CheckSwiGlu},
      {"GatherRows", CheckGatherRows}, {"SelectTop", CheckSelectTop},
  };
  return checks;
}

void ExpectConformance(Backend& backend) {
  for (const ConformanceCheck& check : ConformanceChecks()) {
    EXPECT_EQ(check.run(backend), "") << check.name;
  }
  for (const CacheCheck& check : CacheChecks()) {
    for (const CacheCase& c : CacheCases()) {
      if (!check.applies(c.spec.layers[0])) continue;
      EXPECT_EQ(check.run(backend, c), "") << check.name << " " << c.name;
    }
  }
}

class Conformance : public ::testing::TestWithParam<std::string> {};

TEST_P(Conformance, EveryOperationMatchesTheReference) {
  const Result<std::unique_ptr<Backend>> backend = CreateBackend({.variant = GetParam()});
  ASSERT_TRUE(backend.ok()) << backend.error().message;
  ASSERT_EQ((*backend)->name(), "cpu/" + GetParam()) << "the forced variant is not the one made";
  ASSERT_TRUE((*backend)->Reserve({.max_rows = 128, .max_features = 2048}).ok());
  ExpectConformance(**backend);
}

INSTANTIATE_TEST_SUITE_P(Cpu, Conformance, ::testing::ValuesIn(CpuVariants()),
                         [](const auto& variant) { return variant.param; });

// Rows of attention, bit for bit: alone, in chunks, and beside another sequence. The rows cross a
// border of segments (see kernels/cuda/attention_plan.h) and of strips.
std::string CheckAttentionRows(Backend& candidate, const CacheCase& c) {
  std::mt19937_64 random(kSeed);
  const int64_t tokens = 576, first = 500, rows = tokens - first;
  const int64_t width = c.spec.kv_heads * c.group * c.spec.head_dim;
  const int64_t pages = CeilDiv(tokens, c.spec.page_tokens);
  Cache cache(candidate, c.spec, pages), unused(candidate, c.spec, pages);
  Fill(cache, unused, tokens);
  cache.SealUpTo(candidate, tokens - 1);
  const std::vector<float> q = Normal(random, rows * width, 1.5f);
  // Rows of positions [begin, begin + count), each `copies` times, as so many sequences.
  const auto attend = [&](int64_t begin, int64_t count, int64_t copies) {
    std::vector<float> queries, out(static_cast<size_t>(copies * count * width));
    std::vector<SequenceSlice> slices;
    for (int64_t i = 0; i < copies; ++i) {
      const auto at = q.begin() + (begin - first) * width;
      queries.insert(queries.end(), at, at + count * width);
      slices.push_back({i * count, count, begin, cache.table, 1, 0});
    }
    const Shape shape{copies * count, width};
    candidate.Attention({View(queries, shape),
                         cache.view(),
                         &cache.layout,
                         slices,
                         c.spec.kv_heads * c.group,
                         0.125f,
                         {reinterpret_cast<std::byte*>(out.data()), DType::kF32, shape}});
    return out;
  };
  const std::vector<float> whole = attend(first, rows, 1);
  struct Part {
    int64_t begin, count, copies;
  };
  for (const Part& part : std::vector<Part>{{500, 1, 1},
                                            {511, 1, 3},
                                            {512, 1, 1},
                                            {575, 1, 1},
                                            {509, 5, 1},
                                            {543, 2, 2},
                                            {512, 33, 1}}) {
    const std::vector<float> out = attend(part.begin, part.count, part.copies);
    RETURN_IF_WRONG(Failed(candidate, "Attention"));
    for (int64_t i = 0; i < part.copies; ++i) {
      if (std::memcmp(out.data() + i * part.count * width,
                      whole.data() + (part.begin - first) * width,
                      static_cast<size_t>(part.count * width) * 4) != 0) {
        return c.name + ": rows from " + std::to_string(part.begin) + ", " +
               std::to_string(part.count) + " of " + std::to_string(part.copies) +
               " sequences, are not those of the whole";
      }
    }
  }
  return "";
}

// Rows of a product, bit for bit, whatever the number of rows.
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

class ConformanceOfCuda : public CudaTest {
 protected:
  ConformanceOfCuda()
      : CudaTest(
            {.max_rows = 256, .max_features = 2048, .max_logit_rows = 8, .max_vocab = 300000}) {}
};

TEST_P(ConformanceOfCuda, EveryOperationMatchesTheReference) { ExpectConformance(*mirror_); }

TEST_P(ConformanceOfCuda, RowsDoNotDependOnTheBatch) {
  for (const CacheCase& c : CacheCases()) EXPECT_EQ(CheckAttentionRows(*mirror_, c), "");
  if (GetParam()) {
    EXPECT_EQ(CheckMatMulRows(*mirror_), "");
  }
}

// A product of what another operation wrote right before is that of any other x.
TEST_P(ConformanceOfCuda, ProductsReadWhatWasWrittenLast) {
  const std::unique_ptr<Backend> device =
      std::move(*CreateBackend({.device = "cuda", .deterministic = GetParam()}));
  ASSERT_TRUE(device->Reserve({.max_rows = 64, .max_features = 64}).ok());
  std::mt19937_64 random(kSeed);
  const int64_t m = 33, n = 48, k = 64;
  const std::vector<float> values = Normal(random, m * 2 * k), ones(static_cast<size_t>(k), 1.0f),
                           w = Normal(random, n * k);
  const ConstTensorView part = View(w, Shape{n, k});
  const Weight weight = std::move(*device->PackWeight({&part, 1}, {}, WeightFormat::kBF16));
  Buffer pairs = *device->Import(View(values, Shape{m, 2 * k}));
  Buffer scale = *device->Import(View(ones, Shape{k}));
  Buffer x = *device->Allocate(m * k * 4), copy = *device->Allocate(m * k * 4);
  Buffer out = *device->Allocate(m * n * 4);
  const auto view = [](Buffer& buffer, int64_t width) {
    return buffer.View(DType::kF32, Shape{m, width});
  };
  std::vector<int64_t> rows(static_cast<size_t>(m));
  std::iota(rows.begin(), rows.end(), 0);
  const auto product_of = [&](Buffer& of) {
    device->MatMul({view(of, k), &weight, false, view(out, n)});
    std::vector<float> product(static_cast<size_t>(m * n));
    device->ReadToHost(out.data(), out.bytes(), reinterpret_cast<std::byte*>(product.data()));
    EXPECT_EQ(Failed(*device, "MatMul"), "");
    return product;
  };
  const auto product_of_copy = [&] {
    device->GatherRows({view(x, k), rows, view(copy, k)});
    return product_of(copy);
  };
  device->SwiGlu({view(pairs, 2 * k), view(x, k)});
  const std::vector<float> gated = product_of(x);
  EXPECT_EQ(gated, product_of_copy());
  device->RmsNorm({view(x, k), scale.View(DType::kF32, Shape{k}), 1e-5f, view(copy, k)});
  const std::vector<float> normed = product_of(copy);
  EXPECT_NE(normed, gated);
  device->RmsNorm({view(x, k), scale.View(DType::kF32, Shape{k}), 1e-5f, view(copy, k)});
  EXPECT_EQ(gated, product_of_copy());  // written over
  device->RmsNorm({view(x, k), scale.View(DType::kF32, Shape{k}), 1e-5f, view(copy, k)});
  EXPECT_EQ(gated, product_of(x));  // another x
  EXPECT_EQ(normed, product_of(copy));
}

INSTANTIATE_TEST_SUITE_P(Cuda, ConformanceOfCuda, ::testing::Bool(), [](const auto& chosen) {
  return chosen.param ? "deterministic" : "not_deterministic";
});

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

TEST(ConformanceSuite, PassesOnTheReferenceItself) { ExpectConformance(*CreateReferenceBackend()); }

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
