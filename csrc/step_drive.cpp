// Runs a step over the tensors of all devices: one norm over all, then the update.
#include "step_drive.h"

#include <limits>

#include "devices.h"

namespace regfused {

int8_t StepDriver::index_of(c10::Device device) {
  for (size_t i = 0; i < devices_.size(); ++i)
    if (devices_[i].device == device) return static_cast<int8_t>(i);
  TORCH_CHECK(devices_.size() < size_t(std::numeric_limits<int8_t>::max()), "regfused: too many devices in one step");
  std::unique_ptr<StepDevice> kernels = make_step_device(device);
  auto* async = dynamic_cast<StepAsyncDevice*>(kernels.get());
  devices_.push_back({device, std::move(kernels), async});
  return static_cast<int8_t>(devices_.size() - 1);
}

void StepDriver::cut() {
  for (size_t i = 0; i < devices_.size(); ++i) devices_[i].kernels->cut(*this, static_cast<int8_t>(i));
}

void StepDriver::find_live() {
  for (Device& device : devices_) device.live = false;
  times.clear();
  last_time_.assign(groups.size(), -1);
  for (StepRow& row : rows) {
    if (!row.grad) continue;
    devices_[row.device].live = true;
    if (row.t != 0) row.time = time_of(row.group, row.t);
  }
}

// Rows of one group mostly have the same t.
int32_t StepDriver::time_of(int32_t group, double t) {
  int32_t& last = last_time_[group];
  if (last >= 0 && times[last].t == t) return last;
  last = static_cast<int32_t>(times.size());
  times.push_back(info_of(rule).at(groups[group], t));
  return last;
}

void StepDriver::begin() {
  for (Device& device : devices_)
    if (device.live) device.kernels->begin(*this);
}

bool StepDriver::can_leave_host() const {
  bool any = false;
  for (const Device& device : devices_) {
    if (device.live && !device.async) return false;
    any |= device.live;
  }
  return any;
}

bool StepDriver::is_capturing() const {
  for (const Device& device : devices_)
    if (device.live && device.async && device.async->is_capturing()) return true;
  return false;
}

double StepDriver::norm(const StepScalars& scalars) {
  double accumulated = 0;
  for (const Device& device : devices_)
    if (device.live && device.async) device.kernels->measure(*this, scalars);
  for (const Device& device : devices_)
    if (device.live && !device.async) device.kernels->measure(*this, scalars);  // while the others are at work
  for (const Device& device : devices_)
    if (device.live) accumulated = norm_combine(scalars.norm_type, accumulated, device.kernels->measured(scalars));
  return accumulated;
}

std::pair<int64_t, int64_t> StepDriver::first_nonfinite() const {
  std::pair<int64_t, int64_t> first = {-1, -1};
  for (const Device& device : devices_) {
    if (!device.live) continue;
    const auto here = device.kernels->first_nonfinite();
    if (here.first >= 0 && (first.first < 0 || here.first < first.first)) first = here;
  }
  return first;
}

void StepDriver::step(const StepScalars& scalars) {
  penalty_ = 0;
  for (Device& device : devices_) {
    device.has_numbers = device.live && device.async;
    if (device.live && device.async) device.kernels->step(*this, scalars);
  }
  for (Device& device : devices_) {
    if (!device.live || device.async) continue;
    device.kernels->step(*this, scalars);
    penalty_ += device.kernels->penalty();
  }
}

void StepDriver::measure_without_host(const StepScalars& scalars, bool needs_norm) {
  partials_.clear();
  for (const Device& device : devices_) {
    if (!device.live || !needs_norm) continue;
    device.async->measure(*this, scalars);
    partials_.push_back(device.async->partials());
  }
}

void StepDriver::step_without_host(const StepScalars& scalars) {
  penalty_ = 0;
  bool counts = true;
  for (Device& device : devices_) {
    device.has_numbers = device.live;
    if (!device.live) continue;
    device.async->judge_and_step(*this, scalars, partials_, counts);
    counts = false;
  }
}

std::vector<at::Tensor> StepDriver::numbers() const {
  std::vector<at::Tensor> numbers;
  for (const Device& device : devices_)
    if (device.has_numbers) numbers.push_back(device.async->numbers());
  return numbers;
}

}  // namespace regfused
