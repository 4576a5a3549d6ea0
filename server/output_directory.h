// OutputDirectory: a directory of results that appears as a whole or not at all.
#pragma once

#include <filesystem>
#include <string>
#include <utility>

#include "kernels/result.h"

namespace innerq {

// Filled under another name beside the final one, and removed again unless it was committed.
// Move-only.
class OutputDirectory {
 public:
  // `path` must not exist, or be an empty directory that can be replaced: no mount point; its
  // parent must exist. `option` is what errors
  // call it. Errors: invalid argument; unavailable, with the path and the system's reason.
  static Result<OutputDirectory> Create(const std::filesystem::path& path,
                                        const std::string& option);
  OutputDirectory(OutputDirectory&& other) noexcept;
  OutputDirectory& operator=(OutputDirectory&&) = delete;
  ~OutputDirectory();

  // Where to write.
  const std::filesystem::path& path() const { return partial_; }
  // Gives the directory its name. Errors: unavailable, for one that is not empty by now too.
  Result<void> Commit();

 private:
  OutputDirectory(std::filesystem::path final, std::filesystem::path partial)
      : final_(std::move(final)), partial_(std::move(partial)) {}

  std::filesystem::path final_;
  std::filesystem::path partial_;  // empty: committed, or moved from
};

}  // namespace innerq
