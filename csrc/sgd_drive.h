// Runs an SGD step over the tensors of all devices: one norm over all, then the update.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "sgd_step.h"

namespace regfused {

// What a step is to do.
struct SgdWork {
  std::vector<SgdTensor> tensors;
  std::vector<SgdHyper> groups;

  // Numbers in the memory of a device, which the host does not wait for: kernels read them there.
  // Undefined where the host knows the number.
  std::vector<at::Tensor> lr;  // one for each group
  at::Tensor grad_scale, found_inf;
};

// What a step adds up to.
struct SgdTotals {
  double penalty = 0;
  double zeros = 0;
  double numel = 0;  // elements of the tensors that were stepped
};

// The tensors of one device, and the two passes over them.
class SgdDevice {
 public:
  virtual ~SgdDevice() = default;

  // To be called whenever the tensors or their sizes changed: cuts those with this index into chunks.
  virtual void cut(const SgdWork& work, int8_t index) = 0;
  // To be called when the gradients of a step are known. Raises what a step can raise.
  virtual void begin(const SgdWork& work) = 0;
  // First pass: the norm of h over all tensors with a gradient, accumulated but not finished.
  virtual void measure(const SgdWork& work, const SgdScalars& scalars) = 0;
  virtual double measured(const SgdScalars& scalars) = 0;
  // After measured(): the first and the last tensor among which the first non-finite contribution is, or -1, -1.
  virtual std::pair<int64_t, int64_t> first_nonfinite() const = 0;
  // Second pass: the update.
  virtual void step(const SgdWork& work, const SgdScalars& scalars) = 0;
  // Of the last step() that was the host's to decide on.
  virtual SgdTotals totals() const = 0;
};

// A device that works while the host goes on, and can judge the norm by itself.
class SgdAsyncDevice : public SgdDevice {
 public:
  virtual bool is_capturing() const = 0;
  // After measure(): what was measured, in the memory of the device.
  virtual at::Tensor partials() const = 0;
  // The whole of the second pass: clip coefficient and verdict from the partials of all devices. `counts`: whether a
  // skipped step is to be counted here.
  virtual void judge_and_step(const SgdWork& work, const SgdScalars& scalars,
                              const std::vector<at::Tensor>& partials_of_all, bool counts) = 0;
  // An SgdRecord of the last step, in the memory of the device; skipped steps are counted since the beginning.
  virtual at::Tensor numbers() const = 0;
};

class SgdDriver : public SgdWork {
 public:
  // For SgdTensor::device.
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
  double norm(const SgdScalars& scalars);
  // After norm(): rows among which the first non-finite contribution is, or -1, -1.
  std::pair<int64_t, int64_t> first_nonfinite() const;
  // Second pass, after the host has judged.
  void step(const SgdScalars& scalars);

  // Both passes, judged by the devices. Where nothing needs a norm there is one pass.
  void measure_without_host(const SgdScalars& scalars, bool needs_norm);
  void step_without_host(const SgdScalars& scalars);

  // Of the last step: what the host has, and SgdAsyncDevice::numbers() of every device that took part.
  SgdTotals totals() const { return totals_; }
  std::vector<at::Tensor> numbers() const;

 private:
  struct Slot {
    c10::Device device;
    std::unique_ptr<SgdDevice> kernels;
    SgdAsyncDevice* async;     // the same, or null
    bool live = false;         // in this step
    bool has_numbers = false;  // of the last step
  };
  std::vector<Slot> slots_;
  SgdTotals totals_;
  std::vector<at::Tensor> partials_;  // of all devices, between both passes without the host
};

}  // namespace regfused
