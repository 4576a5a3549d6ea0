// MappedFile and ReadTextFile: how files are read; and what is said where one cannot be written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "kernels/result.h"

namespace innerq {

// A whole file mapped read-only; unmapped on destruction. Move-only.
class MappedFile {
 public:
  // Errors: not found, or data loss for a file that is empty or cannot be mapped.
  static Result<MappedFile> Open(const std::filesystem::path& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}

  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// The whole content of a file, or of a pipe, of at most `max_bytes`. Errors: not found, data loss,
// also for a Git LFS pointer; they begin with the path.
Result<std::string> ReadTextFile(const std::filesystem::path& path, int64_t max_bytes);

// Data loss for a file that only says where Git LFS has the real one
// (github.com/git-lfs/git-lfs, docs/spec.md, "The Pointer"): what a clone without it leaves.
Result<void> RefuseLfsPointer(const std::string& name, std::string_view content);

// Unavailable, with path and reason.
Error CannotWrite(const std::filesystem::path& path, const std::string& reason);

// Largest JSON or tokenizer file that is read; real ones stay below 20 MB.
constexpr int64_t kMaxTextFileBytes = 100'000'000;

}  // namespace innerq
