// The emulator's side of csrc/devices.h and csrc/cuda/stream.h: tensors on the CPU are stepped by CUDA
// kernels, which run on the host.
#include <cstdlib>

#include "cuda/dropout_drive.h"
#include "cuda/foreach_drive.h"
#include "cuda/slice_drive.h"
#include "cuda/step_drive.h"
#include "cuda/stream.h"
#include "devices.h"

namespace regfused {

bool has_kernels(c10::Device device) { return device.is_cpu(); }

const char* where_kernels_run() { return "on the CPU"; }

bool is_asynchronous(c10::Device) { return true; }

// REGFUSED_EMULATED_DEVICES=2: tensors with an odd number of elements are on another device.
c10::Device kernel_device(const at::Tensor& tensor) {
  const char* devices = std::getenv("REGFUSED_EMULATED_DEVICES");
  const bool second = devices && std::atoi(devices) == 2 && tensor.numel() % 2 == 1;
  return c10::Device(c10::kCUDA, second ? 1 : 0);
}

std::unique_ptr<StepDevice> make_step_device(c10::Device device) { return std::make_unique<StepOnCuda>(device); }

std::unique_ptr<ForeachDevice> make_foreach_device(c10::Device device) {
  return std::make_unique<ForeachOnCuda>(device);
}
void run_dropout(const DropoutJob& job, c10::Device device) { dropout_on_cuda(job, device); }
void shrink_slices(c10::Device device, const std::vector<SliceTensor>& tensors) {
  shrink_slices_on_cuda(device, tensors);
}

std::string cuda_built() { return "emulated"; }

c10::Device memory_of(c10::Device) { return c10::kCPU; }

cudaStream_t current_stream(c10::Device) { return nullptr; }

void in_use_on_current_stream(const at::Tensor&) {}

void check_cuda(cudaError_t error, const char* operation) {
  TORCH_CHECK(error == cudaSuccess, "regfused: CUDA refused to ", operation, ": ", cudaGetErrorString(error));
}

}  // namespace regfused
