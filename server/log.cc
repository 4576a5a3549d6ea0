#include "server/log.h"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <memory>

#include "server/utf8.h"

namespace innerq {
namespace {

// The message as a JSON string: "%*" in a pattern.
class QuotedMessage : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&,
              spdlog::memory_buf_t& out) override {
    const std::string quoted = QuoteJson({message.payload.data(), message.payload.size()});
    out.append(quoted.data(), quoted.data() + quoted.size());
  }
  std::unique_ptr<custom_flag_formatter> clone() const override {
    return std::make_unique<QuotedMessage>();
  }
};

}  // namespace

void ConfigureLog(const LogOptions& options) {
  auto logger = std::make_shared<spdlog::logger>(
      "innerq", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  logger->set_level(spdlog::level::from_str(options.level));
  logger->flush_on(spdlog::level::debug);
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  if (options.json) {
    formatter->add_flag<QuotedMessage>('*').set_pattern(
        R"({"time": "%Y-%m-%dT%H:%M:%S.%e%z", "level": "%l", "message": %*})");
  } else {
    formatter->set_pattern("%Y-%m-%d %H:%M:%S.%e %^%l%$ %v");
  }
  logger->set_formatter(std::move(formatter));
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace innerq
