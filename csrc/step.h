// What a step is made of: tensors cut into one flat list of chunks, and what a kernel is told and reports. No torch in
// here: drivers, kernels and stand-alone tests share it.
#pragma once

#include <cstdint>

#include "chunk.h"
#include "rule/norm_rule.h"
#include "rule/rules.h"
#include "slice_step.h"

namespace regfused {

// One parameter.
struct StepRow {
  void* param = nullptr;
  void* grad = nullptr;  // nullptr: no gradient, this step passes the parameter by
  void* slots[kMostSlots] = {};
  void* steps = nullptr;  // a rule that counts: how many there were before this one, a float or a double
  int64_t numel = 0;
  // Of this step: 1 at the first gradient of the parameter, when what the slots hold is not read. A rule that does not
  // count says 2 later. 0 where the memory of a device has the number.
  double t = 0;
  int32_t group = 0;
  int32_t time = 0;      // an index of the driver's, for the group and t
  int8_t device = 0;     // an index of the driver's
  uint8_t slot_set = 0;  // which slots there are: bit by bit
  DType dtype = DType::float32;
  DType steps_dtype = DType::float32;
  SliceLayout slices;  // of the parameter, along group_dim; where group_l1 != 0
};

// The address of a gradient for StepRow::grad: an empty one has no memory, but its parameter is stepped.
inline void* address_of_grad(void* grad) {
  alignas(16) static char nothing[16];
  return grad ? grad : nothing;
}

// What the group lasso shrinks after a step of this row.
inline SliceTensor slices_of(const StepRow& row, const StepHyper& hyper, const StepLength& length) {
  SliceTensor slices{row.grad ? row.param : nullptr, row.dtype, SliceRule::group_lasso, row.slices, 0, {}};
  slices.bound = length.slot < 0 ? hyper.group_threshold() : hyper.metric_threshold();
  if (length.slot >= 0) slices.metric = hyper.metric(length, row.slots[length.slot]);
  return slices;
}

// What holds for all rows of one step.
struct StepScalars {
  double grad_scale = 1;
  double clip_coef = 1;
  NormType norm_type = NormType::two;
  bool write_unscaled_grad = false;  // torch's AMP contract: leave g / grad_scale in the gradient

  // Where a device takes the whole step without the host: what it makes the clip coefficient of,
  // and decides by whether the step happens.
  bool clips = false;
  double max_norm = 0;
  bool skip_nonfinite = false;
};

// What one chunk contributes to the numbers of a step.
struct StepPartial {
  double norm = 0;     // accumulated, not finished
  double penalty = 0;  // l1*sum|p| + l2*sum(p^2) of the parameters before the step
};

// The numbers of a step, where they lie side by side as doubles.
enum StepRecord { kGradNorm, kClipCoef, kPenalty, kSkipped, kRecordSize };

// The passes over one chunk, compiled once per instruction set.
struct StepKernels {
  void (*norm)(const StepRow&, const Chunk&, const StepHyper&, const StepScalars&, StepPartial&);
  // By the rule.
  void (*step[kRules])(const StepRow&, const Chunk&, const StepHyper&, const StepTime&, const StepScalars&,
                       StepPartial&);
  // After the step: g / grad_scale into the gradient.
  void (*unscale)(const StepRow&, const Chunk&, const StepScalars&);
};

}  // namespace regfused
