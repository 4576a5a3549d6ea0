#include "server/http_socket.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

namespace innerq {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kBacklog = 1024;  // connections the kernel holds until they are accepted
constexpr size_t kReceiveBytes = 16 << 10;
constexpr milliseconds kLinger{2'000};  // how long a rejected client may go on sending

// The first byte that a client sends who speaks TLS (RFC 8446, 5.1: a handshake's record).
constexpr char kTlsHandshake = 0x16;

// poll(), whatever signals come: false for a timeout.
template <size_t kCount>
bool PollAll(std::array<pollfd, kCount>& entries, milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  for (;;) {
    const auto left = std::chrono::ceil<milliseconds>(deadline - Clock::now());
    const int ready =
        ::poll(entries.data(), kCount, static_cast<int>(std::max<int64_t>(left.count(), 0)));
    if (ready > 0) return true;
    if (ready == 0 || errno != EINTR) return false;
  }
}

// poll() for one descriptor; its events, or 0 for a timeout.
int Poll(int fd, short events, milliseconds timeout) {
  std::array<pollfd, 1> entry{{{.fd = fd, .events = events, .revents = 0}}};
  return PollAll(entry, timeout) ? entry[0].revents : 0;
}

// Where the first empty line of `text` ends; npos if there is none yet. Lines end with a line feed
// here, with or without a carriage return: whether that is right is the parser's business. Begins
// at `searched`, the start of a line, and moves it on.
size_t EndOfHead(std::string_view text, size_t* searched) {
  for (;;) {
    const size_t feed = text.find('\n', *searched);
    if (feed == std::string_view::npos) return feed;
    const std::string_view line = text.substr(*searched, feed - *searched);
    *searched = feed + 1;
    if (line.empty() || line == "\r") return feed + 1;
  }
}

}  // namespace

void UniqueFd::Reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

bool IsIpAddress(std::string_view host) {
  unsigned char address[sizeof(in6_addr)];
  const std::string text(host);
  return ::inet_pton(AF_INET, text.c_str(), address) == 1 ||
         ::inet_pton(AF_INET6, text.c_str(), address) == 1;
}

Result<ListenSocket> ListenSocket::Bind(const std::string& host, int port) {
  const auto failed = [&](const char* reason) {
    return Error{ErrorCode::kUnavailable, "cannot listen on server.host " + host +
                                              ", server.port " + std::to_string(port) + ": " +
                                              reason};
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

Result<ReadStop> ReadStop::Create() {
  ReadStop result;
  result.fd_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (result.fd() < 0) {
    return Error{ErrorCode::kUnavailable,
                 std::string("no event descriptor: ") + std::strerror(errno)};
  }
  return result;
}

void ReadStop::Set() const { ::eventfd_write(fd_.get(), 1); }

HttpSocket::HttpSocket(UniqueFd fd, const Limits& limits, const ReadStop* stop)
    : fd_(std::move(fd)), limits_(limits), stop_(*stop) {}

bool HttpSocket::WaitForRequest(milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  for (;;) {
    // RFC 9112, 2.2: empty lines before a request are ignored.
    while (unread().starts_with("\r\n")) begin_ += 2;
    if (!unread().empty() && unread() != "\r") return true;
    if (!Fill(deadline)) return false;
  }
}

std::optional<std::string> HttpSocket::ReadHead() {
  if (unread().starts_with(kTlsHandshake)) {  // would wait for our side of it
    Fail(Failure::kTls);
    return std::nullopt;
  }
  const auto deadline = Clock::now() + limits_.header_timeout;
  for (size_t searched = 0;;) {
    const size_t end = EndOfHead(unread(), &searched);
    if (std::min(end, unread().size()) > static_cast<size_t>(limits_.head_bytes)) {
      Fail(Failure::kTooLarge);
      return std::nullopt;
    }
    if (end != std::string_view::npos) {
      std::string head(unread().substr(0, end));
      begin_ += end;
      return head;
    }
    if (!Fill(deadline)) return std::nullopt;
  }
}

void HttpSocket::BeginBody() {
  body_begin_ = Clock::now();
  body_bytes_ = 0;
}

bool HttpSocket::ReadExactly(int64_t size, std::string* to) {
  auto left = static_cast<size_t>(size);
  while (left > 0) {
    if (unread().empty() && !FillBody()) return false;
    const std::string_view part = unread().substr(0, left);
    *to += part;
    begin_ += part.size();
    left -= part.size();
  }
  return true;
}

std::optional<std::string> HttpSocket::ReadLine(int64_t max_bytes) {
  for (;;) {
    const size_t end = unread().find("\r\n");
    const size_t shortest =
        end != std::string_view::npos ? end : unread().size() - !unread().empty();
    if (shortest > static_cast<size_t>(max_bytes)) {
      Fail(Failure::kTooLarge);
      return std::nullopt;
    }
    if (end != std::string_view::npos) {
      std::string line(unread().substr(0, end));
      begin_ += end + 2;
      return line;
    }
    if (!FillBody()) return std::nullopt;
  }
}

bool HttpSocket::FillBody() {
  const auto now = Clock::now();
  const auto earned = std::chrono::seconds(body_bytes_ / kMinBodyRate);
  const size_t before = unread().size();
  if (!Fill(std::min(now, body_begin_ + earned) + limits_.read_timeout)) return false;
  body_bytes_ += static_cast<int64_t>(unread().size() - before);
  return true;
}

bool HttpSocket::Fill(Clock::time_point deadline) {
  buffer_.erase(0, std::exchange(begin_, 0));
  char data[kReceiveBytes];
  for (;;) {
    // First: a peer that always has something to say must not outlast the deadline.
    if (Clock::now() >= deadline) return Fail(Failure::kTimeout);
    const ssize_t n = ::recv(fd_.get(), data, sizeof(data), 0);
    if (n > 0) {
      buffer_.append(data, static_cast<size_t>(n));
      return true;
    }
    if (n < 0 && errno == EINTR) continue;
    if (n == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) return Fail(Failure::kClosed);
    std::array<pollfd, 2> entries{{{.fd = fd_.get(), .events = POLLIN, .revents = 0},
                                   {.fd = stop_.fd(), .events = POLLIN, .revents = 0}}};
    PollAll(entries, std::chrono::ceil<milliseconds>(deadline - Clock::now()));
    if (entries[0].revents == 0 && entries[1].revents != 0) return Fail(Failure::kStopped);
  }
}

bool HttpSocket::Fail(Failure failure) {
  failure_ = failure;
  return false;
}

bool HttpSocket::Write(std::string_view data) {
  while (!data.empty()) {
    const ssize_t n = ::send(fd_.get(), data.data(), data.size(), MSG_NOSIGNAL);
    if (n >= 0) {
      data.remove_prefix(static_cast<size_t>(n));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      // A peer that has closed, not only its sending side, resets the connection upon our data.
      const int events = Poll(fd_.get(), POLLOUT, limits_.write_timeout);
      if ((events & POLLOUT) == 0 || (events & (POLLHUP | POLLERR)) != 0) return false;
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
  do {
    begin_ = buffer_.size();
  } while (Clock::now() < deadline && Fill(deadline));
}

}  // namespace innerq
