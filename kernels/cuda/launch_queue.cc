#include "kernels/cuda/launch_queue.h"

#include <optional>
#include <string>
#include <utility>

namespace innerq::cuda {

Result<std::unique_ptr<LaunchQueue>> LaunchQueue::Create(
    std::function<void(std::string_view)> warn) {
  ASSIGN_OR_RETURN(Stream stream, CreateStream());
  std::unique_ptr<LaunchQueue> made(new LaunchQueue(std::move(stream), std::move(warn)));
  constexpr size_t kArgumentBytes = 512;  // of most launches
  made->record_.Reserve(kMostLaunches, kMostLaunches * kArgumentBytes);
  return made;
}

LaunchQueue::~LaunchQueue() {
  // Nothing may run on memory that is about to be freed; what it failed with no longer matters.
  static_cast<void>(cudaStreamSynchronize(stream_.get()));
}

Result<void> LaunchQueue::Reserve(int64_t staging_bytes) {
  Flush();
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()), "waiting for the device");
  graphs_.Clear();
  captures_ = true;
  if (staging_bytes > host_.bytes()) {
    ASSIGN_OR_RETURN(Buffer host, AllocatePinned(staging_bytes));
    ASSIGN_OR_RETURN(device_, AllocateDevice(staging_bytes));
    host_ = std::move(host);
  }
  staged_.Reset(host_.data(), device_.data(), host_.bytes());
  return {};
}

void LaunchQueue::Check(cudaError_t status, const char* what) {
  if (status != cudaSuccess && error_.ok()) error_ = ErrorOf(status, what);
}

void LaunchQueue::EmptyStaging() {
  Flush();
  Check(cudaStreamSynchronize(stream_.get()), "waiting for room for arguments");
  staged_.Reset();
}

void LaunchQueue::Flush() {
  if (record_.num_launches() > 0 && error_.ok()) SendRecorded();
  record_.Clear();
}

void LaunchQueue::SendRecorded() {
  for (const StagedArrays::Range& range : staged_.TakeChanged()) {
    Check(cudaMemcpyAsync(device_.data() + range.begin, host_.data() + range.begin,
                          static_cast<size_t>(range.end - range.begin), cudaMemcpyHostToDevice,
                          stream_.get()),
          "copying arguments");
  }
  const ExecutableGraph* graph = graphs_.Find(record_);
  std::optional<Error> failed;
  if (graph == nullptr && captures_ && graphs_.Recurs(record_)) {
    Result<ExecutableGraph> captured = CaptureRecorded();
    if (captured.ok()) {
      graph = graphs_.Insert(record_, std::move(captured).value());
    } else {
      failed = captured.error();
    }
  }
  if (!error_.ok()) return;
  if (graph != nullptr) {
    Check(cudaGraphLaunch(graph->get(), stream_.get()), "launching a graph");
  } else {
    error_ = LaunchRecorded();
    // Launches are to blame if they fail by themselves, too.
    if (failed && error_.ok()) GiveUpCaptures(*failed);
  }
}

Result<void> LaunchQueue::LaunchRecorded() {
  for (const Record::Launch& launch : record_.launches()) {
    RETURN_IF_ERROR(launch.function(record_.ArgumentOf(launch), launch.what, stream_.get()));
  }
  return {};
}

// All that launches do for the first time (loading a kernel, choosing an algorithm), which a
// capture may not allow, they did when the record came first; a plan that was dropped since is made
// again, and if the capture does not allow it there are no graphs until the next Reserve.
Result<ExecutableGraph> LaunchQueue::CaptureRecorded() {
  Result<void> made;
  const auto check = [&made](cudaError_t status, const char* what) {
    if (status != cudaSuccess && made.ok()) made = ErrorOf(status, what);
  };
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "a capture");
  if (made.ok()) {
    made = LaunchRecorded();
    check(cudaStreamEndCapture(stream_.get(), &graph), "the end of a capture");
  }
  if (made.ok()) check(cudaGraphInstantiate(&executable, graph, 0), "making a graph");
  if (graph != nullptr) cudaGraphDestroy(graph);
  ExecutableGraph owned(executable);
  // What memory it takes it takes now, where there is another way if there is none.
  if (made.ok()) check(cudaGraphUpload(owned.get(), stream_.get()), "uploading a graph");
  if (made.ok()) return owned;
  static_cast<void>(cudaGetLastError());  // of what nobody waits for
  return made.error();
}

void LaunchQueue::GiveUpCaptures(const Error& error) {
  captures_ = false;
  if (!warn_) return;
  warn_("steps take the host more time from now on: no CUDA graph can be made of them (" +
        error.message + ")");
  warn_ = nullptr;
}

Result<void> LaunchQueue::Wait() {
  Flush();
  Check(cudaStreamSynchronize(stream_.get()), "running operations");
  batch_ = kFirstLaunches;
  graphs_.Trim();
  staged_.EndStep();
  if (!error_.ok()) staged_.ForgetContents();
  return std::exchange(error_, Result<void>());
}

}  // namespace innerq::cuda
