// The two passes of an SGD step over one chunk, for one instruction set.
#pragma once

#include <utility>

#include "../sgd_step.h"
#include "vector.h"

namespace regfused {
inline namespace REGFUSED_ISA {
namespace {

// A sum (or maximum) over kLanes fixed lanes of doubles. Doubles hold the square of any float:
// no overflow, no underflow, and the order of additions does not depend on the vector width.
struct NormLanes {
  NormType type;
  Doubles lanes[kLanes / kDoubles] = {};

  explicit NormLanes(NormType type) : type(type) {}

  // The vector at position I of a row of kLanes elements.
  template <int I>
  REGFUSED_RULE void add(Floats x) {
    lanes[2 * I] = norm_accumulate(type, lanes[2 * I], widen_low(x));
    lanes[2 * I + 1] = norm_accumulate(type, lanes[2 * I + 1], widen_high(x));
  }
  template <int I>
  REGFUSED_RULE void add(Doubles x) {
    lanes[I] = norm_accumulate(type, lanes[I], x);
  }
  REGFUSED_RULE double total() const {
    double parts[kLanes];
    __builtin_memcpy(parts, lanes, sizeof parts);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) parts[j] = norm_combine(type, parts[j], parts[j + half]);
    return parts[0];
  }
};

// A sum of small numbers for the record: each row in the type of arithmetic, the rows in doubles.
struct RowSum {
  Doubles sums[2] = {};

  REGFUSED_RULE void add(Floats row) {
    sums[0] += widen_low(row);
    sums[1] += widen_high(row);
  }
  REGFUSED_RULE void add(Doubles row) { sums[0] += row; }
  REGFUSED_RULE double total() const {
    double total = 0;
    for (int j = 0; j < kDoubles; ++j) total += sums[0][j] + sums[1][j];
    return total;
  }
};

template <int I>
using Position = std::integral_constant<int, I>;

// Calls body(Position<I>, offset) for each vector of a row of kLanes elements.
template <int N, class Body, int... I>
REGFUSED_RULE void for_each_vector(Body&& body, std::integer_sequence<int, I...>) {
  (body(Position<I>{}, I * N), ...);
}
template <class S, class Body>
REGFUSED_RULE void for_each_vector(Body&& body) {
  constexpr int N = sizeof(typename Storage<S>::V) / sizeof(typename Storage<S>::T);
  for_each_vector<N>(body, std::make_integer_sequence<int, kLanes / N>{});
}

// Row after row of one array; the last, short row is worked on in a copy filled up with zeros, so
// that there is no second formula for the tail.
template <class S>
class Rows {
 public:
  Rows(void* array, const SgdChunk& chunk) : at_(static_cast<S*>(array) + chunk.begin) {}

  REGFUSED_RULE S* row(int64_t i, int64_t n) {
    if (n - i >= kLanes) return at_ + i;
    __builtin_memset(last_, 0, sizeof last_);
    __builtin_memcpy(last_, at_ + i, (n - i) * sizeof(S));
    return last_;
  }
  REGFUSED_RULE void write_back(int64_t i, int64_t n) {
    if (n - i < kLanes) __builtin_memcpy(at_ + i, last_, (n - i) * sizeof(S));
  }
  // Zeros in the filled-up part of the last row.
  int64_t zeros_beyond(int64_t n) const {
    int64_t zeros = 0;
    if (n % kLanes)
      for (int64_t j = n % kLanes; j < kLanes; ++j) zeros += is_zero(last_[j]);
    return zeros;
  }

 private:
  S* at_;
  S last_[kLanes];
};

// Asks for the row that is worked on a little later: a core's own prefetcher leaves part of the memory's
// speed unused, in the norm pass, which only reads, more than a quarter of it. Twice or four times
// the distance makes no difference.
template <class S>
REGFUSED_RULE void prefetch(const S* row) {
  constexpr int kBytesAhead = 1024, kCacheLine = 64;
  const char* ahead = reinterpret_cast<const char*>(row) + kBytesAhead;
  for (int i = 0; i < int(kLanes * sizeof(S)); i += kCacheLine) __builtin_prefetch(ahead + i);
}

template <class S, bool kPenalty>
void norm_chunk(const SgdTensor& tensor, const SgdChunk& chunk, const SgdHyper& hyper, const SgdScalars& scalars,
                SgdPartial& partial) {
  using T = typename Storage<S>::T;
  const SgdGradient<T> gradient(hyper, scalars.grad_scale);
  const SgdNormGradient<T> norm_gradient(hyper);
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
void step_chunk(const SgdTensor& tensor, const SgdChunk& chunk, const SgdHyper& hyper, const SgdScalars& scalars,
                SgdPartial& partial) {
  using T = typename Storage<S>::T;
  using V = typename Storage<S>::V;
  const SgdGradient<T> gradient(hyper, scalars.grad_scale);
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
void norm_dtype(const SgdTensor& t, const SgdChunk& c, const SgdHyper& h, const SgdScalars& s, SgdPartial& p) {
  (h.penalty_in_norm() ? norm_chunk<S, true> : norm_chunk<S, false>)(t, c, h, s, p);
}

template <class S>
void step_dtype(const SgdTensor& t, const SgdChunk& c, const SgdHyper& h, const SgdScalars& s, SgdPartial& p) {
  if (t.momentum_buffer)
    (s.write_unscaled_grad ? step_chunk<S, true, true> : step_chunk<S, true, false>)(t, c, h, s, p);
  else
    (s.write_unscaled_grad ? step_chunk<S, false, true> : step_chunk<S, false, false>)(t, c, h, s, p);
}

#define REGFUSED_BY_DTYPE(function)                                                                  \
  [](const SgdTensor& t, const SgdChunk& c, const SgdHyper& h, const SgdScalars& s, SgdPartial& p) { \
    switch (t.dtype) {                                                                               \
      case DType::float32: return function<float>(t, c, h, s, p);                                    \
      case DType::float64: return function<double>(t, c, h, s, p);                                   \
      case DType::bfloat16: return function<BFloat16>(t, c, h, s, p);                                \
      case DType::float16: return function<Float16>(t, c, h, s, p);                                  \
    }                                                                                                \
  }

}  // namespace

const SgdKernels* sgd_kernels() {
#define REGFUSED_NAME_OF(isa) #isa
#define REGFUSED_NAME(isa) REGFUSED_NAME_OF(isa)
  static const SgdKernels kernels = {REGFUSED_NAME(REGFUSED_ISA), REGFUSED_BY_DTYPE(norm_dtype),
                                     REGFUSED_BY_DTYPE(step_dtype)};
  return &kernels;
}

}  // namespace REGFUSED_ISA
}  // namespace regfused
