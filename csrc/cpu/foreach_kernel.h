// Passes over one chunk of a tensor in a list, for one instruction set.
#pragma once

#include "../foreach.h"
#include "../rule/penalty_rule.h"
#include "lanes.h"

namespace regfused {
inline namespace REGFUSED_ISA {
namespace {

// accumulate(lanes, position, x) for each vector of the chunk. The row that is filled up with zeros adds nothing.
template <class S, class Accumulate>
REGFUSED_RULE double reduce_chunk(const ForeachTensor& tensor, const Chunk& chunk, NormType type,
                                  const Accumulate& accumulate) {
  Rows<S> rows(tensor.data, chunk);
  NormLanes lanes(type);
  const int64_t n = chunk.size;
  for (int64_t i = 0; i < n; i += kLanes) {
    const S* row = rows.row(i, n);
    prefetch(row);
    for_each_vector<S>([&](auto position, int at)
                           __attribute__((always_inline)) { accumulate(lanes, position, load(row + at)); });
  }
  return lanes.total();
}

template <class S>
double norm_of_chunk(const ForeachTensor& tensor, const Chunk& chunk, NormType type) {
  return reduce_chunk<S>(tensor, chunk, type,
                         [](NormLanes& lanes, auto position, auto x)
                             __attribute__((always_inline)) { lanes.template add<position.value>(x); });
}

template <class S>
double penalty_of_chunk(const ForeachTensor& tensor, const Chunk& chunk, double l1, double l2) {
  const ElasticNetValue<typename Storage<S>::T> value(l1, l2);
  // No value is negative, so their sum is a norm of type 1.
  return reduce_chunk<S>(tensor, chunk, NormType::one,
                         [&](NormLanes& lanes, auto position, auto p)
                             __attribute__((always_inline)) { lanes.template add<position.value>(value(p)); });
}

template <class S>
void scale_chunk(const ForeachTensor& tensor, const Chunk& chunk, double factor) {
  const Scale<typename Storage<S>::T> scale(factor);
  Rows<S> rows(tensor.data, chunk);
  const int64_t n = chunk.size;
  for (int64_t i = 0; i < n; i += kLanes) {
    S* __restrict row = rows.row(i, n);
    prefetch(row);
    for_each_vector<S>([&](auto, int at) __attribute__((always_inline)) { store(row + at, scale(load(row + at))); });
    rows.write_back(i, n);
  }
}

template <class S>
void penalty_gradient_chunk(const ForeachTensor& tensor, const Chunk& chunk, double l1, double l2, double gain) {
  using V = typename Storage<S>::V;
  const ElasticNetGradient<typename Storage<S>::T> gradient(0, gain * l1, gain * 2 * l2);
  Rows<S> params(tensor.data, chunk), grads(tensor.out, chunk);
  const int64_t n = chunk.size;
  for (int64_t i = 0; i < n; i += kLanes) {
    const S* __restrict param = params.row(i, n);
    S* __restrict grad = grads.row(i, n);
    prefetch(param);
    for_each_vector<S>([&](auto, int at)
                           __attribute__((always_inline)) { store(grad + at, gradient(V{}, load(param + at))); });
    grads.write_back(i, n);
  }
}

#define REGFUSED_BY_DTYPE(function)                                        \
  [](const ForeachTensor& t, const Chunk& c, auto... arguments) {          \
    switch (t.dtype) {                                                     \
      case DType::float32: return function<float>(t, c, arguments...);     \
      case DType::float64: return function<double>(t, c, arguments...);    \
      case DType::bfloat16: return function<BFloat16>(t, c, arguments...); \
      case DType::float16: return function<Float16>(t, c, arguments...);   \
    }                                                                      \
    __builtin_unreachable();                                               \
  }

constexpr ForeachKernels kForeachKernels = {
    REGFUSED_BY_DTYPE(norm_of_chunk),
    REGFUSED_BY_DTYPE(scale_chunk),
    REGFUSED_BY_DTYPE(penalty_of_chunk),
    REGFUSED_BY_DTYPE(penalty_gradient_chunk),
};
#undef REGFUSED_BY_DTYPE

}  // namespace
}  // namespace REGFUSED_ISA
}  // namespace regfused
