// RAII for memory and streams of the CUDA runtime, and errors of it as ours.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "kernels/result.h"
#include "kernels/tensor.h"

namespace innerq::cuda {

// What the runtime said of `what`. Lack of memory is resource exhausted, a launch that the device
// does not take is internal (we sized it), everything else means that the device cannot be used.
inline Error ErrorOf(cudaError_t status, const std::string& what) {
  static_cast<void>(cudaGetLastError());  // told here: a later launch must not find it
  const std::string message =
      what + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status);
  if (status == cudaErrorMemoryAllocation) return {ErrorCode::kResourceExhausted, message};
  if (status == cudaErrorInvalidValue || status == cudaErrorInvalidConfiguration ||
      status == cudaErrorLaunchOutOfResources) {
    return {ErrorCode::kInternal, message};
  }
  return {ErrorCode::kUnavailable, message};
}

#define RETURN_IF_CUDA_ERROR(expression, what)                              \
  do {                                                                      \
    if (const cudaError_t status_ = (expression); status_ != cudaSuccess) { \
      return ::innerq::cuda::ErrorOf(status_, what);                        \
    }                                                                       \
  } while (false)

// Zeroed device memory, aligned to 256 bytes.
inline Result<Buffer> AllocateDevice(int64_t bytes) {
  const auto size = static_cast<size_t>(bytes > 0 ? bytes : 1);
  const std::string what = "allocating " + std::to_string(bytes) + " bytes on the device";
  void* memory = nullptr;
  RETURN_IF_CUDA_ERROR(cudaMalloc(&memory, size), what);
  Buffer buffer(static_cast<std::byte*>(memory), bytes, [](std::byte* data) { cudaFree(data); });
  RETURN_IF_CUDA_ERROR(cudaMemset(memory, 0, size), what);
  // The backend's stream does not wait for the default one, in which memset runs.
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(nullptr), what);
  return buffer;
}

// Copies `rows` rows of `width` bytes to the device, where they lie `pitch` bytes apart, and waits:
// from pageable memory the copy may go on after the call, and the backend's stream would not wait.
inline Result<void> CopyToDevice(const std::byte* from, int64_t rows, int64_t width, int64_t pitch,
                                 std::byte* to) {
  const std::string what = "copying " + std::to_string(rows * width) + " bytes to the device";
  RETURN_IF_CUDA_ERROR(
      cudaMemcpy2D(to, static_cast<size_t>(pitch), from, static_cast<size_t>(width),
                   static_cast<size_t>(width), static_cast<size_t>(rows), cudaMemcpyHostToDevice),
      what);
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(nullptr), what);
  return {};
}

// Zeroed, page-locked host memory.
inline Result<Buffer> AllocatePinned(int64_t bytes) {
  const auto size = static_cast<size_t>(bytes > 0 ? bytes : 1);
  void* memory = nullptr;
  RETURN_IF_CUDA_ERROR(cudaMallocHost(&memory, size),
                       "allocating " + std::to_string(bytes) + " bytes of page-locked memory");
  auto* data = static_cast<std::byte*>(memory);
  for (size_t i = 0; i < size; ++i) data[i] = std::byte{0};
  return Buffer(data, bytes, [](std::byte* freed) { cudaFreeHost(freed); });
}

// A stream of its own.
struct StreamDeleter {
  using pointer = cudaStream_t;
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
using Stream = std::unique_ptr<cudaStream_t, StreamDeleter>;

inline Result<Stream> CreateStream() {
  cudaStream_t stream = nullptr;
  RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                       "creating a stream");
  return Stream(stream);
}

}  // namespace innerq::cuda
