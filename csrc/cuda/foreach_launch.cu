// Starts the kernels that pass over a list of tensors on a CUDA device.
#include <cuda_runtime.h>

#include <algorithm>

#include "foreach_kernel.cuh"
#include "foreach_launch.h"
#include "launch.cuh"

namespace regfused {

namespace {

// 64 registers for a thread, as those of the step have: see step_launch.cu.
constexpr int kBlocksPerMultiprocessor = 4;

template <size_t kBytes, ForeachPass kPass>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    foreach_kernel(const __grid_constant__ ForeachArguments<kBytes> arguments) {
  if constexpr (kPass == ForeachPass::norm) foreach_norm(arguments.job, arguments.rows);
  if constexpr (kPass == ForeachPass::penalty) foreach_penalty(arguments.job, arguments.rows);
  if constexpr (kPass == ForeachPass::clip) foreach_clip(arguments.job, arguments.rows);
  if constexpr (kPass == ForeachPass::penalty_gradient) foreach_penalty_gradient(arguments.job, arguments.rows);
}

template <size_t kBytes>
auto kernel_of(ForeachPass pass) {
  switch (pass) {
    case ForeachPass::norm: return foreach_kernel<kBytes, ForeachPass::norm>;
    case ForeachPass::penalty: return foreach_kernel<kBytes, ForeachPass::penalty>;
    case ForeachPass::clip: return foreach_kernel<kBytes, ForeachPass::clip>;
    default: return foreach_kernel<kBytes, ForeachPass::penalty_gradient>;
  }
}

template <size_t kBytes>
[[nodiscard]] cudaError_t launch_with(ForeachPass pass, const ForeachJob& job, const ForeachRow* rows, int blocks,
                                      cudaStream_t stream) {
  ForeachArguments<kBytes> arguments;
  if (job.rows > ForeachArguments<kBytes>::kRows) return cudaErrorInvalidValue;
  arguments.job = job;
  std::copy_n(rows, job.rows, arguments.rows);
  return launch(kernel_of<kBytes>(pass), arguments, blocks, stream);
}

}  // namespace

int foreach_room() {
  return has_large_arguments() ? ForeachArguments<kLargeArguments>::kRows : ForeachArguments<kSmallArguments>::kRows;
}

cudaError_t foreach_resident_blocks(ForeachPass pass, int device, int& blocks) {
  return resident_blocks(kernel_of<kLargeArguments>(pass), device, blocks);
}

cudaError_t launch_foreach(ForeachPass pass, const ForeachJob& job, const ForeachRow* rows, int blocks,
                           cudaStream_t stream) {
  // Small arguments where they do: larger ones take the host longer.
  if (job.rows <= ForeachArguments<kSmallArguments>::kRows)
    return launch_with<kSmallArguments>(pass, job, rows, blocks, stream);
  return launch_with<kLargeArguments>(pass, job, rows, blocks, stream);
}

}  // namespace regfused
