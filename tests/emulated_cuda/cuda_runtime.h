// Stands in for the CUDA toolkit's header of this name where kernels are compiled for the host: the
// language's keywords, and the few functions of the runtime that regfused calls.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

using emulated::blockDim;
using emulated::blockIdx;
using emulated::gridDim;
using emulated::threadIdx;

#define REGFUSED_SHARED(Type, name) Type& name = *static_cast<Type*>(::emulated::shared(sizeof(Type)))
#define __syncthreads() ::emulated::sync_threads(__FILE__, __LINE__)
// The value of one lane: as far down from here as that lane is, or up.
#define __shfl_sync(mask, value, lane) \
  ::emulated::shuffle_down(mask, value, unsigned(lane) - threadIdx.x % 32, __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, distance) ::emulated::shuffle_down(mask, value, distance, __FILE__, __LINE__)

// Blocks run one after another.
#define __threadfence()
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned before = *at;
  *at = before >= last ? 0 : before + 1;
  return before;
}

inline bool __isGlobal(const void*) { return true; }
#define __builtin_assume(condition)

struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDART_VERSION 13000

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

// The arguments are copied, as by a real launch: a captured one is replayed with what it was given.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((0 + ... + sizeof(Parameters)) <= 32764, "a kernel has at most 32,764 bytes of arguments");
  std::function<void()> call = [kernel, ... arguments = Parameters(arguments)] { kernel(arguments...); };
  return cudaError_t(emulated::launch(config->gridDim.x, config->blockDim.x, std::move(call)));
}
