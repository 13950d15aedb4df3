// Dropout over one chunk, for one instruction set.
#pragma once

#include "../dropout_job.h"
#include "dropout_row.h"
#include "lanes.h"

namespace regfused {
inline namespace REGFUSED_ISA {
namespace {

template <class S>
void dropout_dtype(const DropoutJob& job, const Chunk& chunk) {
  constexpr int kHalves = kDropoutRow / kLanes;
  constexpr int kVectors = kLanes * sizeof(typename Storage<S>::T) / REGFUSED_VECTOR_BYTES;
  const DropoutRule<typename Storage<S>::T> rule(job.p);
  const uint64_t seed = uint64_t(*job.seed);
  Rows<S> inputs(const_cast<void*>(job.input), chunk), outputs(job.output, chunk);
  const int64_t n = chunk.size;
  for (int64_t i = 0; i < n; i += kDropoutRow) {
    const DropoutRow random((chunk.begin + i) / kDropoutRow, seed, rule.upper());
    const auto half_row = [&](auto half) __attribute__((always_inline)) {
      const int64_t begin = i + half.value * kLanes;
      if (begin >= n) return;
      const S* input = inputs.row(begin, n);
      S* output = outputs.row(begin, n);
      prefetch(input);
      for_each_vector<S>([&](auto position, int at) __attribute__((always_inline)) {
        constexpr int kPosition = half.value * kVectors + position.value;
        store(output + at, rule(load(input + at), rule.keeps(random.template at<S, kPosition>())));
      });
      outputs.write_back(begin, n);
    };
    static_assert(kHalves == 2);
    half_row(Position<0>{});
    half_row(Position<1>{});
  }
}

constexpr DropoutKernel kDropoutKernel = [](const DropoutJob& job, const Chunk& chunk) {
  switch (job.dtype) {
    case DType::float32: return dropout_dtype<float>(job, chunk);
    case DType::float64: return dropout_dtype<double>(job, chunk);
    case DType::bfloat16: return dropout_dtype<BFloat16>(job, chunk);
    case DType::float16: return dropout_dtype<Float16>(job, chunk);
  }
};

}  // namespace
}  // namespace REGFUSED_ISA
}  // namespace regfused
