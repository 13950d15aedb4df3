// Dropout on a CUDA device.
#pragma once

#include "../dropout_job.h"
#include "../dropout_rule.h"
#include "limits.h"
#include "memory.cuh"

namespace regfused {

// Threads that share a row: each has an access in every run of the row, and uses up its counters.
template <class S>
constexpr int kDropoutThreads = kDropoutRun / kPerAccess<S>;

// The random bits of the elements that a thread has in a row: `first` is the first of its counters.
template <class S>
struct DropoutShare {
  static constexpr int kRuns = kDropoutRow / kDropoutRun;
  static constexpr int kCounters = kPerAccess<S> / 2;
  uint32_t words[kCounters][4];

  __device__ __forceinline__ DropoutShare(int64_t first, uint64_t seed, DropoutStream stream) {
#pragma unroll
    for (int c = 0; c < kCounters; ++c) {
      const PhiloxWords<uint64_t> random = dropout_words(uint64_t(first + c), seed, stream);
#pragma unroll
      for (int w = 0; w < 4; ++w) words[c][w] = uint32_t(random.word[w]);
    }
  }
  __device__ __forceinline__ bool any_half_is(uint16_t half) const {
    bool any = false;
#pragma unroll
    for (int c = 0; c < kCounters; ++c)
#pragma unroll
      for (int w = 0; w < 4; ++w) any |= (words[c][w] >> 16) == half || (words[c][w] & 0xffffu) == half;
    return any;
  }
  // Of element j of the access in a run.
  __device__ __forceinline__ uint32_t upper(int run, int j) const {
    return dropout_half(words[j / 2][run / 2 * 2 + j % 2], run);
  }
};

// One access in each run of a row. A row that is not `whole`, or that no access of 16 bytes fits, goes
// element by element; of those, only the ones before `n` are there.
template <class S>
struct DropoutAccesses {
  static constexpr int N = kPerAccess<S>;
  static constexpr int kRuns = kDropoutRow / kDropoutRun;
  Pack<S, N> packs[kRuns];

  __device__ __forceinline__ void load(const S* from, bool wide, int64_t n) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int at = run * kDropoutRun;
      if (wide) {
        packs[run].load(from + at);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (at + j < n) packs[run].at[j] = from[at + j];
      }
    }
  }
  __device__ __forceinline__ void store(S* to, bool wide, int64_t n) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int at = run * kDropoutRun;
      if (wide) {
        packs[run].store(to + at);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (at + j < n) to[at + j] = packs[run].at[j];
      }
    }
  }
};

template <class S>
__device__ __forceinline__ void drop_out(const DropoutJob& job) {
  using T = Arithmetic<S>;
  constexpr int N = kPerAccess<S>, kRuns = kDropoutRow / kDropoutRun;
  const S* input = in_global_memory<const S>(const_cast<void*>(job.input));
  S* output = in_global_memory<S>(job.output);
  const DropoutRule<T> rule(job.p);
  const uint64_t seed = uint64_t(*job.seed);
  const bool aligned =
      reinterpret_cast<uintptr_t>(input) % kAccessBytes == 0 && reinterpret_cast<uintptr_t>(output) % kAccessBytes == 0;
  const int64_t shares = (job.numel + kDropoutRow - 1) / kDropoutRow * kDropoutThreads<S>;
  const int64_t stride = int64_t(gridDim.x) * kThreads;

  for (int64_t share = int64_t(blockIdx.x) * kThreads + threadIdx.x; share < shares; share += stride) {
    const int64_t row = share / kDropoutThreads<S>;
    const int place = int(share % kDropoutThreads<S>);
    const int64_t begin = row * kDropoutRow + place * N;
    const int64_t n = job.numel - begin;
    const bool wide = aligned && (row + 1) * kDropoutRow <= job.numel;
    DropoutAccesses<S> x;
    x.load(input + begin, wide, n);

    const int64_t first = row * kDropoutCounters + place * (N / 2);
    const DropoutShare<S> upper(first, seed, kUpperBits);
    uint32_t bits[kRuns][N];
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
#pragma unroll
      for (int j = 0; j < N; ++j) bits[run][j] = upper.upper(run, j);
    if (upper.any_half_is(rule.upper())) {
      const DropoutShare<S> lower(first, seed, kLowerBits);
#pragma unroll
      for (int run = 0; run < kRuns; ++run)
#pragma unroll
        for (int j = 0; j < N; ++j) bits[run][j] |= lower.upper(run, j) >> 16;
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
#pragma unroll
      for (int j = 0; j < N; ++j) narrow(rule(widen(x.packs[run].at[j]), bits[run][j]), x.packs[run].at[j]);
    x.store(output + begin, wide, n);
  }
}

}  // namespace regfused
