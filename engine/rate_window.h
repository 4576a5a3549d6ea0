// RateWindow: how many events per second there have been lately.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>

namespace innerq {

// Counts events in buckets of one second. Not thread-safe; time comes from the caller and must not
// go back.
class RateWindow {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  RateWindow(int64_t seconds, TimePoint start) : seconds_(seconds), start_(start) {}

  void Add(int64_t count, TimePoint now) {
    const int64_t second = SecondOf(now);
    if (buckets_.empty() || buckets_.back().second != second) buckets_.push_back({second, 0});
    buckets_.back().count += count;
    while (buckets_.front().second <= second - seconds_) buckets_.pop_front();
  }

  // Events per second over the window, or over the time since the start if that is shorter.
  double PerSecond(TimePoint now) const {
    const int64_t second = SecondOf(now);
    int64_t sum = 0;
    for (const Bucket& bucket : buckets_) {
      if (bucket.second > second - seconds_) sum += bucket.count;
    }
    return static_cast<double>(sum) / static_cast<double>(std::min(seconds_, second + 1));
  }

 private:
  struct Bucket {
    int64_t second = 0;  // since the start
    int64_t count = 0;
  };
  int64_t SecondOf(TimePoint now) const {
    return std::chrono::duration_cast<std::chrono::seconds>(now - start_).count();
  }

  const int64_t seconds_;
  const TimePoint start_;
  std::deque<Bucket> buckets_;  // ascending; at most `seconds_`
};

}  // namespace innerq
