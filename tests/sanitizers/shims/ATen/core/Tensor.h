// Stands in for torch's tensors: an array of doubles on the CPU, for what drivers of lists report.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

namespace at {

class Tensor {
 public:
  struct Scalar {
    double value;
    double toDouble() const { return value; }
  };

  Tensor() = default;
  explicit Tensor(int64_t numel) : numel_(numel), data_(new double[numel]) {}

  int64_t numel() const { return numel_; }
  void* data_ptr() const { return data_.get(); }
  Scalar item() const { return {data_[0]}; }
  c10::Device device() const { return {}; }

 private:
  int64_t numel_ = 0;
  std::shared_ptr<double[]> data_;  // not initialised
};

}  // namespace at
