// Starts the kernels of an SGD step on a CUDA device. No torch in here.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "step_job.h"

namespace regfused {

// Toolkit and architectures that the kernels were built for.
std::string step_cuda_built();

// Bytes of `each` (see StepJob) that fit the arguments of a kernel on this machine.
size_t step_room_for_each();

enum class StepPass { norm, step };

// Blocks of a kernel that the current device runs at the same time. `doubles`: whether a tensor is float64.
[[nodiscard]] cudaError_t step_resident_blocks(StepPass pass, int device, bool doubles, int& blocks);

// `each`: what goes behind the job, on the host; of no meaning where job.each is set.
[[nodiscard]] cudaError_t launch_step(StepPass pass, const StepJob& job, const unsigned char* each, size_t bytes,
                                      bool doubles, int blocks, cudaStream_t stream);

// Copies `bytes` (a multiple of 8) from the host to the device inside the arguments of kernels: the
// host's memory is free again at once, nothing waits, and a CUDA graph keeps what it was given.
[[nodiscard]] cudaError_t upload(void* to, const void* from, size_t bytes, cudaStream_t stream);

}  // namespace regfused
