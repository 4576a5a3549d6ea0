// OutputDirectory: a directory of results that appears as a whole or not at all.
#pragma once

#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "kernels/result.h"

namespace innerq {

// Filled under another name beside the final one, and removed again unless it was committed.
// Move-only. One thread, but for Remove.
class OutputDirectory {
 public:
  // `path` must not exist, or be an empty directory that can be replaced: no mount point; its
  // parent must exist. `option` is what errors call it. Errors: invalid argument; unavailable, with
  // the path and the system's reason.
  static Result<OutputDirectory> Create(const std::filesystem::path& path,
                                        const std::string& option);
  OutputDirectory(OutputDirectory&& other) noexcept;
  OutputDirectory& operator=(OutputDirectory&&) = delete;
  ~OutputDirectory();

  // Where to write.
  const std::filesystem::path& path() const { return partial_; }
  // Waits until its files and their names are on the disk, gives the directory its name and waits
  // until that is there too. Errors: unavailable, for one that is not empty by now too, or that was
  // removed; if the last wait fails it has its name.
  Result<void> Commit();
  // Removes it now, unless it was committed, be somebody writing to it or not. Any thread. False if
  // there is something left.
  bool Remove();

 private:
  OutputDirectory(std::filesystem::path final, std::filesystem::path partial)
      : final_(std::move(final)), partial_(std::move(partial)) {}

  std::filesystem::path final_;
  std::filesystem::path partial_;
  // Whether it is to be removed. Whoever holds the lock renames or removes it.
  struct State {
    std::mutex mutex;
    bool is_partial = true;
  };
  std::unique_ptr<State> state_ = std::make_unique<State>();  // null: moved from
};

}  // namespace innerq
