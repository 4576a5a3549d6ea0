// WorkSlots: how many threads may do heavy work at once.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace innerq {

// Thread-safe. Whoever finds no slot free waits.
class WorkSlots {
 public:
  explicit WorkSlots(int64_t count) : free_(count) {}

  // Holds a slot of `slots`, which must outlive it.
  class Slot {
   public:
    explicit Slot(WorkSlots& slots) : slots_(slots) { slots_.Take(); }
    Slot(const Slot&) = delete;
    Slot& operator=(const Slot&) = delete;
    ~Slot() { slots_.Return(); }

   private:
    WorkSlots& slots_;
  };

 private:
  void Take() {
    std::unique_lock lock(mutex_);
    freed_.wait(lock, [this] { return free_ > 0; });
    --free_;
  }
  void Return() {
    {
      const std::lock_guard lock(mutex_);
      ++free_;
    }
    freed_.notify_one();
  }

  std::mutex mutex_;
  std::condition_variable freed_;
  int64_t free_;  // guarded by mutex_
};

}  // namespace innerq
