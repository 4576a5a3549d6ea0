#include "server/service.h"

#include <gtest/gtest.h>

#include "tests/server/fake_model.h"

namespace innerq {
namespace {

// Asks as the HTTP server does; the status of the answer.
int StatusOf(const std::vector<HttpRoute>& routes, const std::string& path,
             const std::string& key) {
  for (const HttpRoute& route : routes) {
    if (route.path != path) continue;
    const HttpRequest request{.method = route.method,
                              .path = path,
                              .parameter = "",
                              .body = "",
                              .id = "test",
                              .authorization = "",
                              .api_key = key,
                              .client_gone = [] { return false; }};
    const HttpAdmission admission = route.admit(request);
    return admission.refusal ? admission.refusal->status : route.handle(request).status;
  }
  ADD_FAILURE() << path;
  return 0;
}

TEST(Service, RequestsThatComeWhileItLoadsDoNotCount) {
  Access access({"secret"}, {.requests_per_minute = 2});
  Service service("1", &access);
  const std::vector<HttpRoute> routes = service.Routes();
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(StatusOf(routes, "/props", "secret"), 503);
    EXPECT_EQ(StatusOf(routes, "/props", "wrong"), 401) << "strangers learn nothing";
  }
  service.Open({.model = {.id = "m",
                          .created = 1,
                          .tokenizer = std::make_shared<ByteTokenizer>(),
                          .chat_template = std::make_shared<PlainTemplate>(),
                          .stop_token_ids = {kFakeEos}},
                .cache = {},
                .engine = ScriptedEngine()});
  EXPECT_EQ(StatusOf(routes, "/props", "secret"), 200);
  EXPECT_EQ(StatusOf(routes, "/props", "secret"), 200);
  EXPECT_EQ(StatusOf(routes, "/props", "secret"), 429);
}

}  // namespace
}  // namespace innerq
