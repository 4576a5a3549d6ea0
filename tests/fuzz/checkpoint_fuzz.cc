// A model directory from an input: whatever its files say, opening it succeeds or names an error,
// and what it hands out lies within the files.
//
// Parts are files. Text of a .safetensors part that begins with { is a header: up to the line's
// end, the rest is data, and the size before it is added here.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>

#include "kernels/backend.h"
#include "models/llama.h"
#include "models/safetensors.h"
#include "tests/fuzz/fuzz_parts.h"

namespace innerq {
namespace {

constexpr int64_t kMaxLoadedParameters = 1 << 16;

std::string WithHeaderSize(const std::string& part) {
  if (!part.starts_with('{')) return part;
  const uint64_t header_bytes = std::min(part.find('\n'), part.size());
  std::string file(sizeof(header_bytes), '\0');
  std::memcpy(file.data(), &header_bytes, sizeof(header_bytes));
  file.append(part, 0, header_bytes);
  return part.size() > header_bytes ? file.append(part, header_bytes + 1) : file;
}

// Reads every byte of every tensor.
void ReadTensors(const std::vector<CheckpointTensor>& tensors) {
  unsigned sum = 0;
  for (const CheckpointTensor& tensor : tensors) {
    const int64_t bytes = tensor.view.shape.num_elements() * DTypeBytes(tensor.view.dtype);
    CHECK(bytes > 0, tensor.name);
    for (int64_t i = 0; i < bytes; ++i) sum += std::to_integer<unsigned>(tensor.view.data[i]);
  }
  volatile unsigned sink = sum;
  static_cast<void>(sink);
}

// From memory of just the file's size, beyond which AddressSanitizer watches.
void ParseAlone(const std::string& file) {
  const auto memory = std::make_unique<std::byte[]>(file.size());
  std::memcpy(memory.get(), file.data(), file.size());
  const auto parsed = ParseSafetensors({memory.get(), file.size()}, "file");
  if (parsed.ok()) {
    ReadTensors(parsed->tensors);
  } else {
    CHECK(parsed.error().message.starts_with("file: "), parsed.error().message);
  }
}

void Use(const std::shared_ptr<const Checkpoint>& checkpoint) {
  const ModelConfig& config = checkpoint->config();
  CHECK(config.num_heads % config.num_kv_heads == 0, "heads");
  CHECK(static_cast<int64_t>(config.InverseFrequencies().size()) == config.head_dim / 2, "rope");
  for (const float frequency : config.InverseFrequencies()) {
    CHECK(std::isfinite(frequency), "rope frequency");
  }
  if (config.low_bit) {
    CHECK(config.low_bit->valid() && config.low_bit->Divides(config.hidden_size), "codes");
    CHECK(config.low_bit_bytes() > 0, "codes");
  }
  ReadTensors(checkpoint->tensors());
  for (const CheckpointTensor& tensor : checkpoint->tensors()) {
    CHECK(checkpoint->Find(tensor.name) == &tensor, tensor.name);
  }
  if (config.num_parameters() > kMaxLoadedParameters) return;
  const std::unique_ptr<Backend> backend = CreateReferenceBackend();
  const auto model =
      LlamaModel::Load(checkpoint, backend.get(),
                       {.max_rows = 1, .max_logit_rows = 1, .format = {}, .progress = {}});
  CHECK(model.ok() || !model.error().message.empty(), "an error without a message");
}

}  // namespace
}  // namespace innerq

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace innerq;
  static const FuzzDirectory directory({"config.json", "generation_config.json",
                                        "model.safetensors", "model.safetensors.index.json",
                                        "a.safetensors", "b.safetensors"});
  FuzzParts parts = SplitParts(data, size);
  for (auto& [name, content] : parts) {
    if (!name.ends_with(".safetensors")) continue;
    content = WithHeaderSize(content);
    ParseAlone(content);
  }
  directory.Fill(parts);
  const auto checkpoint = Checkpoint::Open(directory.path());
  if (checkpoint.ok()) {
    Use(*checkpoint);
  } else {
    CHECK(!checkpoint.error().message.empty(), "an error without a message");
  }
  return 0;
}
