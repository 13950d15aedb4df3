// Dropout on a CUDA device.
#pragma once

#include "../dropout_job.h"
#include "../rule/dropout_rule.h"
#include "limits.h"
#include "memory.cuh"

namespace regfused {

// Threads that share a row: each has an access in every run of the row, and uses up its counters.
template <class S>
constexpr int kDropoutThreads = kDropoutRun / kPerAccess<S>;

constexpr int kDropoutRuns = kDropoutRow / kDropoutRun;  // in a row

// The random bits of the elements of one counter: two neighbours in every run of the row.
struct DropoutBits {
  uint32_t of[kDropoutRuns][2];

  // `upper`: see DropoutRule.
  __device__ __forceinline__ DropoutBits(int64_t counter, uint64_t seed, uint16_t upper) {
    bool matter = false;
    add(dropout_words(uint64_t(counter), seed, kUpperBits), [&](uint32_t& bits, uint32_t half) {
      bits = half;
      matter |= half >> 16 == upper;
    });
    if (matter)
      add(dropout_words(uint64_t(counter), seed, kLowerBits),
          [](uint32_t& bits, uint32_t half) { bits |= half >> 16; });
  }

  template <class Add>
  __device__ __forceinline__ void add(const PhiloxWords<uint64_t>& words, const Add& add) {
#pragma unroll
    for (int run = 0; run < kDropoutRuns; ++run)
#pragma unroll
      for (int j = 0; j < 2; ++j) add(of[run][j], dropout_half(uint32_t(words.word[run / 2 * 2 + j]), run));
  }
};

// A thread's accesses to a row, one in every run. They are kept as pairs of elements, those of one counter, and
// taken apart where they are worked on: elements of 16 bits would fill a register each.
template <class S>
struct DropoutAccesses {
  struct alignas(2 * sizeof(S)) Pair {
    S at[2];
  };
  static constexpr int kPairs = kPerAccess<S> / 2;
  struct alignas(kAccessBytes) Access {
    Pair pairs[kPairs];
  };
  Access of[kDropoutRuns];

  __device__ __forceinline__ void load(const S* from) {
#pragma unroll
    for (int run = 0; run < kDropoutRuns; ++run) of[run] = *reinterpret_cast<const Access*>(from + run * kDropoutRun);
  }
  __device__ __forceinline__ void store(S* to) const {
#pragma unroll
    for (int run = 0; run < kDropoutRuns; ++run) *reinterpret_cast<Access*>(to + run * kDropoutRun) = of[run];
  }
  // Works on the first pair of each run, and moves it behind the others. So a loop over the counters needs not
  // be unrolled, which takes more than 64 registers, and yet no register has a name that varies.
  __device__ __forceinline__ void apply(const DropoutRule<Arithmetic<S>>& rule, const DropoutBits& bits) {
#pragma unroll
    for (int run = 0; run < kDropoutRuns; ++run) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        S& element = of[run].pairs[0].at[j];
        narrow(rule(widen(element), rule.keeps(bits.of[run][j])), element);
      }
      if constexpr (kPairs > 1) {
        const Pair first = of[run].pairs[0];
#pragma unroll
        for (int p = 1; p < kPairs; ++p) of[run].pairs[p - 1] = of[run].pairs[p];
        of[run].pairs[kPairs - 1] = first;
      }
    }
  }
};

// The same, element by element, of which `n` are there: for the last row, and where no access of 16 bytes fits.
template <class S>
__device__ __forceinline__ void drop_out_slowly(const S* input, S* output, int64_t n, int64_t first, uint64_t seed,
                                                const DropoutRule<Arithmetic<S>>& rule) {
#pragma unroll 1
  for (int c = 0; c < kPerAccess<S> / 2; ++c) {
    const DropoutBits bits(first + c, seed, rule.upper());
#pragma unroll
    for (int run = 0; run < kDropoutRuns; ++run)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = run * kDropoutRun + 2 * c + j;
        if (at < n) narrow(rule(widen(input[at]), rule.keeps(bits.of[run][j])), output[at]);
      }
  }
}

template <class S>
__device__ __forceinline__ void drop_out(const DropoutJob& job) {
  constexpr int N = kPerAccess<S>;
  const S* input = in_global_memory<const S>(const_cast<void*>(job.input));
  S* output = in_global_memory<S>(job.output);
  const DropoutRule<Arithmetic<S>> rule(job.p);
  const uint64_t seed = uint64_t(*job.seed);
  const bool aligned =
      reinterpret_cast<uintptr_t>(input) % kAccessBytes == 0 && reinterpret_cast<uintptr_t>(output) % kAccessBytes == 0;
  const int64_t shares = (job.numel + kDropoutRow - 1) / kDropoutRow * kDropoutThreads<S>;
  const int64_t stride = int64_t(gridDim.x) * kThreads;

  for (int64_t share = int64_t(blockIdx.x) * kThreads + threadIdx.x; share < shares; share += stride) {
    const int64_t row = share / kDropoutThreads<S>;
    const int place = int(share % kDropoutThreads<S>);
    const int64_t begin = row * kDropoutRow + place * N;
    const int64_t first = row * kDropoutCounters + place * (N / 2);
    if (!aligned || (row + 1) * kDropoutRow > job.numel) {
      drop_out_slowly(input + begin, output + begin, job.numel - begin, first, seed, rule);
      continue;
    }
    DropoutAccesses<S> x;
    x.load(input + begin);
#pragma unroll 1
    for (int c = 0; c < N / 2; ++c) x.apply(rule, DropoutBits(first + c, seed, rule.upper()));
    x.store(output + begin);
  }
}

}  // namespace regfused
