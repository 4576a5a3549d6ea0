// ProgressBar: how far a long piece of work is, for people.
#pragma once

#include <cstdint>
#include <string>

namespace innerq {

// Draws "loading weights [####....]  43%" on one line of standard error if that is a terminal,
// nothing elsewhere. Erased on destruction.
class ProgressBar {
 public:
  explicit ProgressBar(std::string label);
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  ~ProgressBar();

  void Show(int64_t done, int64_t total);

 private:
  const std::string label_;
  const bool visible_;
  int percent_ = -1;  // as drawn
};

}  // namespace innerq
