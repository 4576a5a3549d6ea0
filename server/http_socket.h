// HttpSocket, ListenSocket: TCP sockets with the limits and the patience of an HTTP server.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/result.h"

namespace innerq {

// Owns a file descriptor; move-only.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    Reset();
    fd_ = std::exchange(other.fd_, -1);
    return *this;
  }
  ~UniqueFd() { Reset(); }
  int get() const { return fd_; }
  void Reset();

 private:
  int fd_ = -1;
};

// A bound and listening TCP socket.
class ListenSocket {
 public:
  // Port 0: any free one. Errors: unavailable, with the reason.
  static Result<ListenSocket> Bind(const std::string& host, int port);
  int port() const { return port_; }
  // Waits for a connection, at most a second. An fd of -1 means that there is none.
  UniqueFd Accept() const;
  // Makes all calls of Accept return, now and later. Any thread.
  void Stop() const;

 private:
  UniqueFd fd_;
  int port_ = 0;
};

// One accepted connection. Only the thread that serves it may call it, except for Abort and
// peer_gone.
class HttpSocket {
 public:
  struct Limits {
    int64_t header_bytes = 64 << 10;           // request line and headers
    int64_t body_bytes = 0;                    // with its framing
    std::chrono::milliseconds header_timeout;  // first byte to last header
    std::chrono::milliseconds read_timeout;    // between bytes of the body
    std::chrono::milliseconds write_timeout;   // between bytes taken by the client
  };
  HttpSocket(UniqueFd fd, const Limits& limits);

  // Waits for the first byte of a request; false if none came, or the connection is over.
  bool WaitForRequest(std::chrono::milliseconds timeout);
  // Like recv: bytes read, 0 at the end, -1 for a failure, a timeout or a spent limit.
  ssize_t Read(char* data, size_t size);
  // The headers of this request have been read: the body's limits count from now.
  void HeadersDone();
  // Sends everything; false for a peer that is gone or does not read.
  bool Write(std::string_view data);

  // The peer has closed or reset the connection. One that only ended its sending side looks the
  // same and counts as gone: clients must keep it open until the answer is complete.
  bool peer_gone() const;
  // Ends the connection for both sides; pending reads and writes return.
  void Abort() const;
  // Ends the connection after an answer, so that a client still sending can read it.
  void Linger();

  // No further request may be read from this connection.
  void CloseAfterAnswer() { keep_alive_ = false; }
  bool keep_alive() const { return keep_alive_; }
  bool timed_out() const { return timed_out_; }
  bool limit_reached() const { return limit_reached_; }
  bool reading_headers() const { return reading_headers_; }

 private:
  // Fills the empty buffer; as Read.
  ssize_t Fill(std::chrono::milliseconds timeout);

  UniqueFd fd_;
  const Limits limits_;
  std::vector<char> buffer_;
  size_t begin_ = 0, end_ = 0;  // unread part of the buffer
  int64_t budget_ = 0;          // bytes this request may still send
  std::chrono::steady_clock::time_point header_deadline_;
  bool reading_headers_ = true;
  bool keep_alive_ = true;
  bool timed_out_ = false;
  bool limit_reached_ = false;
};

}  // namespace innerq
