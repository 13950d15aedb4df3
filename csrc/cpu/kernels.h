// Every kernel of one instruction set.
#pragma once

#include "../dropout_job.h"
#include "../foreach.h"
#include "../sgd_step.h"
#include "../slice_step.h"

namespace regfused {

struct Kernels {
  const char* isa;
  SgdKernels sgd;
  ForeachKernels foreach;
  DropoutKernel dropout;
  SliceKernels slice;
};

}  // namespace regfused
