// Starting a kernel.
#pragma once

#include <cuda_runtime.h>

#include "limits.h"

namespace regfused {

template <class Arguments>
[[nodiscard]] inline cudaError_t launch(void (*kernel)(Arguments), const Arguments& arguments, int blocks,
                                        cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

// Blocks of a kernel that a device runs at the same time.
template <class Arguments>
[[nodiscard]] inline cudaError_t resident_blocks(void (*kernel)(Arguments), int device, int& blocks) {
  int multiprocessors = 0, of_each = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, kThreads, 0))
    return error;
  blocks = multiprocessors * of_each;
  return cudaSuccess;
}

// Whether kernels can have kLargeArguments here.
inline bool has_large_arguments() {
  static const bool has = [] {
    int driver = 0;  // one that does not answer is found out by the first launch
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010 && CUDART_VERSION >= 12010;
  }();
  return has;
}

}  // namespace regfused
