// Runs passes over lists of tensors that may be on several devices.
#pragma once

#include <memory>
#include <vector>

#include "foreach_device.h"

namespace regfused {

// Lists of tensors, one for each device.
class Foreach {
 public:
  // A dense tensor of a type that has kernels; `out`, where given, lies in memory as it does.
  void add(const at::Tensor& tensor, const at::Tensor& out = {});

  // 0-dim float64, on the device of the first tensor that is not on the CPU, if there is one.
  at::Tensor norm(NormType type) const;
  at::Tensor penalty(double l1, double l2) const;
  // Two passes; returns the norm. With `finite` the host waits for a norm that is not finite, and nothing is scaled.
  at::Tensor clip(NormType type, double max_norm, bool finite) const;

  void penalty_gradients(double l1, double l2, const at::Tensor& gain) const;

 private:
  struct Slot {
    c10::Device device, memory;
    std::unique_ptr<ForeachDevice> kernels;
    ForeachList list;
  };
  const Slot& home() const;
  // The norm of partial results of each slot, on the device of home().
  at::Tensor finished(const std::vector<at::Tensor>& parts, NormType type) const;

  std::vector<Slot> slots_;
};

}  // namespace regfused
