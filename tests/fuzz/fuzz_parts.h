// How fuzz targets that take several texts or files get them from one input.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/result.h"

namespace innerq {

using FuzzParts = std::map<std::string, std::string>;

// Cuts an input at lines "=== name" into parts by name, the line break before such a line left out.
// What stands before the first is the part "". Of parts with one name the last one counts.
inline FuzzParts SplitParts(const uint8_t* data, size_t size) {
  constexpr std::string_view kMark = "\n=== ";
  // As if a line break stood before the input, so that its first line may be a mark.
  const std::string text = "\n" + std::string(reinterpret_cast<const char*>(data), size);
  FuzzParts parts;
  size_t at = text.find(kMark);
  if (at != 0) parts[""] = text.substr(1, at == text.npos ? at : at - 1);
  while (at != text.npos) {
    const size_t name = at + kMark.size();
    const size_t next = text.find(kMark, name);
    const std::string part = text.substr(name, next == text.npos ? next : next - name);
    const size_t end = std::min(part.find('\n'), part.size());
    parts[part.substr(0, end)] = part.substr(std::min(end + 1, part.size()));
    at = next;
  }
  return parts;
}

// A directory of a fuzzer's process, for code that reads files. Gone when the process ends well.
class FuzzDirectory {
 public:
  // `names`: the files that it may hold.
  explicit FuzzDirectory(std::vector<std::string> names) : names_(std::move(names)) {
    std::string pattern = (std::filesystem::temp_directory_path() / "innerq_fuzz_XXXXXX").string();
    CHECK(::mkdtemp(pattern.data()) != nullptr, pattern);
    path_ = pattern;
  }
  FuzzDirectory(const FuzzDirectory&) = delete;
  FuzzDirectory& operator=(const FuzzDirectory&) = delete;
  ~FuzzDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::filesystem::path& path() const { return path_; }

  // Makes the directory hold those parts that are files of its own, and nothing else.
  void Fill(const FuzzParts& parts) const {
    for (const std::string& name : names_) {
      const auto part = parts.find(name);
      if (part == parts.end()) {
        std::filesystem::remove(path_ / name);
        continue;
      }
      std::ofstream file(path_ / name, std::ios::binary | std::ios::trunc);
      file.write(part->second.data(), static_cast<std::streamsize>(part->second.size()));
      CHECK(file.flush().good(), "cannot write " + (path_ / name).string());
    }
  }

 private:
  const std::vector<std::string> names_;
  std::filesystem::path path_;
};

}  // namespace innerq
