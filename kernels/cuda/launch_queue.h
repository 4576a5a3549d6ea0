// LaunchQueue: the one stream of the CUDA backend, with all that happens on it in order: arrays of
// the host on their way to the device, launches, CUDA graphs of launches that recur, the first
// error.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/launch_record.h"
#include "kernels/cuda/staged_arrays.h"

namespace innerq::cuda {

struct GraphDeleter {
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
using ExecutableGraph = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, GraphDeleter>;

// An array to stage for an operation: its items, and who wants to know where the device has them.
template <typename T>
struct StagedArray {
  StagingSlot slot;
  std::span<const T> items;
  const T** on_device = nullptr;
};

// What a launcher (see launch.h) takes besides the stream.
template <typename Launcher>
struct LauncherTraits;
template <typename Status, typename T>
struct LauncherTraits<Status (*)(const T&, cudaStream_t)> {
  using Launch = T;
};

// Launches are recorded and go to the stream in batches, 16 first and then more, so that the device
// begins while the host goes on. A batch that comes a second time, the same launchers with the same
// bytes, is captured in a CUDA graph, and from then on launched as that graph, which costs the host
// a few microseconds and the device next to nothing between kernels. Prompts, which hardly ever
// repeat, are just launched.
//
// What differs between two steps that decode the same number of sequences lies in staged arrays, at
// addresses that stay, and numbers of blocks that grow with the context are rounded up, so their
// batches are the same. Steps of other numbers of sequences have graphs of their own: no row is
// padded, results and memory are those of plain launches. How many graphs there are is bounded. A
// graph knows only addresses, so it stays right when memory is freed and another owner gets it.
//
// Making a graph takes memory of the device, by the driver. Where there is none left, or a capture
// fails in some other way, launches go on one by one, of which `warn` is told once. Errors stick:
// after one, what is enqueued is dropped, for its inputs may be garbage.
class LaunchQueue {
 public:
  // `warn`: see BackendOptions.
  static Result<std::unique_ptr<LaunchQueue>> Create(std::function<void(std::string_view)> warn);
  ~LaunchQueue();

  // Waits, forgets graphs, and readies `staging_bytes` for arrays, at least those of any operation.
  // Where a step fills them, Stage waits for the stream and begins again.
  Result<void> Reserve(int64_t staging_bytes);

  // Copies arrays, all that an operation has, to where its launches will find them; addresses of
  // empty ones are null. They stay there until the launches have run. False after an error.
  template <typename... T>
  bool Stage(const StagedArray<T>&... arrays) {
    if (!error_.ok()) return false;
    if ((TryStage(arrays) && ...)) return true;
    EmptyStaging();
    CHECK((TryStage(arrays) && ...),
          "a step larger than reserved: " + std::to_string((arrays.items.size_bytes() + ...)) +
              " bytes of arguments, " + std::to_string(host_.bytes()) + " reserved");
    return error_.ok();
  }

  // Launches later, in order. `launcher` must do the same whenever its argument has the same bytes.
  template <auto launcher>
  void Enqueue(const char* what,
               const typename LauncherTraits<decltype(launcher)>::Launch& launch) {
    using Launch = typename LauncherTraits<decltype(launcher)>::Launch;
    static_assert(std::is_trivially_copyable_v<Launch>);
    if (!error_.ok()) return;
    Launch bytes = launch;
    __builtin_clear_padding(&bytes);
    record_.Add(&RunLauncher<launcher>, what, std::as_bytes(std::span(&bytes, 1)));
    if (record_.num_launches() >= batch_) {
      Flush();
      batch_ = std::min(batch_ * 2, kMostLaunches);
    }
  }

  // Sends what was enqueued to the stream.
  void Flush();
  // Keeps the first error until Wait. For calls of the runtime on stream(), after Flush.
  void Check(cudaError_t status, const char* what);
  cudaStream_t stream() const { return stream_.get(); }

  // Waits for all of it; returns the first error since the last call, and forgets it.
  Result<void> Wait();

 private:
  using RunFunction = Result<void> (*)(const std::byte* launch, const char* what,
                                       cudaStream_t stream);
  using Record = LaunchRecord<RunFunction>;

  // Launches in a batch. The host enqueues several in the time that the device takes for one.
  static constexpr int64_t kFirstLaunches = 16, kMostLaunches = 128;
  // In all graphs: some 40 kinds of steps of a model of 32 layers. The driver takes a few KB each.
  static constexpr int64_t kMaxGraphLaunches = 16384;

  LaunchQueue(Stream stream, std::function<void(std::string_view)> warn)
      : stream_(std::move(stream)), graphs_(kMaxGraphLaunches), warn_(std::move(warn)) {}

  static Result<void> ResultOf(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return {};
    return ErrorOf(status, what);
  }
  static Result<void> ResultOf(Result<void> status, const char*) { return status; }
  template <auto launcher>
  static Result<void> RunLauncher(const std::byte* launch, const char* what, cudaStream_t stream) {
    using Launch = typename LauncherTraits<decltype(launcher)>::Launch;
    return ResultOf(launcher(*reinterpret_cast<const Launch*>(launch), stream), what);
  }

  template <typename T>
  bool TryStage(const StagedArray<T>& array) {
    static_assert(std::has_unique_object_representations_v<T> || std::is_same_v<T, float>,
                  "padding would make equal arrays differ");
    const std::byte* on_device = nullptr;
    const bool staged = staged_.Stage(array.slot, std::as_bytes(array.items), &on_device);
    *array.on_device = reinterpret_cast<const T*>(on_device);
    return staged;
  }
  void EmptyStaging();
  void SendRecorded();

  Result<void> LaunchRecorded();
  Result<ExecutableGraph> CaptureRecorded();
  void GiveUpCaptures(const Error& error);

  const Stream stream_;
  Buffer host_, device_;  // of staged arrays; the host's is page-locked
  StagedArrays staged_;
  Record record_;  // what is enqueued
  int64_t batch_ = kFirstLaunches;
  GraphCache<Record, ExecutableGraph> graphs_;
  bool captures_ = true;                        // none has failed since Reserve
  std::function<void(std::string_view)> warn_;  // empty once it was told
  Result<void> error_;
};

}  // namespace innerq::cuda
