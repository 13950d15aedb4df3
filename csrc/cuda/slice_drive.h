// Shrinks slices of tensors by their norms on a CUDA device.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "slice_launch.h"

namespace regfused {

// Three launches, in a metric up to sixteen more where a slice is large or does not lie together, for as many tensors
// as fit the arguments of a kernel (more than a hundred). What is needed beside the tensors is one piece of memory,
// allocated by plan(): later calls can be captured in a CUDA graph.
class SlicesOnCuda {
 public:
  explicit SlicesOnCuda(c10::Device device) : device_(device) {}

  // For tensors of these shapes and rules. `metrics`: whether they may come to have one.
  void plan(const std::vector<SliceTensor>& tensors, bool metrics);
  // The same tensor in another place, null to pass it by, and its bound in a step of this length.
  void set(size_t i, void* data, const SliceBound& bound, const DeviceNumber& length);
  // After set(): in the metric of a step, whose numbers are in the memory of the device.
  void set_metric(size_t i, const void* second_moment, const SliceDeviceMetric* metric);
  // On the current stream. `skip`: null, or a number on the device, other than 0 where nothing is to be done.
  void shrink(const double* skip);

  // What the kernels use: undefined, or it must outlive them.
  const at::Tensor& memory() const { return memory_; }

 private:
  void launch(SlicePass pass, const SliceJob& job, const SliceDeviceTensor* tensors) const;

  c10::Device device_;
  std::vector<SliceDeviceTensor> tensors_;
  bool doubles_ = false;
  at::Tensor memory_;  // of doubles: partial sums, factors
};

// Once, on the current stream.
void shrink_slices_on_cuda(c10::Device device, const std::vector<SliceTensor>& tensors);

}  // namespace regfused
