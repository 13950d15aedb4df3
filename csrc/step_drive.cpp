// Runs an SGD step over the tensors of all devices: one norm over all, then the update.
#include "step_drive.h"

#include <limits>

#include "devices.h"

namespace regfused {

int8_t StepDriver::index_of(c10::Device device) {
  for (size_t i = 0; i < slots_.size(); ++i)
    if (slots_[i].device == device) return static_cast<int8_t>(i);
  TORCH_CHECK(slots_.size() < size_t(std::numeric_limits<int8_t>::max()), "regfused: too many devices in one step");
  std::unique_ptr<StepDevice> kernels = make_step_device(device);
  auto* async = dynamic_cast<StepAsyncDevice*>(kernels.get());
  slots_.push_back({device, std::move(kernels), async});
  return static_cast<int8_t>(slots_.size() - 1);
}

void StepDriver::cut() {
  for (size_t i = 0; i < slots_.size(); ++i) slots_[i].kernels->cut(*this, static_cast<int8_t>(i));
}

void StepDriver::find_live() {
  for (Slot& slot : slots_) slot.live = false;
  for (const StepRow& tensor : tensors)
    if (tensor.grad) slots_[tensor.device].live = true;
}

void StepDriver::begin() {
  for (Slot& slot : slots_)
    if (slot.live) slot.kernels->begin(*this);
}

bool StepDriver::can_leave_host() const {
  bool any = false;
  for (const Slot& slot : slots_) {
    if (slot.live && !slot.async) return false;
    any |= slot.live;
  }
  return any;
}

bool StepDriver::is_capturing() const {
  for (const Slot& slot : slots_)
    if (slot.live && slot.async && slot.async->is_capturing()) return true;
  return false;
}

double StepDriver::norm(const StepScalars& scalars) {
  double accumulated = 0;
  for (const Slot& slot : slots_)
    if (slot.live && slot.async) slot.kernels->measure(*this, scalars);
  for (const Slot& slot : slots_)
    if (slot.live && !slot.async) slot.kernels->measure(*this, scalars);  // while the others are at work
  for (const Slot& slot : slots_)
    if (slot.live) accumulated = norm_combine(scalars.norm_type, accumulated, slot.kernels->measured(scalars));
  return accumulated;
}

std::pair<int64_t, int64_t> StepDriver::first_nonfinite() const {
  std::pair<int64_t, int64_t> first = {-1, -1};
  for (const Slot& slot : slots_) {
    if (!slot.live) continue;
    const auto here = slot.kernels->first_nonfinite();
    if (here.first >= 0 && (first.first < 0 || here.first < first.first)) first = here;
  }
  return first;
}

void StepDriver::step(const StepScalars& scalars) {
  totals_ = StepTotals();
  for (Slot& slot : slots_) {
    slot.has_numbers = slot.live && slot.async;
    if (slot.live && slot.async) slot.kernels->step(*this, scalars);
  }
  for (Slot& slot : slots_) {
    if (!slot.live || slot.async) continue;
    slot.kernels->step(*this, scalars);
    const StepTotals here = slot.kernels->totals();
    totals_.penalty += here.penalty;
    totals_.zeros += here.zeros;
    totals_.numel += here.numel;
  }
}

void StepDriver::measure_without_host(const StepScalars& scalars, bool needs_norm) {
  partials_.clear();
  for (const Slot& slot : slots_) {
    if (!slot.live || !needs_norm) continue;
    slot.async->measure(*this, scalars);
    partials_.push_back(slot.async->partials());
  }
}

void StepDriver::step_without_host(const StepScalars& scalars) {
  totals_ = StepTotals();
  bool counts = true;
  for (Slot& slot : slots_) {
    slot.has_numbers = slot.live;
    if (!slot.live) continue;
    slot.async->judge_and_step(*this, scalars, partials_, counts);
    counts = false;
  }
}

std::vector<at::Tensor> StepDriver::numbers() const {
  std::vector<at::Tensor> numbers;
  for (const Slot& slot : slots_)
    if (slot.has_numbers) numbers.push_back(slot.async->numbers());
  return numbers;
}

}  // namespace regfused
