// Runs dropout on a CUDA device.
#pragma once

#include <c10/core/Device.h>

#include "../dropout_job.h"

namespace regfused {

// On torch's current stream of the device.
void dropout_on_cuda(const DropoutJob& job, c10::Device device);

}  // namespace regfused
