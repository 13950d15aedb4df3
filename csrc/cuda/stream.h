// The little of torch's own CUDA side that the driver needs. The tests' emulator has its own.
#pragma once

#include <cuda_runtime_api.h>

#include <ATen/core/Tensor.h>

namespace regfused {

// Where tensors of a device lie.
c10::Device memory_of(c10::Device device);

// torch's current stream on a device.
cudaStream_t current_stream(c10::Device device);

// Tells torch's allocator that the tensor is in use on the current stream of its device, which may be
// another than the one it was allocated on.
void in_use_on_current_stream(const at::Tensor& tensor);

// Raises what the CUDA runtime reports.
void check_cuda(cudaError_t error, const char* operation);

}  // namespace regfused
