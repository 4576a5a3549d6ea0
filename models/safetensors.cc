#include "models/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "models/files.h"

namespace innerq {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

// One entry of the header, before its place is compared with the others'.
struct Entry {
  std::string name;
  std::optional<DType> dtype;    // absent: none of ours
  std::vector<int64_t> extents;  // outermost first
  std::string text;              // dtype and shape, e.g. "I64 [1, 512]"
  uint64_t begin = 0;
  uint64_t end = 0;
};

// Bits of an element of every dtype that the format has; 0 if it has none of that name.
int64_t DTypeBits(std::string_view name) {
  constexpr std::pair<std::string_view, int64_t> kBits[] = {
      {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},   {"I8", 8},
      {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"I16", 16}, {"U16", 16},
      {"F16", 16},    {"BF16", 16},   {"I32", 32},    {"U32", 32},        {"F32", 32}, {"C64", 64},
      {"F64", 64},    {"I64", 64},    {"U64", 64},    {"F8_E5M2FNUZ", 8},
  };
  for (const auto& [known, bits] : kBits) {
    if (name == known) return bits;
  }
  return 0;
}

std::optional<DType> FindDType(std::string_view name) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kU8}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return std::nullopt;
}

std::string ShapeText(const std::vector<int64_t>& extents) {
  constexpr size_t kShown = 8;
  std::string text;
  for (size_t i = 0; i < std::min(extents.size(), kShown); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(extents[i]);
  }
  return "[" + text + (extents.size() > kShown ? ", ...]" : "]");
}

Shape MakeShape(const std::vector<int64_t>& extents) {
  switch (extents.size()) {
    case 0:
      return Shape{};
    case 1:
      return Shape{extents[0]};
    case 2:
      return Shape{extents[0], extents[1]};
    case 3:
      return Shape{extents[0], extents[1], extents[2]};
  }
  CHECK(extents.size() == 4, "rank was checked");
  return Shape{extents[0], extents[1], extents[2], extents[3]};
}

// Whether a view can say what the tensor is.
bool IsReadable(const Entry& entry) {
  return entry.dtype && entry.extents.size() <= Shape::kMaxRank && entry.begin < entry.end;
}

// `where` begins every message: file and tensor.
Result<Entry> ParseEntry(const std::string& where, const json& value) {
  const auto damaged = [&where](const std::string& what) {
    return Error{ErrorCode::kDataLoss, where + ": " + what};
  };
  if (!value.is_object()) return damaged("not an object");
  const auto dtype = value.find("dtype");
  const auto shape = value.find("shape");
  const auto offsets = value.find("data_offsets");
  if (dtype == value.end() || !dtype->is_string()) return damaged("no \"dtype\"");
  if (shape == value.end() || !shape->is_array()) return damaged("no \"shape\"");
  if (offsets == value.end() || !offsets->is_array() || offsets->size() != 2 ||
      !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    return damaged("\"data_offsets\" are not two unsigned integers");
  }
  Entry entry;
  const auto& dtype_name = dtype->get_ref<const std::string&>();
  int64_t bits = DTypeBits(dtype_name);
  if (bits == 0) return damaged("the format has no dtype " + dtype_name.substr(0, 40));
  for (const json& extent : *shape) {
    if (!extent.is_number_unsigned() || extent.get<uint64_t>() > uint64_t{INT64_MAX}) {
      return damaged("an extent of \"shape\" is not a number of elements");
    }
    entry.extents.push_back(extent.get<int64_t>());
    if (__builtin_mul_overflow(bits, entry.extents.back(), &bits)) {
      return damaged("the product of \"shape\" overflows");
    }
  }
  entry.dtype = FindDType(dtype_name);
  entry.text = dtype_name + " " + ShapeText(entry.extents);
  entry.begin = (*offsets)[0].get<uint64_t>();
  entry.end = (*offsets)[1].get<uint64_t>();
  const auto bytes = static_cast<uint64_t>(bits / 8);
  if (bits % 8 != 0 || entry.begin > entry.end || entry.end - entry.begin != bytes) {
    return damaged("data_offsets [" + std::to_string(entry.begin) + ", " +
                   std::to_string(entry.end) + ") do not hold " + std::to_string(bytes) +
                   (bits % 8 != 0 ? " bytes and a part of one" : " bytes") + ", the size of " +
                   entry.text);
  }
  return entry;
}

struct Header {
  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;
};

// Parses the JSON header and refuses names that occur twice, which a JSON library would merge.
Result<Header> ParseHeader(const std::string& file, std::string_view text) {
  std::unordered_set<std::string> names;
  std::string duplicate;
  const auto note_key = [&](int depth, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::key && depth == 1) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!names.insert(key).second) duplicate = key;
    }
    return true;
  };
  const json parsed_text = json::parse(text, note_key, /*allow_exceptions=*/false);
  if (!parsed_text.is_object()) {
    return Error{ErrorCode::kDataLoss, file + ": the header is not a JSON object"};
  }
  if (!duplicate.empty()) {
    return Error{ErrorCode::kDataLoss, file + ": tensor " + duplicate + " occurs twice"};
  }
  Header header;
  for (const auto& [name, value] : parsed_text.items()) {
    if (name == "__metadata__") {
      for (const auto& [key, text_of_key] : value.items()) {
        if (text_of_key.is_string()) header.metadata[key] = text_of_key.get<std::string>();
      }
      continue;
    }
    ASSIGN_OR_RETURN(Entry entry, ParseEntry(file + ": tensor " + name, value));
    entry.name = name;
    header.entries.push_back(std::move(entry));
  }
  std::sort(header.entries.begin(), header.entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  return header;
}

}  // namespace

Result<SafetensorsFile> ParseSafetensors(std::span<const std::byte> file, const std::string& name) {
  const auto damaged = [&name](const std::string& what) {
    return Error{ErrorCode::kDataLoss, name + ": " + what};
  };
  RETURN_IF_ERROR(
      RefuseLfsPointer(name, {reinterpret_cast<const char*>(file.data()), file.size()}));
  uint64_t header_bytes = 0;  // little-endian, as is every host we build for
  if (file.size() < sizeof(header_bytes)) return damaged("too short for a safetensors header");
  std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
  if (header_bytes > kMaxHeaderBytes) {
    return damaged("header of " + std::to_string(header_bytes) + " bytes, more than the limit of " +
                   std::to_string(kMaxHeaderBytes));
  }
  const std::span<const std::byte> rest = file.subspan(sizeof(header_bytes));
  if (header_bytes > rest.size()) {
    return damaged("header of " + std::to_string(header_bytes) + " bytes in a file of " +
                   std::to_string(file.size()) + "; the file is truncated");
  }
  const std::string_view text(reinterpret_cast<const char*>(rest.data()), header_bytes);
  ASSIGN_OR_RETURN(Header header, ParseHeader(name, text));
  const std::span<const std::byte> data = rest.subspan(header_bytes);

  SafetensorsFile parsed{.tensors = {}, .unreadable = {}, .metadata = std::move(header.metadata)};
  uint64_t next = 0;  // where the next tensor must begin
  for (const Entry& entry : header.entries) {
    const std::string where = "tensor " + entry.name + ": ";
    if (entry.begin != next) {
      return damaged(where + "begins at byte " + std::to_string(entry.begin) + ", but byte " +
                     std::to_string(next) + " follows the tensor before it (" +
                     (entry.begin < next ? "overlap)" : "hole)"));
    }
    if (entry.end > data.size()) {
      return damaged(where + "ends at byte " + std::to_string(entry.end) + " of " +
                     std::to_string(data.size()) + "; the file is truncated");
    }
    next = entry.end;
    if (!IsReadable(entry)) {
      parsed.unreadable.emplace(entry.name, entry.text);
      continue;
    }
    const std::byte* begin = data.data() + entry.begin;
    if (reinterpret_cast<uintptr_t>(begin) % static_cast<size_t>(DTypeBytes(*entry.dtype)) != 0) {
      return InvalidArgument(name + ": " + where +
                             "not aligned to its element size; save the file again with a "
                             "current safetensors library");
    }
    parsed.tensors.push_back({entry.name, {begin, *entry.dtype, MakeShape(entry.extents)}});
  }
  if (next != data.size()) {
    return damaged(std::to_string(data.size() - next) + " bytes of data belong to no tensor");
  }
  return parsed;
}

}  // namespace innerq
