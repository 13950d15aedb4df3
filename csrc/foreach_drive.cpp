// Runs passes over lists of tensors that may be on several devices.
#include "foreach_drive.h"

#include <cmath>

#include <ATen/ops/cat.h>

#include "devices.h"
#include "tensor_check.h"

namespace regfused {

namespace {

// Partial results of all devices in the memory of one. CUDA devices wait for each other without the host.
at::Tensor gathered(const std::vector<at::Tensor>& partials, c10::Device at) {
  if (partials.size() == 1) return partials.front();
  std::vector<at::Tensor> there;
  for (const at::Tensor& part : partials)
    there.push_back(part.to(at, part.scalar_type(), /*non_blocking=*/!at.is_cpu()));
  return at::cat(there);
}

}  // namespace

void Foreach::add(const at::Tensor& tensor, const at::Tensor& out) {
  const c10::Device device = kernel_device(tensor);
  size_t s = 0;
  while (s < slots_.size() && slots_[s].device != device) ++s;
  if (s == slots_.size()) slots_.push_back({device, tensor.device(), make_foreach_device(device), {}});
  ForeachTensor row;
  row.data = tensor.data_ptr();
  row.out = out.defined() ? out.data_ptr() : nullptr;
  row.numel = tensor.numel();
  row.dtype = dtype_of(tensor);
  slots_[s].list.push_back(row);
}

const Foreach::Slot& Foreach::home() const {
  for (const Slot& slot : slots_)
    if (!slot.memory.is_cpu()) return slot;
  return slots_.front();
}

at::Tensor Foreach::finished(const std::vector<at::Tensor>& parts, NormType type) const {
  // The kernel that clips returns the norm; here it has no tensors.
  return home().kernels->clip({}, gathered(parts, home().memory), type, 0);
}

at::Tensor Foreach::norm(NormType type) const {
  std::vector<at::Tensor> norms;
  for (const Slot& slot : slots_) norms.push_back(slot.kernels->norms(slot.list, type));
  return finished(norms, type);
}

at::Tensor Foreach::penalty(double l1, double l2) const {
  std::vector<at::Tensor> sums;
  for (const Slot& slot : slots_) sums.push_back(slot.kernels->penalties(slot.list, l1, l2));
  // None is negative, so their sum is a norm of type 1.
  return finished(sums, NormType::one);
}

at::Tensor Foreach::clip(NormType type, double max_norm, bool finite) const {
  std::vector<at::Tensor> norms;
  for (const Slot& slot : slots_) norms.push_back(slot.kernels->norms(slot.list, type));
  at::Tensor norm;
  if (finite) {
    norm = finished(norms, type);
    if (!std::isfinite(norm.item().toDouble())) return norm;
  }
  for (const Slot& slot : slots_) {
    const at::Tensor here = slot.kernels->clip(slot.list, gathered(norms, slot.memory), type, max_norm);
    if (&slot == &home()) norm = here;
  }
  return norm;
}

void Foreach::penalty_gradients(double l1, double l2, const at::Tensor& gain) const {
  for (const Slot& slot : slots_) slot.kernels->penalty_gradients(slot.list, l1, l2, gain);
}

}  // namespace regfused
