// Arrays of every dtype that are exactly as large as they have to be, and what tests compare them with: doubles.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "chunk.h"

namespace regfused {

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// On the heap, so that a sanitizer sees the first byte behind it, and not initialised, so that it sees what is read
// before it is written.
class Array {
 public:
  Array(DType dtype, int64_t numel) : dtype_(dtype), numel_(numel), data_(std::malloc(numel * size_of(dtype))) {}
  Array(const Array& other) : Array(other.dtype_, other.numel_) {
    std::memcpy(data(), other.data(), numel_ * size_of(dtype_));
  }
  Array(Array&&) = default;
  Array& operator=(Array&&) = default;

  void* data() const { return data_.get(); }
  DType dtype() const { return dtype_; }
  int64_t numel() const { return numel_; }
  bool operator==(const Array& other) const { return std::memcmp(data(), other.data(), numel_ * size_of(dtype_)) == 0; }

  double operator[](int64_t i) const {
    if (dtype_ == DType::float32) return of<float>(i);
    if (dtype_ == DType::float64) return of<double>(i);
    const auto bits = of<uint16_t>(i);
    if (dtype_ == DType::bfloat16) return std::bit_cast<float>(uint32_t(bits) << 16);
    if ((bits >> 10 & 31) == 31) return NAN;  // or infinite: neither is expected
    const float size = std::bit_cast<float>((bits & 0x7fffu) << 13) * 0x1p112f;
    return bits >> 15 ? -size : size;
  }

  // x is a number that float16 and bfloat16 hold exactly, of which neither is subnormal.
  void set(int64_t i, double x) {
    if (dtype_ == DType::float32) return write(i, static_cast<float>(x));
    if (dtype_ == DType::float64) return write(i, x);
    const auto bits = std::bit_cast<uint32_t>(static_cast<float>(x));
    if (dtype_ == DType::bfloat16) return write(i, static_cast<uint16_t>(bits >> 16));
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    write(i, static_cast<uint16_t>(sign | (rest ? (rest - (112u << 23)) >> 13 : 0)));
  }

  std::vector<double> values() const {
    std::vector<double> values(numel_);
    for (int64_t i = 0; i < numel_; ++i) values[i] = (*this)[i];
    return values;
  }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  template <class T>
  T of(int64_t i) const {
    T x;
    std::memcpy(&x, static_cast<const char*>(data()) + i * sizeof(T), sizeof x);
    return x;
  }
  template <class T>
  void write(int64_t i, T x) {
    std::memcpy(static_cast<char*>(data()) + i * sizeof(T), &x, sizeof x);
  }

  DType dtype_;
  int64_t numel_;
  std::unique_ptr<void, Free> data_;
};

// Between -4 and 4, never zero, and exact in every dtype; numbers that lie near each other in the array differ.
inline double varied(int64_t i) {
  const uint64_t mixed = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u >> 33;
  const double size = static_cast<double>(1 + mixed % 128) / 32;
  return mixed >> 20 & 1 ? size : -size;
}

// Not zero.
inline Array gradients(DType dtype, int64_t numel, int64_t salt) {
  Array array(dtype, numel);
  for (int64_t i = 0; i < numel; ++i) array.set(i, varied(i + salt * 1000003));
  return array;
}

// Zeros and negative zeros among them.
inline Array parameters(DType dtype, int64_t numel, int64_t salt) {
  Array array = gradients(dtype, numel, salt);
  for (int64_t i = 5; i < numel; i += 11) array.set(i, 0.0);
  for (int64_t i = 7; i < numel; i += 13) array.set(i, -0.0);
  return array;
}

}  // namespace regfused
