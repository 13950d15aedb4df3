// Starts the kernels that shrink slices on a CUDA device.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "launch.cuh"
#include "slice_kernel.cuh"
#include "slice_launch.h"

namespace regfused {

namespace {

// Blocks of 256 threads on a multiprocessor, at least: 64 registers for a thread, 128 where a tensor is float64.
template <bool kDoubles>
constexpr int kBlocksPerMultiprocessor = kDoubles ? 2 : 4;

// A block takes more than one piece only where there are more pieces than this.
constexpr int64_t kMostBlocks = int64_t(1) << 20;

template <size_t kBytes, bool kDoubles>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<kDoubles>)
    slice_measure_kernel(const __grid_constant__ SliceArguments<kBytes> arguments) {
  slice_measure<kDoubles>(SliceTensors(arguments.job, arguments.tensors));
}

// Sums of as many columns as one access has need more than 64 registers in any type.
template <size_t kBytes, bool kDoubles>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<true>)
    slice_sum_kernel(const __grid_constant__ SliceArguments<kBytes> arguments) {
  slice_sum<kDoubles>(SliceTensors(arguments.job, arguments.tensors));
}

template <size_t kBytes>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<false>)
    slice_factor_kernel(const __grid_constant__ SliceArguments<kBytes> arguments) {
  slice_factors(SliceTensors(arguments.job, arguments.tensors));
}

template <size_t kBytes, bool kDoubles>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<kDoubles>)
    slice_scale_kernel(const __grid_constant__ SliceArguments<kBytes> arguments) {
  slice_scale<kDoubles>(SliceTensors(arguments.job, arguments.tensors));
}

template <size_t kBytes, bool kDoubles>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<true>)
    slice_shrink_kernel(const __grid_constant__ SliceArguments<kBytes> arguments) {
  slice_shrink<kDoubles>(SliceTensors(arguments.job, arguments.tensors));
}

template <size_t kBytes>
[[nodiscard]] cudaError_t launch_pass(SlicePass pass, const SliceJob& job, const SliceDeviceTensor* tensors,
                                      bool doubles, cudaStream_t stream) {
  SliceArguments<kBytes> arguments;
  const size_t bytes = job.tensor_count * sizeof(SliceDeviceTensor);
  if (bytes > sizeof arguments.tensors) return cudaErrorInvalidValue;
  arguments.job = job;
  std::memcpy(arguments.tensors, tensors, bytes);
  void (*kernel)(SliceArguments<kBytes>) = slice_factor_kernel<kBytes>;
  if (pass == SlicePass::measure)
    kernel = doubles ? slice_measure_kernel<kBytes, true> : slice_measure_kernel<kBytes, false>;
  if (pass == SlicePass::sum) kernel = doubles ? slice_sum_kernel<kBytes, true> : slice_sum_kernel<kBytes, false>;
  if (pass == SlicePass::scale) kernel = doubles ? slice_scale_kernel<kBytes, true> : slice_scale_kernel<kBytes, false>;
  if (pass == SlicePass::shrink)
    kernel = doubles ? slice_shrink_kernel<kBytes, true> : slice_shrink_kernel<kBytes, false>;
  const int64_t blocks = pass == SlicePass::factors ? job.makers : job.pieces;
  return launch(kernel, arguments, static_cast<int>(std::min(blocks, kMostBlocks)), stream);
}

}  // namespace

size_t slice_tensors_of_launch() {
  return has_large_arguments() ? SliceArguments<kLargeArguments>::kTensors : SliceArguments<kSmallArguments>::kTensors;
}

cudaError_t launch_slices(SlicePass pass, const SliceJob& job, const SliceDeviceTensor* tensors, bool doubles,
                          cudaStream_t stream) {
  // Small arguments where they do: larger ones take the host longer.
  if (size_t(job.tensor_count) <= SliceArguments<kSmallArguments>::kTensors)
    return launch_pass<kSmallArguments>(pass, job, tensors, doubles, stream);
  return launch_pass<kLargeArguments>(pass, job, tensors, doubles, stream);
}

}  // namespace regfused
