// Runs a step over the tensors of all devices: one norm over all, then the update.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "step_device.h"

namespace regfused {

class StepDriver : public StepWork {
 public:
  // For StepRow::device.
  int8_t index_of(c10::Device device);
  // To be called whenever the rows or their sizes changed.
  void cut();
  // To be called when the gradients of a step are known: which devices take part, and what each row's t means.
  void find_live();
  // Raises what a step can raise.
  void begin();

  // Whether all tensors with a gradient are on devices that can take the step without the host.
  bool can_leave_host() const;
  bool is_capturing() const;

  // First pass, for the host to judge: it waits.
  double norm(const StepScalars& scalars);
  // After norm(): rows among which the first non-finite contribution is, or -1, -1.
  std::pair<int64_t, int64_t> first_nonfinite() const;
  // Second pass, after the host has judged.
  void step(const StepScalars& scalars);

  // Both passes, judged by the devices. Where nothing needs a norm there is one pass.
  void measure_without_host(const StepScalars& scalars, bool needs_norm);
  void step_without_host(const StepScalars& scalars);

  // Of the last step: what the host has, and StepAsyncDevice::numbers() of every device that took part.
  double penalty() const { return penalty_; }
  std::vector<at::Tensor> numbers() const;

 private:
  struct Device {
    c10::Device device;
    std::unique_ptr<StepDevice> kernels;
    StepAsyncDevice* async;    // the same, or null
    bool live = false;         // in this step
    bool has_numbers = false;  // of the last step
  };
  int32_t time_of(int32_t group, double t);

  std::vector<Device> devices_;
  std::vector<int32_t> last_time_;  // of each group
  double penalty_ = 0;
  std::vector<at::Tensor> partials_;  // of all devices, between both passes without the host
};

}  // namespace regfused
