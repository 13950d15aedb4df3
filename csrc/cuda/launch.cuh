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

// Whether kernels can have kLargeArguments here.
inline bool has_large_arguments() {
  static const bool has = [] {
    int driver = 0;  // one that does not answer is found out by the first launch
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010 && CUDART_VERSION >= 12010;
  }();
  return has;
}

}  // namespace regfused
