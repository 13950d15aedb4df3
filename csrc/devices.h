// Which devices have kernels: the one place that knows whether CUDA was built.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <c10/core/Device.h>

#include "dropout_job.h"
#include "foreach_device.h"
#include "slice_step.h"
#include "step_device.h"

namespace regfused {

bool has_kernels(c10::Device device);

// The device whose kernels step a tensor.
c10::Device kernel_device(const at::Tensor& tensor);

// For messages: "on the CPU", or "on the CPU or a CUDA device".
const char* where_kernels_run();

// Whether work on this device goes on while the host does something else, so that reading a
// number from its memory would make the host wait.
bool is_asynchronous(c10::Device device);

std::unique_ptr<StepDevice> make_step_device(c10::Device device);
std::unique_ptr<ForeachDevice> make_foreach_device(c10::Device device);

void run_dropout(const DropoutJob& job, c10::Device device);

// Shrinks slices of tensors of this device; those of an asynchronous one on its current stream.
void shrink_slices(c10::Device device, const std::vector<SliceTensor>& tensors);

// What of CUDA was built, such as "13.0: sm_80, sm_90", or an empty string.
std::string cuda_built();

}  // namespace regfused
