// The two passes of a step on a CUDA device, for every rule.
#pragma once

#include <cfloat>
#include <cmath>

#include "block.cuh"
#include "memory.cuh"
#include "norm.cuh"
#include "step_job.h"

namespace regfused {

// What a block makes of one parameter group, in the type of arithmetic: see ../rule/step_rule.h.
template <class T>
struct StepNormRules {
  StepGradient<T> gradient;
  StepNormGradient<T> h;
  bool reads_param;
};
template <class T, class R>
struct StepUpdateRules {
  StepGradient<T> gradient;
  StepElement<T, R::template Rule> element;
  ElasticNetValue<T> penalty;
  bool has_penalty;
};

// The parts of a job that may differ in each step.
struct StepInputs {
  const StepDeviceGroup* groups;
  const StepGrad* grads;

  __device__ __forceinline__ StepInputs(const StepJob& job, const unsigned char* in_arguments) {
    const unsigned char* inputs = job.inputs ? job.inputs : in_arguments;
    groups = reinterpret_cast<const StepDeviceGroup*>(inputs);
    grads = reinterpret_cast<const StepGrad*>(groups + job.group_count);
  }
};

// Tells what a block made of a group from what it makes of others.
struct StepKey {
  int group_and_type;
  double t;

  __device__ __forceinline__ bool operator!=(const StepKey& other) const {
    return group_and_type != other.group_and_type || !(t == other.t);
  }
};

// One chunk, as all threads of a block see it.
struct StepPlace {
  StepDeviceRow row;
  StepGrad grad;
  int64_t begin;
  int size;

  __device__ __forceinline__ StepPlace(const StepJob& job, const StepInputs& inputs, int chunk) {
    const Chunk here = job.chunks[chunk];
    row = job.rows[here.tensor];
    grad = inputs.grads[here.tensor];
    begin = here.begin;
    size = here.size;
  }
  template <class S>
  __device__ __forceinline__ S* param() const {
    return in_global_memory<S>(row.param) + begin;
  }
  template <class S>
  __device__ __forceinline__ S* grads() const {
    return in_global_memory<S>(grad.grad()) + begin;
  }
  template <class S>
  __device__ __forceinline__ S* slot(int k) const {
    return in_global_memory<S>(row.slots[k]) + begin;
  }
  // The one of a rule that counts is in the memory of the device.
  template <class R>
  __device__ __forceinline__ double t() const {
    if constexpr (R::kCountsSteps)
      return 1 + (row.steps_dtype == DType::float64 ? *in_global_memory<double>(row.steps)
                                                    : double(*in_global_memory<float>(row.steps)));
    else
      return grad.first() ? 1 : 2;
  }
  __device__ __forceinline__ StepKey key(double t) const {
    return {row.group * 2 + (row.dtype == DType::float64 ? 1 : 0), t};
  }
};
constexpr StepKey kNoKey = {-1, 0};

// function.template operator()<kSlots>() for the set of slots of a row.
template <class R, size_t I = 0, class Function>
__device__ __forceinline__ void by_slot_set(unsigned slot_set, const Function& function) {
  constexpr unsigned kSlots = R::kSlotSets[I];
  if constexpr (I + 1 < sizeof(R::kSlotSets) / sizeof(R::kSlotSets[0]))
    if (slot_set != kSlots) return by_slot_set<R, I + 1>(slot_set, function);
  function.template operator()<kSlots>();
}

// --- The norm -------------------------------------------------------------------------------------

// This thread's share of a chunk, accumulated in A.
template <class A, class S, bool kReadsParam>
__device__ __forceinline__ A norm_share(const StepPlace& place, const StepNormRules<Arithmetic<S>>& rules,
                                        NormType type) {
  const S* __restrict__ grads = place.grads<S>();
  const S* __restrict__ params = place.param<S>();
  A accumulated = 0;
  for_each_pack(grads, place.size, kReadsParam && !same_alignment(grads, params), [&](const PackPlace& at) {
    WidePack<S> grad, param;
    grad.load(grads, at);
    if constexpr (kReadsParam) param.load(params, at);
#pragma unroll
    for (int j = 0; j < kPerAccess<S>; ++j) {
      Arithmetic<S> h = rules.gradient(widen(grad.at[j]));
      if constexpr (kReadsParam) h = rules.h(h, widen(param.at[j]));
      accumulated = norm_accumulate(type, accumulated, A(h));
    }
  });
  return accumulated;
}

template <class S, bool kReadsParam>
__device__ __forceinline__ double norm_share(const StepPlace& place, const StepNormRules<Arithmetic<S>>& rules,
                                             NormType type) {
  return exact_sum<Arithmetic<S>>([&]<class A>() { return norm_share<A, S, kReadsParam>(place, rules, type); });
}

template <bool kDoubles>
__device__ __forceinline__ void step_norm(const StepJob& job, const StepInputs& inputs) {
  struct Shared {
    MadeOnce<sizeof(StepNormRules<double>)> rules;
    double of_warps[kWarps];
  };
  REGFUSED_SHARED(Shared, shared);
  const NormType type = job.norm_type;
  StepKey made = kNoKey;

  for (int span = int(blockIdx.x); span < job.span_count; span += int(gridDim.x)) {
    const int begin = span * job.span;
    const int end = begin + job.span < job.chunk_count ? begin + job.span : job.chunk_count;
    double sum = 0;
    for (int chunk = begin; chunk < end; ++chunk) {
      const StepPlace place(job, inputs, chunk);
      if (place.grad.is_none()) continue;
      by_dtype<kDoubles>(place.row.dtype, [&]<class S>() {
        using T = Arithmetic<S>;
        const auto& rules = shared.rules.template get<StepNormRules<T>>(place.key(0), made, [&] {
          const StepHyper hyper = inputs.groups[place.row.group].read();
          return StepNormRules<T>{StepGradient<T>(hyper, job.grad_scale.get()), StepNormGradient<T>(hyper),
                                  hyper.norm_reads_param()};
        });
        const double share =
            rules.reads_param ? norm_share<S, true>(place, rules, type) : norm_share<S, false>(place, rules, type);
        sum = norm_combine(type, sum, share);
      });
    }
    sum = block_combine(sum, shared.of_warps, [&](double a, double b) { return norm_combine(type, a, b); });
    if (threadIdx.x == 0) job.partials[span] = sum;
    __syncthreads();  // of_warps is free again
  }
}

// --- The update -----------------------------------------------------------------------------------

// What a block has to know before it may touch a parameter.
struct StepVerdict {
  double clip_coef;
  bool skip;
};

__device__ __forceinline__ StepVerdict judge(const StepJob& job, double norm) {
  if (!job.judges) return {job.clip_coef, false};
  const bool overflow = job.found_inf.get() != 0;
  const bool nonfinite = job.skip_nonfinite && !(fabs(norm) <= DBL_MAX);
  const double clip_coef = job.clips ? clip_coefficient(job.max_norm, norm) : 1;
  return {clip_coef, overflow || nonfinite};
}

// The numbers of this step, by one thread of the grid. An overflow leaves those of the last step.
__device__ __forceinline__ void write_record(const StepJob& job, const StepVerdict& verdict, double norm) {
  const bool overflow = job.judges && job.found_inf.get() != 0;
  if (job.judges && !overflow) {
    job.record[kGradNorm] = norm;
    job.record[kClipCoef] = verdict.skip ? 0 : verdict.clip_coef;
  }
  job.record[kStepSkipped] = verdict.skip;
  if (verdict.skip && job.counts_skips) job.record[kSkipped] += 1;
}

// This thread's share of a chunk; its penalty.
template <class R, class S, unsigned kSlots, bool kMore>
__device__ __forceinline__ Arithmetic<S> step_share(const StepPlace& place,
                                                    const StepUpdateRules<Arithmetic<S>, R>& rules) {
  using T = Arithmetic<S>;
  S* __restrict__ params = place.param<S>();
  S* __restrict__ grads = place.grads<S>();
  bool apart = !same_alignment(params, grads);
#pragma unroll
  for (int k = 0; k < kMostSlots; ++k)
    if (kSlots >> k & 1) apart |= !same_alignment(params, place.slot<S>(k));
  T penalty = 0;
  for_each_pack(params, place.size, apart, [&](const PackPlace& at) {
    WidePack<S> param, grad, slots[kMostSlots];
    param.load(params, at);
    grad.load(grads, at);
#pragma unroll
    for (int k = 0; k < kMostSlots; ++k)
      if (kSlots >> k & 1) slots[k].load(place.slot<S>(k), at);
#pragma unroll
    for (int j = 0; j < kPerAccess<S>; ++j) {
      T p = widen(param.at[j]), s[kMostSlots];
#pragma unroll
      for (int k = 0; k < kMostSlots; ++k)
        if (kSlots >> k & 1) s[k] = widen(slots[k].at[j]);
      if (rules.has_penalty) penalty += rules.penalty.template operator()<kMore>(p);
      rules.element.template operator()<kSlots, kMore>(p, rules.gradient(widen(grad.at[j])), s);
      narrow(p, param.at[j]);
#pragma unroll
      for (int k = 0; k < kMostSlots; ++k)
        if (kSlots >> k & 1) narrow(s[k], slots[k].at[j]);
    }
    param.store(params, at);
#pragma unroll
    for (int k = 0; k < kMostSlots; ++k)
      if (kSlots >> k & 1) slots[k].store(place.slot<S>(k), at);
  });
  return penalty;
}

// torch's AMP contract: g / grad_scale in the gradient. A loop of its own, as the registers of
// step_share are all in use.
template <class S>
__device__ __forceinline__ void unscale_share(const StepPlace& place, const StepGradient<Arithmetic<S>>& gradient) {
  S* grads = place.grads<S>();
  for_each_pack(grads, place.size, false, [&](const PackPlace& at) {
    WidePack<S> grad;
    grad.load(grads, at);
#pragma unroll
    for (int j = 0; j < kPerAccess<S>; ++j) narrow(gradient.unscaled(widen(grad.at[j])), grad.at[j]);
    grad.store(grads, at);
  });
}

// The metric of the step of a row, for its group lasso. A call, as what it needs would cost the step registers.
template <class R>
__device__ __attribute__((noinline)) void leave_metric(const StepJob& job, const StepInputs& inputs, int r, double t) {
  const StepDeviceRow& row = job.rows[r];
  const StepHyper hyper = inputs.groups[row.group].read();
  if (hyper.group_l1 == 0) return;
  const auto own = hyper.own<typename R::Hyper>();
  const SliceMetric metric = hyper.metric(R::length(own, R::at(own, t), row.slot_set), nullptr);
  job.metrics[r] = {metric.root, metric.floor, hyper.metric_threshold()};
}

// One more step for every row that had a gradient, by the block that is done last: until then others read the old
// numbers.
template <class R>
__device__ __forceinline__ void count_steps(const StepJob& job, const StepInputs& inputs, bool& is_last) {
  __syncthreads();  // the whole block is done
  if (threadIdx.x == 0) {
    auto* blocks_done = reinterpret_cast<unsigned*>(job.record + kBlocksDone);
    __threadfence();
    is_last = atomicInc(blocks_done, gridDim.x - 1) == gridDim.x - 1;  // the last one sets it back to 0
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
#pragma unroll 4
  for (int r = int(threadIdx.x); r < job.row_count; r += kThreads) {
    if (inputs.grads[r].is_none()) continue;
    const StepDeviceRow& row = job.rows[r];
    const double t = row.steps_dtype == DType::float64 ? (*in_global_memory<double>(row.steps) += 1)
                                                       : (*in_global_memory<float>(row.steps) += 1);
    if (job.metrics) leave_metric<R>(job, inputs, r, t);
  }
}

template <class R, bool kDoubles>
__device__ __forceinline__ void step_update(const StepJob& job, const StepInputs& inputs) {
  struct Shared {
    StepVerdict verdict;
    MadeOnce<sizeof(StepUpdateRules<double, R>)> rules;
    double of_warps[kWarps];
    bool is_last;
  };
  REGFUSED_SHARED(Shared, shared);

  const double norm =
      job.gathered ? gathered_norm(job.gathered, job.gathered_count, job.norm_type, shared.of_warps) : NAN;
  if (threadIdx.x == 0) {
    shared.verdict = judge(job, norm);
    if (blockIdx.x == 0) write_record(job, shared.verdict, norm);
  }
  __syncthreads();
  if (shared.verdict.skip) return;
  StepKey made = kNoKey;

  for (int span = int(blockIdx.x); span < job.span_count; span += int(gridDim.x)) {
    const int begin = span * job.span;
    const int end = begin + job.span < job.chunk_count ? begin + job.span : job.chunk_count;
    double penalty = 0;
    for (int chunk = begin; chunk < end; ++chunk) {
      const StepPlace place(job, inputs, chunk);
      if (place.grad.is_none()) continue;
      by_dtype<kDoubles>(place.row.dtype, [&]<class S>() {
        using T = Arithmetic<S>;
        const double t = place.template t<R>();
        const auto& rules = shared.rules.template get<StepUpdateRules<T, R>>(place.key(t), made, [&] {
          const StepHyper hyper = inputs.groups[place.row.group].read();
          const StepTime time = R::at(hyper.own<typename R::Hyper>(), t);
          return StepUpdateRules<T, R>{StepGradient<T>(hyper, job.grad_scale.get()),
                                       StepElement<T, R::template Rule>(hyper, shared.verdict.clip_coef, time),
                                       ElasticNetValue<T>(hyper.l1, hyper.l2, hyper.concavity), hyper.has_penalty()};
        });
        by_slot_set<R>(place.row.slot_set, [&]<unsigned kSlots>() {
          penalty += rules.element.more ? step_share<R, S, kSlots, true>(place, rules)
                                        : step_share<R, S, kSlots, false>(place, rules);
        });
        if (job.write_unscaled_grad) {
          __syncthreads();  // all threads have read their gradients, which may be others than they unscale
          unscale_share<S>(place, rules.gradient);
        }
      });
    }
    penalty = block_combine(penalty, shared.of_warps, [](double a, double b) { return a + b; });
    if (threadIdx.x == 0) job.penalties[span] = penalty;
    __syncthreads();  // of_warps is free again
  }
  static_assert(R::kCountsSteps || !R::template Rule<double>::kLengthOfElements, "count_steps leaves the metric");
  if constexpr (R::kCountsSteps) count_steps<R>(job, inputs, shared.is_last);
}

}  // namespace regfused
