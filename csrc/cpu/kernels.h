// Every kernel of one instruction set.
#pragma once

#include "../dropout_job.h"
#include "../foreach.h"
#include "../slice_step.h"
#include "../step.h"

namespace regfused {

struct Kernels {
  const char* isa;
  StepKernels step;
  ForeachKernels foreach;
  DropoutKernel dropout;
  SliceKernels slice;
};

}  // namespace regfused
