// The kernels of the instruction set that is being compiled, as a table.
#pragma once

#include "dropout_kernel.h"
#include "foreach_kernel.h"
#include "kernels.h"
#include "slice_kernel.h"
#include "step_kernel.h"

namespace regfused {
inline namespace REGFUSED_ISA {

const Kernels* kernels() {
#define REGFUSED_NAME_OF(isa) #isa
#define REGFUSED_NAME(isa) REGFUSED_NAME_OF(isa)
  static const Kernels table = {REGFUSED_NAME(REGFUSED_ISA), kStepKernels, kForeachKernels, kDropoutKernel,
                                kSliceKernels};
  return &table;
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
