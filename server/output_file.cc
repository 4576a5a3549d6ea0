#include "server/output_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

namespace innerq {
namespace {

Error CannotWrite(const std::filesystem::path& path) {
  return {ErrorCode::kUnavailable, "cannot write " + path.string() + ": " + std::strerror(errno)};
}

}  // namespace

Result<OutputFile> OutputFile::Open(const std::filesystem::path& path) {
  constexpr int kFlags = O_WRONLY | O_CLOEXEC;
  constexpr mode_t kMode = 0666;
  int fd = ::open(path.c_str(), kFlags | O_CREAT | O_EXCL, kMode);
  const bool created = fd >= 0;
  if (!created && errno == EEXIST) fd = ::open(path.c_str(), kFlags);
  if (fd < 0) return CannotWrite(path);
  return OutputFile(path, fd, created);
}

Result<std::optional<OutputFile>> OutputFile::OpenIfNamed(const std::filesystem::path& path) {
  if (path.empty()) return std::optional<OutputFile>();
  ASSIGN_OR_RETURN(OutputFile file, Open(path));
  return std::optional<OutputFile>(std::move(file));
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      created_(std::exchange(other.created_, false)) {}

OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
  if (created_) ::unlink(path_.c_str());
}

Result<void> OutputFile::Write(std::string_view text) {
  const Result<void> written = Replace(text);
  if (written) {
    created_ = false;
    return {};
  }
  // A part of a document is worse than none. If this fails too there is nothing left to do.
  [[maybe_unused]] const int ignored = fd_ >= 0 ? ::ftruncate(fd_, 0) : 0;
  return written;
}

Result<void> OutputFile::Replace(std::string_view text) {
  // What is no regular file has no length to cut.
  if (::ftruncate(fd_, 0) != 0 && errno != EINVAL) return CannotWrite(path_);
  while (!text.empty()) {
    const ssize_t written = ::write(fd_, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return CannotWrite(path_);
    text.remove_prefix(static_cast<size_t>(written));
  }
  if (::close(std::exchange(fd_, -1)) != 0) return CannotWrite(path_);
  return {};
}

}  // namespace innerq
