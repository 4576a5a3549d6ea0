#include "server/output_directory.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

namespace innerq {
namespace {

Error CannotCreate(const std::filesystem::path& path, const std::string& reason) {
  return {ErrorCode::kUnavailable, "cannot create " + path.string() + ": " + reason};
}

// Waits until a file, or the names in a directory, are on the disk.
Result<void> WaitForDisk(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  // A file system that cannot wait for names says EINVAL.
  const int failed = fd < 0 || (::fsync(fd) != 0 && errno != EINVAL) ? errno : 0;
  if (fd >= 0) ::close(fd);
  if (failed == 0) return {};
  return Error{ErrorCode::kUnavailable,
               "cannot write " + path.string() + ": " + std::strerror(failed)};
}

}  // namespace

Result<OutputDirectory> OutputDirectory::Create(const std::filesystem::path& path,
                                                const std::string& option) {
  if (path.empty()) return InvalidArgument(option + ": expected a directory, found nothing");
  std::error_code failed;
  // Of a relative path of which nothing is there g++ 12 makes no absolute one.
  std::filesystem::path final = std::filesystem::absolute(path, failed);
  if (!failed) final = std::filesystem::weakly_canonical(final, failed);
  if (failed) return CannotCreate(path, failed.message());
  if (!final.has_filename()) final = final.parent_path();  // "out/"
  if (std::filesystem::exists(final, failed) &&
      !(std::filesystem::is_directory(final, failed) && std::filesystem::is_empty(final, failed))) {
    return InvalidArgument(option + ": " + path.string() +
                           " is there already; expected an empty directory, or nothing");
  }
  if (failed) return CannotCreate(path, failed.message());
  // One that cannot be replaced in the end, such as a mount point, shows at once.
  if (std::filesystem::exists(final, failed) &&
      (::rmdir(final.c_str()) != 0 || ::mkdir(final.c_str(), 0777) != 0)) {
    return CannotCreate(final, std::strerror(errno));
  }
  const std::string stem = final.string() + ".partial-" + std::to_string(::getpid());
  for (int i = 0;; ++i) {
    const std::filesystem::path partial = stem + "-" + std::to_string(i);
    if (::mkdir(partial.c_str(), 0777) == 0) return OutputDirectory(final, partial);
    if (errno != EEXIST) return CannotCreate(partial, std::strerror(errno));
  }
}

OutputDirectory::OutputDirectory(OutputDirectory&& other) noexcept = default;

OutputDirectory::~OutputDirectory() {
  if (state_ != nullptr) Remove();
}

Result<void> OutputDirectory::Commit() {
  std::error_code failed;
  for (std::filesystem::directory_iterator it(partial_, failed), end; !failed && it != end;
       it.increment(failed)) {
    RETURN_IF_ERROR(WaitForDisk(it->path()));
  }
  if (failed) return CannotCreate(final_, failed.message());
  RETURN_IF_ERROR(WaitForDisk(partial_));
  {
    const std::lock_guard lock(state_->mutex);
    // Replaces an empty directory, and no other.
    if (::rename(partial_.c_str(), final_.c_str()) != 0) {
      return CannotCreate(final_, std::strerror(errno));
    }
    state_->is_partial = false;
  }
  return WaitForDisk(final_.parent_path());
}

bool OutputDirectory::Remove() {
  constexpr int kTries = 100;  // a file that is created meanwhile takes another one
  const std::lock_guard lock(state_->mutex);
  std::error_code failed;
  for (int i = 0; state_->is_partial && i < kTries; ++i) {
    std::filesystem::remove_all(partial_, failed);
    state_->is_partial = static_cast<bool>(failed);
  }
  return !state_->is_partial;
}

}  // namespace innerq
