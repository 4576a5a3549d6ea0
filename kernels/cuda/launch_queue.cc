#include "kernels/cuda/launch_queue.h"

#include <string>
#include <utility>

namespace innerq::cuda {

Result<std::unique_ptr<LaunchQueue>> LaunchQueue::Create() {
  ASSIGN_OR_RETURN(Stream stream, CreateStream());
  std::unique_ptr<LaunchQueue> made(new LaunchQueue(std::move(stream)));
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
  bool failed = false;
  if (graph == nullptr && captures_ && graphs_.Recurs(record_)) {
    ExecutableGraph captured = CaptureRecorded();
    failed = captured == nullptr;
    if (!failed) graph = graphs_.Insert(record_, std::move(captured));
  }
  if (!error_.ok()) return;
  if (graph != nullptr) {
    Check(cudaGraphLaunch(graph->get(), stream_.get()), "launching a graph");
  } else {
    error_ = LaunchRecorded();
    // Launches are to blame if they fail by themselves, too.
    if (failed && error_.ok()) captures_ = false;
  }
}

Result<void> LaunchQueue::LaunchRecorded() {
  for (const Record::Launch& launch : record_.launches()) {
    RETURN_IF_ERROR(launch.function(record_.ArgumentOf(launch), launch.what, stream_.get()));
  }
  return {};
}

// Null if it cannot be had. All that launches do for the first time (loading a kernel, choosing an
// algorithm), which a capture may not allow, they did when the record came first.
ExecutableGraph LaunchQueue::CaptureRecorded() {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  bool captured =
      cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal) == cudaSuccess;
  if (captured) {
    captured = LaunchRecorded().ok();
    captured &= cudaStreamEndCapture(stream_.get(), &graph) == cudaSuccess;
  }
  captured = captured && cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess;
  if (graph != nullptr) cudaGraphDestroy(graph);
  ExecutableGraph made(executable);
  // What memory it takes it takes now, where there is another way if there is none.
  captured = captured && cudaGraphUpload(made.get(), stream_.get()) == cudaSuccess;
  if (captured) return made;
  static_cast<void>(cudaGetLastError());  // of what nobody waits for
  return nullptr;
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
