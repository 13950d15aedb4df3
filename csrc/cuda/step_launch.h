// Starts the kernels of a step on a CUDA device. No torch in here.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "step_job.h"

namespace regfused {

// Toolkit and architectures that the kernels were built for.
std::string step_cuda_built();

// Bytes of inputs (see StepJob) that fit the arguments of a kernel on this machine.
size_t step_room_for_inputs();

enum class StepPass { norm, step };

struct StepKernelChoice {
  StepPass pass;
  RuleId rule;   // of the step; the norm is the same for all
  bool doubles;  // whether a row is float64
};

// Blocks of a kernel that the current device runs at the same time.
[[nodiscard]] cudaError_t step_resident_blocks(const StepKernelChoice& choice, int device, int& blocks);

// `inputs`: what goes behind the job, on the host; of no meaning where job.inputs is set.
[[nodiscard]] cudaError_t launch_step(const StepKernelChoice& choice, const StepJob& job, const unsigned char* inputs,
                                      size_t bytes, int blocks, cudaStream_t stream);

// Copies `bytes` (a multiple of 8) from the host to the device inside the arguments of kernels: the
// host's memory is free again at once, nothing waits, and a CUDA graph keeps what it was given.
[[nodiscard]] cudaError_t upload(void* to, const void* from, size_t bytes, cudaStream_t stream);

}  // namespace regfused
