// What the threads of a block do together.
#pragma once

#include <new>

#include "limits.h"

// A variable of the block, without a constructor. A macro, because what stands for shared memory
// where a kernel is compiled for the host is no storage class.
#if !defined(REGFUSED_SHARED)
#define REGFUSED_SHARED(Type, name)                                  \
  __shared__ alignas(Type) unsigned char name##_bytes[sizeof(Type)]; \
  Type& name = *reinterpret_cast<Type*>(name##_bytes)
#endif

namespace regfused {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Combines the values of all threads of the block, in an order that is always the same; the result
// is thread 0's. `of_warps` is free again after the next __syncthreads.
template <class Combine>
__device__ __forceinline__ double block_combine(double value, double (&of_warps)[kWarps], const Combine& combine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_down_sync(0xffffffffu, value, distance));
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) value = combine(value, of_warps[warp]);
  return value;
}

// Something that one thread makes for all, and that stays until another is asked for.
template <size_t kBytes>
struct MadeOnce {
  alignas(8) unsigned char bytes[kBytes];

  // `key` tells one from another; `made` is the key of what there is, at first one that no other has.
  // Both must be the same in all threads.
  template <class Made, class Key, class Make>
  __device__ __forceinline__ const Made& get(const Key& key, Key& made, const Make& make) {
    static_assert(sizeof(Made) <= kBytes);
    if (key != made) {
      __syncthreads();  // nobody reads what there is any more
      if (threadIdx.x == 0) new (bytes) Made(make());
      __syncthreads();
      made = key;
    }
    return *reinterpret_cast<const Made*>(bytes);
  }
};

}  // namespace regfused
