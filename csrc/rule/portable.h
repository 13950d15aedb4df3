// What lets one rule file be compiled by g++ (once per instruction set) and by nvcc.
#pragma once

#include <cmath>

// Rules are always inlined: a function compiled for AVX-512 must never become the one
// copy that the linker keeps for a machine without it. The namespace says the same to
// the linker once more.
#if defined(__CUDACC__)
#define REGFUSED_RULE __host__ __device__ __forceinline__
#else
#define REGFUSED_RULE __attribute__((always_inline)) inline
#endif

#ifndef REGFUSED_ISA
#define REGFUSED_ISA portable
#endif

namespace regfused {
inline namespace REGFUSED_ISA {

// In every rule, T is the type of arithmetic (float or double) and V what one call works on:
// T itself, or a vector of T. Operators and ?: mean the same for both.

// s in every lane. A subtraction, because -0 + 0 would lose the sign of s.
template <class V, class T>
REGFUSED_RULE V splat(T s) {
  return s - V{};
}

// Rounded to nearest on every instruction set and device, so that bits hold. cpu/vector.h has the one of vectors.
template <class V>
REGFUSED_RULE V square_root(V x) {
  return sqrt(x);
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
