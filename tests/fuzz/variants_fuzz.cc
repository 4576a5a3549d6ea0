// Every CPU variant that this machine has, on layouts and contents of an input: sealed pages hold
// the reference's values bit by bit, integer products are exact, and attention stays within the
// bound of its roundings. What is not finite is refused by all or by none.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>

#include "kernels/cpu/attention_ops.h"
#include "tests/kernels/attention_case.h"

namespace innerq {
namespace {

using Provider = FuzzedDataProvider;

constexpr int64_t kMaxTokens = 1024;

// --- Integer products ---

// Memory of just `size` elements, on a border of 64 bytes, beyond which AddressSanitizer watches.
template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), kAlignment))) {
    std::memset(static_cast<void*>(data_), 0x55, static_cast<size_t>(size) * sizeof(T));
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  ~Aligned() { ::operator delete(data_, kAlignment); }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

// AttentionOps::dot as its contract says it, from packed codes and the integers x [row_end][inner].
void MultiplyPlainly(const DotArgs& args, const int32_t* x, int32_t* dots) {
  const UnpackArgs& side = args.side;
  for (int64_t r = args.row_begin; r < args.row_end; ++r) {
    for (int64_t g = 0; g < args.groups(); ++g) {
      int32_t* out = dots + (r - args.row_begin) * args.row_dots() + g * side.outer;
      for (int64_t o = args.panel_begin * kPanelWidth; o < args.panel_end * kPanelWidth; ++o) {
        out[o] = 0;
        for (int64_t i = g * side.group_size; i < (g + 1) * side.group_size; ++i) {
          const int64_t at = ((o / 16 * (side.inner / 4) + i / 4) * 16 + o % 16) * 4 + i % 4;
          const int32_t code = ReadCode(side.packed, side.bits, at);
          out[o] += (code - side.offset) * x[r * side.inner + i];
        }
      }
    }
  }
}

void CheckDot(Provider& input) {
  constexpr int kBits[] = {2, 3, 4, 8};
  constexpr int64_t kGroups[] = {8, 16, 32, 64, 128};
  constexpr int64_t kReadBeyond = 64;
  DotArgs args;
  UnpackArgs& side = args.side;
  side.bits = input.PickValueInArray(kBits);
  side.group_size = input.PickValueInArray(kGroups);
  side.inner = side.group_size * input.ConsumeIntegralInRange<int64_t>(1, 256 / side.group_size);
  side.outer = kPanelWidth * input.ConsumeIntegralInRange<int64_t>(1, 5);
  side.offset = input.ConsumeBool() ? 1 << (side.bits - 1) : 0;
  args.panel_end = side.outer / kPanelWidth;
  args.panel_begin = input.ConsumeIntegralInRange<int64_t>(0, args.panel_end - 1);
  args.row_end = input.ConsumeIntegralInRange<int64_t>(1, kTileRows);
  args.row_begin =
      input.ConsumeIntegralInRange<int64_t>(0, (args.row_end - 1) / kRowBlock) * kRowBlock;
  side.num_rows = args.row_end;
  const bool extreme = input.ConsumeBool();
  std::mt19937_64 random(input.ConsumeIntegral<uint64_t>());
  const int64_t num_codes = side.outer * side.inner, packed_bytes = num_codes / 8 * side.bits;
  const Aligned<uint8_t> packed(packed_bytes + kReadBeyond);
  for (int64_t i = 0; i < packed_bytes; ++i) {
    packed[i] = extreme ? 0xff : static_cast<uint8_t>(random());
  }
  side.packed = packed.get();

  const int shift = HighShift(side.bits);
  const int32_t top = MaxRowInteger(shift);
  args.rows = {nullptr, IntegerRows::Stride(side.inner), BlockOf(side.group_size), shift};
  const int64_t row_bytes = RoundUp(args.row_end, kRowBlock) * args.rows.stride;
  const Aligned<int8_t> bytes(row_bytes);
  args.rows.data = bytes.get();
  const Aligned<int32_t> x(args.row_end * side.inner), sums(args.row_end * args.groups());
  for (int64_t r = 0; r < args.row_end; ++r) {
    for (int64_t i = 0; i < side.inner; ++i) {
      int32_t& value = x[r * side.inner + i];
      const bool negative = random() % 2 != 0;
      value = extreme ? (negative ? -top : top)
                      : static_cast<int32_t>(random() % static_cast<unsigned>(2 * top + 1)) - top;
      const int32_t high = (value + (1 << shift >> 1)) >> shift, block = args.rows.block;
      int8_t* low = args.rows.Row(r) + i / block * 2 * block + i % block;
      low[0] = static_cast<int8_t>(value - (high << shift));
      low[block] = static_cast<int8_t>(high);
      int32_t& sum = sums[r * args.groups() + i / side.group_size];
      sum = i % side.group_size == 0 ? value : sum + value;
    }
  }
  args.sums = sums.get();

  const int64_t count = (args.row_end - args.row_begin) * args.row_dots();
  const Aligned<int32_t> expected(count);
  MultiplyPlainly(args, x.get(), expected.get());
  for (const CpuIsa isa : SupportedCpuIsas()) {
    const Aligned<uint8_t> codes(UnpackArgs::kCodeBytes * (num_codes + side.inner * kPanelWidth));
    const Aligned<int32_t> dots(RoundUp(count, kRowBlock * args.row_dots()));
    side.codes = codes.get();
    args.dots = dots.get();
    const AttentionOps ops = AttentionOpsFor(isa);
    ops.begin(side.num_rows);
    args.codes = ops.unpack(side);
    ops.dot(args);
    ops.end(side.num_rows);
    for (int64_t i = 0; i < count; ++i) {
      if (i % side.outer / kPanelWidth < args.panel_begin) continue;
      CHECK(dots[i] == expected[i], std::string(CpuIsaName(isa)) + ": sum " + std::to_string(i));
    }
  }
}

// --- Pages ---

QuantSpec ConsumeSpec(Provider& input) {
  constexpr int kBits[] = {2, 3, 4, 8, 16};
  constexpr int kGroups[] = {8, 16, 32, 64, 128};
  constexpr QuantMode kModes[] = {QuantMode::kSymmetric, QuantMode::kAsymmetric,
                                  QuantMode::kHybrid};
  return {.bits = input.PickValueInArray(kBits),
          .mode = input.PickValueInArray(kModes),
          .axis = input.ConsumeBool() ? QuantAxis::kInner : QuantAxis::kOuter,
          .group_size = input.PickValueInArray(kGroups),
          .codec = input.ConsumeBool() ? QuantCodec::kPaper : QuantCodec::kFitted};
}

Case ConsumeCase(Provider& input) {
  constexpr int64_t kPages[] = {32, 32, 32, 64, 128};
  constexpr int64_t kDims[] = {8, 16, 24, 32, 40, 48, 64, 80, 128, 256};
  Case c;
  c.key = ConsumeSpec(input);
  c.value = ConsumeSpec(input);
  c.page_tokens = input.PickValueInArray(kPages);
  c.head_dim = input.PickValueInArray(kDims);
  c.kv_heads = input.ConsumeIntegralInRange<int64_t>(1, 2);
  constexpr int64_t kHeads[] = {1, 2, 3, 4, 16};
  c.heads = c.kv_heads * input.PickValueInArray(kHeads);
  c.sink_tokens = c.page_tokens * input.ConsumeIntegralInRange<int64_t>(0, 1);
  c.recent_tokens = c.page_tokens * input.ConsumeIntegralInRange<int64_t>(1, 2);
  c.normalize = input.ConsumeBool();
  return c;
}

// How the numbers of one side are made.
enum class Content {
  kNormal,
  kZero,
  kTiny,
  kSubnormal,
  kHuge,
  kConstant,
  kOutliers,
  kAny,
  kBits,
  kMaxValue = kBits
};

float MakeNumber(Content content, std::mt19937_64& random) {
  constexpr float kSpecial[] = {0.0f,     -0.0f,     0x1p-24f, -0x1p-24f, 0x1p-14f,
                                65504.0f, -65504.0f, 1.0f,     -1.0f,     0x1p-40f};
  const float uniform = static_cast<float>(static_cast<int64_t>(random() >> 40)) * 0x1p-23f - 1.0f;
  switch (content) {
    case Content::kNormal:
      return 3.0f * uniform;
    case Content::kZero:
      return 0.0f;
    case Content::kTiny:
      return 0x1p-18f * uniform;
    case Content::kSubnormal:
      return 1e-39f * uniform;
    case Content::kHuge:
      return 65504.0f * uniform;
    case Content::kConstant:
      return 1.25f;
    case Content::kOutliers:
      return random() % 64 == 0 ? 2000.0f * uniform : 0.01f * uniform;
    case Content::kAny:
      return random() % 2 == 0 ? uniform : kSpecial[random() % std::size(kSpecial)];
    case Content::kBits:  // of any F16, NaN and infinity included
      return F16ToF32(static_cast<uint16_t>(random()));
  }
  return 0;
}

// Angles are zero, so that rotation is exact and all caches hold equal keys.
Input MakeInput(const Case& c, int64_t tokens, Provider& provider) {
  std::mt19937_64 random(provider.ConsumeIntegral<uint64_t>());
  const auto query = provider.ConsumeEnum<Content>(), key = provider.ConsumeEnum<Content>(),
             value = provider.ConsumeEnum<Content>();
  Input input;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < c.heads * c.head_dim; ++i) {
      input.qkv.push_back(MakeNumber(query == Content::kBits ? Content::kAny : query, random));
    }
    for (int64_t i = 0; i < c.kv_heads * c.head_dim; ++i) {
      input.qkv.push_back(MakeNumber(key, random));
    }
    for (int64_t i = 0; i < c.kv_heads * c.head_dim; ++i) {
      input.qkv.push_back(MakeNumber(value, random));
    }
  }
  input.cos.assign(static_cast<size_t>(tokens * c.head_dim / 2), 1.0f);
  input.sin.assign(input.cos.size(), 0.0f);
  input.largest_key = input.largest_value = Largest(input.qkv);
  return input;
}

// A backend, its cache of one sequence, and whether it could seal what that holds.
struct Filled {
  Filled(Backend& of, const Case& c, Input& input, const std::vector<PageRef>& pages)
      : backend(of), cache(c, of.code_order(), static_cast<int64_t>(pages.size())) {
    Fill(backend, cache, input, pages, kNormId, q);
    ok = backend.Synchronize().ok();
  }
  Backend& backend;
  Cache cache;
  std::vector<float> q;
  bool ok = false;
};

void CheckSealed(Filled& expected, Filled& actual, const std::vector<PageRef>& pages,
                 PageRange sealed, const std::string& name) {
  const KvLayout& layout = expected.cache.layout;
  for (int64_t p = sealed.begin; p < sealed.end; ++p) {
    const int32_t id = pages[static_cast<size_t>(p)].sealed_id;
    for (int64_t g = 0; g < layout.kv_heads(); ++g) {
      for (int64_t t = 0; t < layout.page_tokens(); ++t) {
        for (int64_t d = 0; d < layout.head_dim(); ++d) {
          const PagedKvView want = expected.cache.View(), got = actual.cache.View();
          const bool same =
              DecodeSealedKey(want, id, g, t, d) == DecodeSealedKey(got, id, g, t, d) &&
              DecodeSealedValue(want, id, g, t, d) == DecodeSealedValue(got, id, g, t, d);
          CHECK(same, name + ": page " + std::to_string(p) + ", head " + std::to_string(g) +
                          ", token " + std::to_string(t) + ", channel " + std::to_string(d));
        }
      }
    }
  }
}

void CheckAttention(const std::vector<float>& expected, const std::vector<float>& actual,
                    double bound, const std::string& name) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool near = std::fabs(static_cast<double>(actual[i]) - expected[i]) <= bound;
    CHECK(near, name + ": element " + std::to_string(i) + " is " + std::to_string(actual[i]) +
                    " instead of " + std::to_string(expected[i]) + ", bound " +
                    std::to_string(bound));
  }
}

std::vector<std::unique_ptr<Backend>> MakeBackends() {
  std::vector<std::unique_ptr<Backend>> backends;
  for (const std::string& variant : CpuVariants()) {
    auto backend = CreateBackend({.variant = variant, .threads = 1});
    CHECK(backend.ok() && (*backend)->name() == "cpu/" + variant, variant);
    CHECK((*backend)->Reserve({.max_rows = kMaxTokens, .max_features = 8}).ok(), variant);
    backends.push_back(std::move(*backend));
  }
  return backends;
}

void CheckPages(Provider& input) {
  static const std::vector<std::unique_ptr<Backend>> backends = MakeBackends();
  const Case c = ConsumeCase(input);
  KvCacheSpec spec{c.kv_heads, c.head_dim, c.page_tokens, c.sink_tokens, c.recent_tokens, {}};
  spec.layers = {{c.key, c.value, c.normalize}};
  if (!KvLayout::Create(spec, CodeOrder::kPanel16).ok()) return;
  const int64_t num_pages = (c.sink_tokens + c.recent_tokens) / c.page_tokens +
                            input.ConsumeIntegralInRange<int64_t>(1, 3);
  const int64_t tokens =
      (num_pages - 1) * c.page_tokens + input.ConsumeIntegralInRange<int64_t>(1, c.page_tokens);
  const int64_t num_rows = input.ConsumeIntegralInRange<int64_t>(1, 20);
  const Rows rows{std::max<int64_t>(tokens - num_rows, 0), tokens};
  Input numbers = MakeInput(c, tokens, input);
  const std::vector<PageRef> pages = Pages(num_pages, 0, 1);

  const std::unique_ptr<Backend> reference = CreateReferenceBackend();
  Filled expected(*reference, c, numbers, pages);
  const PageRange sealed = expected.cache.layout.SealedPages(tokens - 1);
  const bool finite = std::all_of(numbers.qkv.begin(), numbers.qkv.end(),
                                  [](float x) { return std::fabs(x) <= 65504.0f; });
  std::vector<float> out;
  double bound = 0;
  std::vector<std::byte> pool;  // as the first variant sealed it
  if (expected.ok && finite) {
    out = Attend(*reference, expected.cache, expected.q, c.heads, pages, kNormId, rows);
    bound = ErrorBound(expected.cache, c, numbers, expected.q, pages, rows.end - 1);
  }
  for (const auto& backend : backends) {
    const std::string name(backend->name());
    Filled actual(*backend, c, numbers, pages);
    CHECK(actual.ok == expected.ok, name + ": another verdict on the values than the reference's");
    if (!expected.ok) continue;
    if (backend == backends.front()) {
      CheckSealed(expected, actual, pages, sealed, name);
      pool = actual.cache.sealed;
    }
    CHECK(actual.cache.sealed == pool, name + ": other sealed bytes than the best variant's");
    if (out.empty()) continue;
    const std::vector<float> got =
        Attend(*backend, actual.cache, actual.q, c.heads, pages, kNormId, rows);
    CheckAttention(out, got, bound, name);
    const std::vector<float> alone =
        Attend(*backend, actual.cache, actual.q, c.heads, pages, kNormId, {tokens - 1, tokens});
    CHECK(std::equal(alone.begin(), alone.end(), got.end() - static_cast<ptrdiff_t>(alone.size())),
          name + ": a row depends on the rows beside it");
  }
}

}  // namespace
}  // namespace innerq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace innerq;
  FuzzedDataProvider input(data, size);
  switch (input.ConsumeIntegralInRange<int>(0, 7)) {
    case 0:
    case 1:
      CheckDot(input);
      break;
    default:
      CheckPages(input);
  }
  return 0;
}
