// Runs dropout over chunks of one array, in parallel, on the CPU.
#pragma once

#include "../dropout_job.h"

namespace regfused {

// The same bits for any number of threads. Cannot fail.
void dropout_on_cpu(const DropoutJob& job);

}  // namespace regfused
