#include "kernels/backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"

namespace innerq {
namespace {

std::string Describe(DType dtype, const Shape& shape) {
  return DTypeName(dtype) + shape.ToString();
}

// Requires a view of F32 with exactly this shape.
void CheckF32(const char* op, const char* name, const ConstTensorView& view, const Shape& shape) {
  CHECK(view.dtype == DType::kF32 && view.shape == shape && (view.data || !shape.num_elements()),
        std::string(op) + "." + name + ": expected " + Describe(DType::kF32, shape) + ", got " +
            Describe(view.dtype, view.shape));
}

int64_t Rows(const ConstTensorView& view) { return view.shape[0]; }
int64_t Cols(const ConstTensorView& view) { return view.shape[1]; }

// Slices must cover rows [0, rows) in order and hold a page for every position.
void CheckSlices(const char* op, std::span<const SequenceSlice> slices, int64_t rows,
                 int64_t page_tokens) {
  int64_t next = 0;
  for (const SequenceSlice& slice : slices) {
    CHECK(slice.row_begin == next && slice.num_rows > 0 && slice.first_position >= 0,
          std::string(op) + ": slices must be consecutive and not empty");
    const int64_t last = slice.first_position + slice.num_rows - 1;
    CHECK(static_cast<int64_t>(slice.pages.size()) > last / page_tokens,
          std::string(op) + ": page table too short");
    next += slice.num_rows;
  }
  CHECK(next == rows, std::string(op) + ": slices must cover all rows");
}

// Every page that a row of the slice reads must be there in the form it is read in.
void CheckPages(const AttentionArgs& args, const SequenceSlice& slice) {
  const PagedKvView& kv = args.kv;
  const int64_t last = slice.first_position + slice.num_rows - 1;
  // The sealed range only grows with the position: the last row sees the most pages sealed, the
  // first the fewest. A page between is read in both forms.
  const PageRange sealed = args.layout->SealedPages(last, slice.exact_before);
  const PageRange always = args.layout->SealedPages(slice.first_position, slice.exact_before);
  for (int64_t page = 0; page <= args.layout->PageOf(last); ++page) {
    const PageRef ref = slice.pages[static_cast<size_t>(page)];
    CHECK(page < sealed.begin || page >= sealed.end || ref.sealed_id >= 0,
          "Attention: page " + std::to_string(page) + " is to be read as sealed but has no block");
    CHECK((page >= always.begin && page < always.end) || ref.open_id >= 0,
          "Attention: page " + std::to_string(page) + " is to be read as open but has no block");
  }
  CHECK(sealed.size() == 0 || kv.sealed_pages != nullptr, "Attention: no pool of sealed pages");
  CHECK(sealed.size() == 0 || !kv.layout->normalize_keys ||
            (slice.norm_id >= 0 && kv.key_norms != nullptr),
        "Attention: no key norm");
}

// The order of SelectTop.
bool RanksAbove(const TopLogit& a, const TopLogit& b) {
  const bool finite = std::isfinite(a.logit);
  if (finite != std::isfinite(b.logit)) return !finite;
  return finite && a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

}  // namespace

Result<Weight> Backend::PackWeight(std::span<const ConstTensorView> parts,
                                   std::span<const ConstTensorView> bias_parts,
                                   WeightFormat format) {
  CHECK(!parts.empty(), "PackWeight: no parts");
  CHECK(bias_parts.empty() || bias_parts.size() == parts.size(),
        "PackWeight: expected one bias per part");
  Weight weight;
  weight.format = format;
  weight.cols = parts[0].shape[1];
  for (size_t i = 0; i < parts.size(); ++i) {
    CHECK(parts[i].shape.rank() == 2 && parts[i].shape[1] == weight.cols,
          "PackWeight: parts differ in columns");
    CHECK(bias_parts.empty() || bias_parts[i].shape == Shape{parts[i].shape[0]},
          "PackWeight: bias does not match its part");
    weight.rows += parts[i].shape[0];
  }
  RETURN_IF_ERROR(DoPackWeight(parts, bias_parts, &weight));
  return weight;
}

Result<void> Backend::PackBias(std::span<const ConstTensorView> bias_parts, Weight* weight) {
  if (bias_parts.empty()) return {};
  std::vector<float> bias;
  for (const ConstTensorView& part : bias_parts) {
    for (int64_t i = 0; i < part.shape[0]; ++i) bias.push_back(ElementAsFloat(part, i));
  }
  const ConstTensorView host{reinterpret_cast<const std::byte*>(bias.data()), DType::kF32,
                             Shape{weight->rows}};
  if (!host_visible()) {
    ASSIGN_OR_RETURN(weight->bias, Import(host));
    return {};
  }
  // Import may borrow.
  ASSIGN_OR_RETURN(weight->bias, Allocate(host.bytes()));
  std::memcpy(weight->bias.data(), host.data, static_cast<size_t>(host.bytes()));
  return {};
}

Result<Weight> Backend::PackLowBitWeight(std::span<const LowBitMatrix> parts,
                                         std::span<const ConstTensorView> bias_parts) {
  CHECK(!parts.empty(), "PackLowBitWeight: no parts");
  CHECK(bias_parts.empty() || bias_parts.size() == parts.size(),
        "PackLowBitWeight: expected one bias per part");
  Weight weight;
  weight.cols = parts[0].cols;
  weight.low_bit = parts[0].spec;
  weight.input_clip = parts[0].input_clip;
  CHECK(weight.low_bit->valid() && weight.low_bit->Divides(weight.cols),
        "PackLowBitWeight: impossible spec");
  for (size_t i = 0; i < parts.size(); ++i) {
    CHECK(parts[i].cols == weight.cols && parts[i].spec == weight.low_bit &&
              parts[i].input_clip == weight.input_clip,
          "PackLowBitWeight: parts differ");
    CHECK(bias_parts.empty() || bias_parts[i].shape == Shape{parts[i].rows},
          "PackLowBitWeight: bias does not match its part");
    weight.rows += parts[i].rows;
  }
  RETURN_IF_ERROR(DoPackLowBitWeight(parts, bias_parts, &weight));
  return weight;
}

void Backend::Embed(const EmbedArgs& args) {
  const int64_t rows = static_cast<int64_t>(args.token_ids.size());
  CHECK(args.table.shape.rank() == 2, "Embed.table: expected a matrix");
  CheckF32("Embed", "out", args.out, Shape{rows, Cols(args.table)});
  for (const int32_t id : args.token_ids) {
    CHECK(id >= 0 && id < Rows(args.table), "Embed: token id outside the vocabulary");
  }
  if (rows > 0) DoEmbed(args);
}

void Backend::RmsNorm(const RmsNormArgs& args) {
  CHECK(args.x.shape.rank() == 2, "RmsNorm.x: expected a matrix");
  CheckF32("RmsNorm", "x", args.x, args.x.shape);
  CheckF32("RmsNorm", "weight", args.weight, Shape{Cols(args.x)});
  CheckF32("RmsNorm", "out", args.out, args.x.shape);
  if (Rows(args.x) > 0) DoRmsNorm(args);
}

void Backend::MatMul(const MatMulArgs& args) {
  CHECK(args.weight != nullptr && args.x.shape.rank() == 2,
        "MatMul: expected a matrix and a weight");
  CheckF32("MatMul", "x", args.x, Shape{Rows(args.x), args.weight->cols});
  CheckF32("MatMul", "out", args.out, Shape{Rows(args.x), args.weight->rows});
  if (Rows(args.x) > 0) DoMatMul(args);
}

void Backend::RopeTable(const RopeTableArgs& args) {
  const Shape shape{static_cast<int64_t>(args.positions.size()),
                    static_cast<int64_t>(args.inverse_frequency.size())};
  CheckF32("RopeTable", "cos", args.cos, shape);
  CheckF32("RopeTable", "sin", args.sin, shape);
  if (shape[0] > 0) DoRopeTable(args);
}

void Backend::RopeAppend(const RopeAppendArgs& args) {
  CHECK(args.qkv.shape.rank() == 2 && args.q.shape.rank() == 2 && args.kv.layout != nullptr,
        "RopeAppend: expected matrices and a cache layer");
  const KvLayerLayout& layout = *args.kv.layout;
  const int64_t rows = Rows(args.qkv);
  CheckF32("RopeAppend", "qkv", args.qkv,
           Shape{rows, Cols(args.q) + 2 * layout.kv_heads * layout.head_dim});
  CheckF32("RopeAppend", "q", args.q, Shape{rows, Cols(args.q)});
  CheckF32("RopeAppend", "cos", args.cos, Shape{rows, layout.head_dim / 2});
  CheckF32("RopeAppend", "sin", args.sin, Shape{rows, layout.head_dim / 2});
  CheckSlices("RopeAppend", args.slices, rows, layout.page_tokens);
  if (rows > 0) DoRopeAppend(args);
}

void Backend::ComputeKeyNorm(const KeyNormArgs& args) {
  CHECK(args.kv.layout != nullptr && args.kv.layout->normalize_keys && args.kv.key_norms != nullptr,
        "ComputeKeyNorm: this layer does not normalize keys");
  for (const KeyNormItem& item : args.items) {
    CHECK(item.norm_id >= 0 && !item.open_ids.empty(), "ComputeKeyNorm: incomplete item");
  }
  if (!args.items.empty()) DoComputeKeyNorm(args);
}

void Backend::Seal(const SealArgs& args) {
  CHECK(args.kv.layout != nullptr && args.kv.sealed_pages != nullptr, "Seal: no sealed pages");
  for (const SealItem& item : args.items) {
    CHECK(item.open_id >= 0 && item.sealed_id >= 0 &&
              (item.norm_id >= 0 || !args.kv.layout->normalize_keys),
          "Seal: incomplete item");
  }
  if (!args.items.empty()) DoSeal(args);
}

void Backend::Attention(const AttentionArgs& args) {
  CHECK(args.kv.layout != nullptr && args.layout != nullptr && args.q.shape.rank() == 2,
        "Attention: expected a matrix and a cache layer");
  const KvLayerLayout& layer = *args.kv.layout;
  CHECK(args.num_heads > 0 && args.num_heads % layer.kv_heads == 0,
        "Attention: query heads must be a multiple of key/value heads");
  const int64_t rows = Rows(args.q);
  CheckF32("Attention", "q", args.q, Shape{rows, args.num_heads * layer.head_dim});
  CheckF32("Attention", "out", args.out, args.q.shape);
  CheckSlices("Attention", args.slices, rows, layer.page_tokens);
  for (const SequenceSlice& slice : args.slices) CheckPages(args, slice);
  if (rows > 0) DoAttention(args);
}

void Backend::SwiGlu(const SwiGluArgs& args) {
  CHECK(args.gate_up.shape.rank() == 2 && Cols(args.gate_up) % 2 == 0,
        "SwiGlu.gate_up: expected an even number of columns");
  CheckF32("SwiGlu", "gate_up", args.gate_up, args.gate_up.shape);
  CheckF32("SwiGlu", "out", args.out, Shape{Rows(args.gate_up), Cols(args.gate_up) / 2});
  if (Rows(args.gate_up) > 0) DoSwiGlu(args);
}

void Backend::GatherRows(const GatherRowsArgs& args) {
  CHECK(args.x.shape.rank() == 2, "GatherRows.x: expected a matrix");
  CheckF32("GatherRows", "x", args.x, args.x.shape);
  CheckF32("GatherRows", "out", args.out,
           Shape{static_cast<int64_t>(args.rows.size()), Cols(args.x)});
  for (const int64_t row : args.rows) {
    CHECK(row >= 0 && row < Rows(args.x), "GatherRows: row out of range");
  }
  if (!args.rows.empty()) DoGatherRows(args);
}

void Backend::SelectTop(const SelectTopArgs& args) {
  CHECK(args.x.shape.rank() == 2, "SelectTop.x: expected a matrix");
  CheckF32("SelectTop", "x", args.x, args.x.shape);
  CHECK(args.k >= 1 && args.k <= std::min(Cols(args.x), kMaxTopLogits),
        "SelectTop: k out of range");
  CHECK(static_cast<int64_t>(args.out.size()) == Rows(args.x) * args.k,
        "SelectTop.out: expected k elements per row");
  if (Rows(args.x) > 0) DoSelectTop(args);
}

void Backend::DoSelectTop(const SelectTopArgs& args) {
  CHECK(host_visible(), "a device backend must implement SelectTop");
  const int64_t width = Cols(args.x);
  std::vector<TopLogit> row(static_cast<size_t>(width));
  auto out = args.out.begin();
  for (int64_t i = 0; i < Rows(args.x); ++i) {
    for (int64_t c = 0; c < width; ++c) {
      row[static_cast<size_t>(c)] = {args.x.As<float>()[i * width + c], static_cast<int32_t>(c)};
    }
    std::partial_sort(row.begin(), row.begin() + args.k, row.end(), RanksAbove);
    out = std::copy_n(row.begin(), args.k, out);
  }
}

void Backend::ReadToHost(const std::byte* from, int64_t bytes, std::byte* to) {
  CHECK(bytes >= 0 && (bytes == 0 || (from != nullptr && to != nullptr)), "ReadToHost: no memory");
  if (bytes > 0) DoReadToHost(from, bytes, to);
}

void Backend::DoReadToHost(const std::byte* from, int64_t bytes, std::byte* to) {
  CHECK(host_visible(), "a device backend must implement ReadToHost");
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

Result<std::unique_ptr<Backend>> CreateBackend(const BackendOptions& options) {
  if (options.device == "cpu") return CreateCpuBackend(options);
  if (options.device == "reference" || options.device == "cuda") {
    if (options.variant != "auto") {
      return InvalidArgument("backend.variant must be \"auto\" for the " + options.device +
                                 " backend, not \"" + options.variant + "\"",
                             "backend.variant");
    }
    if (options.device == "cuda") return CreateCudaBackend(options);
    return CreateReferenceBackend();
  }
  return InvalidArgument(
      "backend.device must be cpu, cuda or reference, not \"" + options.device + "\"",
      "backend.device");
}

}  // namespace innerq
