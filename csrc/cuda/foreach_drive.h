// Runs passes over lists of tensors on a CUDA device.
#pragma once

#include "../foreach_device.h"
#include "foreach_launch.h"

namespace regfused {

// One launch for a pass over some 1000 tensors. All that a kernel has to know is among its arguments: nothing is
// uploaded, nothing waits, and a CUDA graph keeps what it was given.
class ForeachOnCuda : public ForeachDevice {
 public:
  explicit ForeachOnCuda(c10::Device device);

  at::Tensor norms(const ForeachList& list, NormType type) const override;
  at::Tensor penalties(const ForeachList& list, double l1, double l2) const override;
  at::Tensor clip(const ForeachList& list, const at::Tensor& norms, NormType type, double max_norm) const override;
  void penalty_gradients(const ForeachList& list, double l1, double l2, const at::Tensor& gain) const override;

 private:
  at::Tensor reduce(ForeachPass pass, const ForeachList& list, ForeachJob job) const;
  at::Tensor doubles(at::IntArrayRef shape) const;
  void launch(ForeachPass pass, const ForeachJob& job, const ForeachRow* rows, int64_t work) const;

  c10::Device device_;
  c10::Device memory_;  // where its tensors are
};

}  // namespace regfused
