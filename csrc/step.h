// What one SGD step is made of: tensors cut into one flat list of chunks, and what a kernel is
// told and reports. No torch in here: drivers, kernels and stand-alone tests share it.
#pragma once

#include <cstdint>

#include "chunk.h"
#include "rule/norm_rule.h"
#include "rule/sgd_rule.h"
#include "slice_step.h"

namespace regfused {

struct StepRow {
  void* param = nullptr;
  void* grad = nullptr;             // nullptr: no gradient, this step passes the tensor by
  void* momentum_buffer = nullptr;  // nullptr: a step without momentum
  int64_t numel = 0;
  int32_t group = 0;
  int8_t device = 0;  // an index of the driver's
  DType dtype = DType::float32;
  SliceLayout slices;  // of the parameter, along group_dim; where group_l1 != 0
  bool first = false;  // the first gradient of this parameter: what the buffer holds is not read as b
};

// What the group lasso shrinks after a step of this tensor.
inline SliceTensor slices_of(const StepRow& tensor, const SgdHyper& hyper) {
  return {tensor.grad ? tensor.param : nullptr, tensor.dtype, SliceRule::group_lasso, tensor.slices,
          hyper.lr * hyper.group_l1};
}

// What holds for all tensors of one step.
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
  int64_t zeros = 0;   // exact zeros among the parameters after the step
};

// The numbers of a step, where they lie side by side as doubles.
enum StepRecord {
  kGradNorm,
  kClipCoef,
  kPenalty,
  kZeros,  // exact zeros
  kNumel,  // elements of the tensors that were stepped
  kSkipped,
  kRecordSize
};

// The two passes over one chunk, compiled once per instruction set.
struct StepKernels {
  void (*norm)(const StepRow&, const Chunk&, const SgdHyper&, const StepScalars&, StepPartial&);
  void (*step)(const StepRow&, const Chunk&, const SgdHyper&, const StepScalars&, StepPartial&);
};

}  // namespace regfused
