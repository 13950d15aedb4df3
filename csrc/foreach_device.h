// The passes over a list of tensors on one device.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "foreach.h"

namespace regfused {

using ForeachList = std::vector<ForeachTensor>;

// Nothing is kept between them, and where a device works while the
// host goes on, the host waits for nothing.
class ForeachDevice {
 public:
  virtual ~ForeachDevice() = default;

  // What the list adds up to, in float64 in the memory of the device: partial norms, accumulated but not finished, or
  // partial sums of l1*|p| + l2*p^2.
  virtual at::Tensor norms(const ForeachList& list, NormType type) const = 0;
  virtual at::Tensor penalties(const ForeachList& list, double l1, double l2) const = 0;

  // The norm that these partial norms add up to, 0-dim float64; each tensor of the list is multiplied by torch's clip
  // coefficient of it.
  virtual at::Tensor clip(const ForeachList& list, const at::Tensor& norms, NormType type, double max_norm) const = 0;

  // out = gain * (l1*sign(p) + 2*l2*p); `gain` is a 0-dim float32 or float64 tensor on any device.
  virtual void penalty_gradients(const ForeachList& list, double l1, double l2, const at::Tensor& gain) const = 0;
};

}  // namespace regfused
