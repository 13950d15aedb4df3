// Runs dropout over chunks of one array, in parallel, on the CPU.
#include "dropout_drive.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace regfused {

namespace {

constexpr int64_t kChunk = 4096;

// Random words take more time than memory: waking another thread pays earlier than in a pass that only moves data.
constexpr int64_t kSerialChunks = 8;

}  // namespace

void dropout_on_cpu(const DropoutJob& job) {
  const DropoutKernel kernel = choose_kernels()->dropout;
  parallel((job.numel + kChunk - 1) / kChunk, kSerialChunks, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * kChunk;
      kernel(job, {0, static_cast<int32_t>(std::min(kChunk, job.numel - first)), first});
    }
  });
}

}  // namespace regfused
