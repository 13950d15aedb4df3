// Runs dropout on a CUDA device.
#include "dropout_drive.h"

#include <c10/core/DeviceGuard.h>

#include "dropout_launch.h"
#include "stream.h"

namespace regfused {

void dropout_on_cuda(const DropoutJob& job, c10::Device device) {
  const c10::DeviceGuard guard(memory_of(device));
  check_cuda(launch_dropout(job, device.index(), current_stream(device)), "launch the dropout kernel");
}

}  // namespace regfused
