// Files for tests: where stored data is, temporary directories, safetensors written by hand.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "models/checkpoint.h"

namespace innerq {

// A file or directory of the shared test data, by its path there.
inline std::filesystem::path SharedPath(const std::string& relative) {
  const char* root = std::getenv("INNERQ_SHARED");
  const std::filesystem::path base =
      root != nullptr ? std::filesystem::path(root)
                      : std::filesystem::path(INNERQ_SOURCE_DIR) / ".." / "shared";
  return base / relative;
}

// Random weights of a small Llama 3.2: 2 layers, 2 key/value heads of 64, vocabulary 128, context
// 256.
inline std::filesystem::path TinyLlamaDirectory() {
  return std::filesystem::path(INNERQ_SOURCE_DIR) / "tests/models/golden/tiny_llama";
}

// Skips the test, by name, if the shared data is not there.
#define SKIP_WITHOUT(path)                                                       \
  if (!std::filesystem::exists(path)) {                                          \
    GTEST_SKIP() << "no " << (path) << "; set INNERQ_SHARED to the shared data"; \
  }

inline std::string ReadAll(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void WriteAll(const std::filesystem::path& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  ASSERT_TRUE(file.good()) << path;
}

// A directory that lives as long as this object.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "innerq_XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// JSON that is valid, but nests so deep that nothing may recurse over it: a frame of 32 bytes a
// level would already overflow 8 MiB of stack, one of 280 bytes under a sanitizer.
inline std::string DeepJson() {
#if defined(INNERQ_SANITIZED)
  constexpr size_t kLevels = 30'000;
#else
  constexpr size_t kLevels = 300'000;
#endif
  return std::string(kLevels, '[') + std::string(kLevels, ']');
}

// A safetensors file: header size, header, data.
inline std::string Safetensors(const std::string& header, const std::string& data) {
  std::string file(8, '\0');
  const uint64_t size = header.size();
  std::memcpy(file.data(), &size, sizeof(size));
  return file + header + data;
}

// A tensor to store: F32 unless told otherwise.
struct StoredTensor {
  std::string name;
  std::vector<int64_t> shape;
  std::string bytes;
  std::string dtype = "F32";
};

// Copies of a checkpoint's tensors.
inline std::vector<StoredTensor> StoredTensors(const Checkpoint& checkpoint) {
  std::vector<StoredTensor> stored;
  for (const CheckpointTensor& tensor : checkpoint.tensors()) {
    StoredTensor& copy = stored.emplace_back();
    copy.name = tensor.name;
    copy.dtype = DTypeName(tensor.view.dtype);
    for (int i = 0; i < tensor.view.shape.rank(); ++i) copy.shape.push_back(tensor.view.shape[i]);
    copy.bytes.assign(reinterpret_cast<const char*>(tensor.view.data),
                      static_cast<size_t>(tensor.view.bytes()));
  }
  return stored;
}

inline std::string Safetensors(const std::vector<StoredTensor>& tensors) {
  std::string header = "{", data;
  for (const StoredTensor& tensor : tensors) {
    std::string shape;
    for (const int64_t extent : tensor.shape) {
      shape += (shape.empty() ? "" : ",") + std::to_string(extent);
    }
    const size_t begin = data.size();
    data += tensor.bytes;
    header += (header.size() > 1 ? ",\"" : "\"") + tensor.name + "\":{\"dtype\":\"" + tensor.dtype +
              "\",\"shape\":[" + shape + "],\"data_offsets\":[" + std::to_string(begin) + "," +
              std::to_string(data.size()) + "]}";
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return Safetensors(header, data);
}

}  // namespace innerq
