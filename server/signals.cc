#include "server/signals.h"

#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include <condition_variable>
#include <csignal>
#include <mutex>
#include <string_view>
#include <thread>
#include <utility>

namespace innerq {
namespace {

using std::chrono::steady_clock;

// Says why the process ends. Neither waits for a log that another thread holds, nor for a reader of
// standard error.
void TellRepeatedSignal(int signal) {
  const std::string_view line = signal == SIGINT ? "innerq: a second SIGINT: ending at once\n"
                                                 : "innerq: a second SIGTERM: ending at once\n";
  pollfd writable{.fd = STDERR_FILENO, .events = POLLOUT, .revents = 0};
  if (::poll(&writable, 1, 0) <= 0) return;
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace

struct Signals::State {
  std::mutex mutex;
  std::condition_variable arrived;
  bool catching = false;
  int caught = 0;
  steady_clock::time_point caught_at;
  std::function<void()> before_exit;

  void Run(const sigset_t& set) noexcept {
    pthread_setname_np(pthread_self(), "innerq-signals");
    for (;;) {
      int signal = 0;
      if (sigwait(&set, &signal) != 0) continue;
      const std::lock_guard lock(mutex);
      if (signal == caught && steady_clock::now() - caught_at < kRepeat) continue;
      if (!catching || caught != 0) {
        if (caught != 0) TellRepeatedSignal(signal);
        if (before_exit) before_exit();
        ::_exit(128 + signal);
      }
      caught = signal;
      caught_at = steady_clock::now();
      arrived.notify_all();
    }
  }
};

Signals::Signals() : state_(std::make_shared<State>()) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  // The thread has nothing to return to: it waits for as long as the process lives.
  std::jthread([set, state = state_] { state->Run(set); }).detach();
}

void Signals::Catch() {
  const std::lock_guard lock(state_->mutex);
  state_->catching = true;
}

void Signals::SetBeforeExit(std::function<void()> work) {
  const std::lock_guard lock(state_->mutex);
  state_->before_exit = std::move(work);
}

int Signals::Wait(std::chrono::milliseconds timeout) {
  std::unique_lock lock(state_->mutex);
  state_->arrived.wait_for(lock, timeout, [this] { return state_->caught != 0; });
  return state_->caught;
}

}  // namespace innerq
