// The HTTP server before clients that are slow, malformed, half-closed, or in a browser.
#include <gtest/gtest.h>

#include <algorithm>

#include "server/access.h"
#include "tests/server/http_test_util.h"

namespace innerq {
namespace {

class HttpClientsTest : public HttpServerTest {};

const std::string kChunked = "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";

// Sends a request a few bytes at a time until the server ends the connection; how long it took.
milliseconds Drip(Client& client, const std::string& begin, const std::string& drop) {
  const auto start = steady_clock::now();
  client.Send(begin);
  for (int i = 0; i < 500 && !client.Readable(milliseconds(20)); ++i) client.Send(drop);
  return std::chrono::duration_cast<milliseconds>(steady_clock::now() - start);
}

TEST_F(HttpClientsTest, HeadersThatTrickleInAreCutOff) {
  StartEcho({.header_timeout = milliseconds(200)});
  for (const char* begin : {"GET /item/x HTTP/1.1\r\nX: ", "G"}) {
    Client client(server_->port());
    const milliseconds took = Drip(client, begin, "a");
    EXPECT_GE(took, milliseconds(150));
    EXPECT_LT(took, milliseconds(5000));
    ExpectError(client.Read(), 408, "request_timeout");
    EXPECT_TRUE(client.AtEnd());
  }
}

TEST_F(HttpClientsTest, BodiesThatStallOrTrickleInAreCutOff) {
  StartEcho({.read_timeout = milliseconds(200)});
  for (const std::string& head :
       {std::string("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n"), kChunked}) {
    Client stalled(server_->port()), dripping(server_->port());
    stalled.Send(head);
    ExpectError(stalled.Read(), 408, "request_timeout");
    EXPECT_TRUE(stalled.AtEnd());
    EXPECT_LT(Drip(dripping, head, "1"), milliseconds(5000));
    dripping.Read();  // 408; 400 for a chunk size of too many digits
    EXPECT_TRUE(dripping.AtEnd());
  }
}

TEST_F(HttpClientsTest, AnswersThatAreReadInATrickleAreCutOff) {
  StartEcho({.write_timeout = milliseconds(200)});
  Client client(server_->port(), 4096);
  client.Send(Get("/flood"));
  EXPECT_TRUE(Eventually([&] {
    client.Fill(16);
    return floods_ended_ == 1;
  }));
}

TEST_F(HttpClientsTest, AnIdleConnectionIsClosedWithoutAWord) {
  StartEcho({.keep_alive_timeout = milliseconds(100)});
  Client fresh(server_->port()), used(server_->port()), empty(server_->port());
  used.Send(Get("/item/x"));
  EXPECT_EQ(used.Read().body, "x");
  EXPECT_TRUE(fresh.AtEnd());
  EXPECT_TRUE(used.AtEnd());
  EXPECT_LT(Drip(empty, "", "\r\n"), milliseconds(5000));  // empty lines are no request
  EXPECT_TRUE(empty.AtEnd());
}

TEST_F(HttpClientsTest, AHalfClosedClientGetsWhatCanBeAnsweredAtOnce) {
  StartEcho();
  const std::string body(1000, 'b');
  for (const std::string& request :
       {Post("/echo", body), "POST /echo HTTP/1.0\r\nContent-Length: 1000\r\n\r\n" + body}) {
    Client client(server_->port());
    client.Send(request);
    client.CloseSending();
    EXPECT_EQ(client.Read().body, body);
    EXPECT_TRUE(client.AtEnd());
  }
  Client pipelined(server_->port());
  pipelined.Send(Get("/item/1") + Get("/item/2") + "GET /item/3 HT");
  pipelined.CloseSending();
  EXPECT_EQ(pipelined.Read().body, "1");
  EXPECT_EQ(pipelined.Read().body, "2");
  EXPECT_TRUE(pipelined.AtEnd());  // the third never came whole
  // Whoever waits long for such a client sees it as gone.
  Client waiting(server_->port());
  waiting.Send(Get("/wait"));
  waiting.CloseSending();
  EXPECT_EQ(waiting.Read().body, "waited");
  Client half_body(server_->port());
  half_body.Send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf");
  half_body.CloseSending();
  ExpectError(half_body.Read(), 400, "bad_request");
}

TEST_F(HttpClientsTest, MalformedChunksEndTheConnection) {
  StartEcho();
  for (const char* body :
       {"5\r\nhello", "5\r\nhelloX\r\n0\r\n\r\n", "5\r\nhello\n0\r\n\r\n", "5\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n", "0x5\r\nhello\r\n0\r\n\r\n", "\r\n", " \r\n",
        "ffffffffffffffffffff\r\n", "5\r\nhello\r\n\r\n", " 5\r\nhello\r\n0\r\n\r\n",
        "5;a\n1\r\nhello\r\n0\r\n\r\n", "0\r\nnot a field\r\n\r\n", "0\r\nX: a\nb\r\n\r\n",
        "0\r\nX: y\r\n folded\r\n\r\n"}) {
    Client client(server_->port());
    client.Send(kChunked + body);
    client.CloseSending();
    ExpectError(client.Read(), 400, "bad_request");
    EXPECT_TRUE(client.AtEnd()) << body;
  }
  ExpectError(Ask(kChunked + "7fffffffffffffff\r\nx"), 413, "request_too_large");
  ExpectError(Ask(kChunked + "5" + std::string(300, ';') + "\r\nhello\r\n0\r\n\r\n"), 400,
              "bad_request");
  std::string trailers;
  for (int i = 0; i < 40; ++i) trailers += "X: y\r\n";
  ExpectError(Ask(kChunked + "0\r\n" + trailers + "\r\n"), 400, "bad_request");
}

TEST_F(HttpClientsTest, ChunksMayHaveExtensionsAndTrailersAndComeInAnyPieces) {
  StartEcho();
  const std::string request =
      kChunked + "5;a=b\r\nhello\r\n1 \r\n \r\n05\r\nworld\r\n0\r\nX-Sum: 1\r\n\r\n";
  Client client(server_->port());
  client.Send(request + request + Get("/item/next"));
  EXPECT_EQ(client.Read().body, "hello world");
  EXPECT_EQ(client.Read().body, "hello world");
  EXPECT_EQ(client.Read().body, "next");
  for (const char byte : request) client.Send({&byte, 1});
  EXPECT_EQ(client.Read().body, "hello world");
}

TEST_F(HttpClientsTest, WhatIsNotHttpIsToldSoAtOnce) {
  StartEcho();
  for (const std::string& request :
       {std::string("GET / HTTP/1.1\n\n"), std::string("GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n", 28),
        std::string("\x16\x03\x01\x02\x00\x01\n\r\n", 9), std::string("GET /item/x\r\n\r\n"),
        std::string("GET /item/%zz HTTP/1.1\r\nHost: x\r\n\r\n"),
        std::string("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        std::string("CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n")}) {
    Client client(server_->port());
    client.Send(request);
    ExpectError(client.Read(), 400, "bad_request");
    EXPECT_TRUE(client.AtEnd()) << request;
  }
  std::string many;
  for (int i = 0; i < 200; ++i) many += "X: y\r\n";
  ExpectError(Ask(Get("/item/x", many)), 431, "bad_request");
  ExpectError(Ask(Get("/item/x", "X: " + std::string(70'000, 'y') + "\r\n")), 431, "bad_request");
}

TEST_F(HttpClientsTest, TheHeaderLimitIsTheConfiguredOne) {
  StartEcho({.max_header_bytes = 1024});
  const auto padded = [](size_t size) {
    const std::string bare = Get("/item/x", "X: \r\n");
    return Get("/item/x", "X: " + std::string(size - bare.size(), 'y') + "\r\n");
  };
  EXPECT_EQ(Ask(padded(1024)).status, 200);
  ExpectError(Ask(padded(1025)), 431, "bad_request");
}

TEST_F(HttpClientsTest, EmptyLinesBeforeARequestAndAbsoluteTargetsAreFine) {
  StartEcho();
  Client client(server_->port());
  client.Send("\r\n\r\n" + Get("/item/1") + "\r\n" + Get("http://x/item/2"));
  EXPECT_EQ(client.Read().body, "1");
  EXPECT_EQ(client.Read().body, "2");
}

TEST_F(HttpClientsTest, HeadIsGetWithoutABody) {
  StartEcho();
  Client client(server_->port());
  client.Send("HEAD /item/four HTTP/1.1\r\nHost: x\r\n\r\n");
  ASSERT_TRUE(client.ReadUntil("\r\n\r\n"));
  const std::string head = client.Take();
  EXPECT_TRUE(head.starts_with("HTTP/1.1 200 OK\r\n")) << head;
  EXPECT_NE(head.find("Content-Length: 4\r\n"), std::string::npos) << head;
  EXPECT_TRUE(head.ends_with("\r\n\r\n")) << head;
  client.Send(Get("/item/x"));
  EXPECT_EQ(client.Read().body, "x");
  ExpectError(Ask("PUT /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"), 405,
              "method_not_allowed");
}

TEST_F(HttpClientsTest, ContinueIsSaidOnlyToRequestsThatWillBeAnswered) {
  StartEcho();
  const auto expect = [](const std::string& path, int length) {
    return "POST " + path + " HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: " +
           std::to_string(length) + "\r\n\r\n";
  };
  Client client(server_->port());
  client.Send(expect("/echo", 2));
  ASSERT_TRUE(client.ReadUntil("\r\n\r\n"));
  EXPECT_EQ(client.Take(), "HTTP/1.1 100 Continue\r\n\r\n");
  client.Send("ab");
  EXPECT_EQ(client.Read().body, "ab");
  ExpectError(Ask(expect("/echo", 2000)), 413, "request_too_large");
  ExpectError(Ask(expect("/none", 2)), 404, "not_found");
}

TEST_F(HttpClientsTest, BodiesAreJsonHoweverCurlCallsThem) {
  StartEcho();
  const auto ask = [this](const std::string& type) {
    return Ask("POST /echo HTTP/1.1\r\nHost: x\r\n" + type + "Content-Length: 2\r\n\r\n{}");
  };
  for (const char* type :
       {"", "Content-Type: application/json\r\n", "Content-Type: Application/JSON; charset=x\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\n",
        "Content-Type: application/vnd.api+json\r\n"}) {
    EXPECT_EQ(ask(type).body, "{}") << type;
  }
  for (const char* type : {"text/plain", "multipart/form-data; boundary=x", "application/xml"}) {
    ExpectError(ask(std::string("Content-Type: ") + type + "\r\n"), 415, "bad_request");
  }
}

TEST_F(HttpClientsTest, BrowsersAreAnsweredByOrigin) {
  StartEcho({.origins = {.cors_origins = {"https://a.example"}}});
  const std::string ours = "Origin: https://a.example\r\n";
  const std::string preflight =
      "OPTIONS /echo HTTP/1.1\r\nHost: x\r\nAccess-Control-Request-Method: POST\r\n"
      "Access-Control-Request-Headers: authorization,x-stainless-os\r\n";
  Client client(server_->port());
  client.Send(preflight + ours + "\r\n");
  Reply reply = client.Read();
  EXPECT_EQ(reply.status, 204);
  EXPECT_FALSE(reply.headers.contains("Content-Length"));
  EXPECT_EQ(reply.headers.at("Access-Control-Allow-Origin"), "https://a.example");
  EXPECT_EQ(reply.headers.at("Access-Control-Allow-Methods"), "POST");
  EXPECT_EQ(reply.headers.at("Access-Control-Allow-Headers"), "authorization,x-stainless-os");
  client.Send(Post("/echo", "x", ours));  // on the same connection
  EXPECT_EQ(client.Read().body, "x");
  reply = Ask(Get("/none", ours));  // errors are readable as well
  EXPECT_EQ(reply.status, 404);
  EXPECT_EQ(reply.headers.at("Access-Control-Allow-Origin"), "https://a.example");
  EXPECT_EQ(reply.headers.at("Vary"), "Origin");
  const std::string theirs = "Origin: https://evil.example\r\n";
  ExpectError(Ask(preflight + theirs + "\r\n"), 403, "origin_not_allowed");
  reply = Ask(Post("/echo", "x", theirs));
  ExpectError(reply, 403, "origin_not_allowed");
  EXPECT_FALSE(reply.headers.contains("Access-Control-Allow-Origin"));
  EXPECT_EQ(Ask(Post("/echo", "x")).body, "x");
  ExpectError(Ask("OPTIONS /echo HTTP/1.1\r\nHost: x\r\n\r\n"), 405, "method_not_allowed");
}

TEST_F(HttpClientsTest, ForeignHostNamesAreRefused) {
  StartEcho({.origins = {.allowed_hosts = {"x"}}});
  EXPECT_EQ(Ask(Get("/item/y")).body, "y");  // Host: x
  EXPECT_EQ(Ask("GET /item/y HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n").body, "y");
  ExpectError(Ask("GET /item/y HTTP/1.1\r\nHost: evil.example\r\n\r\n"), 403, "host_not_allowed");
}

// A route that asks for a key, which allows one request at a time.
class KeyedRouteTest : public HttpServerTest {
 protected:
  void StartKeyed(HttpServerOptions options = {}) {
    options.on_answer = [this](const HttpExchange& exchange) {
      const std::lock_guard lock(mutex_);
      log_.push_back(exchange);
    };
    const auto admit = [this](const HttpRequest& request) {
      EXPECT_EQ(request.body, "");
      return access_.Admit(request, steady_clock::now());
    };
    Start(options, {{"POST", "/keyed",
                     [](const HttpRequest& request) -> HttpResponse {
                       if (request.body == "throw") throw std::runtime_error("x");
                       request.notes->prompt_tokens = 3;
                       if (request.body != "flood") return {.body = "done"};
                       return {.stream = [](HttpWriter& out) {
                         while (out.Write("flood")) {
                         }
                       }};
                     },
                     admit}});
  }
  // Whether an answer of this status has been reported.
  bool Reported(int status) {
    const std::lock_guard lock(mutex_);
    return std::any_of(log_.begin(), log_.end(), [status](const HttpExchange& exchange) {
      return exchange.status == status;
    });
  }
  std::vector<HttpExchange> TakeLog(size_t size) {
    EXPECT_TRUE(Eventually([&] {
      const std::lock_guard lock(mutex_);
      return log_.size() >= size;
    }));
    const std::lock_guard lock(mutex_);
    return std::exchange(log_, {});
  }

  const std::string key_ = "X-Api-Key: k\r\n";
  Access access_{{"k"}, {.concurrent_requests = 1}};
  std::mutex mutex_;
  std::vector<HttpExchange> log_;  // guarded by mutex_
};

TEST_F(KeyedRouteTest, KeysAreCheckedBeforeTheBodyIsRead) {
  StartKeyed();
  // The body never comes, and nobody waits for it.
  ExpectError(Ask("POST /keyed HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"), 401,
              "invalid_api_key");
  ExpectError(Ask(Post("/keyed", "x", "Authorization: Bearer no\r\n")), 401, "invalid_api_key");
  EXPECT_EQ(Ask(Post("/keyed", "x", "Authorization: Bearer k\r\n")).body, "done");
}

TEST_F(KeyedRouteTest, PlacesComeBackHoweverARequestEnds) {
  StartKeyed({.read_timeout = milliseconds(100), .write_timeout = milliseconds(100)});
  const std::string ask = Post("/keyed", "x", key_);
  const auto free = [&] { return Ask(ask).status == 200; };
  Client flooded(server_->port());
  flooded.Send(Post("/keyed", "flood", key_));
  ASSERT_TRUE(flooded.ReadUntil("flood"));
  const Reply refused = Ask(ask);
  ExpectError(refused, 429, "rate_limit_exceeded");
  EXPECT_EQ(refused.headers.at("Retry-After"), "1");
  flooded.Close();
  EXPECT_TRUE(Eventually(free));
  ExpectError(Ask(Post("/keyed", "throw", key_)), 500, "internal_error");
  EXPECT_TRUE(Eventually(free));
  const std::string endless = "POST /keyed HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n" + key_;
  ExpectError(Ask(endless + "\r\n"), 408, "request_timeout");
  EXPECT_TRUE(Eventually(free));
  {
    Client leaver(server_->port());
    leaver.Send(endless + "Expect: 100-continue\r\n\r\nhalf");
    ASSERT_TRUE(leaver.ReadUntil("100 Continue"));  // it has its place
  }
  EXPECT_TRUE(Eventually([&] { return Reported(400); }));
  EXPECT_TRUE(Eventually(free));
  Client sleeper(server_->port(), 4096);
  sleeper.Send(Post("/keyed", "flood", key_));
  ASSERT_TRUE(sleeper.ReadUntil("flood"));
  EXPECT_TRUE(Eventually(free));
  // Whoever has read an answer finds the place free, on the same connection and on others.
  Client busy(server_->port());
  for (int i = 0; i < 20; ++i) {
    busy.Send(ask);
    EXPECT_EQ(busy.Read().body, "done");
    EXPECT_EQ(Ask(ask).body, "done");
  }
}

TEST_F(KeyedRouteTest, EveryAnswerIsReportedOnce) {
  StartKeyed();
  // Each has a connection and so a thread of its own: their reports are in order if each is
  // awaited.
  std::vector<HttpExchange> log;
  for (const std::string& request :
       {Post("/keyed", "x", key_ + "X-Request-Id: first\r\n"),
        Post("/keyed", "x", "X-Request-Id: second\r\n"), Get("/a%20b", "X-Request-Id: third\r\n"),
        std::string("nonsense\r\n\r\n")}) {
    Ask(request);
    for (HttpExchange& exchange : TakeLog(1)) log.push_back(std::move(exchange));
  }
  ASSERT_EQ(log.size(), 4u);
  EXPECT_EQ(log[0].id, "first");
  EXPECT_EQ(log[0].method + log[0].path, "POST/keyed");
  EXPECT_EQ(log[0].status, 200);
  EXPECT_EQ(log[0].notes.prompt_tokens, 3);
  EXPECT_GT(log[0].duration.count(), 0);
  EXPECT_EQ(log[1].id, "second");
  EXPECT_EQ(log[1].status, 401);
  EXPECT_EQ(log[1].notes.prompt_tokens, 0);
  EXPECT_EQ(log[2].path, "/a b");
  EXPECT_EQ(log[2].status, 404);
  EXPECT_EQ(log[3].status, 400);
  EXPECT_EQ(log[3].path, "");
  EXPECT_TRUE(log[3].id.starts_with("req-"));
}

}  // namespace
}  // namespace innerq
