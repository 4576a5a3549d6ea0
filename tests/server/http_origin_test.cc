#include "server/http_origin.h"

#include <gtest/gtest.h>

#include <map>

namespace innerq {
namespace {

using Fields = std::vector<HttpHead::Field>;

HttpHead Head(const std::string& method, Fields fields) {
  HttpHead head{.method = method, .path = "/", .fields = std::move(fields)};
  return head;
}

std::map<std::string, std::string> Answered(const HttpOriginPolicy& policy, const HttpHead& head) {
  std::map<std::string, std::string> headers;
  for (const auto& [name, value] : policy.Headers(head, "GET, POST")) {
    EXPECT_TRUE(headers.emplace(name, value).second) << name;
  }
  return headers;
}

TEST(HttpOriginPolicy, PagesOfOtherSitesMayNotSendUnlessTheyAreAllowed) {
  const HttpOriginPolicy none;
  const HttpOriginPolicy some{.cors_origins = {"https://a.example", "null"}};
  const HttpOriginPolicy any{.cors_origins = {"*"}};
  const auto post = [](const std::string& origin) {
    return Head("POST", {{"Host", "127.0.0.1:8080"}, {"Origin", origin}});
  };
  EXPECT_TRUE(none.MaySend(Head("POST", {{"Host", "127.0.0.1:8080"}})));  // no browser
  EXPECT_TRUE(none.MaySend(post("http://127.0.0.1:8080")));               // a page of ours
  EXPECT_TRUE(none.MaySend(post("HTTPS://127.0.0.1:8080")));
  for (const char* origin : {"https://a.example", "http://127.0.0.1:80801", "http://127.0.0.1",
                             "127.0.0.1:8080", "null", "http://x@127.0.0.1:8080"}) {
    EXPECT_FALSE(none.MaySend(post(origin))) << origin;
    EXPECT_TRUE(any.MaySend(post(origin))) << origin;
  }
  EXPECT_TRUE(some.MaySend(post("https://a.example")));
  EXPECT_TRUE(some.MaySend(post("null")));
  EXPECT_FALSE(some.MaySend(post("https://a.example.evil")));
  EXPECT_FALSE(some.MaySend(post("http://a.example")));
  EXPECT_FALSE(none.MaySend(Head("OPTIONS", {{"Host", "x"}, {"Origin", "https://a"}})));
  EXPECT_TRUE(none.MaySend(Head("GET", {{"Host", "x"}, {"Origin", "https://a"}})));
}

TEST(HttpOriginPolicy, NamesThatWerePointedHereAreNotAnswered) {
  const HttpOriginPolicy policy{.allowed_hosts = {"gpu1.lan"}};
  for (const char* host :
       {"127.0.0.1", "127.0.0.1:8080", "[::1]:8080", "[::1]", "10.1.2.3", "localhost",
        "LOCALHOST:80", "a.localhost", "gpu1.lan:8080", "GPU1.lan", ""}) {
    EXPECT_TRUE(policy.MayAddress(host)) << host;
  }
  for (const char* host : {"evil.example", "evil.example:8080", "notlocalhost", "localhost.evil",
                           "127.0.0.1.evil", "gpu1.lan.evil", "1", "[::1", "[", ":80"}) {
    EXPECT_FALSE(policy.MayAddress(host)) << host;
    EXPECT_TRUE(HttpOriginPolicy().MayAddress(host)) << host;
  }
}

TEST(HttpOriginPolicy, AnswersCarryWhatTheOriginIsAllowed) {
  const HttpHead get = Head("GET", {{"Host", "x"}, {"Origin", "https://a.example"}});
  const HttpHead preflight = Head("OPTIONS", {{"Host", "x"},
                                              {"Origin", "https://a.example"},
                                              {"Access-Control-Request-Method", "POST"},
                                              {"Access-Control-Request-Headers", "x-a, x-b"}});
  EXPECT_TRUE(Answered({}, get).empty());
  EXPECT_TRUE(Answered({}, preflight).empty());
  const HttpOriginPolicy policy{.cors_origins = {"https://b.example", "https://a.example"}};
  EXPECT_EQ(Answered(policy, get),
            (std::map<std::string, std::string>{
                {"Vary", "Origin"},
                {"Access-Control-Allow-Origin", "https://a.example"},
                {"Access-Control-Expose-Headers", "X-Request-Id, Retry-After"}}));
  EXPECT_EQ(Answered(policy, preflight), (std::map<std::string, std::string>{
                                             {"Vary", "Origin"},
                                             {"Access-Control-Allow-Origin", "https://a.example"},
                                             {"Access-Control-Allow-Methods", "GET, POST"},
                                             {"Access-Control-Allow-Headers", "x-a, x-b"},
                                             {"Access-Control-Max-Age", "600"}}));
  // Caches must not give this answer to another origin.
  EXPECT_EQ(Answered({.cors_origins = {"https://b.example"}}, get),
            (std::map<std::string, std::string>{{"Vary", "Origin"}}));
  EXPECT_EQ(Answered({.cors_origins = {"*"}}, get).at("Access-Control-Allow-Origin"), "*");
}

TEST(IsLoopback, KnowsAddressesAndNamesOfThisMachine) {
  for (const char* host : {"127.0.0.1", "127.1.2.3", "::1", "localhost"}) {
    EXPECT_TRUE(IsLoopback(host)) << host;
  }
  for (const char* host : {"0.0.0.0", "::", "10.0.0.1", "gpu1.lan", "127.evil"}) {
    EXPECT_FALSE(IsLoopback(host)) << host;
  }
}

}  // namespace
}  // namespace innerq
