// The little of torch's own CUDA side that the driver needs.
#include "stream.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>

namespace regfused {

c10::Device memory_of(c10::Device device) { return device; }

cudaStream_t current_stream(c10::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }

void in_use_on_current_stream(const at::Tensor& tensor) {
  c10::cuda::CUDACachingAllocator::recordStream(tensor.storage().data_ptr(),
                                                c10::cuda::getCurrentCUDAStream(tensor.device().index()));
}

void check_cuda(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that does not stick must not meet the next call
  TORCH_CHECK(false, "regfused: CUDA refused to ", operation, ": ", cudaGetErrorString(error));
}

}  // namespace regfused
