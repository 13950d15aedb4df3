// Runs passes over lists of tensors on the CPU.
#pragma once

#include "../foreach_device.h"

namespace regfused {

// The same bits for any number of threads.
class ForeachOnCpu : public ForeachDevice {
 public:
  at::Tensor norms(const ForeachList& list, NormType type) const override;
  at::Tensor penalties(const ForeachList& list, double l1, double l2) const override;
  at::Tensor clip(const ForeachList& list, const at::Tensor& norms, NormType type, double max_norm) const override;
  void penalty_gradients(const ForeachList& list, double l1, double l2, const at::Tensor& gain) const override;
};

}  // namespace regfused
