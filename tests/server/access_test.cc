#include "server/access.h"

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <thread>

namespace innerq {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

const Access::TimePoint kStart{std::chrono::hours(1)};

HttpRequest Bearer(const std::string& key) {
  HttpRequest request;
  request.authorization = "Bearer " + key;
  return request;
}

// The status that a request is refused with; 0 if it is not.
int Refused(Access& access, const HttpRequest& request, Access::TimePoint now = kStart) {
  const HttpAdmission admission = access.Admit(request, now);
  return admission.refusal ? admission.refusal->status : 0;
}

std::string RetryAfter(const HttpAdmission& admission) {
  EXPECT_TRUE(admission.refusal && admission.refusal->status == 429);
  if (!admission.refusal) return "";
  EXPECT_NE(admission.refusal->body.find("rate_limit_exceeded"), std::string::npos);
  EXPECT_EQ(admission.refusal->headers.size(), 1u);
  EXPECT_EQ(admission.refusal->headers.at(0).first, "Retry-After");
  return admission.refusal->headers.at(0).second;
}

TEST(Access, WithoutKeysEverybodyMayAsk) {
  Access access;
  EXPECT_EQ(Refused(access, {}), 0);
  EXPECT_EQ(Refused(access, Bearer("any")), 0);
}

TEST(Access, AKeyMustBeShownWhole) {
  Access access({"first-key", "second"});
  for (const char* key : {"first-key", "second"}) EXPECT_EQ(Refused(access, Bearer(key)), 0);
  const std::string padded = std::string("second") + '\0';
  for (const std::string& key :
       {std::string(), std::string("first-keY"), std::string("first-ke"), std::string("first-key1"),
        std::string("secondsecond"), padded, std::string(Access::kMaxKeyBytes + 1, 's')}) {
    EXPECT_EQ(Refused(access, Bearer(key)), 401) << key;
  }
  EXPECT_EQ(Refused(access, {}), 401);
  HttpRequest request;
  request.authorization = "Basic second";
  EXPECT_EQ(Refused(access, request), 401);
  request.authorization = "bearer second";  // schemes have no case
  EXPECT_EQ(Refused(access, request), 0);
  request.authorization = "Bearer   second";  // RFC 9110, 11.4: one space or more
  EXPECT_EQ(Refused(access, request), 0);
  request.authorization = "Bearersecond";
  EXPECT_EQ(Refused(access, request), 401);
  request.api_key = "second";
  EXPECT_EQ(Refused(access, request), 0);
  request.authorization = "Bearer of-a-proxy";  // one known key is enough, in either place
  EXPECT_EQ(Refused(access, request), 0);
  request = Bearer("first-key");
  request.api_key = "of-a-proxy";
  EXPECT_EQ(Refused(access, request), 0);
  const HttpAdmission refused = access.Admit(Bearer("third"), kStart);
  ASSERT_TRUE(refused.refusal.has_value());
  EXPECT_NE(refused.refusal->body.find("invalid_api_key"), std::string::npos);
  EXPECT_EQ(refused.refusal->body.find("third"), std::string::npos);
  EXPECT_EQ(refused.refusal->headers.at(0).first, "WWW-Authenticate");
}

TEST(Access, KeysAsLongAsAllowedAreToldApart) {
  const std::string longest(Access::kMaxKeyBytes, 'k');
  Access access({longest});
  EXPECT_EQ(Refused(access, Bearer(longest)), 0);
  EXPECT_EQ(Refused(access, Bearer(longest + "k")), 401);
  EXPECT_EQ(Refused(access, Bearer(longest.substr(1))), 401);
}

TEST(Access, RequestsOfAnyMinuteAreLimitedPerKey) {
  Access access({"a", "b"}, {.requests_per_minute = 3});
  for (const int second : {0, 10, 50}) {
    EXPECT_EQ(Refused(access, Bearer("a"), kStart + seconds(second)), 0);
  }
  EXPECT_EQ(RetryAfter(access.Admit(Bearer("a"), kStart + seconds(50))), "10");
  EXPECT_EQ(RetryAfter(access.Admit(Bearer("a"), kStart + milliseconds(59'999))), "1");
  EXPECT_EQ(Refused(access, Bearer("b"), kStart + seconds(50)), 0);
  // Refused requests do not count: the first one leaves the window, then the second.
  EXPECT_EQ(Refused(access, Bearer("a"), kStart + seconds(60)), 0);
  EXPECT_EQ(Refused(access, Bearer("a"), kStart + seconds(60)), 429);
  EXPECT_EQ(Refused(access, Bearer("a"), kStart + seconds(70)), 0);
  EXPECT_EQ(Refused(access, Bearer("wrong"), kStart), 401);
}

TEST(Access, PlacesComeBackWhenTheirRequestsEnd) {
  auto access = std::make_unique<Access>(std::vector<std::string>{"a", "b"},
                                         KeyLimits{.concurrent_requests = 2});
  HttpAdmission first = access->Admit(Bearer("a"), kStart);
  const HttpAdmission second = access->Admit(Bearer("a"), kStart);
  EXPECT_FALSE(first.refusal || second.refusal);
  EXPECT_EQ(RetryAfter(access->Admit(Bearer("a"), kStart)), "1");
  EXPECT_EQ(Refused(*access, Bearer("b")), 0);
  first.place.reset();
  const HttpAdmission third = access->Admit(Bearer("a"), kStart);
  EXPECT_FALSE(third.refusal);
  EXPECT_EQ(Refused(*access, Bearer("a")), 429);
  access.reset();  // the places of requests that are still running remain valid
}

TEST(Access, ARequestRefusedForOneLimitDoesNotCountForTheOther) {
  Access access({"a"}, {.requests_per_minute = 2, .concurrent_requests = 1});
  {
    const HttpAdmission held = access.Admit(Bearer("a"), kStart);
    for (int i = 0; i < 5; ++i) EXPECT_EQ(Refused(access, Bearer("a")), 429);
  }
  EXPECT_EQ(Refused(access, Bearer("a")), 0);    // the second of the minute
  EXPECT_EQ(Refused(access, Bearer("a")), 429);  // the third
  EXPECT_EQ(Refused(access, Bearer("a"), kStart + seconds(60)), 0);
}

TEST(Access, CountsExactlyUnderThreads) {
  constexpr int kThreads = 8, kRounds = 500, kLimit = 3;
  Access access({"a"}, {.requests_per_minute = 1000, .concurrent_requests = kLimit});
  std::atomic<int> running{0}, most{0}, admitted{0};
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < kRounds; ++i) {
          const HttpAdmission admission = access.Admit(Bearer("a"), kStart);
          if (admission.refusal) continue;
          ++admitted;
          const int now = ++running;
          for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
          }
          --running;
        }
      });
    }
  }
  EXPECT_LE(most, kLimit);
  EXPECT_LE(admitted, 1000);
  // All places are free again, and the minute has exactly what is left of it.
  for (int i = admitted; i < 1000; ++i) ASSERT_EQ(Refused(access, Bearer("a")), 0) << i;
  EXPECT_EQ(Refused(access, Bearer("a")), 429);
  EXPECT_EQ(Refused(access, Bearer("a"), kStart + seconds(60)), 0);
}

class KeyFileTest : public testing::Test {
 protected:
  ~KeyFileTest() override { std::filesystem::remove(path_); }
  Result<std::vector<std::string>> Load(const std::string& text) {
    std::ofstream(path_, std::ios::binary) << text;
    ServerOptions options;
    options.api_keys = {"inline"};
    options.api_key_file = path_;
    return LoadApiKeys(options);
  }
  const std::filesystem::path path_ =
      std::filesystem::temp_directory_path() /
      ("innerq_keys_" + std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
};

TEST_F(KeyFileTest, HasOneKeyALine) {
  const auto keys = Load("# the team\n\nsk-one\r\nsk-two  \n   \nlast");
  ASSERT_TRUE(keys.ok()) << keys.error().message;
  EXPECT_EQ(*keys, (std::vector<std::string>{"inline", "sk-one", "sk-two", "last"}));
}

TEST_F(KeyFileTest, IsRefusedWithItsPathWithoutTellingKeys) {
  for (const std::string& text :
       {std::string("sk-secret two"), std::string("ok\nsk-secret\x01\n"), std::string("# only\n"),
        std::string(), "sk-secret" + std::string(Access::kMaxKeyBytes, 'x')}) {
    const auto keys = Load(text);
    ASSERT_FALSE(keys.ok()) << text;
    EXPECT_EQ(keys.error().param, "server.api_key_file");
    EXPECT_NE(keys.error().message.find(path_.string()), std::string::npos);
    EXPECT_EQ(keys.error().message.find("secret"), std::string::npos);
  }
  ServerOptions options;
  for (const auto& path : {path_ / "none", std::filesystem::temp_directory_path()}) {
    options.api_key_file = path;  // one that is not there, and a directory
    EXPECT_FALSE(LoadApiKeys(options).ok());
  }
}

}  // namespace
}  // namespace innerq
