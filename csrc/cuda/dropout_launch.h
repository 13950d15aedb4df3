// Starts the kernel of dropout on a CUDA device. No torch in here.
#pragma once

#include <cuda_runtime_api.h>

#include "../dropout_job.h"

namespace regfused {

// On the current device. Pointers are to its memory; the host waits for nothing.
[[nodiscard]] cudaError_t launch_dropout(const DropoutJob& job, int device, cudaStream_t stream);

}  // namespace regfused
