#include "models/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace innerq {
namespace {

Error OpenError(const std::filesystem::path& path, int error_number) {
  const ErrorCode code = error_number == ENOENT ? ErrorCode::kNotFound : ErrorCode::kDataLoss;
  return {code, path.string() + ": " + std::strerror(error_number)};
}

// Closes a file descriptor.
struct FileDescriptor {
  explicit FileDescriptor(int open_fd) : fd(open_fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() {
    if (fd >= 0) ::close(fd);
  }
  int fd;
};

}  // namespace

Result<MappedFile> MappedFile::Open(const std::filesystem::path& path) {
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.fd < 0) return OpenError(path, errno);
  struct stat status {};
  if (::fstat(file.fd, &status) != 0) return OpenError(path, errno);
  if (!S_ISREG(status.st_mode) || status.st_size <= 0) {
    return Error{ErrorCode::kDataLoss, path.string() + ": empty, or not a regular file"};
  }
  const auto size = static_cast<size_t>(status.st_size);
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED) return OpenError(path, errno);
  return MappedFile(static_cast<const std::byte*>(data), size);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

Result<std::string> ReadTextFile(const std::filesystem::path& path, int64_t max_bytes) {
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.fd < 0) return OpenError(path, errno);
  std::string text;
  for (;;) {
    constexpr size_t kChunk = 1 << 16;
    const size_t had = text.size();
    text.resize(had + kChunk);
    const ssize_t got = ::read(file.fd, text.data() + had, kChunk);
    if (got < 0 && errno != EINTR) return OpenError(path, errno);
    text.resize(had + static_cast<size_t>(std::max<ssize_t>(got, 0)));
    if (got == 0) break;
    if (static_cast<int64_t>(text.size()) > max_bytes) {
      return Error{ErrorCode::kDataLoss, path.string() + ": more than the " +
                                             std::to_string(max_bytes) +
                                             " bytes that such a file may have"};
    }
  }
  RETURN_IF_ERROR(RefuseLfsPointer(path.string(), text));
  return text;
}

Result<void> RefuseLfsPointer(const std::string& name, std::string_view content) {
  if (!content.starts_with("version https://git-lfs")) return {};
  return Error{ErrorCode::kDataLoss,
               name + ": is a Git LFS pointer; `git lfs pull` fetches the file"};
}

Error CannotWrite(const std::filesystem::path& path, const std::string& reason) {
  return {ErrorCode::kUnavailable, "cannot write " + path.string() + ": " + reason};
}

}  // namespace innerq
