// What the CUDA backend uses of the CUDA runtime, over host memory. There is one stream, and it
// runs as late as it may: when somebody waits for it. So memory of the host that is written before
// it was copied shows as wrong results.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorMemoryAllocation,
  cudaErrorInvalidConfiguration,
  cudaErrorLaunchOutOfResources,
  cudaErrorStreamCaptureUnsupported
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
using cudaStream_t = void*;
constexpr unsigned cudaStreamNonBlocking = 1;
struct cudaFuncAttributes {};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_extent = 1, unsigned y_extent = 1, unsigned z_extent = 1)
      : x(x_extent), y(y_extent), z(z_extent) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace innerq::emulation {

using Work = std::vector<std::function<void()>>;

// The stream, and what tests ask of it.
struct Stream {
  Work waiting;
  Work* capture = nullptr;  // that enqueued work goes to instead
  bool refuses_captures = false;
  int64_t num_captures = 0, num_graph_launches = 0;  // since the program began

  void Add(std::function<void()> work) {
    (capture != nullptr ? *capture : waiting).push_back(std::move(work));
  }
  // Copies are no part of our graphs, and some of them cannot be.
  cudaError_t AddOutsideCapture(std::function<void()> work) {
    if (capture != nullptr) return cudaErrorStreamCaptureUnsupported;
    Add(std::move(work));
    return cudaSuccess;
  }
  cudaError_t Run() {
    if (capture != nullptr) return cudaErrorStreamCaptureUnsupported;
    for (const std::function<void()>& work : std::exchange(waiting, {})) work();
    return cudaSuccess;
  }
};
inline Stream the_stream;

}  // namespace innerq::emulation

using cudaGraph_t = innerq::emulation::Work*;
using cudaGraphExec_t = innerq::emulation::Work*;

inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (innerq::emulation::the_stream.capture != nullptr) return cudaErrorStreamCaptureUnsupported;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaMallocHost(void** memory, size_t bytes) { return cudaMalloc(memory, bytes); }
// Waits for the device, as CUDA does.
inline cudaError_t cudaFree(void* memory) {
  const cudaError_t status = innerq::emulation::the_stream.Run();
  std::free(memory);
  return status;
}
inline cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
// All that can be told of the host's memory here.
inline cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = SIZE_MAX / 2;
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return innerq::emulation::the_stream.AddOutsideCapture(
      [=] { std::memset(memory, value, bytes); });
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  return innerq::emulation::the_stream.AddOutsideCapture([=] { std::memcpy(to, from, bytes); });
}
inline cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                size_t width, size_t height, cudaMemcpyKind) {
  for (size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<char*>(to) + row * to_pitch,
                static_cast<const char*>(from) + row * from_pitch, width);
  }
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = &innerq::emulation::the_stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
// A null stream is the default one, in which nothing ever waits.
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return stream != nullptr ? innerq::emulation::the_stream.Run() : cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  innerq::emulation::Stream& stream = innerq::emulation::the_stream;
  if (stream.refuses_captures || stream.capture != nullptr) return cudaErrorInvalidValue;
  stream.capture = new innerq::emulation::Work;
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = std::exchange(innerq::emulation::the_stream.capture, nullptr);
  ++innerq::emulation::the_stream.num_captures;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                        unsigned long long) {
  *executable = new innerq::emulation::Work(*graph);
  return cudaSuccess;
}
inline cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  innerq::emulation::Stream& stream = innerq::emulation::the_stream;
  if (stream.capture != nullptr) return cudaErrorStreamCaptureUnsupported;
  for (const std::function<void()>& work : *graph) stream.Add(work);
  ++stream.num_graph_launches;
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
