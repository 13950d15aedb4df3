// The passes of a step over one chunk, for one instruction set.
#pragma once

#include "../step.h"
#include "lanes.h"

namespace regfused {
inline namespace REGFUSED_ISA {
namespace {

template <class S, bool kReadsParam>
void norm_chunk(const StepRow& row, const Chunk& chunk, const StepHyper& hyper, const StepScalars& scalars,
                StepPartial& partial) {
  using T = typename Storage<S>::T;
  const StepGradient<T> gradient(hyper, scalars.grad_scale);
  const StepNormGradient<T> norm_gradient(hyper);
  Rows<S> grads(row.grad, chunk), params(row.param, chunk);
  NormLanes norm(scalars.norm_type);
  const int64_t n = chunk.size;
  for (int64_t i = 0; i < n; i += kLanes) {
    const S* grad = grads.row(i, n);
    const S* param = kReadsParam ? params.row(i, n) : nullptr;
    prefetch(grad);
    if constexpr (kReadsParam) prefetch(param);
    for_each_vector<S>([&](auto position, int at) __attribute__((always_inline)) {
      auto h = gradient(load(grad + at));
      if constexpr (kReadsParam) h = norm_gradient(h, load(param + at));
      norm.template add<position.value>(h);
    });
  }
  partial.norm = norm.total();
}

constexpr bool has_slot(unsigned slots, int s) { return (slots >> s & 1) != 0; }

// The arrays of a chunk that a step reads and writes, row after row of kLanes elements. kSlots: which slots there are.
template <class S, unsigned kSlots>
struct StepArrays {
  Rows<S> grads, params;
  Rows<S> slots[kMostSlots];
  const int64_t n;

  StepArrays(const StepRow& row, const Chunk& chunk)
      : grads(row.grad, chunk),
        params(row.param, chunk),
        slots{{row.slots[0], chunk}, {row.slots[1], chunk}, {row.slots[2], chunk}},
        n(chunk.size) {}

  // element(param, grad, slots) for each vector, which is stored again, but for the gradient; after_row() for each row.
  template <class Element, class AfterRow>
  REGFUSED_RULE void for_each(const Element& element, const AfterRow& after_row) {
    using V = typename Storage<S>::V;
    for (int64_t i = 0; i < n; i += kLanes) {
      const S* grad = grads.row(i, n);
      S* __restrict param = params.row(i, n);
      S* slot[kMostSlots];
      for (int s = 0; s < kMostSlots; ++s) slot[s] = has_slot(kSlots, s) ? slots[s].row(i, n) : nullptr;
      for_each_vector<S>([&](auto, int at) __attribute__((always_inline)) {
        V p = load(param + at);
        V of_slots[kMostSlots];
        for (int s = 0; s < kMostSlots; ++s)
          if (has_slot(kSlots, s)) of_slots[s] = load(slot[s] + at);
        element(p, load(grad + at), of_slots);
        store(param + at, p);
        for (int s = 0; s < kMostSlots; ++s)
          if (has_slot(kSlots, s)) store(slot[s] + at, of_slots[s]);
      });
      after_row();
      params.write_back(i, n);
      for (int s = 0; s < kMostSlots; ++s)
        if (has_slot(kSlots, s)) slots[s].write_back(i, n);
    }
  }
};

// Every option.
template <class S, class R, unsigned kSlots, bool kMore>
void step_chunk(const StepRow& row, const Chunk& chunk, const StepHyper& hyper, const StepTime& time,
                const StepScalars& scalars, StepPartial& partial) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const StepGradient<T> gradient(hyper, scalars.grad_scale);
  const StepElement<T, R::template Rule> element(hyper, scalars.clip_coef, time);
  if (element.more != kMore) return step_chunk<S, R, kSlots, true>(row, chunk, hyper, time, scalars, partial);
  const ElasticNetValue<T> penalty_value(hyper.l1, hyper.l2, hyper.concavity);
  const bool has_penalty = hyper.has_penalty();
  RowSum penalty;
  V row_penalty{};
  StepArrays<S, kSlots>(row, chunk)
      .for_each(
          [&](V& p, V g, V* slots) __attribute__((always_inline)) {
            if (has_penalty) row_penalty += penalty_value.template operator()<kMore>(p);
            element.template operator()<kSlots, kMore>(p, gradient(g), slots);
          },
          [&]() __attribute__((always_inline)) {
            if (has_penalty) penalty.add(row_penalty);
            row_penalty = V{};
          });
  partial.penalty = penalty.total();
}

// What is_lean allows.
template <class S, class R, unsigned kSlots, int kVariant, bool kSlope, bool kKeepsZeros>
void lean_chunk(const StepRow& row, const Chunk& chunk,
                const LeanElement<typename Storage<S>::T, R::template Rule>& lean) {
  using V = typename Storage<S>::V;
  const LeanElement<typename Storage<S>::T, R::template Rule> element = lean;  // in registers
  StepArrays<S, kSlots>(row, chunk)
      .for_each(
          [&](V& p, V g, V* slots) __attribute__((always_inline)) {
            element.template operator()<kSlots, kVariant, kSlope, kKeepsZeros>(p, g, slots);
          },
          []() __attribute__((always_inline)) {});
}

template <class S, class R, unsigned kSlots, bool kKeepsZeros>
void lean_chunk(const StepRow& row, const Chunk& chunk, const StepHyper& hyper, const StepTime& time,
                const StepScalars& scalars) {
  const LeanElement<typename Storage<S>::T, R::template Rule> element(hyper, scalars.grad_scale, scalars.clip_coef,
                                                                      time);
  const bool slope = element.slope != 0;
  if constexpr (kSlots != 0 && R::template Rule<double>::kVariants == 2)
    if (element.rule.variant() == 1)
      return slope ? lean_chunk<S, R, kSlots, 1, true, kKeepsZeros>(row, chunk, element)
                   : lean_chunk<S, R, kSlots, 1, false, kKeepsZeros>(row, chunk, element);
  return slope ? lean_chunk<S, R, kSlots, 0, true, kKeepsZeros>(row, chunk, element)
               : lean_chunk<S, R, kSlots, 0, false, kKeepsZeros>(row, chunk, element);
}

template <class S, class R, unsigned kSlots>
void step_slots(const StepRow& row, const Chunk& chunk, const StepHyper& hyper, const StepTime& time,
                const StepScalars& scalars, StepPartial& partial) {
  // Narrow types are limited by their conversions.
  if constexpr (sizeof(S) >= sizeof(float))
    if (is_lean<R::template Rule>(hyper, time))
      return (hyper.keep_zeros ? lean_chunk<S, R, kSlots, true> : lean_chunk<S, R, kSlots, false>)(row, chunk, hyper,
                                                                                                   time, scalars);
  step_chunk<S, R, kSlots, false>(row, chunk, hyper, time, scalars, partial);
}

// g / grad_scale into the gradient.
template <class S>
void unscale_chunk(const StepRow& row, const Chunk& chunk, const StepScalars& scalars) {
  const StepGradient<typename Storage<S>::T> gradient(StepHyper{}, scalars.grad_scale);
  Rows<S> grads(row.grad, chunk);
  const int64_t n = chunk.size;
  for (int64_t i = 0; i < n; i += kLanes) {
    S* __restrict grad = grads.row(i, n);
    for_each_vector<S>([&](auto, int at)
                           __attribute__((always_inline)) { store(grad + at, gradient.unscaled(load(grad + at))); });
    grads.write_back(i, n);
  }
}

// function.template operator()<S>() for the row's storage type.
template <class Function>
REGFUSED_RULE void by_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32: return function.template operator()<float>();
    case DType::float64: return function.template operator()<double>();
    case DType::bfloat16: return function.template operator()<BFloat16>();
    case DType::float16: return function.template operator()<Float16>();
  }
}

void norm_pass(const StepRow& row, const Chunk& chunk, const StepHyper& hyper, const StepScalars& scalars,
               StepPartial& partial) {
  by_dtype(row.dtype, [&]<class S>() __attribute__((always_inline)) {
    (hyper.norm_reads_param() ? norm_chunk<S, true> : norm_chunk<S, false>)(row, chunk, hyper, scalars, partial);
  });
}

template <class R>
void step_pass(const StepRow& row, const Chunk& chunk, const StepHyper& hyper, const StepTime& time,
               const StepScalars& scalars, StepPartial& partial) {
  static_assert(sizeof(R::kSlotSets) / sizeof(R::kSlotSets[0]) == 2);
  by_dtype(row.dtype, [&]<class S>() __attribute__((always_inline)) {
    (row.slot_set == R::kSlotSets[1] ? step_slots<S, R, R::kSlotSets[1]>
                                     : step_slots<S, R, R::kSlotSets[0]>)(row, chunk, hyper, time, scalars, partial);
  });
}

void unscale_pass(const StepRow& row, const Chunk& chunk, const StepScalars& scalars) {
  by_dtype(row.dtype, [&]<class S>() __attribute__((always_inline)) { unscale_chunk<S>(row, chunk, scalars); });
}

// In the order of RuleId.
constexpr StepKernels kStepKernels = {norm_pass, {step_pass<Sgd>, step_pass<Adam>}, unscale_pass};

}  // namespace
}  // namespace REGFUSED_ISA
}  // namespace regfused
