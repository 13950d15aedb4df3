// The norms that run fused: how one accumulates, how parts combine, how it ends, and torch's
// clip coefficient.
#pragma once

#include <cmath>

#include "portable.h"

namespace regfused {

enum class NormType { one, two, inf };

// torch writes the type of a norm as a number.
inline bool is_fused_norm(double type) { return type == 1 || type == 2 || type == INFINITY; }
inline NormType fused_norm(double type) {
  return type == 1 ? NormType::one : type == 2 ? NormType::two : NormType::inf;
}

inline namespace REGFUSED_ISA {

// One more element into an accumulator that starts at 0. A NaN stays, in the maximum too.
template <class V>
REGFUSED_RULE V norm_accumulate(NormType type, V accumulated, V x) {
  if (type == NormType::two) return accumulated + x * x;
  V size = x < 0 ? -x : x;
  if (type == NormType::one) return accumulated + size;
  return ((size > accumulated) | (size != size)) ? size : accumulated;
}

// Two accumulators into one.
REGFUSED_RULE double norm_combine(NormType type, double a, double b) {
  if (type != NormType::inf) return a + b;
  return ((b > a) | (b != b)) ? b : a;
}

// The norm itself from what was accumulated.
REGFUSED_RULE double norm_finish(NormType type, double accumulated) {
  return type == NormType::two ? sqrt(accumulated) : accumulated;
}

// c = min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_; NaN stays NaN.
REGFUSED_RULE double clip_coefficient(double max_norm, double norm) {
  double ratio = max_norm / (norm + 1e-6);
  return ratio > 1 ? 1 : ratio;
}

// g -> factor*g: what a clip makes of a gradient.
template <class T>
struct Scale {
  T factor;

  REGFUSED_RULE explicit Scale(double factor) : factor(T(factor)) {}

  template <class V>
  REGFUSED_RULE V operator()(V g) const {
    return factor * g;
  }
};

}  // namespace REGFUSED_ISA
}  // namespace regfused
