#include "server/http_socket.h"

#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

namespace innerq {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kBacklog = 1024;  // connections the kernel holds until they are accepted
constexpr size_t kBufferBytes = 16 << 10;
constexpr milliseconds kLinger{2'000};  // how long a rejected client may go on sending

// poll() for one descriptor; its events, or 0 for a timeout.
int Poll(int fd, short events, milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  for (;;) {
    pollfd entry{.fd = fd, .events = events, .revents = 0};
    const auto left = std::chrono::ceil<milliseconds>(deadline - Clock::now());
    const int ready = ::poll(&entry, 1, static_cast<int>(std::max<int64_t>(left.count(), 0)));
    if (ready > 0) return entry.revents;
    if (ready == 0 || errno != EINTR) return 0;
  }
}

}  // namespace

void UniqueFd::Reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

Result<ListenSocket> ListenSocket::Bind(const std::string& host, int port) {
  const auto failed = [&](const char* reason) {
    return Error{ErrorCode::kUnavailable,
                 "cannot listen on " + host + ":" + std::to_string(port) + ": " + reason};
  };
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (const int code = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found)) {
    return failed(::gai_strerror(code));
  }
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> addresses(found, ::freeaddrinfo);
  int error = 0;
  for (const addrinfo* address = found; address != nullptr; address = address->ai_next) {
    ListenSocket result;
    result.fd_ = UniqueFd(::socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
                                   address->ai_protocol));
    const int fd = result.fd_.get();
    const int on = 1;
    sockaddr_storage bound{};
    socklen_t size = sizeof(bound);
    if (fd < 0 || ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
        ::bind(fd, address->ai_addr, address->ai_addrlen) != 0 || ::listen(fd, kBacklog) != 0 ||
        ::getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &size) != 0) {
      error = errno;
      continue;
    }
    char service[16];
    ::getnameinfo(reinterpret_cast<sockaddr*>(&bound), size, nullptr, 0, service, sizeof(service),
                  NI_NUMERICSERV);
    result.port_ = std::atoi(service);
    return result;
  }
  return failed(std::strerror(error));
}

UniqueFd ListenSocket::Accept() const {
  Poll(fd_.get(), POLLIN, std::chrono::seconds(1));
  UniqueFd fd(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (fd.get() >= 0) {
    const int on = 1;
    ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  } else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
    ::poll(nullptr, 0, 20);  // out of descriptors: the connection stays in the backlog meanwhile
  }
  return fd;
}

void ListenSocket::Stop() const { ::shutdown(fd_.get(), SHUT_RDWR); }

HttpSocket::HttpSocket(UniqueFd fd, const Limits& limits)
    : fd_(std::move(fd)), limits_(limits), buffer_(kBufferBytes) {}

bool HttpSocket::WaitForRequest(milliseconds timeout) {
  budget_ = limits_.header_bytes;
  reading_headers_ = true;
  if (begin_ == end_ && Fill(timeout) <= 0) return false;
  header_deadline_ = Clock::now() + limits_.header_timeout;
  return true;
}

void HttpSocket::HeadersDone() {
  reading_headers_ = false;
  budget_ = limits_.body_bytes;
}

ssize_t HttpSocket::Fill(milliseconds timeout) {
  for (;;) {
    const ssize_t n = ::recv(fd_.get(), buffer_.data(), buffer_.size(), 0);
    if (n >= 0) {
      begin_ = 0;
      end_ = static_cast<size_t>(n);
      return n;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK) return -1;
    if (Poll(fd_.get(), POLLIN, timeout) == 0) {
      timed_out_ = true;
      return -1;
    }
  }
}

ssize_t HttpSocket::Read(char* data, size_t size) {
  if (budget_ <= 0) {
    limit_reached_ = true;
    return -1;
  }
  if (begin_ == end_) {
    const milliseconds timeout =
        reading_headers_ ? std::chrono::ceil<milliseconds>(header_deadline_ - Clock::now())
                         : limits_.read_timeout;
    if (const ssize_t n = Fill(timeout); n <= 0) return n;
  }
  const size_t n = std::min({size, end_ - begin_, static_cast<size_t>(budget_)});
  std::memcpy(data, buffer_.data() + begin_, n);
  begin_ += n;
  budget_ -= static_cast<int64_t>(n);
  return static_cast<ssize_t>(n);
}

bool HttpSocket::Write(std::string_view data) {
  while (!data.empty()) {
    const ssize_t n = ::send(fd_.get(), data.data(), data.size(), MSG_NOSIGNAL);
    if (n >= 0) {
      data.remove_prefix(static_cast<size_t>(n));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      const int events = Poll(fd_.get(), POLLOUT | POLLRDHUP, limits_.write_timeout);
      if ((events & POLLOUT) == 0 || (events & (POLLRDHUP | POLLHUP | POLLERR)) != 0) return false;
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

bool HttpSocket::peer_gone() const {
  return (Poll(fd_.get(), POLLRDHUP, milliseconds(0)) & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

void HttpSocket::Abort() const { ::shutdown(fd_.get(), SHUT_RDWR); }

void HttpSocket::Linger() {
  // Closing with unread input would reset the connection and take the answer with it.
  ::shutdown(fd_.get(), SHUT_WR);
  const auto deadline = Clock::now() + kLinger;
  while (Clock::now() < deadline &&
         Fill(std::chrono::ceil<milliseconds>(deadline - Clock::now())) > 0) {
  }
}

}  // namespace innerq
