// Starts the kernels that pass over a list of tensors on a CUDA device. No torch in here.
#pragma once

#include <cuda_runtime_api.h>

#include "foreach_job.h"

namespace regfused {

// Rows that fit the arguments of a kernel on this machine.
int foreach_room();

// Blocks of a kernel that a device runs at the same time.
[[nodiscard]] cudaError_t foreach_resident_blocks(ForeachPass pass, int device, int& blocks);

// `rows`: job.rows of them, on the host.
[[nodiscard]] cudaError_t launch_foreach(ForeachPass pass, const ForeachJob& job, const ForeachRow* rows, int blocks,
                                         cudaStream_t stream);

}  // namespace regfused
