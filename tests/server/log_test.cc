#include "server/log.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>

#include "server/service.h"

namespace innerq {
namespace {

using nlohmann::json;

// What the log gets of an answer.
std::string Logged(const LogOptions& options, const HttpExchange& exchange) {
  testing::internal::CaptureStderr();
  ConfigureLog(options);
  LogAnswer(exchange);
  return testing::internal::GetCapturedStderr();
}

TEST(Log, AMessageIsOneLineWhateverIsInIt) {
  const HttpExchange exchange{
      .id = "r1", .method = "GET", .path = "/a\r\nb\x1b[2J\"\\\x7f", .status = 404};
  const std::string text = Logged({.level = "info", .json = false}, exchange);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1) << text;
  EXPECT_NE(text.find(" info request r1: GET /a\\x0d\\x0ab\\x1b[2J\"\\\\x7f 404 in "),
            std::string::npos)
      << text;
  const std::string line = Logged({.level = "info", .json = true}, exchange);
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1) << line;
  const json parsed = json::parse(line);
  EXPECT_EQ(parsed["level"], "info");
  EXPECT_TRUE(parsed["message"].get<std::string>().starts_with("request r1: GET " + exchange.path))
      << line;
}

TEST(LogAnswer, TellsIdStatusTokensAndReasonOnTheLevelTheyDeserve) {
  const auto log = [](const std::string& level, const HttpExchange& answered) {
    return Logged({.level = level, .json = false}, answered);
  };
  HttpExchange exchange{.id = "r1",
                        .method = "POST",
                        .path = "/v1/completions",
                        .status = 200,
                        .duration = std::chrono::microseconds(1500),
                        .notes = {.prompt_tokens = 5, .completion_tokens = 7}};
  const std::string head = "request r1: POST /v1/completions 200 in 1.5 ms";
  EXPECT_TRUE(
      log("info", exchange).ends_with(head + ", 5 prompt and 7 completion tokens, abort\n"));
  exchange.notes.finish_reason = "stop";
  EXPECT_TRUE(log("info", exchange).ends_with(head + ", 5 prompt and 7 completion tokens, stop\n"));
  EXPECT_EQ(log("warn", exchange), "");
  exchange.notes = {};
  EXPECT_EQ(log("info", exchange), "");
  EXPECT_TRUE(log("debug", exchange).ends_with(head + "\n"));
  exchange.status = 429;
  EXPECT_NE(log("info", exchange).find(" 429 "), std::string::npos);
  exchange.status = 500;
  EXPECT_NE(log("warn", exchange).find(" 500 "), std::string::npos);
}

}  // namespace
}  // namespace innerq
