// Storage types on a CUDA device: conversion, and access to 16 bytes at once. The only place that
// knows dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "../chunk.h"

namespace regfused {

// The type of arithmetic for a storage type.
template <class S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class S>
using Arithmetic = typename ArithmeticOf<S>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// To nearest, ties to even.
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }

// A pointer that was read from a table, as one into global memory: the compiler does not see that by
// itself, and would access it through the generic address space.
template <class S>
__device__ __forceinline__ S* in_global_memory(void* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return static_cast<S*>(pointer);
}

// function.template operator()<S>() for the storage type S. Without kDoubles no tensor is float64.
template <bool kDoubles, class Function>
__device__ __forceinline__ void by_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32: return function.template operator()<float>();
    case DType::float64:
      if constexpr (kDoubles) function.template operator()<double>();
      return;
    case DType::bfloat16: return function.template operator()<__nv_bfloat16>();
    case DType::float16: return function.template operator()<__half>();
  }
}

constexpr int kAccessBytes = 16;

// Elements that fill one access.
template <class S>
constexpr int kPerAccess = kAccessBytes / int(sizeof(S));

// N consecutive elements: one, or as many as fill one access; then they must lie at a multiple of
// its size.
template <class S, int N>
struct Pack {
  S at[N];

  __device__ __forceinline__ void load(const S* from) {
    if constexpr (N * sizeof(S) == kAccessBytes) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from);
      memcpy(at, &bits, sizeof bits);
    } else {
      static_assert(N == 1);
      at[0] = *from;
    }
  }
  __device__ __forceinline__ void store(S* to) const {
    if constexpr (N * sizeof(S) == kAccessBytes) {
      uint4 bits;
      memcpy(&bits, at, sizeof bits);
      *reinterpret_cast<uint4*>(to) = bits;
    } else {
      static_assert(N == 1);
      *to = at[0];
    }
  }
};

// Elements before the first one that lies at a multiple of the access size, of n.
template <class S>
__device__ __forceinline__ int elements_before_aligned(const S* array, int n) {
  const int past = int(reinterpret_cast<uintptr_t>(array) % kAccessBytes);
  const int before = past ? (kAccessBytes - past) / int(sizeof(S)) : 0;
  return before < n ? before : n;
}

template <class S>
__device__ __forceinline__ bool same_alignment(const S* a, const S* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % kAccessBytes == 0;
}

// Consecutive elements of an array of n that fill one access: those from i on. Some of the first and of the last pack
// may lie outside of the array.
struct PackPlace {
  int i, n;
  bool whole;  // all are there, at a multiple of the access size

  __device__ __forceinline__ bool has(int j) const { return unsigned(i + j) < unsigned(n); }
};

// What is not there is 0, and is not stored.
template <class S>
struct WidePack {
  S at[kPerAccess<S>];

  __device__ __forceinline__ void load(const S* from, const PackPlace& place) {
    if (place.whole) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + place.i);
      memcpy(at, &bits, sizeof bits);
      return;
    }
#pragma unroll
    for (int j = 0; j < kPerAccess<S>; ++j) at[j] = place.has(j) ? from[place.i + j] : S{};
  }
  __device__ __forceinline__ void store(S* to, const PackPlace& place) const {
    if (place.whole) {
      uint4 bits;
      memcpy(&bits, at, sizeof bits);
      *reinterpret_cast<uint4*>(to + place.i) = bits;
      return;
    }
#pragma unroll
    for (int j = 0; j < kPerAccess<S>; ++j)
      if (place.has(j)) to[place.i + j] = at[j];
  }
};

// body(place) so that the threads of the block cover the elements [0, n) once. `array` is one of those that are
// accessed; `apart`: they are aligned differently, and no access is wide. One body for all of it: it may be large.
template <class S, class Body>
__device__ __forceinline__ void for_each_pack(const S* array, int n, bool apart, const Body& body) {
  constexpr int N = kPerAccess<S>;
  // Packs begin at multiples of the access size, the first one perhaps before the array.
  const int past = int(reinterpret_cast<uintptr_t>(array) % kAccessBytes / sizeof(S));
  for (int i = int(threadIdx.x) * N - past; i < n; i += kThreads * N)
    body(PackPlace{i, n, !apart && i >= 0 && i + N <= n});
}

// Calls body.template operator()<N>(i) so that some threads, of which this one is the `thread`-th, cover the
// elements [0, n) once: N = kPerAccess where all arrays can be accessed 16 bytes at once, N = 1 for the
// ends that are left, and for everything where the arrays are `apart`, that is, aligned differently.
// `array` is one of them.
template <class S, class Body>
__device__ __forceinline__ void for_each_access_of(int thread, int threads, const S* array, int n, bool apart,
                                                   const Body& body) {
  constexpr int N = kPerAccess<S>;
  const int head = apart ? n : elements_before_aligned(array, n);
  const int tail = head + (n - head) / N * N;
  for (int i = thread; i < head; i += threads) body.template operator()<1>(i);
  for (int i = head + thread * N; i < tail; i += threads * N) body.template operator()<N>(i);
  for (int i = tail + thread; i < n; i += threads) body.template operator()<1>(i);
}

// The same for all threads of the block.
template <class S, class Body>
__device__ __forceinline__ void for_each_access(const S* array, int n, bool apart, const Body& body) {
  for_each_access_of(int(threadIdx.x), int(blockDim.x), array, n, apart, body);
}

}  // namespace regfused
