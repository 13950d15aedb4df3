// The two passes of an SGD step on a CUDA device.
#pragma once

#include <cfloat>
#include <cmath>

#include "block.cuh"
#include "memory.cuh"
#include "norm.cuh"
#include "step_job.h"

namespace regfused {

// What the step made of one parameter group: see ../rule/sgd_rule.h.
template <class T>
struct StepNormRules {
  StepGradient<T> gradient;
  StepNormGradient<T> h;
  bool reads_param;
};
template <class T>
struct StepStepRules {
  StepGradient<T> gradient;
  SgdRule<T> rule;
  ElasticNetValue<T> penalty;
  bool has_penalty;
  bool counts_zeros;  // or the group lasso does, which comes after
};

// The parts of a job that may differ in each step.
struct StepEach {
  const StepDeviceGroup* groups;
  const StepGrad* grads;

  __device__ __forceinline__ StepEach(const StepJob& job, const unsigned char* behind_the_job) {
    const unsigned char* each = job.each ? job.each : behind_the_job;
    groups = reinterpret_cast<const StepDeviceGroup*>(each);
    grads = reinterpret_cast<const StepGrad*>(groups + job.group_count);
  }
};

// One chunk, as all threads of a block see it.
struct StepPlace {
  StepDeviceRow tensor;
  StepGrad grad;
  int64_t begin;
  int size;

  __device__ __forceinline__ StepPlace(const StepJob& job, const StepEach& each, int chunk) {
    const Chunk here = job.chunks[chunk];
    tensor = job.tensors[here.tensor];
    grad = each.grads[here.tensor];
    begin = here.begin;
    size = here.size;
  }
  template <class S>
  __device__ __forceinline__ S* param() const {
    return in_global_memory<S>(tensor.param) + begin;
  }
  template <class S>
  __device__ __forceinline__ S* grads() const {
    return in_global_memory<S>(grad.grad()) + begin;
  }
  template <class S>
  __device__ __forceinline__ S* momentum_buffer() const {
    return in_global_memory<S>(tensor.momentum_buffer) + begin;
  }
  // Tells the rules of this chunk from those of others.
  __device__ __forceinline__ int rules() const {
    return tensor.group * 4 + (tensor.dtype == DType::float64 ? 2 : 0) + (grad.first() ? 1 : 0);
  }
};
constexpr int kNoRules = -1;

// --- The norm -------------------------------------------------------------------------------------

// This thread's share of a chunk, accumulated in A.
template <class A, class S, bool kPenalty>
__device__ __forceinline__ A norm_share(const StepPlace& place, const StepNormRules<Arithmetic<S>>& rules,
                                        NormType type) {
  const S* __restrict__ grads = place.grads<S>();
  const S* __restrict__ params = place.param<S>();
  A accumulated = 0;
  for_each_access(grads, place.size, kPenalty && !same_alignment(grads, params), [&]<int N>(int i) {
    Pack<S, N> grad, param;
    grad.load(grads + i);
    if constexpr (kPenalty) param.load(params + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Arithmetic<S> h = rules.gradient(widen(grad.at[j]));
      if constexpr (kPenalty) h = rules.h(h, widen(param.at[j]));
      accumulated = norm_accumulate(type, accumulated, A(h));
    }
  });
  return accumulated;
}

template <class S, bool kPenalty>
__device__ __forceinline__ double norm_share(const StepPlace& place, const StepNormRules<Arithmetic<S>>& rules,
                                             NormType type) {
  return exact_sum<Arithmetic<S>>([&]<class A>() { return norm_share<A, S, kPenalty>(place, rules, type); });
}

template <bool kDoubles>
__device__ __forceinline__ void step_norm(const StepJob& job, const StepEach& each) {
  struct Shared {
    MadeOnce<sizeof(StepNormRules<double>)> rules;
    double of_warps[kWarps];
  };
  REGFUSED_SHARED(Shared, shared);
  const NormType type = job.norm_type;
  int made = kNoRules;

  for (int span = int(blockIdx.x); span < job.span_count; span += int(gridDim.x)) {
    const int begin = span * job.span;
    const int end = begin + job.span < job.chunk_count ? begin + job.span : job.chunk_count;
    double sum = 0;
    for (int chunk = begin; chunk < end; ++chunk) {
      const StepPlace place(job, each, chunk);
      if (place.grad.is_none()) continue;
      by_dtype<kDoubles>(place.tensor.dtype, [&]<class S>() {
        using T = Arithmetic<S>;
        const auto& rules = shared.rules.template get<StepNormRules<T>>(place.rules(), made, [&] {
          const SgdHyper hyper = each.groups[place.tensor.group].read();
          return StepNormRules<T>{StepGradient<T>(hyper, job.grad_scale.get()), StepNormGradient<T>(hyper),
                                  hyper.penalty_in_norm()};
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
  if (!verdict.skip) job.record[kNumel] = job.numel;
  if (verdict.skip && job.counts_skips) job.record[kSkipped] += 1;
}

// Sums for the record, of this thread.
template <class T>
struct StepSums {
  T penalty = 0;
  int zeros = 0;
};

template <class S, bool kMomentum>
__device__ __forceinline__ StepSums<Arithmetic<S>> step_share(const StepPlace& place,
                                                              const StepStepRules<Arithmetic<S>>& rules) {
  using T = Arithmetic<S>;
  S* __restrict__ params = place.param<S>();
  S* __restrict__ grads = place.grads<S>();
  S* __restrict__ buffers = kMomentum ? place.momentum_buffer<S>() : nullptr;
  const bool apart = !same_alignment(params, grads) || (kMomentum && !same_alignment(params, buffers));
  StepSums<T> sums;
  for_each_access(params, place.size, apart, [&]<int N>(int i) {
    Pack<S, N> param, grad, buffer;
    param.load(params + i);
    grad.load(grads + i);
    if constexpr (kMomentum) buffer.load(buffers + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      T p = widen(param.at[j]);
      T g = widen(grad.at[j]);
      T b = 0;
      if constexpr (kMomentum) b = widen(buffer.at[j]);
      if (rules.has_penalty) sums.penalty += rules.penalty(p);
      rules.rule.template operator()<kMomentum>(p, rules.gradient(g), b);
      narrow(p, param.at[j]);
      if constexpr (kMomentum) narrow(b, buffer.at[j]);
      sums.zeros += widen(param.at[j]) == 0;
    }
    param.store(params + i);
    if constexpr (kMomentum) buffer.store(buffers + i);
  });
  return sums;
}

// torch's AMP contract: g / grad_scale in the gradient. A loop of its own, as the registers of
// step_share are all in use.
template <class S>
__device__ __forceinline__ void unscale_share(const StepPlace& place, const StepGradient<Arithmetic<S>>& gradient) {
  S* grads = place.grads<S>();
  for_each_access(grads, place.size, false, [&]<int N>(int i) {
    Pack<S, N> grad;
    grad.load(grads + i);
#pragma unroll
    for (int j = 0; j < N; ++j) narrow(gradient.unscaled(widen(grad.at[j])), grad.at[j]);
    grad.store(grads + i);
  });
}

template <bool kDoubles>
__device__ __forceinline__ void step_update(const StepJob& job, const StepEach& each) {
  struct Shared {
    StepVerdict verdict;
    MadeOnce<sizeof(StepStepRules<double>)> rules;
    double of_warps[2][kWarps];
  };
  REGFUSED_SHARED(Shared, shared);

  const double norm =
      job.gathered ? gathered_norm(job.gathered, job.gathered_count, job.norm_type, shared.of_warps[0]) : NAN;
  if (threadIdx.x == 0) {
    shared.verdict = judge(job, norm);
    if (blockIdx.x == 0) write_record(job, shared.verdict, norm);
  }
  __syncthreads();
  if (shared.verdict.skip) return;
  int made = kNoRules;

  for (int span = int(blockIdx.x); span < job.span_count; span += int(gridDim.x)) {
    const int begin = span * job.span;
    const int end = begin + job.span < job.chunk_count ? begin + job.span : job.chunk_count;
    double penalty = 0;
    int zeros = 0;
    for (int chunk = begin; chunk < end; ++chunk) {
      const StepPlace place(job, each, chunk);
      if (place.grad.is_none()) continue;
      by_dtype<kDoubles>(place.tensor.dtype, [&]<class S>() {
        using T = Arithmetic<S>;
        const auto& rules = shared.rules.template get<StepStepRules<T>>(place.rules(), made, [&] {
          const SgdHyper hyper = each.groups[place.tensor.group].read();
          return StepStepRules<T>{StepGradient<T>(hyper, job.grad_scale.get()),
                                  SgdRule<T>(hyper, shared.verdict.clip_coef, place.grad.first()),
                                  ElasticNetValue<T>(hyper.l1, hyper.l2), hyper.l1 != 0 || hyper.l2 != 0,
                                  hyper.group_l1 == 0};
        });
        const StepSums<T> sums =
            place.tensor.momentum_buffer ? step_share<S, true>(place, rules) : step_share<S, false>(place, rules);
        if (job.write_unscaled_grad) {
          __syncthreads();  // all threads have read their gradients, which may be others than they unscale
          unscale_share<S>(place, rules.gradient);
        }
        penalty += sums.penalty;
        if (rules.counts_zeros) zeros += sums.zeros;
      });
    }
    const auto add = [](double a, double b) { return a + b; };
    penalty = block_combine(penalty, shared.of_warps[0], add);
    const double all_zeros = block_combine(zeros, shared.of_warps[1], add);
    if (threadIdx.x == 0) {
      job.sums[span] = penalty;
      job.sums[job.span_count + span] = all_zeros;
    }
    __syncthreads();  // of_warps is free again
  }
}

}  // namespace regfused
