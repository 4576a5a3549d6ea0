// HttpSocket, ListenSocket: TCP sockets with the limits and the patience of an HTTP server.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

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

// Whether a host is written as an IPv4 or IPv6 address, without brackets.
bool IsIpAddress(std::string_view host);

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

// Tells any number of sockets, now and later, to wait for no more input. Thread-safe.
class ReadStop {
 public:
  // Errors: unavailable, if there is no file descriptor left.
  static Result<ReadStop> Create();
  void Set() const;
  int fd() const { return fd_.get(); }  // readable once it is set

 private:
  UniqueFd fd_;
};

// One accepted connection, read and written with limits on sizes and times. Only the thread that
// serves it may call it, except for Abort and peer_gone.
class HttpSocket {
 public:
  struct Limits {
    int64_t head_bytes = 64 << 10;             // request line and headers
    std::chrono::milliseconds header_timeout;  // first byte to last header
    std::chrono::milliseconds read_timeout;    // between bytes of the body
    std::chrono::milliseconds write_timeout;   // between bytes taken by the client
  };
  // Bytes per second that a body must bring on average once the read timeout has passed, so that no
  // trickle keeps a thread. Answers need no rate of ours: Linux reports room for more only when a
  // third of its send buffer is free, and so much a client must take within each write timeout.
  static constexpr int64_t kMinBodyRate = 1024;

  // Why a read failed.
  enum class Failure { kNone, kClosed, kTimeout, kTooLarge, kStopped, kTls };

  // Once `stop` is set, reads take what has arrived and fail where they would have to wait. It must
  // outlive the socket.
  HttpSocket(UniqueFd fd, const Limits& limits, const ReadStop* stop);

  // Waits for the first byte of a request; false if none came, or the connection is over.
  bool WaitForRequest(std::chrono::milliseconds timeout);
  // Reads request line and headers with the empty line that ends them, or sees by the first byte
  // that the peer speaks TLS. nullopt: see failure().
  std::optional<std::string> ReadHead();
  // From now on the body is read.
  void BeginBody();
  // Appends `size` bytes to `to`. False: see failure().
  bool ReadExactly(int64_t size, std::string* to);
  // Reads a line of at most `max_bytes`, returned without its CR LF. nullopt: see failure().
  std::optional<std::string> ReadLine(int64_t max_bytes);
  Failure failure() const { return failure_; }

  // Sends everything; false for a peer that is gone or does not read.
  bool Write(std::string_view data);

  // The peer has closed or reset the connection. One that only ended its sending side looks the
  // same, as TCP does not tell the two apart before data comes back.
  bool peer_gone() const;
  // Ends the connection for both sides; pending reads and writes return.
  void Abort() const;
  // Ends the connection after an answer, so that a client still sending can read it.
  void Linger();

 private:
  std::string_view unread() const { return std::string_view(buffer_).substr(begin_); }
  // Receives more, behind what is unread; false at the end, for a failure, at the deadline or when
  // it would wait and is to stop.
  bool Fill(std::chrono::steady_clock::time_point deadline);
  // As Fill, with the limits of a body.
  bool FillBody();
  bool Fail(Failure failure);

  UniqueFd fd_;
  const Limits limits_;
  const ReadStop& stop_;
  std::string buffer_;
  size_t begin_ = 0;  // of what is unread in the buffer
  std::chrono::steady_clock::time_point body_begin_;
  int64_t body_bytes_ = 0;  // received since
  Failure failure_ = Failure::kNone;
};

}  // namespace innerq
