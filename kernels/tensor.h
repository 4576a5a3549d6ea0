// DType, TensorView, ConstTensorView, Buffer: typed, shaped memory of one backend.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <span>
#include <string>
#include <utility>

#include "kernels/float16.h"
#include "kernels/result.h"

namespace innerq {

// kU8 holds packed codes; what computes with floats takes the others.
enum class DType { kF32, kF16, kBF16, kU8 };

constexpr int64_t DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kU8:
      return 1;
  }
  return 0;
}

constexpr const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBF16:
      return "BF16";
    case DType::kU8:
      return "U8";
  }
  return "?";
}

// Up to four extents, outermost first; dense row-major.
class Shape {
 public:
  static constexpr int kMaxRank = 4;

  Shape() = default;
  Shape(std::initializer_list<int64_t> extents) : rank_(static_cast<int>(extents.size())) {
    CHECK(rank_ <= kMaxRank, "rank above 4");
    int i = 0;
    for (int64_t extent : extents) extents_[static_cast<size_t>(i++)] = extent;
  }

  int rank() const { return rank_; }
  int64_t operator[](int i) const { return extents_[static_cast<size_t>(i)]; }
  int64_t num_elements() const {
    int64_t product = 1;
    for (int i = 0; i < rank_; ++i) product *= extents_[static_cast<size_t>(i)];
    return product;
  }
  bool operator==(const Shape& other) const {
    if (rank_ != other.rank_) return false;
    for (int i = 0; i < rank_; ++i) {
      if ((*this)[i] != other[i]) return false;
    }
    return true;
  }
  std::string ToString() const {
    std::string text = "[";
    for (int i = 0; i < rank_; ++i) text += (i ? ", " : "") + std::to_string((*this)[i]);
    return text + "]";
  }

 private:
  int rank_ = 0;
  std::array<int64_t, kMaxRank> extents_{};
};

// Borrowed, read-only, dense memory with an element type and a shape.
struct ConstTensorView {
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;
  Shape shape;

  int64_t bytes() const { return shape.num_elements() * DTypeBytes(dtype); }
  template <typename T>
  const T* As() const {
    return reinterpret_cast<const T*>(data);
  }
};

// Element `i` of a view, counted without regard to its shape, exactly.
inline float ElementAsFloat(const ConstTensorView& view, int64_t i) {
  switch (view.dtype) {
    case DType::kF32:
      return view.As<float>()[i];
    case DType::kF16:
      return F16ToF32(view.As<uint16_t>()[i]);
    case DType::kBF16:
      return BF16ToF32(view.As<uint16_t>()[i]);
    case DType::kU8:
      return static_cast<float>(view.As<uint8_t>()[i]);
  }
  return 0;
}

// Borrowed, writable, dense memory with an element type and a shape.
struct TensorView {
  std::byte* data = nullptr;
  DType dtype = DType::kF32;
  Shape shape;

  int64_t bytes() const { return shape.num_elements() * DTypeBytes(dtype); }
  template <typename T>
  T* As() const {
    return reinterpret_cast<T*>(data);
  }
  operator ConstTensorView() const { return {data, dtype, shape}; }  // NOLINT: borrow weaker
};

// Owns a piece of one backend's memory; move-only; freed by the deleter the backend gave it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(std::byte* data, int64_t bytes, std::function<void(std::byte*)> deleter)
      : data_(data), bytes_(bytes), deleter_(std::move(deleter)) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      Reset();
      data_ = std::exchange(other.data_, nullptr);
      bytes_ = std::exchange(other.bytes_, 0);
      deleter_ = std::exchange(other.deleter_, nullptr);
    }
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { Reset(); }

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  // A view of the first elements; `offset` is in bytes.
  TensorView View(DType dtype, Shape shape, int64_t offset = 0) {
    CHECK(offset + shape.num_elements() * DTypeBytes(dtype) <= bytes_, "view beyond its buffer");
    return {data_ + offset, dtype, shape};
  }

 private:
  void Reset() {
    if (data_ != nullptr && deleter_) deleter_(data_);
    data_ = nullptr;
  }
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  std::function<void(std::byte*)> deleter_;
};

}  // namespace innerq
