// Starts the kernel of dropout on a CUDA device.
#include "dropout_launch.h"

#include <cuda_runtime.h>

#include "dropout_kernel.cuh"
#include "launch.cuh"

namespace regfused {

namespace {

// Blocks of 256 threads that a multiprocessor has room for. A thread has four accesses of 16 bytes in flight.
constexpr int kBlocksPerMultiprocessor = 4;

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dropout_kernel(const __grid_constant__ DropoutJob job) {
  drop_out<S>(job);
}

template <class S>
[[nodiscard]] cudaError_t launch_for(const DropoutJob& job, int multiprocessors, cudaStream_t stream) {
  const int64_t rows = (job.numel + kDropoutRow - 1) / kDropoutRow;
  const int64_t needed = (rows * kDropoutThreads<S> + kThreads - 1) / kThreads;
  const int64_t resident = int64_t(multiprocessors) * kBlocksPerMultiprocessor;
  return launch(dropout_kernel<S>, job, static_cast<int>(needed < resident ? needed : resident), stream);
}

}  // namespace

cudaError_t launch_dropout(const DropoutJob& job, int device, cudaStream_t stream) {
  int multiprocessors = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return error;
  switch (job.dtype) {
    case DType::float32: return launch_for<float>(job, multiprocessors, stream);
    case DType::float64: return launch_for<double>(job, multiprocessors, stream);
    case DType::bfloat16: return launch_for<__nv_bfloat16>(job, multiprocessors, stream);
    case DType::float16: return launch_for<__half>(job, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace regfused
