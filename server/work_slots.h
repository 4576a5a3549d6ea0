// WorkSlots: how much heavy work may be done at once.
#pragma once

#include <malloc.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace innerq {

// Bounds the threads that work at once, and the bytes that they work on together. Whoever finds no
// room waits, first come first served. After each kTrimBytes of work what it has freed goes back to
// the system: glibc would keep it for each thread that ever worked. Thread-safe.
class WorkSlots {
 public:
  // Work on more than `max_bytes` is done alone.
  WorkSlots(int64_t count, int64_t max_bytes) : count_(count), max_bytes_(max_bytes) {}

  // Holds a slot of `slots`, which must outlive it, for work on so many bytes.
  class Slot {
   public:
    Slot(WorkSlots& slots, size_t bytes) : slots_(slots), bytes_(static_cast<int64_t>(bytes)) {
      slots_.Take(bytes_);
    }
    Slot(const Slot&) = delete;
    Slot& operator=(const Slot&) = delete;
    ~Slot() { slots_.Return(bytes_); }

   private:
    WorkSlots& slots_;
    const int64_t bytes_;
  };

  // How many wait for a slot.
  int64_t num_waiting() const {
    const std::lock_guard lock(mutex_);
    return arrived_ - admitted_;
  }

 private:
  void Take(int64_t bytes) {
    std::unique_lock lock(mutex_);
    const int64_t number = arrived_++;
    changed_.wait(lock, [&] {
      const bool fits = taken_ == 0 || (taken_ < count_ && bytes <= max_bytes_ - bytes_);
      return number == admitted_ && fits;
    });
    ++admitted_;
    ++taken_;
    bytes_ += bytes;
    changed_.notify_all();  // there may be room for the next one, too
  }
  void Return(int64_t bytes) {
    std::unique_lock lock(mutex_);
    untrimmed_ += bytes;
    if (untrimmed_ >= kTrimBytes) {
      untrimmed_ = 0;
      lock.unlock();
      malloc_trim(0);
      lock.lock();
    }
    --taken_;
    bytes_ -= bytes;
    changed_.notify_all();
  }

  // Work on so many bytes takes far longer than looking for memory to give back.
  static constexpr int64_t kTrimBytes = int64_t{1} << 20;

  const int64_t count_;
  const int64_t max_bytes_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  int64_t arrived_ = 0;    // so many have asked ...
  int64_t admitted_ = 0;   // ... and so many of them, in order, have got a slot
  int64_t taken_ = 0;      // slots
  int64_t bytes_ = 0;      // that are worked on
  int64_t untrimmed_ = 0;  // bytes that were worked on since memory was given back
};

}  // namespace innerq
