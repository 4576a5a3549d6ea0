// The reference backend: plain loops in the order of the formulas, sums in double. It is the
// specification that every other backend is tested against; it is not meant to be quick.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "kernels/backend.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/float16.h"

namespace innerq {
namespace {

// What a weight becomes in a format, as a float.
float RoundTo(WeightFormat format, float x) {
  switch (format) {
    case WeightFormat::kBF16:
      return BF16ToF32(F32ToBF16(x));
    case WeightFormat::kF16:
      return F16ToF32(F32ToF16(x));
    case WeightFormat::kF32:
      return x;
  }
  return x;
}

class ReferenceBackend final : public Backend {
 public:
  std::string_view name() const override { return "reference"; }
  CodeOrder code_order() const override { return CodeOrder::kRowMajor; }
  bool deterministic() const override { return true; }
  int64_t available_bytes() const override { return AvailableHostBytes(); }

  Result<Buffer> Allocate(int64_t bytes) override { return AllocateHost(bytes); }

  Result<Buffer> Import(ConstTensorView host) override {
    return Buffer(const_cast<std::byte*>(host.data), host.bytes(), nullptr);
  }

  Result<void> Reserve(const StepLimits&) override { return {}; }

  Result<void> Synchronize() override {
    failed_seals_ = std::exchange(failing_, {});
    if (failed_seals_.empty()) return {};
    return Error{ErrorCode::kInternal, "non-finite key or value in the cache"};
  }

  std::vector<int64_t> failed_seals() const override {
    return {failed_seals_.begin(), failed_seals_.end()};
  }

 private:
  // Weights are [N, K] F32, already rounded to their format.
  Result<void> DoPackWeight(std::span<const ConstTensorView> parts,
                            std::span<const ConstTensorView> bias_parts, Weight* weight) override {
    ASSIGN_OR_RETURN(weight->data, Allocate(weight->rows * weight->cols * 4));
    float* out = reinterpret_cast<float*>(weight->data.data());
    for (const ConstTensorView& part : parts) {
      for (int64_t i = 0; i < part.shape.num_elements(); ++i) {
        *out++ = RoundTo(weight->format, ElementAsFloat(part, i));
      }
    }
    return PackBias(bias_parts, weight);
  }

  // [N, K] F32: T * l, exact.
  Result<void> DoPackLowBitWeight(std::span<const LowBitMatrix> parts,
                                  std::span<const ConstTensorView> bias_parts,
                                  Weight* weight) override {
    ASSIGN_OR_RETURN(weight->data, Allocate(weight->rows * weight->cols * 4));
    float* out = reinterpret_cast<float*>(weight->data.data());
    for (const LowBitMatrix& part : parts) {
      for (int64_t n = 0; n < part.rows; ++n) {
        for (int64_t k = 0; k < part.cols; ++k) {
          *out++ = part.Clip(n, k) * static_cast<float>(part.Level(n, k));
        }
      }
    }
    return PackBias(bias_parts, weight);
  }

  void DoEmbed(const EmbedArgs& args) override {
    const int64_t width = args.out.shape[1];
    float* out = args.out.As<float>();
    for (const int32_t id : args.token_ids) {
      for (int64_t c = 0; c < width; ++c) *out++ = ElementAsFloat(args.table, id * width + c);
    }
  }

  void DoRmsNorm(const RmsNormArgs& args) override {
    const int64_t width = args.x.shape[1];
    for (int64_t row = 0; row < args.x.shape[0]; ++row) {
      const float* x = args.x.As<float>() + row * width;
      float* out = args.out.As<float>() + row * width;
      double squares = 0;
      for (int64_t c = 0; c < width; ++c) squares += static_cast<double>(x[c]) * x[c];
      const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(width) + args.epsilon);
      for (int64_t c = 0; c < width; ++c) {
        out[c] = static_cast<float>(x[c] * inverse * args.weight.As<float>()[c]);
      }
    }
  }

  // Inputs [K] as they meet a weight, in units of what is returned.
  static double RoundInputs(const float* x, const Weight& weight, float* rounded) {
    if (!weight.low_bit) {
      const bool bf16 = weight.format == WeightFormat::kBF16;
      for (int64_t k = 0; k < weight.cols; ++k) {
        rounded[k] = bf16 ? BF16ToF32(F32ToBF16(x[k])) : x[k];
      }
      return 1;
    }
    const LowBitSpec& spec = *weight.low_bit;
    const InputRounding rounding =
        InputRounding::Of(spec, weight.input_clip, LargestInput(x, weight.cols));
    for (int64_t k = 0; k < weight.cols; ++k) {
      rounded[k] = static_cast<float>(rounding.Integer(spec, x[k]));
    }
    return static_cast<double>(rounding.down) / spec.max_level();
  }

  void DoMatMul(const MatMulArgs& args) override {
    const Weight& weight = *args.weight;
    const float* w = reinterpret_cast<const float*>(weight.data.data());
    const float* bias = reinterpret_cast<const float*>(weight.bias.data());
    std::vector<float> rounded(static_cast<size_t>(weight.cols));
    for (int64_t m = 0; m < args.x.shape[0]; ++m) {
      const double unit = RoundInputs(args.x.As<float>() + m * weight.cols, weight, rounded.data());
      for (int64_t n = 0; n < weight.rows; ++n) {
        double sum = 0;
        for (int64_t k = 0; k < weight.cols; ++k) {
          sum += static_cast<double>(rounded[static_cast<size_t>(k)]) * w[n * weight.cols + k];
        }
        sum *= unit;
        if (bias != nullptr) sum += bias[n];
        float& out = args.out.As<float>()[m * weight.rows + n];
        out = static_cast<float>(args.accumulate ? out + sum : sum);
      }
    }
  }

  void DoRopeTable(const RopeTableArgs& args) override {
    int64_t i = 0;
    for (const int64_t position : args.positions) {
      for (const float frequency : args.inverse_frequency) {
        const float angle = static_cast<float>(position) * frequency;
        args.cos.As<float>()[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
        args.sin.As<float>()[i] = static_cast<float>(std::sin(static_cast<double>(angle)));
        ++i;
      }
    }
  }

  // Channel d turns with d + D/2 (Hugging Face's order).
  static float Rotated(const float* x, const float* cos, const float* sin, int64_t dim, int64_t d) {
    const int64_t half = dim / 2;
    const int64_t i = d % half;
    const double turned = d < half ? -static_cast<double>(x[d + half]) : x[d - half];
    return static_cast<float>(static_cast<double>(x[d]) * cos[i] + turned * sin[i]);
  }

  void DoRopeAppend(const RopeAppendArgs& args) override {
    const KvLayerLayout& layout = *args.kv.layout;
    const int64_t dim = layout.head_dim;
    const int64_t num_heads = args.q.shape[1] / dim;
    for (const SequenceSlice& slice : args.slices) {
      for (int64_t i = 0; i < slice.num_rows; ++i) {
        const int64_t row = slice.row_begin + i;
        const int64_t position = slice.first_position + i;
        const float* qkv = args.qkv.As<float>() + row * args.qkv.shape[1];
        const float* cos = args.cos.As<float>() + row * (dim / 2);
        const float* sin = args.sin.As<float>() + row * (dim / 2);
        for (int64_t h = 0; h < num_heads; ++h) {
          for (int64_t d = 0; d < dim; ++d) {
            args.q.As<float>()[row * args.q.shape[1] + h * dim + d] =
                Rotated(qkv + h * dim, cos, sin, dim, d);
          }
        }
        const int64_t open_id =
            slice.pages[static_cast<size_t>(position / layout.page_tokens)].open_id;
        CHECK(open_id >= 0, "RopeAppend: no open page");
        const int64_t t = position % layout.page_tokens;
        for (int64_t g = 0; g < layout.kv_heads; ++g) {
          const float* key = qkv + (num_heads + g) * dim;
          const float* value = qkv + (num_heads + layout.kv_heads + g) * dim;
          for (int64_t d = 0; d < dim; ++d) {
            args.kv.OpenKeys(open_id, g)[layout.OpenKeyIndex(t, d)] =
                F32ToF16(Rotated(key, cos, sin, dim, d));
            args.kv.OpenValues(open_id, g)[layout.OpenValueIndex(t, d)] = F32ToF16(value[d]);
          }
        }
      }
    }
  }

  void DoComputeKeyNorm(const KeyNormArgs& args) override {
    const KvLayerLayout& layout = *args.kv.layout;
    for (const KeyNormItem& item : args.items) {
      for (int64_t g = 0; g < layout.kv_heads; ++g) {
        for (int64_t d = 0; d < layout.head_dim; ++d) {
          float largest = 0;
          for (const int32_t open_id : item.open_ids) {
            for (int64_t t = 0; t < layout.page_tokens; ++t) {
              const float k = F16ToF32(args.kv.OpenKeys(open_id, g)[layout.OpenKeyIndex(t, d)]);
              if (std::isnan(k) || std::fabs(k) > largest) largest = std::fabs(k);  // NaN stays
            }
          }
          args.kv.KeyNorm(item.norm_id, g)[d] = largest == 0 ? 1.0f : std::sqrt(largest);
        }
      }
    }
  }

  void DoSeal(const SealArgs& args) override {
    const KvLayerLayout& layout = *args.kv.layout;
    for (size_t i = 0; i < args.items.size(); ++i) {
      finite_ = true;
      for (int64_t g = 0; g < layout.kv_heads; ++g) {
        SealKeys(args.kv, args.items[i], g);
        SealValues(args.kv, args.items[i], g);
      }
      if (!finite_) failing_.insert(static_cast<int64_t>(i));
    }
  }

  // Encodes the groups of one side. `element(i, j)` is value i of group j, `weight(i, j)` that of
  // its error, `code_index` and `scale_index` say where its code and its parameters go.
  template <typename Element, typename ErrorWeight, typename CodeIndex, typename ScaleIndex>
  void SealGroups(const QuantSpec& spec, int64_t num_groups, std::byte* codes, std::byte* scales,
                  std::byte* zeros, Element element, ErrorWeight weight, CodeIndex code_index,
                  ScaleIndex scale_index) {
    constexpr int kMaxGroup = 128;
    float x[kMaxGroup], weights[kMaxGroup];
    uint8_t group_codes[kMaxGroup];
    for (int64_t j = 0; j < num_groups; ++j) {
      bool finite = true;
      for (int i = 0; i < spec.group_size; ++i) {
        x[i] = element(i, j);
        weights[i] = weight(i, j);
        finite &= std::isfinite(x[i]);
      }
      finite_ &= finite;
      if (!finite) continue;  // EncodeGroups takes finite values only
      GroupParams params;
      EncodeGroups<1>(spec, x, weights, spec.group_size, group_codes, &params);
      const StoredParams stored = StoreParams(params, spec.bits);
      for (int i = 0; i < spec.group_size; ++i) {
        WriteCode(reinterpret_cast<uint8_t*>(codes), spec.bits, code_index(i, j), group_codes[i]);
      }
      reinterpret_cast<uint16_t*>(scales)[scale_index(j)] = stored.scale;
      if (spec.has_zero()) reinterpret_cast<uint16_t*>(zeros)[scale_index(j)] = stored.zero;
    }
  }

  void CheckFinite(const uint16_t* halves, int64_t n) {
    for (int64_t i = 0; i < n; ++i) finite_ &= std::isfinite(F16ToF32(halves[i]));
  }

  void SealKeys(const PagedKvView& kv, const SealItem& item, int64_t g) {
    const KvLayerLayout& layout = *kv.layout;
    const QuantSpec& spec = layout.key;
    const uint16_t* from = kv.OpenKeys(item.open_id, g);
    std::byte* to = kv.SealedHead(item.sealed_id, g);
    const int64_t tokens = layout.page_tokens, dim = layout.head_dim;
    if (!spec.quantized()) {
      CheckFinite(from, tokens * dim);
      std::memcpy(to + layout.key_codes, from, static_cast<size_t>(tokens * dim * 2));
      return;
    }
    const float* norm = layout.normalize_keys ? kv.KeyNorm(item.norm_id, g) : nullptr;
    const bool inner = spec.axis == QuantAxis::kInner;
    const int64_t size = spec.group_size;
    // Group j: inner, channels of one token; outer, tokens of one channel.
    const auto place = [=](int64_t i, int64_t j) -> std::pair<int64_t, int64_t> {
      if (inner) return {j % tokens, j / tokens * size + i};
      return {j / dim * size + i, j % dim};
    };
    SealGroups(
        spec, tokens * dim / size, to + layout.key_codes, to + layout.key_scales,
        to + layout.key_zeros,
        [&](int64_t i, int64_t j) {
          const auto [t, d] = place(i, j);
          const float k = F16ToF32(from[layout.OpenKeyIndex(t, d)]);
          return norm != nullptr ? k / norm[d] : k;
        },
        [&](int64_t i, int64_t j) {
          const auto [t, d] = place(i, j);
          return norm != nullptr && inner ? norm[d] * norm[d] : 1.0f;
        },
        [&](int64_t i, int64_t j) {
          const auto [t, d] = place(i, j);
          return layout.KeyCodeIndex(t, d);
        },
        [&](int64_t j) {
          const auto [t, d] = place(0, j);
          return layout.KeyScaleIndex(t, d);
        });
  }

  void SealValues(const PagedKvView& kv, const SealItem& item, int64_t g) {
    const KvLayerLayout& layout = *kv.layout;
    const QuantSpec& spec = layout.value;
    const uint16_t* from = kv.OpenValues(item.open_id, g);
    std::byte* to = kv.SealedHead(item.sealed_id, g);
    const int64_t tokens = layout.page_tokens, dim = layout.head_dim;
    if (!spec.quantized()) {
      for (int64_t t = 0; t < tokens; ++t) CheckFinite(from + layout.OpenValueIndex(t, 0), dim);
      std::memcpy(to + layout.value_codes, from,
                  static_cast<size_t>(tokens * layout.padded_dim() * 2));
      return;
    }
    const bool inner = spec.axis == QuantAxis::kInner;
    const int64_t size = spec.group_size;
    // Group j: inner, tokens of one channel; outer, channels of one token.
    const auto place = [=](int64_t i, int64_t j) -> std::pair<int64_t, int64_t> {
      if (inner) return {j / dim * size + i, j % dim};
      return {j % tokens, j / tokens * size + i};
    };
    SealGroups(
        spec, tokens * dim / size, to + layout.value_codes, to + layout.value_scales,
        to + layout.value_zeros,
        [&](int64_t i, int64_t j) {
          const auto [t, c] = place(i, j);
          return F16ToF32(from[layout.OpenValueIndex(t, c)]);
        },
        [](int64_t, int64_t) { return 1.0f; },
        [&](int64_t i, int64_t j) {
          const auto [t, c] = place(i, j);
          return layout.ValueCodeIndex(t, c);
        },
        [&](int64_t j) {
          const auto [t, c] = place(0, j);
          return layout.ValueScaleIndex(t, c);
        });
  }

  // Keys and values of one head of one sequence as F32, a page decoded when it is first read.
  class PageReader {
   public:
    struct Page {
      std::vector<float> keys, values;  // [T][D]
    };

    PageReader(const PagedKvView& kv, const SequenceSlice& slice, int64_t head)
        : kv_(kv), slice_(slice), head_(head), open_(slice.pages.size()), sealed_(open_.size()) {}

    const Page& Read(int64_t page, bool is_sealed) {
      Page& decoded = (is_sealed ? sealed_ : open_)[static_cast<size_t>(page)];
      if (decoded.keys.empty()) Decode(slice_.pages[static_cast<size_t>(page)], is_sealed, decoded);
      return decoded;
    }

   private:
    void Decode(PageRef ref, bool is_sealed, Page& page) const {
      const KvLayerLayout& layer = *kv_.layout;
      for (int64_t t = 0; t < layer.page_tokens; ++t) {
        for (int64_t d = 0; d < layer.head_dim; ++d) {
          if (is_sealed) {
            const float norm = layer.normalize_keys ? kv_.KeyNorm(slice_.norm_id, head_)[d] : 1.0f;
            page.keys.push_back(DecodeSealedKey(kv_, ref.sealed_id, head_, t, d) * norm);
            page.values.push_back(DecodeSealedValue(kv_, ref.sealed_id, head_, t, d));
          } else {
            const int64_t key = layer.OpenKeyIndex(t, d), value = layer.OpenValueIndex(t, d);
            page.keys.push_back(F16ToF32(kv_.OpenKeys(ref.open_id, head_)[key]));
            page.values.push_back(F16ToF32(kv_.OpenValues(ref.open_id, head_)[value]));
          }
        }
      }
    }

    const PagedKvView& kv_;
    const SequenceSlice& slice_;
    const int64_t head_;
    std::vector<Page> open_, sealed_;
  };

  void DoAttention(const AttentionArgs& args) override {
    const KvLayerLayout& layer = *args.kv.layout;
    const int64_t dim = layer.head_dim;
    const int64_t group = args.num_heads / layer.kv_heads;
    for (const SequenceSlice& slice : args.slices) {
      for (int64_t g = 0; g < layer.kv_heads; ++g) {
        PageReader reader(args.kv, slice, g);
        for (int64_t i = 0; i < slice.num_rows; ++i) {
          for (int64_t h = g * group; h < (g + 1) * group; ++h) {
            const int64_t at = (slice.row_begin + i) * args.q.shape[1] + h * dim;
            AttendRow(args, slice.first_position + i, slice.exact_before, reader,
                      {args.q.As<float>() + at, args.out.As<float>() + at});
          }
        }
      }
    }
  }

  struct Row {
    const float* q;  // [D]
    float* out;      // [D]
  };

  // out = softmax(scale * q.K) V over positions [0, position].
  static void AttendRow(const AttentionArgs& args, int64_t position, int64_t exact_before,
                        PageReader& reader, Row row) {
    const int64_t dim = args.kv.layout->head_dim, page_tokens = args.kv.layout->page_tokens;
    const PageRange sealed = args.layout->SealedPages(position, exact_before);
    const auto read = [&](int64_t p) -> const PageReader::Page& {
      const int64_t page = p / page_tokens;
      return reader.Read(page, page >= sealed.begin && page < sealed.end);
    };
    std::vector<double> weights(static_cast<size_t>(position + 1));
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t p = 0; p <= position; ++p) {
      const float* key = read(p).keys.data() + p % page_tokens * dim;
      double dot = 0;
      for (int64_t d = 0; d < dim; ++d) dot += static_cast<double>(key[d]) * row.q[d];
      weights[static_cast<size_t>(p)] = dot * args.scale;
      largest = std::max(largest, weights[static_cast<size_t>(p)]);
    }
    double sum = 0;
    std::vector<double> total(static_cast<size_t>(dim));
    for (int64_t p = 0; p <= position; ++p) {
      const double weight = std::exp(weights[static_cast<size_t>(p)] - largest);
      const float* value = read(p).values.data() + p % page_tokens * dim;
      for (int64_t c = 0; c < dim; ++c) total[static_cast<size_t>(c)] += weight * value[c];
      sum += weight;
    }
    for (int64_t c = 0; c < dim; ++c) {
      row.out[c] = static_cast<float>(total[static_cast<size_t>(c)] / sum);
    }
  }

  void DoSwiGlu(const SwiGluArgs& args) override {
    const int64_t width = args.out.shape[1];
    for (int64_t row = 0; row < args.out.shape[0]; ++row) {
      for (int64_t c = 0; c < width; ++c) {
        const double gate = args.gate_up.As<float>()[row * 2 * width + c];
        const double up = args.gate_up.As<float>()[row * 2 * width + width + c];
        args.out.As<float>()[row * width + c] =
            static_cast<float>(gate / (1.0 + std::exp(-gate)) * up);
      }
    }
  }

  void DoGatherRows(const GatherRowsArgs& args) override {
    const int64_t width = args.x.shape[1];
    float* out = args.out.As<float>();
    for (const int64_t row : args.rows) {
      std::memcpy(out, args.x.As<float>() + row * width, static_cast<size_t>(width) * 4);
      out += width;
    }
  }

  bool finite_ = true;                        // what the current item of Seal has held so far
  std::set<int64_t> failing_, failed_seals_;  // since, and before the last Synchronize
};

}  // namespace

std::unique_ptr<Backend> CreateReferenceBackend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace innerq
