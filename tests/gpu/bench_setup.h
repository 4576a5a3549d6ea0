// What the benchmarks on a GPU begin with: arguments that choose what is measured, a backend,
// memory with something in it.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "kernels/backend.h"

namespace innerq {

// An argument `key=a,b,...` and where its list goes: to one of the two.
struct ListArgument {
  std::string_view key;
  std::vector<int64_t>* numbers = nullptr;
  std::vector<std::string>* names = nullptr;
};

inline std::vector<std::string> SplitList(std::string_view list) {
  std::vector<std::string> items;
  for (size_t at = 0; at < list.size();) {
    const size_t end = std::min(list.find(',', at), list.size());
    items.emplace_back(list.substr(at, end - at));
    at = end + 1;
  }
  return items;
}

// Whether `text` is `argument` and holds a list for it, which then replaces the one that is there.
inline bool ReadArgument(std::string_view text, const ListArgument& argument) {
  const size_t equals = text.find('=');
  if (equals == std::string_view::npos || text.substr(0, equals) != argument.key) return false;
  std::vector<std::string> names = SplitList(text.substr(equals + 1));
  if (argument.names != nullptr) {
    *argument.names = std::move(names);
    return true;
  }
  argument.numbers->clear();
  for (const std::string& name : names) {
    const char* end = name.data() + name.size();
    int64_t number = 0;
    const auto [stop, error] = std::from_chars(name.data(), end, number);
    if (stop != end || error != std::errc()) return false;
    argument.numbers->push_back(number);
  }
  return true;
}

// Reads main's arguments. Exits if one of them is none of `lists`; `file`: whose top explains them.
inline void ReadArguments(std::span<char* const> arguments, const char* file,
                          std::span<const ListArgument> lists) {
  for (const std::string_view text : arguments.subspan(1)) {
    const auto reads = [text](const ListArgument& list) { return ReadArgument(text, list); };
    if (std::any_of(lists.begin(), lists.end(), reads)) continue;
    std::fprintf(stderr, "cannot use argument %s; see the top of %s\n", text.data(), file);
    std::exit(1);
  }
}

// Whether a list that means all where it is empty has `name`.
inline bool Chosen(const std::vector<std::string>& names, const char* name) {
  return names.empty() || std::find(names.begin(), names.end(), name) != names.end();
}

// The GPU's. Exits where there is none, and says why.
inline std::unique_ptr<Backend> CudaBackendOrExit() {
  auto backend = CreateBackend({.device = "cuda"});
  if (backend.ok()) return std::move(*backend);
  std::fprintf(stderr, "%s\n", backend.error().message.c_str());
  std::exit(1);
}

inline void CheckCuda(cudaError_t status, const char* what) {
  CHECK(status == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(status));
}

// Copies `values` to device memory, over and over.
inline void FillRepeating(Buffer& buffer, std::span<const uint16_t> values) {
  const auto block = static_cast<int64_t>(values.size_bytes());
  for (int64_t at = 0; at < buffer.bytes(); at += block) {
    const auto bytes = static_cast<size_t>(std::min(block, buffer.bytes() - at));
    const void* from = at == 0 ? static_cast<const void*>(values.data()) : buffer.data();
    CheckCuda(cudaMemcpy(buffer.data() + at, from, bytes, cudaMemcpyDefault), "filling memory");
  }
  CheckCuda(cudaDeviceSynchronize(), "filling memory");
}

}  // namespace innerq
