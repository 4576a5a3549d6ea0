// The safetensors file format: header size, JSON header, tensor data.
//
// Source: github.com/huggingface/safetensors, "Format":
//   8 bytes   N, size of the header, unsigned little-endian
//   N bytes   JSON object: name -> {"dtype", "shape", "data_offsets": [begin, end)}, offsets in
//             bytes from the end of the header; the optional "__metadata__" maps strings to strings
//   the rest  data, indexed without holes or overlaps
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "kernels/result.h"
#include "models/checkpoint.h"

namespace innerq {

struct SafetensorsFile {
  std::vector<CheckpointTensor> tensors;  // ordered by offset
  // Dtype and shape, e.g. "I64 [1, 512]", of those that no view can show: of other dtypes than
  // ours, of more than four dimensions, or without elements.
  std::map<std::string, std::string> unreadable;
  std::map<std::string, std::string> metadata;  // those of "__metadata__" that are strings
};

// Finds the tensors in a file's bytes. The views borrow `file`, which must be
// aligned to 8 bytes; `name` is the file's name in messages. Errors: data loss for a damaged
// file, invalid argument for an alignment we do not support.
Result<SafetensorsFile> ParseSafetensors(std::span<const std::byte> file, const std::string& name);

}  // namespace innerq
