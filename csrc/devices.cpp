// Which devices have kernels: the one place that knows whether CUDA was built.
#include "devices.h"

#include "cpu/dropout_drive.h"
#include "cpu/foreach_drive.h"
#include "cpu/slice_drive.h"
#include "cpu/step_drive.h"
#if defined(REGFUSED_CUDA)
#include "cuda/dropout_drive.h"
#include "cuda/foreach_drive.h"
#include "cuda/slice_drive.h"
#include "cuda/step_drive.h"
#include "cuda/step_launch.h"
#endif

namespace regfused {

namespace {

void shrink_slices_on_cpu(const std::vector<SliceTensor>& tensors) {
  SlicesOnCpu slices;
  slices.clear();
  for (const SliceTensor& tensor : tensors) slices.add(tensor);
  slices.shrink();
}

}  // namespace

#if defined(REGFUSED_CUDA)

bool has_kernels(c10::Device device) { return device.is_cpu() || device.is_cuda(); }

const char* where_kernels_run() { return "on the CPU or a CUDA device"; }

std::unique_ptr<StepDevice> make_step_device(c10::Device device) {
  if (device.is_cuda()) return std::make_unique<StepOnCuda>(device);
  return std::make_unique<StepOnCpu>();
}

std::unique_ptr<ForeachDevice> make_foreach_device(c10::Device device) {
  if (device.is_cuda()) return std::make_unique<ForeachOnCuda>(device);
  return std::make_unique<ForeachOnCpu>();
}

void run_dropout(const DropoutJob& job, c10::Device device) {
  if (device.is_cuda()) return dropout_on_cuda(job, device);
  dropout_on_cpu(job);
}

void shrink_slices(c10::Device device, const std::vector<SliceTensor>& tensors) {
  if (device.is_cuda()) return shrink_slices_on_cuda(device, tensors);
  shrink_slices_on_cpu(tensors);
}

std::string cuda_built() { return step_cuda_built(); }

#else

bool has_kernels(c10::Device device) { return device.is_cpu(); }

const char* where_kernels_run() { return "on the CPU"; }

std::unique_ptr<StepDevice> make_step_device(c10::Device) { return std::make_unique<StepOnCpu>(); }

std::unique_ptr<ForeachDevice> make_foreach_device(c10::Device) { return std::make_unique<ForeachOnCpu>(); }
void run_dropout(const DropoutJob& job, c10::Device) { dropout_on_cpu(job); }
void shrink_slices(c10::Device, const std::vector<SliceTensor>& tensors) { shrink_slices_on_cpu(tensors); }

std::string cuda_built() { return ""; }

#endif

c10::Device kernel_device(const at::Tensor& tensor) { return tensor.device(); }

bool is_asynchronous(c10::Device device) { return !device.is_cpu(); }

}  // namespace regfused
