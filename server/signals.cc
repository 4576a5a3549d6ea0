#include "server/signals.h"

#include <pthread.h>
#include <unistd.h>

#include <condition_variable>
#include <csignal>
#include <mutex>
#include <thread>
#include <utility>

namespace innerq {

struct Signals::State {
  std::mutex mutex;
  std::condition_variable arrived;
  bool catching = false;
  int caught = 0;
  std::function<void()> before_exit;

  void Run(const sigset_t& set) noexcept {
    pthread_setname_np(pthread_self(), "innerq-signals");
    for (;;) {
      int signal = 0;
      if (sigwait(&set, &signal) != 0) continue;
      const std::lock_guard lock(mutex);
      if (!catching || caught != 0) {
        if (before_exit) before_exit();
        ::_exit(128 + signal);
      }
      caught = signal;
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
