// Sums and norms of many elements, as the threads of a block take them.
#pragma once

#include <cfloat>

#include "../rule/norm_rule.h"
#include "block.cuh"

namespace regfused {

// share.template operator()<A>(): what this thread adds up, accumulated in A, none of it negative.
//
// In the type of arithmetic T, as this is fast on every card; where that overflows, though no element
// is infinite, or where it loses digits, once more in double. (A sum of 0 may have lost squares of
// elements below 1e-22: nothing beside the 1e-6 that is added to a norm.)
template <class T, class Share>
__device__ __forceinline__ double exact_sum(const Share& share) {
  const T fast = share.template operator()<T>();
  const bool exact = fast == 0 || (fast >= 1e-30f && fast <= FLT_MAX) || fast != fast;
  if (sizeof(T) == sizeof(double) || exact) return fast;
  return share.template operator()<double>();
}

// The norm that partial norms add up to, in a fixed order, the same bits in every block; thread 0's.
__device__ __forceinline__ double gathered_norm(const double* partials, int count, NormType type,
                                                double (&of_warps)[kWarps]) {
  double accumulated = 0;
  for (int i = int(threadIdx.x); i < count; i += kThreads) accumulated = norm_combine(type, accumulated, partials[i]);
  accumulated = block_combine(accumulated, of_warps, [&](double a, double b) { return norm_combine(type, a, b); });
  return norm_finish(type, accumulated);
}

}  // namespace regfused
