// SafetensorsWriter: writes a safetensors file whose tensors are known before their data is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/result.h"
#include "kernels/tensor.h"

namespace innerq {

struct TensorToWrite {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
};

// The format is in safetensors.h. Tensors are stored by element size, the largest first, so that
// all are aligned; the header is padded with spaces to a multiple of 8 bytes. Move-only; a file
// that is not finished has no header and is left to the caller to remove.
class SafetensorsWriter {
 public:
  // Creates the file, which must not exist, and takes its space on disk where the file system can.
  // `metadata`: what is known of it by now, of any size. CHECK: names differ. Errors: unavailable,
  // with the path and the system's reason.
  static Result<SafetensorsWriter> Create(const std::filesystem::path& path,
                                          std::vector<TensorToWrite> tensors,
                                          std::map<std::string, std::string> metadata = {});
  SafetensorsWriter(SafetensorsWriter&& other) noexcept;
  SafetensorsWriter& operator=(SafetensorsWriter&&) = delete;
  ~SafetensorsWriter();

  // Writes a tensor's data, each once, in any order. Errors: as of Create.
  Result<void> Write(const std::string& name, std::span<const std::byte> data);
  // Writes the header, with `more` metadata, and waits until all of it is on the disk. CHECK: every
  // tensor was written, and `more` takes at most 2048 bytes. Errors: as of Create.
  Result<void> Finish(const std::map<std::string, std::string>& more);

  // Of the file, header included.
  int64_t bytes() const { return data_begin_ + data_bytes_; }

 private:
  // Where a tensor is, in bytes from `data_begin_`.
  struct Place {
    TensorToWrite tensor;
    int64_t begin = 0;
    int64_t end = 0;
    bool written = false;
  };

  SafetensorsWriter(std::filesystem::path path, std::vector<TensorToWrite> tensors,
                    std::map<std::string, std::string> metadata);
  std::string Header() const;
  Result<void> WriteAt(int64_t offset, std::span<const std::byte> data);

  std::filesystem::path path_;
  std::map<std::string, std::string> metadata_;
  std::vector<Place> places_;  // in order
  std::map<std::string, size_t> place_of_;
  int64_t data_begin_ = 0;
  int64_t data_bytes_ = 0;
  int fd_ = -1;  // -1: closed, or moved from
};

}  // namespace innerq
