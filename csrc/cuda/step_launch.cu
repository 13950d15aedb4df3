// Starts the kernels of a step on a CUDA device.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "launch.cuh"
#include "step_kernel.cuh"
#include "step_launch.h"

namespace regfused {

namespace {

// Arrays that an element of a rule has: its parameter, its gradient and the slots of the largest set.
template <class R>
constexpr int arrays_of() {
  int arrays = 2;
  for (const unsigned slot_set : R::kSlotSets) arrays = std::max(arrays, 2 + std::popcount(slot_set));
  return arrays;
}

// Blocks of 256 threads on a multiprocessor, at least. With 4 a thread has 64 registers, and three
// accesses of 16 bytes are in flight for each of 1024 threads: by Little's law, not by measurement,
// about twice what hides the latency of an H100's memory. With four arrays or more, 3 blocks (80 registers)
// have as much in flight. float64 does not fit, and so has kernels of its own.
constexpr int blocks_of(int arrays, bool doubles) { return doubles ? 2 : arrays <= 3 ? 4 : 3; }

template <size_t kBytes, bool kDoubles>
__global__ void __launch_bounds__(kThreads, blocks_of(2, kDoubles))
    step_norm_kernel(const __grid_constant__ StepArguments<kBytes> arguments) {
  step_norm<kDoubles>(arguments.job, StepInputs(arguments.job, arguments.inputs));
}

template <size_t kBytes, class R, bool kDoubles>
__global__ void __launch_bounds__(kThreads, blocks_of(arrays_of<R>(), kDoubles))
    step_kernel(const __grid_constant__ StepArguments<kBytes> arguments) {
  step_update<R, kDoubles>(arguments.job, StepInputs(arguments.job, arguments.inputs));
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
                                      const unsigned char* inputs, size_t bytes, int blocks, cudaStream_t stream) {
  StepArguments<kBytes> arguments;
  arguments.job = job;
  if (!job.inputs) {
    if (bytes > sizeof arguments.inputs) return cudaErrorInvalidValue;
    std::memcpy(arguments.inputs, inputs, bytes);
  }
  return launch(kernel, arguments, blocks, stream);
}

template <size_t kBytes>
using StepKernel = void (*)(StepArguments<kBytes>);

template <size_t kBytes>
StepKernel<kBytes> kernel_of(const StepKernelChoice& choice) {
  const bool doubles = choice.doubles;
  if (choice.pass == StepPass::norm) return doubles ? step_norm_kernel<kBytes, true> : step_norm_kernel<kBytes, false>;
  return by_rule(choice.rule, [&]<class R>() -> StepKernel<kBytes> {
    return doubles ? step_kernel<kBytes, R, true> : step_kernel<kBytes, R, false>;
  });
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

size_t step_room_for_inputs() {
  return has_large_arguments() ? StepArguments<kLargeArguments>::kRoom : StepArguments<kSmallArguments>::kRoom;
}

cudaError_t step_resident_blocks(const StepKernelChoice& choice, int device, int& blocks) {
  return resident_blocks(kernel_of<kLargeArguments>(choice), device, blocks);
}

cudaError_t launch_step(const StepKernelChoice& choice, const StepJob& job, const unsigned char* inputs, size_t bytes,
                        int blocks, cudaStream_t stream) {
  // Small arguments where they do: larger ones take the host longer.
  if (job.inputs || bytes <= StepArguments<kSmallArguments>::kRoom)
    return launch_with(kernel_of<kSmallArguments>(choice), job, inputs, bytes, blocks, stream);
  return launch_with(kernel_of<kLargeArguments>(choice), job, inputs, bytes, blocks, stream);
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
