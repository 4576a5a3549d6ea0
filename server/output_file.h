// OutputFile: a result file that is known to be writable before the work begins.
#pragma once

#include <filesystem>
#include <optional>
#include <string_view>
#include <utility>

#include "kernels/result.h"

namespace innerq {

// Opened at once, written at the end. Until then what it held before stays; a file that Open made
// is removed again unless it was written as a whole. Move-only.
class OutputFile {
 public:
  // Errors: unavailable, with the path and the system's reason.
  static Result<OutputFile> Open(const std::filesystem::path& path);
  // The same; no file for an empty path.
  static Result<std::optional<OutputFile>> OpenIfNamed(const std::filesystem::path& path);
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&&) = delete;
  ~OutputFile();

  // Replaces the content. Errors: as Open; the disk may be full. What could not be written as a
  // whole is left empty.
  Result<void> Write(std::string_view text);

 private:
  OutputFile(std::filesystem::path path, int fd, bool created)
      : path_(std::move(path)), fd_(fd), created_(created) {}

  Result<void> Replace(std::string_view text);

  std::filesystem::path path_;
  int fd_ = -1;           // -1: closed, or moved from
  bool created_ = false;  // and not written as a whole yet
};

}  // namespace innerq
