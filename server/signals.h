// Signals: SIGTERM and SIGINT as something that a thread waits for.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

namespace innerq {

// Takes SIGTERM and SIGINT, on a thread of its own: no handler runs in the middle of other code,
// and it works for process 1, for which the default action is to ignore them. Create it before any
// other thread, for those must inherit the blocked signals. One per process.
class Signals {
 public:
  Signals();

  // Supervisors send a signal to a process and to its group, or once more: the same signal within
  // this time of the first one repeats it, and is ignored.
  static constexpr std::chrono::milliseconds kRepeat{1000};

  // Until this call the first signal ends the process; from now on it is Wait that returns, and
  // only a second one, no repetition, that ends the process, with a line on standard error.
  void Catch();
  // What the second signal does before it ends the process, on the thread of signals; empty:
  // nothing. Waits while one does, which is for ever.
  void SetBeforeExit(std::function<void()> work);
  // The first signal that was caught, now or within the timeout; 0: none.
  int Wait(std::chrono::milliseconds timeout);

 private:
  struct State;
  const std::shared_ptr<State> state_;
};

}  // namespace innerq
