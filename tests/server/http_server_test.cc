#include "server/http_server.h"

#include <gtest/gtest.h>

#include "server/log.h"
#include "server/service.h"
#include "tests/server/fake_model.h"
#include "tests/server/http_test_util.h"

namespace innerq {
namespace {

TEST_F(HttpServerTest, OneConnectionServesManyRequestsAlsoPipelined) {
  StartEcho();
  Client client(server_->port());
  for (int i = 0; i < 20; ++i) {
    client.Send(Post("/echo", "body" + std::to_string(i)));
    const Reply reply = client.Read();
    EXPECT_EQ(reply.status, 200);
    EXPECT_EQ(reply.body, "body" + std::to_string(i));
  }
  client.Send(Post("/echo", "one") + Get("/item/two/three") + Post("/echo", ""));
  EXPECT_EQ(client.Read().body, "one");
  EXPECT_EQ(client.Read().body, "two/three");
  EXPECT_EQ(client.Read().body, "");
  client.Send(Get("/item/x", "Connection: close\r\n"));
  EXPECT_EQ(client.Read().headers["Connection"], "close");
  EXPECT_TRUE(client.AtEnd());
}

TEST_F(HttpServerTest, RequestIdsAreEchoedOrMade) {
  StartEcho();
  EXPECT_EQ(Ask(Get("/item/x", "X-Request-Id: abc-1\r\n")).headers["X-Request-Id"], "abc-1");
  const std::string first = Ask(Get("/item/x")).headers["X-Request-Id"];
  EXPECT_FALSE(first.empty());
  EXPECT_NE(first, Ask(Get("/item/x")).headers["X-Request-Id"]);
  EXPECT_NE(Ask(Get("/item/x", "X-Request-Id: a\"b\r\n")).headers["X-Request-Id"], "a\"b");
  EXPECT_FALSE(Ask(Get("/none")).headers["X-Request-Id"].empty());
}

TEST_F(HttpServerTest, UnknownPathsAndMethodsAreTold) {
  StartEcho();
  ExpectError(Ask(Get("/none")), 404, "not_found");
  ExpectError(Ask(Get("/item/")), 404, "not_found");
  ExpectError(Ask(Post("/none", "x")), 404, "not_found");
  Reply reply = Ask(Get("/echo"));
  ExpectError(reply, 405, "method_not_allowed");
  EXPECT_EQ(reply.headers["Allow"], "POST");
  ExpectError(Ask("BREW /echo HTTP/1.1\r\nHost: x\r\n\r\n"), 405, "method_not_allowed");
  ExpectError(Ask("DELETE /echo HTTP/1.1\r\nHost: x\r\n\r\n"), 405, "method_not_allowed");
  ExpectError(Ask("OPTIONS /item/x HTTP/1.1\r\nHost: x\r\n\r\n"), 405, "method_not_allowed");
  ExpectError(Ask(Get("/" + std::string(2000, 'a'))), 414, "bad_request");
  ExpectError(Ask(Get("/" + std::string(9000, 'a'))), 414, "bad_request");
}

TEST_F(HttpServerTest, AClientThatSpeaksTlsIsToldAtOnce) {
  StartEcho();
  Client client(server_->port());
  client.Send(std::string("\x16\x03\x01\x02\x00\x01", 6));  // how a ClientHello begins
  ASSERT_TRUE(client.Readable(milliseconds(5000)));
  const Reply reply = client.Read();
  ExpectError(reply, 400, "bad_request");
  EXPECT_NE(reply.body.find("this port speaks plain HTTP"), std::string::npos) << reply.body;
}

TEST_F(HttpServerTest, MalformedRequestsGetAnErrorAndTheConnectionEnds) {
  StartEcho({.header_timeout = milliseconds(300)});
  for (const std::string request : {
           "nonsense\r\n\r\n",
           "GET /item/x HTTP/9.9\r\nHost: x\r\n\r\n",
           "GET /item/x HTTP/1.1 \r\nHost: x\r\n\r\n",
           "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
           "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: -3\r\n\r\nabc",
           "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3x\r\n\r\nabc",
           "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: "
           "chunked\r\n\r\nabc",
           "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
       }) {
    Client client(server_->port());
    client.Send(request);
    const Reply reply = client.Read();
    ExpectError(reply, 400, "bad_request");
    EXPECT_TRUE(client.AtEnd()) << request;
  }
  ExpectError(Ask("POST /echo HTTP/1.1\r\nHost: x\r\n\r\n"), 411, "bad_request");
  ExpectError(Ask("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n"), 501,
              "bad_request");
  ExpectError(Ask(Post("/echo", "x", "Content-Encoding: gzip\r\n")), 415, "bad_request");
  // A request line that never ends is not waited for.
  const auto start = steady_clock::now();
  Ask("GET /item");
  EXPECT_LT(steady_clock::now() - start, milliseconds(3000));
}

TEST_F(HttpServerTest, HeadersAreBounded) {
  StartEcho();
  std::string many;
  for (int i = 0; i < 20'000; ++i) many += "X-" + std::to_string(i) + ": y\r\n";
  ExpectError(Ask(Get("/item/x", many)), 431, "bad_request");
}

TEST_F(HttpServerTest, TooLargeBodiesAreRefusedHoweverTheyAreSent) {
  StartEcho();
  EXPECT_EQ(Ask(Post("/echo", std::string(1000, 'x'))).body.size(), 1000u);
  ExpectError(Ask(Post("/echo", std::string(1001, 'x'))), 413, "request_too_large");
  ExpectError(Ask(Post("/echo", std::string(3'000'000, 'x'))), 413, "request_too_large");
  ExpectError(Ask("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\nabc"),
              413, "request_too_large");
  std::string chunks;
  for (int i = 0; i < 100; ++i) chunks += "14\r\n" + std::string(20, 'y') + "\r\n";
  const std::string head = "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
  ExpectError(Ask(head + chunks + "0\r\n\r\n"), 413, "request_too_large");
  EXPECT_EQ(Ask(head + chunks.substr(0, 26 * 50) + "0\r\n\r\n").body, std::string(1000, 'y'));
}

TEST_F(HttpServerTest, WhatHandlersThrowStaysInside) {
  StartEcho();
  ExpectError(Ask(Get("/throw")), 500, "internal_error");
  const Reply late = Ask(Get("/throw-late"));
  EXPECT_EQ(late.status, 200);
  EXPECT_EQ(late.body, "begun");
  EXPECT_FALSE(late.complete);
  EXPECT_EQ(Ask(Get("/item/x")).body, "x");
}

TEST_F(HttpServerTest, AHandlerSeesThatItsClientHasGone) {
  StartEcho();
  Client client(server_->port());
  client.Send(Get("/wait"));
  ASSERT_TRUE(Eventually([&] { return waiting_ == 1; }));
  EXPECT_EQ(server_->active_requests(), 1);
  client.Close();
  EXPECT_TRUE(Eventually([&] { return waiting_ == 0; }));
  EXPECT_TRUE(server_->WaitUntilIdle(milliseconds(5000)));
}

TEST_F(HttpServerTest, AClientThatLeavesOrDoesNotReadEndsItsStream) {
  StartEcho({.write_timeout = milliseconds(200)});
  Client leaver(server_->port());
  leaver.Send(Get("/flood"));
  ASSERT_TRUE(leaver.ReadUntil("xxx"));
  leaver.Close();
  EXPECT_TRUE(Eventually([&] { return floods_ended_ == 1; }));
  Client sleeper(server_->port(), 4096);
  sleeper.Send(Get("/flood"));
  EXPECT_TRUE(Eventually([&] { return floods_ended_ == 2; }));
}

TEST_F(HttpServerTest, OldClientsGetAStreamThatEndsWithTheConnection) {
  Start({}, {{"GET", "/s", [](const HttpRequest&) {
                return HttpResponse{.stream = [](HttpWriter& out) { out.Write("text"); }};
              }}});
  const Reply reply = Ask("GET /s HTTP/1.0\r\n\r\n");
  EXPECT_FALSE(reply.headers.contains("Transfer-Encoding"));
  EXPECT_EQ(reply.body, "text");
}

TEST_F(HttpServerTest, ConnectionsBeyondTheLimitAreToldSo) {
  StartEcho({.max_connections = 2});
  Client first(server_->port()), second(server_->port());
  first.Send(Get("/wait"));
  second.Send(Get("/wait"));
  ASSERT_TRUE(Eventually([&] { return waiting_ == 2; }));
  const Reply reply = Ask(Post("/echo", "x"));
  ExpectError(reply, 503, "server_is_overloaded");
  EXPECT_EQ(reply.headers.at("Retry-After"), "1");
  released_ = true;
  EXPECT_EQ(first.Read().body, "waited");
  EXPECT_EQ(second.Read().body, "waited");
  first.Close();
  EXPECT_TRUE(Eventually([&] { return Ask(Post("/echo", "x")).status == 200; }));
}

TEST_F(HttpServerTest, DestructionEndsIdleAndBusyConnections) {
  StartEcho();
  Client idle(server_->port()), busy(server_->port());
  idle.Send(Get("/item/x"));
  EXPECT_EQ(idle.Read().body, "x");
  busy.Send(Get("/wait"));
  ASSERT_TRUE(Eventually([&] { return waiting_ == 1; }));
  EXPECT_FALSE(server_->WaitUntilIdle(milliseconds(10)));
  const auto start = steady_clock::now();
  server_.reset();
  EXPECT_LT(steady_clock::now() - start, milliseconds(1000));
  EXPECT_TRUE(idle.AtEnd());
}

TEST_F(HttpServerTest, WhileItClosesAnAnswerIsTheLastOfItsConnection) {
  StartEcho();
  Client old(server_->port());
  old.Send(Get("/item/1"));
  EXPECT_EQ(old.Read().headers["Connection"], "keep-alive");
  server_->BeginToClose();
  Client fresh(server_->port());
  for (Client* client : {&old, &fresh}) {
    client->Send(Post("/echo", "x"));
    Reply reply = client->Read();
    EXPECT_EQ(reply.body, "x");
    EXPECT_EQ(reply.headers["Connection"], "close");
    EXPECT_TRUE(client->AtEnd());
  }
}

TEST_F(HttpServerTest, WhenItStopsReadingOnlyWholeRequestsAreAnswered) {
  StartEcho();
  Client idle(server_->port()), busy(server_->port());
  Client half_head(server_->port()), half_body(server_->port());
  idle.Send(Get("/item/x"));
  EXPECT_EQ(idle.Read().body, "x");
  busy.Send(Get("/wait"));
  half_head.Send("GET /item/x HTTP/1.1\r\nHo");
  half_body.Send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf");
  ASSERT_TRUE(Eventually([&] { return server_->active_requests() == 3 && waiting_ == 1; }));
  server_->StopReading();
  for (Client* client : {&half_head, &half_body}) {
    Reply reply = client->Read();
    ExpectError(reply, 503, "server_is_overloaded");
    EXPECT_EQ(reply.headers["Retry-After"], "1");
    EXPECT_TRUE(client->AtEnd());
  }
  EXPECT_TRUE(idle.AtEnd());
  EXPECT_TRUE(Eventually([&] { return server_->active_requests() == 1; }));
  EXPECT_EQ(waiting_, 1);  // its client has not gone
  released_ = true;
  EXPECT_EQ(busy.Read().body, "waited");
  EXPECT_TRUE(server_->WaitUntilIdle(milliseconds(5000)));
}

TEST_F(HttpServerTest, EveryRequestIsCountedWhenItEnds) {
  StartEcho();
  Ask(Get("/item/x"));
  Ask(Get("/none"));
  Ask("nonsense\r\n\r\n");
  EXPECT_TRUE(Eventually([&] { return server_->ended_requests() == 3; }));
}

TEST_F(HttpServerTest, APortInUseIsAnErrorThatNamesIt) {
  StartEcho();
  const auto second = HttpServer::Start({.port = server_->port()}, {});
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.error().code, ErrorCode::kUnavailable);
  EXPECT_NE(second.error().message.find(std::to_string(server_->port())), std::string::npos);
  EXPECT_FALSE(HttpServer::Start({.host = "no.such.host.invalid"}, {}).ok());
}

// The whole service over a scripted model.
class ServiceTest : public HttpServerTest {
 protected:
  void StartService(std::unique_ptr<Engine> engine) {
    service_ = std::make_unique<Service>("1.2.3", &access_);
    Start({.on_answer = LogAnswer}, service_->Routes());
    if (engine) Open(std::move(engine));
  }
  void Open(std::unique_ptr<Engine> engine) {
    service_->Open({.model = {.id = "m",
                              .created = 1,
                              .tokenizer = std::make_shared<ByteTokenizer>(),
                              .chat_template = std::make_shared<PlainTemplate>(),
                              .stop_token_ids = {kFakeEos}},
                    .cache = {},
                    .engine = std::move(engine)});
  }
  static std::string Completion(int max_tokens, bool stream) {
    return Post("/v1/completions", json{{"model", "m"},
                                        {"prompt", "a"},
                                        {"max_tokens", max_tokens},
                                        {"temperature", 0},
                                        {"ignore_eos", true},
                                        {"stream", stream}}
                                       .dump());
  }
  bool Settled() {
    return Eventually([&] {
      const EngineStats stats = service_->engine()->Stats();
      return stats.accepted == stats.finished && stats.running == 0 && stats.waiting == 0;
    });
  }
  Access access_;
  std::unique_ptr<Service> service_;
};

TEST_F(ServiceTest, IsAliveButNotReadyWhileLoading) {
  StartService(nullptr);
  EXPECT_EQ(Ask(Get("/health")).status, 200);
  EXPECT_EQ(Ask(Get("/version")).body, R"({"version": "1.2.3"})");
  for (const char* path : {"/ready", "/metrics", "/v1/models"}) {
    ExpectError(Ask(Get(path)), 503, "server_is_overloaded");
  }
  ExpectError(Ask(Completion(1, false)), 503, "server_is_overloaded");
  Open(ScriptedEngine());
  EXPECT_EQ(Ask(Get("/ready")).status, 200);
  EXPECT_EQ(json::parse(Ask(Get("/v1/models")).body)["data"][0]["id"], "m");
  EXPECT_EQ(Ask(Get("/v1/models/m")).status, 200);
  ExpectError(Ask(Get("/v1/models/none/x")), 404, "model_not_found");
  EXPECT_EQ(json::parse(Ask(Completion(3, false)).body)["choices"][0]["text"], "bcd");
}

TEST_F(ServiceTest, NoRouteIgnoresAQuery) {
  StartService(ScriptedEngine());
  for (const HttpRoute& route : service_->Routes()) {
    const std::string path = route.path.ends_with('*') ? "/v1/models/m" : route.path;
    for (const char* query : {"?a%20b=1&c", "?a%20b"}) {
      const Reply reply = Ask(route.method == "GET" ? Get(path + query) : Post(path + query, "{}"));
      ExpectError(reply, 400, "unsupported_parameter");
      EXPECT_EQ(json::parse(reply.body)["error"]["param"], "a b") << path;
    }
  }
  EXPECT_EQ(Ask(Get("/health?")).status, 200);
}

TEST_F(ServiceTest, AStreamArrivesWhole) {
  StartService(ScriptedEngine());
  const Reply reply = Ask(Completion(300, true));
  EXPECT_TRUE(reply.complete);
  EXPECT_EQ(reply.headers.at("Content-Type"), "text/event-stream");
  EXPECT_TRUE(reply.body.ends_with("data: [DONE]\n\n"));
}

TEST_F(ServiceTest, WhatIsThrownInsideIsLoggedAndNotTold) {
  ConfigureLog({.level = "error", .json = false});
  StartService(ScriptedEngine());
  const auto ask = [this](const char* prompt, bool stream) {
    testing::internal::CaptureStderr();
    const Reply reply = Ask(Post(
        "/v1/completions",
        json{{"model", "m"}, {"prompt", prompt}, {"temperature", 0}, {"stream", stream}}.dump(),
        "X-Request-Id: r7\r\n"));
    EXPECT_EQ(reply.body.find("secret"), std::string::npos);
    return testing::internal::GetCapturedStderr();
  };
  const auto logged = [](const std::string& text, const char* cause) {
    return text.find("r7") != std::string::npos && text.find(cause) != std::string::npos;
  };
  EXPECT_TRUE(logged(ask("throw", false), "secret of the tokenizer"));
  EXPECT_TRUE(logged(ask("|", true), "secret of the detokenizer"));
}

TEST_F(ServiceTest, EveryUseOfTheModelIsOneLineOfTheLogWithItsId) {
  ConfigureLog({.level = "info", .json = true});
  StartService(ScriptedEngine());
  const auto lines = [this](const std::string& request) {
    testing::internal::CaptureStderr();
    Ask(request);
    EXPECT_TRUE(server_->WaitUntilIdle(milliseconds(5000)));
    return testing::internal::GetCapturedStderr();
  };
  const auto message = [&](const std::string& request) {
    return json::parse(lines(request))["message"].get<std::string>();  // throws if there are two
  };
  for (const bool stream : {false, true}) {
    std::string request = Completion(3, stream);
    request.insert(request.find("Content-Length"), "X-Request-Id: r8\r\n");
    const std::string line = message(request);
    EXPECT_TRUE(line.starts_with("request r8: POST /v1/completions 200 in ")) << line;
    EXPECT_TRUE(line.ends_with(" ms, 2 prompt and 3 completion tokens, length")) << line;
  }
  EXPECT_EQ(lines(Get("/health")), "");
  // What a client makes up cannot look like a line of ours.
  EXPECT_NE(message(Get("/none", "X-Request-Id: r9\", \"level\": \"error\r\n")).find("req-"),
            std::string::npos);
  EXPECT_EQ(message(Get("/none%22%5c")).find("%"), std::string::npos);
}

TEST_F(ServiceTest, KeysAreAskedForWhereTheModelIsUsed) {
  Access access({"k"});
  Service service("1", &access);
  Start({}, service.Routes());
  ExpectError(Ask(Completion(1, false)), 401, "invalid_api_key");  // also while loading
  EXPECT_EQ(Ask(Get("/health")).status, 200);
  EXPECT_EQ(Ask(Get("/version")).status, 200);
  server_.reset();
}

TEST(ClientUrl, IsAnAddressThatAClientHereCanUse) {
  EXPECT_EQ(ClientUrl("127.0.0.1", 80), "http://127.0.0.1:80");
  EXPECT_EQ(ClientUrl("gpu1.lan", 8080), "http://gpu1.lan:8080");
  EXPECT_EQ(ClientUrl("0.0.0.0", 80), "http://127.0.0.1:80");
  EXPECT_EQ(ClientUrl("::", 80), "http://[::1]:80");
  EXPECT_EQ(ClientUrl("fe80::1", 80), "http://[fe80::1]:80");
}

TEST_F(ServiceTest, ClientsThatLeaveCancelTheirRequestsAndNothingLeaks) {
  StartService(ScriptedEngine(milliseconds(1)));
  for (int round = 0; round < 8; ++round) {
    Client streaming(server_->port()), waiting(server_->port());
    streaming.Send(Completion(1000, true));
    waiting.Send(Completion(1000, false));
    ASSERT_TRUE(streaming.ReadUntil("data: "));
  }
  EXPECT_TRUE(Settled());
  const EngineStats stats = service_->engine()->Stats();
  EXPECT_GE(stats.accepted, 8);
  EXPECT_EQ(stats.finished_by_reason.at(FinishReason::kCancelled), stats.accepted);
  EXPECT_EQ(stats.open_pages_used, 0);
  EXPECT_TRUE(server_->WaitUntilIdle(milliseconds(5000)));
}

TEST_F(ServiceTest, DrainingFinishesStreamsAndRefusesTheRest) {
  StartService(ScriptedEngine(milliseconds(1)));
  Client client(server_->port());
  client.Send(Completion(300, true));
  ASSERT_TRUE(client.ReadUntil("data: "));
  std::thread drain([&] { EXPECT_TRUE(service_->engine()->Drain(milliseconds(8000))); });
  EXPECT_TRUE(Eventually([&] { return Ask(Get("/ready")).status == 503; }));
  EXPECT_EQ(Ask(Get("/health")).status, 200);
  const Reply refused = Ask(Completion(1, false));
  ExpectError(refused, 503, "server_is_overloaded");
  EXPECT_GE(std::stoi(refused.headers.at("Retry-After")), 1);
  const Reply reply = client.Read();
  EXPECT_TRUE(reply.complete);
  EXPECT_TRUE(reply.body.ends_with("data: [DONE]\n\n"));
  drain.join();
  EXPECT_TRUE(server_->WaitUntilIdle(milliseconds(5000)));
}

}  // namespace
}  // namespace innerq
