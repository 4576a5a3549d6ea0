#include "server/http_head.h"

#include <gtest/gtest.h>

namespace innerq {
namespace {

HttpHead Parsed(const std::string& text) {
  auto parsed = ParseHttpHead(text);
  const auto* fault = std::get_if<HttpFault>(&parsed);
  EXPECT_EQ(fault, nullptr) << text << ": " << (fault != nullptr ? fault->message : "");
  return fault != nullptr ? HttpHead() : std::get<HttpHead>(std::move(parsed));
}

// The status of the fault; 0 if there is none.
int Fault(const std::string& text) {
  const auto parsed = ParseHttpHead(text);
  const auto* fault = std::get_if<HttpFault>(&parsed);
  return fault != nullptr ? fault->status : 0;
}

std::string WithLine(const std::string& line) { return line + "\r\nHost: x\r\n\r\n"; }
std::string WithField(const std::string& field) {
  return "POST / HTTP/1.1\r\nHost: x\r\n" + field + "\r\n\r\n";
}

TEST(HttpHead, HasMethodPathAndFields) {
  const HttpHead head = Parsed(
      "POST /a%20b/c%2Fd?q=%00 HTTP/1.1\r\nhost: x\r\nX-Empty:\r\nX-Two: \t one \t\r\nx-two: b\r\n"
      "Content-Length: 007\r\n\r\n");
  EXPECT_EQ(head.method, "POST");
  EXPECT_EQ(head.path, "/a b/c/d");
  EXPECT_EQ(head.query, "q=%00");
  EXPECT_EQ(head.Get("HOST"), "x");
  EXPECT_EQ(head.Get("X-Two"), "one");
  EXPECT_EQ(head.Get("X-Empty"), "");
  EXPECT_EQ(head.Get("X"), "");
  EXPECT_EQ(head.content_length, 7);
  EXPECT_TRUE(head.has_body() && head.keep_alive() && !head.chunked && !head.http_1_0);
}

TEST(HttpHead, KnowsAbsoluteTargets) {
  EXPECT_EQ(Parsed(WithLine("GET http://x:80/v1/models HTTP/1.1")).path, "/v1/models");
  EXPECT_EQ(Parsed(WithLine("GET HTTPS://x/?a HTTP/1.1")).path, "/");
  for (const char* target : {"http://x", "ftp://x/", "x", "*", "x:443", "http:/x"}) {
    EXPECT_EQ(Fault(WithLine(std::string("GET ") + target + " HTTP/1.1")), 400) << target;
  }
}

TEST(HttpHead, NamesTheFirstParameterOfItsQuery) {
  const auto first = [](const char* target) {
    return Parsed(WithLine(std::string("GET ") + target + " HTTP/1.1")).FirstParameter();
  };
  EXPECT_EQ(first("/x"), "");
  EXPECT_EQ(first("/x?"), "");
  EXPECT_EQ(first("/x?limit=2&after=y"), "limit");
  EXPECT_EQ(first("/x?a%20b"), "a b");
  EXPECT_EQ(first("/x?a&b"), "a");
  EXPECT_EQ(first("/x?%zz=1"), "%zz");
  EXPECT_EQ(first("http://x/?y=/?z"), "y");
}

TEST(HttpHead, RefusesRequestLinesThatAreNone) {
  for (const char* line : {"",
                           "GET",
                           "GET /",
                           "GET / HTTP/1.2",
                           "GET / HTTP/2",
                           "GET / http/1.1",
                           "GET  / HTTP/1.1",
                           "GET /  HTTP/1.1",
                           " GET / HTTP/1.1",
                           "GET / HTTP/1.1 ",
                           "G(T / HTTP/1.1",
                           "GET /a b HTTP/1.1",
                           "GET\t/ HTTP/1.1",
                           "GET /\x01 HTTP/1.1",
                           "GET /\xc3\xa9 HTTP/1.1",
                           "GET /% HTTP/1.1",
                           "GET /%4 HTTP/1.1",
                           "GET /%zz HTTP/1.1",
                           "GET /%+1 HTTP/1.1",
                           "GET /%00 HTTP/1.1",
                           "GET /%0d%0aX HTTP/1.1",
                           "GET /%7f HTTP/1.1"}) {
    EXPECT_EQ(Fault(WithLine(line)), 400) << line;
  }
  EXPECT_EQ(Fault(WithLine("GET /" + std::string(1024, 'a') + " HTTP/1.1")), 414);
}

TEST(HttpHead, RefusesWhatTwoReadersMayReadInTwoWays) {
  for (const char* field : {"Content-Length: 3\r\nContent-Length: 3",
                            "Content-Length: 3, 3",
                            "Content-Length: +3",
                            "Content-Length: -3",
                            "Content-Length: 0x3",
                            "Content-Length: 3x",
                            "Content-Length:",
                            "Content-Length: 99999999999999999999",
                            "Content-Length: 3\r\nTransfer-Encoding: chunked",
                            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
                            "Content-Length : 3",
                            " Content-Length: 3",
                            "X: a\r\n folded",
                            "X: a\r\n\tfolded",
                            "X",
                            ": a",
                            "X: a\nY: b",
                            "X: a\rb",
                            "X: a\x0b",
                            "X: a\x7f",
                            "X\x01: a",
                            "H\xc3st: a",
                            "Host: y"}) {
    EXPECT_EQ(Fault(WithField(field)), 400) << field;
  }
  EXPECT_EQ(Fault(WithField(std::string("X: a\0b", 6))), 400);
  for (const char* encoding : {"gzip", "gzip, chunked", "chunked, chunked", "chunkedx", ""}) {
    EXPECT_EQ(Fault(WithField(std::string("Transfer-Encoding: ") + encoding)), 501) << encoding;
  }
  EXPECT_TRUE(Parsed(WithField("Transfer-Encoding: Chunked")).chunked);
  EXPECT_EQ(Fault("GET / HTTP/1.1\r\n\r\n"), 400);  // no Host
  EXPECT_EQ(Fault("GET / HTTP/1.0\r\n\r\n"), 0);
  EXPECT_EQ(Fault("GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"), 400);
  EXPECT_EQ(Fault("GET / HTTP/1.1\nHost: x\n\n"), 400);
  EXPECT_EQ(Fault("GET / HTTP/1.1\r\nHost: x\r\n\r\nmore"), 400);
  EXPECT_EQ(Fault(""), 400);
  EXPECT_EQ(Fault("GET / HTTP/1.1\r\nHost: x\r\n"), 400);
}

TEST(HttpHead, BoundsTheNumberOfFields) {
  std::string many;
  for (int i = 0; i < 126; ++i) many += "X: y\r\n";
  EXPECT_EQ(Fault(WithField(many + "X: y")), 0);  // with Host 128
  EXPECT_EQ(Fault(WithField(many + "X: y\r\nX: y")), 431);
}

TEST(HttpHead, ConnectionsEndWhereTheClientSaysSo) {
  EXPECT_FALSE(Parsed(WithField("Connection: close")).keep_alive());
  EXPECT_FALSE(Parsed(WithField("Connection: te , Close")).keep_alive());
  EXPECT_FALSE(Parsed(WithField("Connection: keep-alive\r\nconnection: close")).keep_alive());
  EXPECT_TRUE(Parsed(WithField("Connection: closed\r\nX: close")).keep_alive());
  EXPECT_FALSE(Parsed("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").keep_alive());
}

TEST(ParseChunkSize, TakesHexadecimalDigitsOnly) {
  EXPECT_EQ(ParseChunkSize("0"), 0);
  EXPECT_EQ(ParseChunkSize("1aF"), 0x1af);
  EXPECT_EQ(ParseChunkSize("5;name=\"value\""), 5);
  EXPECT_EQ(ParseChunkSize("5 ; a\t\xc3\xa9"), 5);
  for (const char* line :
       {"", " ", ";", "g", "-1", "+1", "0x5", "5 5", " 5", "\t5", "5;a\nb", "5;a\rb", "5;\x01",
        "5;\x7f", "5\x0b", "8000000000000000", "fffffffffffffffff"}) {
    EXPECT_EQ(ParseChunkSize(line), -1) << line;
  }
}

}  // namespace
}  // namespace innerq
