#include "server/output_directory.h"

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

}  // namespace

Result<OutputDirectory> OutputDirectory::Create(const std::filesystem::path& path,
                                                const std::string& option) {
  if (path.empty()) return InvalidArgument(option + ": expected a directory, found nothing");
  std::error_code failed;
  std::filesystem::path final = std::filesystem::weakly_canonical(path, failed);
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

OutputDirectory::OutputDirectory(OutputDirectory&& other) noexcept
    : final_(std::move(other.final_)), partial_(std::exchange(other.partial_, {})) {}

OutputDirectory::~OutputDirectory() {
  std::error_code ignored;  // there is nothing left to do
  if (!partial_.empty()) std::filesystem::remove_all(partial_, ignored);
}

Result<void> OutputDirectory::Commit() {
  // Replaces an empty directory, and no other.
  if (::rename(partial_.c_str(), final_.c_str()) != 0) {
    return CannotCreate(final_, std::strerror(errno));
  }
  partial_.clear();
  return {};
}

}  // namespace innerq
