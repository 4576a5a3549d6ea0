#include "server/commands.h"

#include <gtest/gtest.h>

namespace innerq {
namespace {

// The exit code and the line that an error gives.
std::pair<int, std::string> Report(const Error& error) {
  testing::internal::CaptureStderr();
  const int code = ReportError(error);
  return {code, testing::internal::GetCapturedStderr()};
}

TEST(ReportError, NamesTheKeyOnce) {
  EXPECT_EQ(Report(InvalidArgument("group_size 128 does not divide 64", "kv_cache.key.group_size")),
            std::pair(2, std::string("innerq: kv_cache.key.group_size: group_size 128 does not "
                                     "divide 64\n")));
  EXPECT_EQ(Report(InvalidArgument("a.json: server.port: expected integer", "server.port")).second,
            "innerq: a.json: server.port: expected integer\n");
}

TEST(ReportError, TellsAConfigurationThatCannotWorkFromAFailure) {
  EXPECT_EQ(Report({ErrorCode::kNotFound, "no such file"}).first, 2);
  EXPECT_EQ(Report({ErrorCode::kResourceExhausted, "too little", "kv_cache.memory"}).first, 2);
  EXPECT_EQ(Report({ErrorCode::kUnavailable, "no AMX here", "backend.variant"}).first, 2);
  EXPECT_EQ(Report({ErrorCode::kUnavailable, "port 80 is in use"}).first, 1);
  EXPECT_EQ(Report({ErrorCode::kDataLoss, "model.safetensors is damaged"}).first, 1);
}

}  // namespace
}  // namespace innerq
