// Runs an SGD step over the tensors of all devices: one norm over all, then the update.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "step.h"

namespace regfused {

// What a step is to do.
struct StepWork {
  std::vector<StepRow> tensors;
  std::vector<SgdHyper> groups;

  // Numbers in the memory of a device, which the host does not wait for: kernels read them there.
  // Undefined where the host knows the number.
  std::vector<at::Tensor> lr;  // one for each group
  at::Tensor grad_scale, found_inf;
};

// What a step adds up to.
struct StepTotals {
  double penalty = 0;
  double zeros = 0;
  double numel = 0;  // elements of the tensors that were stepped
};

// The tensors of one device, and the two passes over them.
class StepDevice {
 public:
  virtual ~StepDevice() = default;

  // To be called whenever the tensors or their sizes changed: cuts those with this index into chunks.
  virtual void cut(const StepWork& work, int8_t index) = 0;
  // To be called when the gradients of a step are known. Raises what a step can raise.
  virtual void begin(const StepWork& work) = 0;
  // First pass: the norm of h over all tensors with a gradient, accumulated but not finished.
  virtual void measure(const StepWork& work, const StepScalars& scalars) = 0;
  virtual double measured(const StepScalars& scalars) = 0;
  // After measured(): the first and the last tensor among which the first non-finite contribution is, or -1, -1.
  virtual std::pair<int64_t, int64_t> first_nonfinite() const = 0;
  // Second pass: the update.
  virtual void step(const StepWork& work, const StepScalars& scalars) = 0;
  // Of the last step() that was the host's to decide on.
  virtual StepTotals totals() const = 0;
};

// A device that works while the host goes on, and can judge the norm by itself.
class StepAsyncDevice : public StepDevice {
 public:
  virtual bool is_capturing() const = 0;
  // After measure(): what was measured, in the memory of the device.
  virtual at::Tensor partials() const = 0;
  // The whole of the second pass: clip coefficient and verdict from the partials of all devices. `counts`: whether a
  // skipped step is to be counted here.
  virtual void judge_and_step(const StepWork& work, const StepScalars& scalars,
                              const std::vector<at::Tensor>& partials_of_all, bool counts) = 0;
  // An StepRecord of the last step, in the memory of the device; skipped steps are counted since the beginning.
  virtual at::Tensor numbers() const = 0;
};

class StepDriver : public StepWork {
 public:
  // For StepRow::device.
  int8_t index_of(c10::Device device);
  // To be called whenever the tensors or their sizes changed.
  void cut();
  // To be called when the gradients of a step are known: which devices take part.
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
  StepTotals totals() const { return totals_; }
  std::vector<at::Tensor> numbers() const;

 private:
  struct Slot {
    c10::Device device;
    std::unique_ptr<StepDevice> kernels;
    StepAsyncDevice* async;    // the same, or null
    bool live = false;         // in this step
    bool has_numbers = false;  // of the last step
  };
  std::vector<Slot> slots_;
  StepTotals totals_;
  std::vector<at::Tensor> partials_;  // of all devices, between both passes without the host
};

}  // namespace regfused
