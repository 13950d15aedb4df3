// The two passes of an SGD step over one chunk, for one instruction set.
#pragma once

#include "../step.h"
#include "lanes.h"

namespace regfused {
inline namespace REGFUSED_ISA {
namespace {

template <class S, bool kPenalty>
void norm_chunk(const StepRow& tensor, const Chunk& chunk, const SgdHyper& hyper, const StepScalars& scalars,
                StepPartial& partial) {
  using T = typename Storage<S>::T;
  const StepGradient<T> gradient(hyper, scalars.grad_scale);
  const StepNormGradient<T> norm_gradient(hyper);
  Rows<S> grads(tensor.grad, chunk), params(tensor.param, chunk);
  NormLanes norm(scalars.norm_type);
  const int64_t n = chunk.size;
  for (int64_t i = 0; i < n; i += kLanes) {
    const S* grad = grads.row(i, n);
    const S* param = kPenalty ? params.row(i, n) : nullptr;
    prefetch(grad);
    if constexpr (kPenalty) prefetch(param);
    for_each_vector<S>([&](auto position, int at) __attribute__((always_inline)) {
      auto h = gradient(load(grad + at));
      if constexpr (kPenalty) h = norm_gradient(h, load(param + at));
      norm.template add<position.value>(h);
    });
  }
  partial.norm = norm.total();
}

template <class S, bool kMomentum, bool kWriteGrad>
void step_chunk(const StepRow& tensor, const Chunk& chunk, const SgdHyper& hyper, const StepScalars& scalars,
                StepPartial& partial) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const StepGradient<T> gradient(hyper, scalars.grad_scale);
  const SgdRule<T> rule(hyper, scalars.clip_coef, tensor.first);
  const ElasticNetValue<T> penalty_value(hyper.l1, hyper.l2);
  const bool has_penalty = hyper.l1 != 0 || hyper.l2 != 0;
  Rows<S> grads(tensor.grad, chunk), params(tensor.param, chunk), buffers(tensor.momentum_buffer, chunk);
  RowSum penalty;
  decltype(V{} == V{}) zeros{};
  const int64_t n = chunk.size;
  for (int64_t i = 0; i < n; i += kLanes) {
    S* __restrict grad = grads.row(i, n);
    S* __restrict param = params.row(i, n);
    S* __restrict buffer = kMomentum ? buffers.row(i, n) : nullptr;
    V row_penalty{};
    prefetch(grad);
    prefetch(param);
    if constexpr (kMomentum) prefetch(buffer);
    for_each_vector<S>([&](auto, int at) __attribute__((always_inline)) {
      V g = load(grad + at);
      V p = load(param + at);
      V b = kMomentum ? load(buffer + at) : V{};
      if constexpr (kWriteGrad) store(grad + at, gradient.unscaled(g));
      g = gradient(g);
      if (has_penalty) row_penalty += penalty_value(p);
      rule.template operator()<kMomentum>(p, g, b);
      store(param + at, p);
      if constexpr (kMomentum) store(buffer + at, b);
      zeros -= stored_as_zero<S>(p);
    });
    if (has_penalty) penalty.add(row_penalty);
    if constexpr (kWriteGrad) grads.write_back(i, n);
    params.write_back(i, n);
    if constexpr (kMomentum) buffers.write_back(i, n);
  }
  partial.penalty = penalty.total();
  partial.zeros = -params.zeros_beyond(n);
  for (int j = 0; j < int(sizeof(V) / sizeof(T)); ++j) partial.zeros += zeros[j];
}

template <class S>
void norm_dtype(const StepRow& t, const Chunk& c, const SgdHyper& h, const StepScalars& s, StepPartial& p) {
  (h.penalty_in_norm() ? norm_chunk<S, true> : norm_chunk<S, false>)(t, c, h, s, p);
}

template <class S>
void step_dtype(const StepRow& t, const Chunk& c, const SgdHyper& h, const StepScalars& s, StepPartial& p) {
  if (t.momentum_buffer)
    (s.write_unscaled_grad ? step_chunk<S, true, true> : step_chunk<S, true, false>)(t, c, h, s, p);
  else
    (s.write_unscaled_grad ? step_chunk<S, false, true> : step_chunk<S, false, false>)(t, c, h, s, p);
}

#define REGFUSED_BY_DTYPE(function)                                                               \
  [](const StepRow& t, const Chunk& c, const SgdHyper& h, const StepScalars& s, StepPartial& p) { \
    switch (t.dtype) {                                                                            \
      case DType::float32: return function<float>(t, c, h, s, p);                                 \
      case DType::float64: return function<double>(t, c, h, s, p);                                \
      case DType::bfloat16: return function<BFloat16>(t, c, h, s, p);                             \
      case DType::float16: return function<Float16>(t, c, h, s, p);                               \
    }                                                                                             \
  }

constexpr StepKernels kStepKernels = {REGFUSED_BY_DTYPE(norm_dtype), REGFUSED_BY_DTYPE(step_dtype)};
#undef REGFUSED_BY_DTYPE

}  // namespace
}  // namespace REGFUSED_ISA
}  // namespace regfused
