// Every kernel of one instruction set.
#pragma once

#include "../sgd_step.h"

namespace regfused {

struct Kernels {
  const char* isa;
  SgdKernels sgd;
};

}  // namespace regfused
