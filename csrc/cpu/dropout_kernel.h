// Dropout over one chunk, for one instruction set.
#pragma once

#include "../dropout_job.h"
#include "lanes.h"
#include "philox_row.h"

namespace regfused {
inline namespace REGFUSED_ISA {
namespace {

template <class S>
void dropout_dtype(const DropoutJob& job, const Chunk& chunk) {
  static_assert(kLanes == kDropoutRow);
  const DropoutRule<typename Storage<S>::T> rule(job.p);
  const uint64_t key = uint64_t(*job.seed);
  Rows<S> inputs(const_cast<void*>(job.input), chunk), outputs(job.output, chunk);
  const int64_t n = chunk.size;
  for (int64_t i = 0; i < n; i += kLanes) {
    const S* input = inputs.row(i, n);
    S* output = outputs.row(i, n);
    prefetch(input);
    const PhiloxRow random((chunk.begin + i) / kLanes, key);
    for_each_vector<S>([&](auto position, int at) __attribute__((always_inline)) {
      store(output + at, rule(load(input + at), random.template at<S, position.value>()));
    });
    outputs.write_back(i, n);
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
