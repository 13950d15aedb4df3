// The tensors of one device, and the two passes of a step over them.
#pragma once

#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "step.h"

namespace regfused {

// What a step is to do.
struct StepWork {
  RuleId rule = RuleId::sgd;
  std::vector<StepRow> rows;
  std::vector<StepHyper> groups;
  std::vector<StepTime> times;  // that rows refer to

  // Numbers in the memory of a device, which the host does not wait for: kernels read them there.
  // Undefined where the host knows the number.
  std::vector<at::Tensor> lr;  // one for each group
  at::Tensor grad_scale, found_inf;
};

class StepDevice {
 public:
  virtual ~StepDevice() = default;

  // To be called whenever the rows or their sizes changed: cuts those with this index into chunks.
  virtual void cut(const StepWork& work, int8_t index) = 0;
  // To be called when the gradients of a step are known. Raises what a step can raise.
  virtual void begin(const StepWork& work) = 0;
  // First pass: the norm of h over all rows with a gradient, accumulated but not finished.
  virtual void measure(const StepWork& work, const StepScalars& scalars) = 0;
  virtual double measured(const StepScalars& scalars) = 0;
  // After measured(): the first and the last row among which the first non-finite contribution is, or -1, -1.
  virtual std::pair<int64_t, int64_t> first_nonfinite() const = 0;
  // Second pass: the update.
  virtual void step(const StepWork& work, const StepScalars& scalars) = 0;
  // l1*sum|p| + l2*sum(p^2) before the last step() that was the host's to decide on.
  virtual double penalty() const = 0;
};

// A device that works while the host goes on, and can judge the norm by itself. It counts the steps of its rows.
class StepAsyncDevice : public StepDevice {
 public:
  virtual bool is_capturing() const = 0;
  // After measure(): what was measured, in the memory of the device.
  virtual at::Tensor partials() const = 0;
  // The whole of the second pass: clip coefficient and verdict from the partials of all devices. `counts`: whether a
  // skipped step is to be counted here.
  virtual void judge_and_step(const StepWork& work, const StepScalars& scalars,
                              const std::vector<at::Tensor>& partials_of_all, bool counts) = 0;
  // A StepRecord of the last step, in the memory of the device; skipped steps are counted since the beginning.
  virtual at::Tensor numbers() const = 0;
};

}  // namespace regfused
