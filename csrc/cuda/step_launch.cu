// Starts the kernels of an SGD step on a CUDA device.
#include <cuda_runtime.h>

#include <cstring>

#include "launch.cuh"
#include "step_kernel.cuh"
#include "step_launch.h"

namespace regfused {

namespace {

// Blocks of 256 threads on a multiprocessor, at least. With 4 a thread has 64 registers, and three
// accesses of 16 bytes are in flight for each of 1024 threads: by Little's law, not by measurement,
// about twice what hides the latency of an H100's memory. float64 does not fit 64 registers, and so
// has kernels of its own.
template <bool kDoubles>
constexpr int kBlocksPerMultiprocessor = kDoubles ? 2 : 4;

template <size_t kBytes, bool kDoubles>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<kDoubles>)
    step_norm_kernel(const __grid_constant__ StepArguments<kBytes> arguments) {
  step_norm<kDoubles>(arguments.job, StepEach(arguments.job, arguments.each));
}

template <size_t kBytes, bool kDoubles>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<kDoubles>)
    step_kernel(const __grid_constant__ StepArguments<kBytes> arguments) {
  step_update<kDoubles>(arguments.job, StepEach(arguments.job, arguments.each));
}

template <size_t kBytes>
struct UploadArguments {
  uint64_t* to;
  int64_t words;
  uint64_t from[(kBytes - 16) / 8];
};
static_assert(sizeof(UploadArguments<kLargeArguments>) <= kLargeArguments);

template <size_t kBytes>
__global__ void __launch_bounds__(kThreads) upload_kernel(const __grid_constant__ UploadArguments<kBytes> arguments) {
  for (int i = int(threadIdx.x); i < arguments.words; i += kThreads) arguments.to[i] = arguments.from[i];
}

template <size_t kBytes>
[[nodiscard]] cudaError_t launch_with(void (*kernel)(StepArguments<kBytes>), const StepJob& job,
                                      const unsigned char* each, size_t bytes, int blocks, cudaStream_t stream) {
  StepArguments<kBytes> arguments;
  arguments.job = job;
  if (!job.each) {
    if (bytes > sizeof arguments.each) return cudaErrorInvalidValue;
    std::memcpy(arguments.each, each, bytes);
  }
  return launch(kernel, arguments, blocks, stream);
}

template <size_t kBytes>
auto kernel_of(StepPass pass, bool doubles) {
  if (pass == StepPass::norm) return doubles ? step_norm_kernel<kBytes, true> : step_norm_kernel<kBytes, false>;
  return doubles ? step_kernel<kBytes, true> : step_kernel<kBytes, false>;
}

}  // namespace

std::string step_cuda_built() {
  const int version = CUDART_VERSION;
  std::string built = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
#if defined(__CUDA_ARCH_LIST__)
  const int architectures[] = {__CUDA_ARCH_LIST__};
  built += ":";
  for (const int architecture : architectures) built += " sm_" + std::to_string(architecture / 10);
#endif
  return built;
}

size_t step_room_for_each() {
  return has_large_arguments() ? StepArguments<kLargeArguments>::kRoom : StepArguments<kSmallArguments>::kRoom;
}

cudaError_t step_resident_blocks(StepPass pass, int device, bool doubles, int& blocks) {
  return resident_blocks(kernel_of<kLargeArguments>(pass, doubles), device, blocks);
}

cudaError_t launch_step(StepPass pass, const StepJob& job, const unsigned char* each, size_t bytes, bool doubles,
                        int blocks, cudaStream_t stream) {
  // Small arguments where they do: larger ones take the host longer.
  if (job.each || bytes <= StepArguments<kSmallArguments>::kRoom)
    return launch_with(kernel_of<kSmallArguments>(pass, doubles), job, each, bytes, blocks, stream);
  return launch_with(kernel_of<kLargeArguments>(pass, doubles), job, each, bytes, blocks, stream);
}

namespace {

template <size_t kBytes>
[[nodiscard]] cudaError_t upload_pieces(uint64_t* to, const unsigned char* from, size_t bytes, cudaStream_t stream) {
  UploadArguments<kBytes> arguments;
  for (size_t done = 0; done < bytes; done += sizeof arguments.from) {
    const size_t now = bytes - done < sizeof arguments.from ? bytes - done : sizeof arguments.from;
    arguments.to = to + done / 8;
    arguments.words = static_cast<int64_t>(now / 8);
    std::memcpy(arguments.from, from + done, now);
    if (const cudaError_t error = launch(upload_kernel<kBytes>, arguments, 1, stream)) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t upload(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (bytes % 8 != 0) return cudaErrorInvalidValue;
  auto* words = static_cast<uint64_t*>(to);
  const auto* host = static_cast<const unsigned char*>(from);
  if (bytes > kSmallArguments && has_large_arguments())
    return upload_pieces<kLargeArguments>(words, host, bytes, stream);
  return upload_pieces<kSmallArguments>(words, host, bytes, stream);
}

}  // namespace regfused
