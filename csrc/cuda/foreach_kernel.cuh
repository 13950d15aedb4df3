// Passes over a list of tensors on a CUDA device.
#pragma once

#include "../rule/penalty_rule.h"
#include "foreach_job.h"
#include "memory.cuh"
#include "norm.cuh"

namespace regfused {

// One chunk, as all threads of a block see it.
struct ForeachPlace {
  const ForeachRow& row;
  int64_t begin;
  int size;

  // The last row whose first chunk is not after this one: rows without elements have none.
  __device__ __forceinline__ static int row_of(const ForeachJob& job, const ForeachRow* rows, int chunk) {
    int low = 0, high = job.rows;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (rows[middle].first_chunk <= chunk)
        low = middle;
      else
        high = middle;
    }
    return low;
  }

  __device__ __forceinline__ ForeachPlace(const ForeachJob& job, const ForeachRow* rows, int chunk)
      : row(rows[row_of(job, rows, chunk)]), begin((chunk - row.first_chunk) * job.chunk_size) {
    const int64_t left = row.numel - begin;
    size = int(left < job.chunk_size ? left : job.chunk_size);
  }
  template <class S>
  __device__ __forceinline__ S* data() const {
    return in_global_memory<S>(row.data) + begin;
  }
  template <class S>
  __device__ __forceinline__ S* out() const {
    return in_global_memory<S>(row.out) + begin;
  }
};

// --- Passes that add up ---------------------------------------------------------------------------

// accumulate(accumulated, x) over this thread's elements of a chunk.
template <class A, class S, class Accumulate>
__device__ __forceinline__ A reduce_share(const ForeachPlace& place, const Accumulate& accumulate) {
  const S* __restrict__ data = place.data<S>();
  A accumulated = 0;
  for_each_access(data, place.size, false, [&]<int N>(int i) {
    Pack<S, N> x;
    x.load(data + i);
#pragma unroll
    for (int j = 0; j < N; ++j) accumulated = accumulate(accumulated, widen(x.at[j]));
  });
  return accumulated;
}

// share.template operator()<S>(place): what this thread adds up of a chunk.
template <class Share>
__device__ __forceinline__ void foreach_reduce(const ForeachJob& job, const ForeachRow* rows, NormType type,
                                               const Share& share) {
  struct Shared {
    double of_warps[kWarps];
  };
  REGFUSED_SHARED(Shared, shared);
  for (int span = int(blockIdx.x); span < job.span_count; span += int(gridDim.x)) {
    const int begin = span * job.span;
    const int end = begin + job.span < job.chunk_count ? begin + job.span : job.chunk_count;
    double sum = 0;
    for (int chunk = begin; chunk < end; ++chunk) {
      const ForeachPlace place(job, rows, chunk);
      by_dtype<true>(place.row.dtype,
                     [&]<class S>() { sum = norm_combine(type, sum, share.template operator()<S>(place)); });
    }
    sum = block_combine(sum, shared.of_warps, [&](double a, double b) { return norm_combine(type, a, b); });
    if (threadIdx.x == 0) job.partials[span] = sum;
    __syncthreads();  // of_warps is free again
  }
}

__device__ __forceinline__ void foreach_norm(const ForeachJob& job, const ForeachRow* rows) {
  const NormType type = job.norm_type;
  foreach_reduce(job, rows, type, [&]<class S>(const ForeachPlace& place) {
    return exact_sum<Arithmetic<S>>([&]<class A>() {
      return reduce_share<A, S>(place, [&](A sum, auto x) { return norm_accumulate(type, sum, A(x)); });
    });
  });
}

__device__ __forceinline__ void foreach_penalty(const ForeachJob& job, const ForeachRow* rows) {
  foreach_reduce(job, rows, NormType::one, [&]<class S>(const ForeachPlace& place) {
    const ElasticNetValue<Arithmetic<S>> value(job.l1, job.l2);
    return exact_sum<Arithmetic<S>>(
        [&]<class A>() { return reduce_share<A, S>(place, [&](A sum, auto p) { return sum + A(value(p)); }); });
  });
}

// --- Passes that write ----------------------------------------------------------------------------

// to[i] = rule(from[i]) for a chunk.
template <class S, class Rule>
__device__ __forceinline__ void map_share(const S* from, S* to, int size, const Rule& rule) {
  for_each_access(from, size, !same_alignment(from, to), [&]<int N>(int i) {
    Pack<S, N> x;
    x.load(from + i);
#pragma unroll
    for (int j = 0; j < N; ++j) narrow(rule(widen(x.at[j])), x.at[j]);
    x.store(to + i);
  });
}

__device__ __forceinline__ void foreach_clip(const ForeachJob& job, const ForeachRow* rows) {
  struct Shared {
    double of_warps[kWarps];
    double clip_coef;
  };
  REGFUSED_SHARED(Shared, shared);
  const double norm = gathered_norm(job.gathered, job.gathered_count, job.norm_type, shared.of_warps);
  if (threadIdx.x == 0) {
    shared.clip_coef = clip_coefficient(job.max_norm, norm);
    if (blockIdx.x == 0 && job.norm) *job.norm = norm;
  }
  __syncthreads();
  const double clip_coef = shared.clip_coef;
  if (clip_coef == 1) return;  // every bit stays as it is
  for (int chunk = int(blockIdx.x); chunk < job.chunk_count; chunk += int(gridDim.x)) {
    const ForeachPlace place(job, rows, chunk);
    by_dtype<true>(place.row.dtype, [&]<class S>() {
      S* data = place.data<S>();
      map_share(data, data, place.size, Scale<Arithmetic<S>>(clip_coef));
    });
  }
}

__device__ __forceinline__ void foreach_penalty_gradient(const ForeachJob& job, const ForeachRow* rows) {
  const double gain = job.gain.get();
  for (int chunk = int(blockIdx.x); chunk < job.chunk_count; chunk += int(gridDim.x)) {
    const ForeachPlace place(job, rows, chunk);
    by_dtype<true>(place.row.dtype, [&]<class S>() {
      using T = Arithmetic<S>;
      const ElasticNetGradient<T> gradient(0, gain * job.l1, gain * 2 * job.l2);
      map_share<S>(place.data<S>(), place.out<S>(), place.size, [&](T p) { return gradient(T(0), p); });
    });
  }
}

}  // namespace regfused
