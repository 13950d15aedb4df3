// Starts the kernels that shrink slices on a CUDA device. No torch in here.
#pragma once

#include <cuda_runtime_api.h>

#include "slice_job.h"

namespace regfused {

// How many tensors fit the arguments of a kernel on this machine.
size_t slice_tensors_of_launch();

enum class SlicePass { measure, sum, factors, scale, shrink };

// `tensors`: job.tensor_count of them, on the host. `doubles`: whether one is float64.
[[nodiscard]] cudaError_t launch_slices(SlicePass pass, const SliceJob& job, const SliceDeviceTensor* tensors,
                                        bool doubles, cudaStream_t stream);

}  // namespace regfused
