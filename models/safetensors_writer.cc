#include "models/safetensors_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "models/files.h"

namespace innerq {
namespace {

constexpr int64_t kMetadataBytes = 2048;  // room in the header for what is known in the end
constexpr int64_t kAlignment = 8;         // of the data

}  // namespace

SafetensorsWriter::SafetensorsWriter(std::filesystem::path path, std::vector<TensorToWrite> tensors,
                                     std::map<std::string, std::string> metadata)
    : path_(std::move(path)), metadata_(std::move(metadata)) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorToWrite& a, const TensorToWrite& b) {
    const int64_t a_bytes = DTypeBytes(a.dtype), b_bytes = DTypeBytes(b.dtype);
    return a_bytes != b_bytes ? a_bytes > b_bytes : a.name < b.name;
  });
  for (TensorToWrite& tensor : tensors) {
    const int64_t begin = data_bytes_;
    data_bytes_ += tensor.shape.num_elements() * DTypeBytes(tensor.dtype);
    CHECK(place_of_.emplace(tensor.name, places_.size()).second, "two tensors " + tensor.name);
    places_.push_back({std::move(tensor), begin, data_bytes_});
  }
  const auto size_bytes = static_cast<int64_t>(sizeof(uint64_t));
  const auto header = static_cast<int64_t>(Header().size()) + kMetadataBytes;
  data_begin_ = size_bytes + (header + kAlignment - 1) / kAlignment * kAlignment;
}

SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&& other) noexcept
    : path_(std::move(other.path_)),
      metadata_(std::move(other.metadata_)),
      places_(std::move(other.places_)),
      place_of_(std::move(other.place_of_)),
      data_begin_(other.data_begin_),
      data_bytes_(other.data_bytes_),
      fd_(std::exchange(other.fd_, -1)) {}

SafetensorsWriter::~SafetensorsWriter() {
  if (fd_ >= 0) ::close(fd_);
}

Result<SafetensorsWriter> SafetensorsWriter::Create(const std::filesystem::path& path,
                                                    std::vector<TensorToWrite> tensors,
                                                    std::map<std::string, std::string> metadata) {
  constexpr mode_t kMode = 0666;
  SafetensorsWriter writer(path, std::move(tensors), std::move(metadata));
  writer.fd_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_CREAT | O_EXCL, kMode);
  if (writer.fd_ < 0) return CannotWrite(path, std::strerror(errno));
  // A disk that is too small shows now, not after hours.
  if (::fallocate(writer.fd_, 0, 0, writer.bytes()) != 0 && errno != EOPNOTSUPP &&
      errno != ENOSYS && errno != EINTR) {
    return CannotWrite(path, std::strerror(errno));
  }
  return writer;
}

Result<void> SafetensorsWriter::Write(const std::string& name, std::span<const std::byte> data) {
  const auto found = place_of_.find(name);
  CHECK(found != place_of_.end(), "no tensor " + name);
  Place& place = places_[found->second];
  CHECK(!place.written, "tensor " + name + " was written");
  CHECK(static_cast<int64_t>(data.size()) == place.end - place.begin, "bytes of tensor " + name);
  place.written = true;
  return WriteAt(data_begin_ + place.begin, data);
}

Result<void> SafetensorsWriter::Finish(const std::map<std::string, std::string>& more) {
  for (const Place& place : places_) CHECK(place.written, "no data of tensor " + place.tensor.name);
  metadata_.insert(more.begin(), more.end());
  std::string header = Header();
  const auto header_bytes = static_cast<uint64_t>(data_begin_) - sizeof(uint64_t);
  CHECK(header.size() <= header_bytes, "more metadata than there is room for");
  header.resize(header_bytes, ' ');
  std::string file_begin(sizeof(header_bytes), '\0');
  std::memcpy(file_begin.data(), &header_bytes, sizeof(header_bytes));  // little-endian hosts
  file_begin += header;
  RETURN_IF_ERROR(WriteAt(0, std::as_bytes(std::span(file_begin))));
  if (::fsync(fd_) != 0 || ::close(std::exchange(fd_, -1)) != 0) {
    return CannotWrite(path_, std::strerror(errno));
  }
  return {};
}

std::string SafetensorsWriter::Header() const {
  nlohmann::ordered_json header;
  header["__metadata__"] = metadata_;
  for (const Place& place : places_) {
    std::vector<int64_t> shape;
    for (int i = 0; i < place.tensor.shape.rank(); ++i) shape.push_back(place.tensor.shape[i]);
    header[place.tensor.name] = {{"dtype", DTypeName(place.tensor.dtype)},
                                 {"shape", shape},
                                 {"data_offsets", {place.begin, place.end}}};
  }
  return header.dump();
}

Result<void> SafetensorsWriter::WriteAt(int64_t offset, std::span<const std::byte> data) {
  while (!data.empty()) {
    const ssize_t written = ::pwrite(fd_, data.data(), data.size(), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return CannotWrite(path_, std::strerror(errno));
    offset += written;
    data = data.subspan(static_cast<size_t>(written));
  }
  return {};
}

}  // namespace innerq
