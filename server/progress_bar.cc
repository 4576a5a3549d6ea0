#include "server/progress_bar.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace innerq {

ProgressBar::ProgressBar(std::string label)
    : label_(std::move(label)), visible_(::isatty(STDERR_FILENO) != 0) {}

ProgressBar::~ProgressBar() {
  if (percent_ >= 0) std::fputs("\r\033[K", stderr);
}

void ProgressBar::Show(int64_t done, int64_t total) {
  const int percent = total > 0 ? static_cast<int>(100 * std::min(done, total) / total) : 100;
  if (!visible_ || percent == percent_) return;
  percent_ = percent;
  const auto filled = static_cast<size_t>(percent) * 40 / 100;
  fmt::print(stderr, "\r{} [{}{}] {:3}%", label_, std::string(filled, '#'),
             std::string(40 - filled, '.'), percent);
  std::fflush(stderr);
}

}  // namespace innerq
